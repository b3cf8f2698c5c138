"""Folders of others, through the command line: Hugging Face Qwen3 bases, published hypernetworks, adapters for elsewhere."""
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import shine as cli
import train
from conftest import ROOT, close, perturb
from data import QWEN_PATTERN, TASKS, Examples, Tokenizer, collate, render, think_block, train_bpe
from m2p import memory_tokens
from model import PRESETS, QWEN3, Config, LanguageModel, UserError, lora_size
from shine import Shine, ShineConfig
from test_golden import CASE
from train import AdamW16, save_base

BASE = CASE / "base"


def published(folder):
    """The three pickles of a published hypernetwork, written from the flat tensors where the case has no pickles."""
    if (CASE / "hypernet/metanetwork.pth").is_file():
        return shutil.copytree(CASE / "hypernet", folder)
    tensors = load_file(CASE / "hypernet/hypernet.safetensors")
    folder.mkdir()
    torch.save(tensors["mem_tokens"], folder / "mem_tokens.pt")
    torch.save({n.removeprefix("metanetwork."): t for n, t in tensors.items() if n.startswith("metanetwork.")}, folder / "metanetwork.pth")
    meta = [{"attention": {}, "mlp": {}} for _ in range(json.loads((BASE / "config.json").read_text())["num_hidden_layers"])]
    for name, t in tensors.items():
        if name.startswith("metalora."):
            _, _, i, part, linear, half = name.split(".")
            layer = meta[int(i)]["mlp" if part == "mlp" else "attention"]
            layer.setdefault(linear.removesuffix("_proj"), {"C": None})[half[-1]] = t
    torch.save(meta, folder / "metalora.pth")
    return folder


HYPERNET = published(Path(tempfile.mkdtemp()) / "hypernet")


def call(*arguments):
    cli.main([str(a) for a in arguments])


def row(v, name, mask, i):
    """Row i of the case without its padding, as --ids takes it."""
    return " ".join(map(str, v[name][i][v[mask][i].bool()].tolist()))


@pytest.fixture(scope="module")
def vectors():
    return load_file(CASE / "vectors.safetensors")


def settings():
    """What the published files do not tell."""
    info = json.loads((CASE / "case.json").read_text())
    return "--scale", info["scale"], "--m2p-heads", info["m2p"]["nhead"]


@pytest.mark.parametrize("i", [0, 1])
def test_command_line_repeats_the_golden_case(vectors, tmp_path, capsys, i):
    v, prompt = vectors, next(n for n in vectors if n.startswith("prompt") and n.endswith("mask"))
    for question, mask, ask in (("input_ids", "input_attention_mask", "logits"), ("prompt_ids", prompt, "ids")):
        call(row(v, "evidence_ids", "evidence_attention_mask", i), "--base", BASE, "--hypernet", HYPERNET, "--ids", *settings(),
             "--ask", row(v, question, mask, i), "--max-new-tokens", v["greedy_lora_ids"].shape[1], "--json",
             "--save", tmp_path / "lora.safetensors", "--logits", tmp_path / "logits.safetensors")
        out = json.loads(capsys.readouterr().out)
        if ask == "logits":
            assert close(load_file(tmp_path / "logits.safetensors")["turn.0"], v["logits_lora"][i][v[mask][i].bool()])
        else:
            assert out["turns"][0]["answer"].split() == [str(t) for t in v["greedy_lora_ids"][i].tolist()]
    saved = load_file(tmp_path / "lora.safetensors")
    assert saved and all(close(t, v[name][i]) for name, t in saved.items())


def test_a_saved_lora_says_what_it_was_made_for_and_not_the_text(tmp_path, capsys):
    call("5 17 3 3 8", "--base", BASE, "--hypernet", HYPERNET, "--ids", *settings(), "--save", tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        info = file.metadata()
    assert info["format"] == "shine-lora-1" and info["base_name"] == "base" and info["tokens"] == "5" and info["r"] == "2"
    assert len(info["base"]) == len(info["text"]) == 12 and "17" not in info.values()
    call("--load", tmp_path / "lora.safetensors", "--base", BASE, "--ids", "--ask", "5 6")       # no hypernetwork needed
    assert "loaded" in capsys.readouterr().out


def test_converted_hypernetwork_is_the_same_without_pickles(tmp_path, capsys, monkeypatch):
    call("--convert", HYPERNET, "--base", BASE, "--out", tmp_path / "ours", *settings())
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["hypernet.json", "hypernet.safetensors"]
    arguments = ("9 8 7 7 6", "--base", BASE, "--ids", "--save")
    call(*arguments, tmp_path / "a.safetensors", "--hypernet", HYPERNET, *settings())
    monkeypatch.setattr(torch, "load", None)
    call(*arguments, tmp_path / "b.safetensors", "--hypernet", tmp_path / "ours")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_zero_memory_embeddings_of_the_published_runs_work(tmp_path, capsys):
    shutil.copytree(HYPERNET, tmp_path / "h")
    for path in [tmp_path / "h", *(tmp_path / "h").iterdir()]:
        os.chmod(path, 0o755)
    (tmp_path / "h/mem_tokens.pt").unlink()
    torch.save(torch.zeros_like(torch.load(HYPERNET / "mem_tokens.pt", weights_only=True)), tmp_path / "h/mem_tokens.pt")
    call("5 17 3", "--base", BASE, "--hypernet", tmp_path / "h", "--ids", "--save", tmp_path / "lora.safetensors")
    saved = load_file(tmp_path / "lora.safetensors")
    assert all(torch.isfinite(t).all() for t in saved.values())


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def broken(tmp_path, what):
    """A copy of the case with one thing wrong. -> (the words its complaint must have)"""
    for part in ("base", "h"):
        shutil.copytree(BASE if part == "base" else HYPERNET, tmp_path / part)
        for path in [tmp_path / part, *(tmp_path / part).iterdir()]:
            os.chmod(path, 0o755)
    base, hyper, config = tmp_path / "base", tmp_path / "h", json.loads((BASE / "config.json").read_text())
    weights = load_file(BASE / "model.safetensors")
    if isinstance(what, dict):
        (base / "config.json").write_text(json.dumps(config | what))
        return "config.json", next(iter(what))
    if what == "shape off by one":
        weights["model.norm.weight"] = weights["model.norm.weight"][1:]
        save_file(weights, base / "model.safetensors")
        return "model.norm.weight", "47" if config["hidden_size"] == 48 else "expected"
    if what == "left over":
        save_file(weights | {"model.extra": torch.zeros(1)}, base / "model.safetensors")
        return "model.extra", "base"
    if what == "cut short":
        (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
        return "model.safetensors", "damaged"
    if what == "missing shard":
        (base / "model.safetensors").unlink()
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: "model-00001-of-00002.safetensors" for n in weights}}))
        return "model-00001-of-00002.safetensors", "missing"
    if what == "code in a pickle":
        (hyper / "metanetwork.pth").write_bytes(pickle.dumps(Evil()))
        return "metanetwork.pth", "nothing in it was run"
    if what == "code in a torch file":
        torch.save(Evil(), hyper / "metalora.pth")
        return "metalora.pth", "nothing in it was run"
    if what == "no metalora":
        (hyper / "metalora.pth").unlink()
        return "metalora.pth", "missing"
    if what == "another width":
        torch.save(torch.zeros(32, 40), hyper / "mem_tokens.pt")
        return "another language model", "40"


@pytest.mark.parametrize("what", [
    {"architectures": ["LlamaForCausalLM"]}, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, {"use_sliding_window": True},
    {"model_type": "qwen2"}, {"attention_bias": True}, {"quantization_config": {"quant_method": "fp8"}}, {"layer_types": ["sliding_attention"]},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, {"hidden_act": "gelu"},
    "shape off by one", "left over", "cut short", "missing shard", "code in a pickle", "code in a torch file", "no metalora", "another width"],
    ids=lambda what: next(iter(what)) if isinstance(what, dict) else what.replace(" ", "-"))
def test_bad_folders_end_in_one_line(tmp_path, what, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = broken(tmp_path, what)
    with pytest.raises(UserError) as complaint:
        call("5 17 3", "--base", tmp_path / "base", "--hypernet", tmp_path / "h", "--ids")
    assert "\n" not in str(complaint.value) and all(word in str(complaint.value) for word in words), complaint.value
    assert not (tmp_path / "was_run").exists()


def test_words_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.*--ids"):
        call("some words", "--base", BASE, "--hypernet", HYPERNET)
    with pytest.raises(UserError, match="row of token ids"):
        call("some words", "--base", BASE, "--hypernet", HYPERNET, "--ids")
    with pytest.raises(UserError, match="--hypernet"):
        call("5 6", "--base", BASE, "--ids")


def test_sharded_folder_is_the_same_model(tmp_path, ids):
    weights = load_file(BASE / "model.safetensors")
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in shards.items():
        save_file({n: weights[n] for n in part}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f for f, part in shards.items() for n in part}}))
    shutil.copy(BASE / "config.json", tmp_path / "config.json")
    whole, cut = LanguageModel.load(BASE), LanguageModel.load(tmp_path)
    assert torch.equal(whole(ids), cut(ids))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is missing"):
        LanguageModel.load(tmp_path)


def test_bf16_weights_stay_bf16_and_answer_in_float32(tmp_path, ids):
    weights = {n: t.bfloat16() for n, t in load_file(BASE / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(BASE / "config.json", tmp_path / "config.json")
    model = LanguageModel.load(tmp_path)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    model.compute_dtype = torch.float32
    with torch.no_grad():
        logits, exact = model(ids), LanguageModel.load(tmp_path, dtype=torch.float32)(ids)
        assert logits.dtype == torch.float32 and close(logits, exact)
        assert close(torch.stack([model(ids[:1, :1])]), exact[None, :1, :1], 0.05)        # one row: rounded to bf16


def test_gradients_through_frozen_bf16_weights_are_those_of_the_same_numbers_in_float32(tmp_path):
    """The cast copy is not kept for the way back but made again; a wrong one would train silently on wrong gradients."""
    save_file({n: t.bfloat16() for n, t in load_file(BASE / "model.safetensors").items()}, tmp_path / "model.safetensors")
    shutil.copy(BASE / "config.json", tmp_path / "config.json")
    grads = []
    for dtype in (None, torch.float32):
        base = LanguageModel.load(tmp_path, dtype=dtype)
        base.compute_dtype = torch.float32
        shine = Shine(base, None, ShineConfig(r=2, meta_r=3, m2p_layers=2))
        rows = torch.arange(1, 41).view(2, 20)
        shine({"input_ids": rows, "attention_mask": torch.ones(2, 20), "weights": torch.ones(2, 20), "context_ids": rows + 50,
               "context_mask": torch.ones(2, 20)}).backward()
        grads.append({n: p.grad for n, p in shine.trained().items()})
    assert all(close(grads[0][n], grads[1][n], 1e-4) for n in grads[1])


def peft_logits(folder, model, ids):
    """The adapter applied as PEFT does: y = x W^T + (alpha / r) (x A^T) B^T."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    lora = [{} for _ in model.model.layers]
    for name, t in tensors.items():
        *_, layer, part, linear, half, _ = name.split(".")
        lora[int(layer)].setdefault(f"{part}.{linear}", {})[half] = t.T * (config["lora_alpha"] / config["r"] if half == "lora_B" else 1)
    return model(ids, None, [{n: (ab["lora_A"], ab["lora_B"]) for n, ab in layer.items()} for layer in lora])


def test_peft_adapter_and_merged_folder_give_the_same_logits(tmp_path, capsys, ids):
    call("5 17 3 3 8", "--base", BASE, "--hypernet", HYPERNET, "--ids", *settings(), "--save", tmp_path / "lora.safetensors",
         "--export-peft", tmp_path / "peft", "--merge-into", tmp_path / "merged")
    base = LanguageModel.load(BASE)
    expected = base(ids, None, cli.LoRA.load(tmp_path / "lora.safetensors", base))
    assert not close(base(ids), expected, 1e-2)
    assert close(peft_logits(tmp_path / "peft", base, ids), expected)
    assert close(LanguageModel.load(tmp_path / "merged")(ids), expected)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2 and len(config["target_modules"]) == 7 and config["base_model_name_or_path"] == str(BASE)
    with pytest.raises(UserError, match="choose another folder"):
        call("5 17", "--base", BASE, "--hypernet", HYPERNET, "--ids", "--merge-into", BASE)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Hugging Face folder as it is downloaded, in small: bf16, tokenizer.json, generation_config.json."""
    folder = tmp_path_factory.mktemp("hub") / "Qwen3-tiny"
    ranks = train_bpe([f" {line}" for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()], 400)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<RECON>", "<COMP>"]
    tokenizer = Tokenizer(ranks, QWEN_PATTERN, special, False, "NFC")
    tokenizer.special = {n: i for n, i in tokenizer.special.items() if n not in TASKS}
    tokenizer.save_hugging_face(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{# enable_thinking #}"}')
    config = Config(vocab_size=512, **PRESETS["test"])
    config.save(folder)
    save_base(perturb(LanguageModel(config)), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.im_end, 65]}))
    return folder


def test_tokenizer_of_a_downloaded_folder(qwen):
    tok = Tokenizer.from_hugging_face(qwen)
    for text in ("What is the model called?", "e\u0301t\u00e9 <|im_end|>", "tabs\t and  \n\n runs", "\u4e2d\u6587 \U0001f44d\U0001f3fd", ""):
        assert tok.decode(tok.encode(text)) == unicodedata.normalize("NFC", text)
    assert tok.im_end not in tok.encode("<|im_end|>") and tok.encode("a<|im_end|>", special=True)[-1] == tok.im_end
    last = max(tok.special[n] for n in tok.special if n not in TASKS)
    assert [tok.special[n] for n in TASKS] == [last + 1, last + 2, last + 3]
    assert tok.stops == [65, tok.im_end] and tok.decode([tok.vocab_size + 5]) == ""


def test_prompt_is_the_models_own_format(qwen):
    tok = Tokenizer.from_hugging_face(qwen)
    turns = [("user", "Hi"), ("assistant", "Yes."), ("user", "\n\nWho?")]
    wanted = ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\n\n\nWho?<|im_end|>\n"
              "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert render(tok, turns, open_ended=True)[0] == tok.encode(wanted, special=True)
    assert not think_block(qwen, {"chat_template": "no such switch"}) and think_block(qwen, {}) == "<think>\n\n</think>\n\n"
    ids, weights = render(tok, turns[:2])              # training has no think block
    assert tok.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert tok.decode([i for i, w in zip(ids, weights) if w]) == "Yes.<|im_end|>"


def test_vocab_and_merges_files_give_the_same_tokenizer(qwen, tmp_path):
    raw = json.loads((qwen / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in raw["model"]["merges"]), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {t["id"]: {"content": t["content"]} for t in raw["added_tokens"]}}))
    a, b = Tokenizer.from_hugging_face(qwen), Tokenizer.from_hugging_face(tmp_path)
    assert a.special == b.special and a.ranks == b.ranks
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="merges.txt is missing"):
        Tokenizer.from_hugging_face(tmp_path)


@pytest.mark.parametrize("change, word", [
    (lambda raw: raw["model"].update(type="Unigram"), "Unigram"), (lambda raw: raw["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "Lowercase"), (lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
    (lambda raw: raw["model"]["merges"].reverse(), "order"), (lambda raw: raw.update(added_tokens=raw["added_tokens"][1:]), "<|endoftext|>"),
    (lambda raw: raw.pop("model"), "model")], ids=["unigram", "byte-fallback", "normalizer", "pre-tokenizer", "merges", "special", "no-model"])
def test_other_tokenizers_are_refused_by_name(qwen, tmp_path, change, word):
    raw = json.loads((qwen / "tokenizer.json").read_text(encoding="utf-8"))
    change(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="tokenizer.json.*" + re.escape(word)):
        Tokenizer.from_hugging_face(tmp_path)


PAPER = ["--stage", "pretrain", "--preset", "paper", "--rank", "2", "--meta-rank", "4", "--context-length", "90", "--conversation-length", "140",
         "--accumulate", "1", "--steps", "2", "--eval-every", "9", "--eval-texts", "1", "--workers", "0", "--device", "cpu", "--max-facts", "1"]


def test_trains_a_hypernetwork_for_a_downloaded_folder_and_talks_with_it(qwen, tmp_path, capsys):
    train.main(PAPER + ["--base", str(qwen), "--out", str(tmp_path / "a"), "--checkpointing", "--moments16"])
    assert not (tmp_path / "a/model.safetensors").exists()          # the base stays where it is
    state = load_file(tmp_path / "a/state.safetensors")
    assert state["exp_avg.memory"].dtype == torch.bfloat16 and state["param.memory"].dtype == torch.float32
    config = json.loads((tmp_path / "a/hypernet.json").read_text())
    assert config["scale"] == 0.001 and config["meta_r"] == 4 and config["m2p_norm"] is False and config["base_name"] == "Qwen3-tiny"
    call("The model reads.", "--base", qwen, "--hypernet", tmp_path / "a", "--ask", "Who reads?", "--max-new-tokens", 4, "--save", tmp_path / "l.safetensors",
         "--export-peft", tmp_path / "peft", "--merge-into", tmp_path / "merged")
    assert "> Who reads?" in capsys.readouterr().out
    assert {p.name for p in qwen.iterdir()} == {p.name for p in (tmp_path / "merged").iterdir()}
    assert load_file(tmp_path / "merged/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    train.main(PAPER + ["--base", str(qwen), "--out", str(tmp_path / "a"), "--resume", "--steps", "3", "--checkpointing", "--moments16"])
    assert json.loads((tmp_path / "a/state.json").read_text())["step"] == 3


def test_checkpointing_changes_memory_and_not_the_gradients(qwen):
    results = []
    for on in (False, True):
        base = LanguageModel.load(qwen, dtype=torch.float32)
        shine = Shine(base, Tokenizer.from_hugging_face(qwen), ShineConfig(r=2, meta_r=3, m2p_layers=2))
        base.checkpointing = shine.m2p.checkpointing = on
        passes = {"language model": 0, "M2P": 0}
        for name, layer in (("language model", base.model.layers[0]), ("M2P", shine.m2p.transformer_layers[0])):
            layer.register_forward_pre_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))
        batch = collate([Examples("finetune", shine.tokenizer, 200, 300, max_facts=1)(i) for i in range(2)], shine.tokenizer)
        shine(batch).backward()
        assert passes == {"language model": 4 if on else 2, "M2P": 2 if on else 1}      # each once more on the way back
        results.append({n: p.grad for n, p in shine.trained().items()})
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_moments_in_bf16_follow_those_in_float32():
    """Without rounding by chance the second moment would stay where the first steps left it."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.ones(4000)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([params[0]], lr=1e-3, betas=(0.9, 0.999)), AdamW16([params[1]], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)]
    for step in range(300):
        for p, optimizer in zip(params, optimizers):
            p.grad = torch.full_like(p, 1.0 if step < 100 else 0.1)
            optimizer.step()
    v = [optimizer.state[p]["exp_avg_sq"].float() for p, optimizer in zip(params, optimizers)]
    assert v[1].mean() == pytest.approx(v[0].mean().item(), rel=0.01)
    assert close(params[1].data, params[0].data, 5e-3)


def test_released_sizes_have_the_papers_memory_tokens():
    """Section 1 for 8B; 0.6B has 8 heads in its M2P and 176 memory tokens; with 4B rank 8 does not divide, and the message says what does."""
    for name, r, M in (("qwen3-8b", 8, 148), ("qwen3-0.6b", 8, 176), ("qwen3-4b", 10, 224)):
        config = Config(**QWEN3[name])
        assert memory_tokens(lora_size(config, r), config.hidden_size) == M
    with pytest.raises(UserError, match="a multiple of 5"):
        train.main(["--stage", "pretrain", "--base", "qwen3-4b", "--preset", "paper", "--dry-run", "--device", "cpu"])


def test_dry_run_refuses_what_does_not_fit_together():
    with pytest.raises(UserError, match="paper"):
        train.main(["--stage", "base", "--preset", "paper", "--dry-run"])
    with pytest.raises(UserError, match="--base"):
        train.main(["--stage", "base", "--base", "x"])


def test_dry_run_counts_what_a_pass_takes(qwen):
    """Against torch's own records of a real pass: what is saved for the way back is at most what the dry run's peak holds."""
    out = train.dry_run(train.parse(["--stage", "pretrain", "--base", str(qwen), "--rank", "2", "--meta-rank", "4", "--context-length", "64",
                                     "--conversation-length", "64", "--batch", "2", "--device", "cpu", "--float32", "--dry-run"]))
    base = LanguageModel.load(qwen)
    base.compute_dtype = torch.float32
    shine = Shine(base, Tokenizer.from_hugging_face(qwen), ShineConfig(r=2, meta_r=4, target_modules="down_proj", static_a=True, answer_r=8))
    assert out["trained"] == sum(p.numel() for p in shine.trained().values()) and out["frozen_bytes"] == sum(p.nbytes for p in base.parameters())
    own, saved = {p.untyped_storage().data_ptr() for p in shine.parameters()}, {}
    ones = torch.ones(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1], lambda t: t):
        loss = shine({"input_ids": ones, "attention_mask": ones, "weights": torch.ones(2, 64), "context_ids": ones, "context_mask": ones})
    kept = sum(size for pointer, size in saved.items() if pointer not in own)
    assert kept < out["activations"][False] < 1.5 * kept and out["activations"][True] < 0.6 * out["activations"][False]
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert 0.5 < counter.get_total_flops() / (out["flops"] / 2) < 1.4        # the way back is about half of a pass with a frozen base


def test_sharded_base_trains_like_a_whole_one(qwen, tmp_path):
    """Two processes on the CPU, the frozen layers spread over both: the same losses as without --shard."""
    losses = []
    for name, more in (("whole", []), ("sharded", ["--shard"])):
        out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py", *PAPER, "--base",
                              str(qwen), "--out", str(tmp_path / name), *more], cwd=ROOT, check=True, capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120).stdout
        losses.append([json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl") if '"tokens"' in line])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    whole = sum(p.numel() for p in LanguageModel.load(qwen).model.layers.parameters())
    assert f"{whole // 2:,} in this process" in out          # half of them is really elsewhere


@pytest.mark.parametrize("arguments, word", [
    (("5 999999",), "512 tokens"), (("5", "--ask", "512"), "512 tokens"), (("5", "--m2p-heads", "5"), "5 M2P heads"), (("5", "--logits", "x"), "--ask"),
    (("5", "--out", "x"), "--convert"), (("5", "--model", "x"), "--model"), (("5", "--export-peft", ""), "empty"), (("5", "--scale", "inf"), "inf")])
def test_flags_that_make_no_sense_end_in_one_line(arguments, word):
    """Each was a traceback, or was silently ignored, until a reader tried it."""
    with pytest.raises(UserError, match=re.escape(word)):
        call(*arguments, "--base", BASE, "--hypernet", HYPERNET, "--ids")


@pytest.mark.parametrize("file, change", [
    ("metalora.pth", lambda x: x[2]["attention"]["k"].update(B=x[2]["attention"]["k"]["B"].transpose(1, 2))),      # was taken as it stood
    ("metalora.pth", lambda x: x[1]["mlp"]["up"].update(A=x[1]["mlp"]["up"]["A"].int())), ("metalora.pth", lambda x: x[0]["mlp"]["up"].update(C=torch.ones(1))),
    ("metanetwork.pth", lambda x: x.update(layer_pe=x["layer_pe"].to_sparse())), ("metanetwork.pth", lambda x: x.pop("token_pe")),
    ("metanetwork.pth", lambda x: x.update({"transformer_layers.x.y": torch.ones(1)}))])
def test_published_tensors_are_checked_one_by_one(tmp_path, file, change):
    shutil.copytree(HYPERNET, tmp_path / "h")
    os.chmod(tmp_path / "h", 0o755)
    tensors = torch.load(tmp_path / "h" / file, weights_only=True)
    change(tensors)
    (tmp_path / "h" / file).unlink()
    torch.save(tensors, tmp_path / "h" / file)
    with pytest.raises(UserError, match=file):
        call("5 17", "--base", BASE, "--hypernet", tmp_path / "h", "--ids")


def test_a_merged_folder_is_another_model_and_is_there_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    """The fingerprint once saw the norms only, so that a LoRA could be put twice into the same model."""
    arguments = ("5 17 3", "--base", BASE, "--hypernet", HYPERNET, "--ids", *settings())
    call(*arguments, "--save", tmp_path / "l.safetensors", "--merge-into", tmp_path / "merged")
    with pytest.raises(UserError, match="another language model"):
        call("--load", tmp_path / "l.safetensors", "--base", tmp_path / "merged", "--ids", "--ask", "5")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for flag in ("--merge-into", "--export-peft"):
        with pytest.raises(UserError, match="choose another folder"):
            call(*arguments, flag, tmp_path / "full")

    for module, name, error in ((cli.shutil, "copyfile", OSError), (cli, "save_file", SafetensorError)):      # what a full disk raises in each
        def full(*_, **__):
            raise error("No space left on device")
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
            patch.setattr(module, name, full)
            call(*arguments, "--merge-into", tmp_path / "half")
    assert {p.name for p in tmp_path.iterdir()} == {"l.safetensors", "merged", "full"}


def test_paper_presets_are_the_papers(qwen):
    """Real text only, the lengths of the stage even when the hypernetwork was trained at others, and a stated length of the run."""
    args = train.parse(["--stage", "finetune", "--base", str(qwen), "--preset", "paper-1qa", "--steps", "5"])
    assert (args.context_length, args.conversation_length, args.lr, args.warmup, args.batch, args.accumulate) == (2380, 100, 1e-5, 400, 1, 4)
    assert (args.text_share, args.record_share, args.wild_share, args.minutes) == (1.0, 1.0, 0.0, None)
    with pytest.raises(UserError, match="--steps N"):
        train.parse(["--stage", "pretrain", "--base", str(qwen), "--preset", "paper"])


def test_lengths_may_change_between_stages_and_sizes_may_not(qwen, tmp_path):
    train.main(PAPER + ["--base", str(qwen), "--out", str(tmp_path / "a")])
    args = train.parse(PAPER + ["--base", str(qwen), "--model", str(tmp_path / "a"), "--context-length", "70"])
    shine = train.build(args, torch.device("cpu"), torch.float32, [])[3]
    assert (shine.config.context_length, shine.config.conversation_length, shine.config.r) == (70, 140, 2)
    args = train.parse(PAPER + ["--base", str(qwen), "--model", str(tmp_path / "a"), "--rank", "4"])
    with pytest.raises(UserError, match="--rank 4.*has 2"):
        train.build(args, torch.device("cpu"), torch.float32, [])


def test_a_chat_without_a_hypernetwork_reads_no_text(tmp_path, monkeypatch, capsys):
    call("5 17 3", "--base", BASE, "--hypernet", HYPERNET, "--ids", *settings(), "--save", tmp_path / "l.safetensors")
    lines = iter(["/text 5 17", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    call("--load", tmp_path / "l.safetensors", "--base", BASE, "--ids", "--chat")
    assert "error: there is no hypernetwork to read a text with" in capsys.readouterr().out
