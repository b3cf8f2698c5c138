"""Folders of others, through the command line: Hugging Face Qwen3 bases, published hypernetworks, adapters for elsewhere."""
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import shine as cli
from conftest import close
from model import Config, LanguageModel, UserError
from test_golden import CASE

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
            assert close(load_file(tmp_path / "logits.safetensors")["turn.0"], v["logits_lora"][i][v[mask][i].bool()], 2e-5)
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
