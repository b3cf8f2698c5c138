"""What a large language model takes here, beside what --dry-run says: load, read, talk, and one training step.

    python -m benchmarks.compat --make qwen3-0.6b DIR          (once; needs benchmarks/requirements.txt)
    python -m benchmarks.memory --base DIR [--json OUT]

Every row is a process of its own; memory is its largest resident size less what Python and torch take before the model is
loaded. Weights are random: sizes and seconds are those of the real ones, answers are not.
"""
import contextlib
import io
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data import Parser, run
from model import Config, LanguageModel, UserError, pick_device, write_json
from shine import Shine, ShineConfig, load_tokenizer

GIB = 2 ** 30


def resident(which):
    """Bytes of this process, from Linux: VmRSS now, VmHWM at most so far (ru_maxrss would begin with the parent's)."""
    return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def text_of(tokenizer, tokens):
    """A text of so many tokens, made of this project's own words."""
    words = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8") * 20
    return tokenizer.decode(tokenizer.encode(words)[:tokens])


def load(args):
    started = time.perf_counter()
    model = LanguageModel.load(args.base, dtype=None)
    for p in model.parameters():
        p.data.view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32).max()      # touch every mapped page
    return {"seconds": round(time.perf_counter() - started, 2), "weights GiB": sum(p.nbytes for p in model.parameters()) / GIB}


def talk(args):
    _, dtype, _ = pick_device("cpu")
    shine = Shine.load(args.hypernet, base=args.base, dtype=None)
    shine.base.compute_dtype = dtype
    text = text_of(shine.tokenizer, 1000)
    started = time.perf_counter()
    lora = shine.generate_lora(text)
    read = time.perf_counter() - started
    talk, pieces = shine.conversation(lora, max_new_tokens=32), []
    started = time.perf_counter()
    for piece in talk.stream("What is this text about?"):
        pieces.append(time.perf_counter() - started)
    return {"LoRA from 1,000 tokens, s": round(read, 2), "first piece s": round(pieces[0], 2), "32 tokens s": round(pieces[-1], 2)}


def train(args):
    """A pass, an optimizer step and another pass at the given lengths: in the last all there is lives at once."""
    from train import give_back_memory, make_optimizers
    give_back_memory()
    _, dtype, _ = pick_device("cpu")
    model = LanguageModel.load(args.base, dtype=None)
    model.compute_dtype = dtype
    shine = Shine(model, load_tokenizer(args.base, model), ShineConfig(8, 128, 4, 0, 0.001))
    model.checkpointing = shine.m2p.checkpointing = args.checkpointing
    optimizers, _ = make_optimizers(shine, 1e-5, 0, 0.01, (0.9, 0.999))
    B, N, S = 1, args.length, args.length
    ones = torch.ones(B, S, dtype=torch.long)
    batch = {"input_ids": ones * 7, "attention_mask": ones, "weights": torch.ones(B, S), "context_ids": torch.ones(B, N, dtype=torch.long),
             "context_mask": torch.ones(B, N, dtype=torch.long)}
    started = time.perf_counter()
    shine(batch).backward()
    optimizers[0].step()
    shine(batch).backward()
    return {"seconds of two passes and a step": round(time.perf_counter() - started, 1)}


def child(what, base, *more):
    """Run one measurement in a new process -> its dict, with the memory it took."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", "--child", what, "--base", base, *map(str, more)],
                          capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{what}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def estimate(base, length):
    from train import dry_run, parse
    args = ["--stage", "pretrain", "--base", base, "--preset", "paper", "--dry-run", "--device", "cpu", "--accumulate", 1,
            "--context-length", length, "--conversation-length", length]
    with contextlib.redirect_stdout(io.StringIO()):
        return dry_run(parse([str(a) for a in args]))


def main(argv=None):
    parser = Parser(description="Memory and seconds of a large language model on this machine.")
    parser.add_argument("--base", required=True)
    parser.add_argument("--hypernet")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--child", choices=("load", "talk", "train"))
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    if args.child:
        before = resident("VmRSS")
        row = {"load": load, "talk": talk, "train": train}[args.child](args)
        print(json.dumps(row | {"peak GiB": (resident("VmHWM") - before) / GIB}))
        return
    config = Config.load(args.base)
    results = {"load": child("load", args.base)}
    with tempfile.TemporaryDirectory() as tmp:
        base = LanguageModel.load(args.base)
        Shine(base, load_tokenizer(args.base, base), ShineConfig(8, 128, 4, 0, 0.001, 2380, 1150)).save(tmp, torch.float32)
        del base
        results["talk"] = child("talk", args.base, "--hypernet", tmp) | {"dry run GiB": estimate(args.base, 1000)["talk"] / GIB}
    for length, checkpointing in ((128, False), (128, True), (256, False), (512, True)):
        row = child("train", args.base, "--length", length, *(["--checkpointing"] if checkpointing else []))
        row["dry run GiB"] = estimate(args.base, length)["total"][checkpointing] / GIB
        results[f"training pass, {length} + {length} tokens{', checkpointing' if checkpointing else ''}"] = row | {"estimate / measured": row["dry run GiB"] / row["peak GiB"]}
    machine = f"{re.sub(' +', ' ', platform.processor() or platform.machine())}, {torch.get_num_threads()} threads, torch {torch.__version__}, {pick_device('cpu')[2]}"
    print(f"{config.num_hidden_layers} layers of {config.hidden_size}; {machine}")
    for name, row in results.items():
        print(f"{name:48s} " + ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.json:
        write_json(args.json, {"machine": machine, "base": Path(args.base).name, "results": results})


if __name__ == "__main__":
    run(main)
