"""Does training in bf16 follow training in float32? The same batches, the same start, two loss curves.

    python -m benchmarks.precision [--steps 500] [--preset nano] [--json OUT]

Masters, moments and logits are float32 in both; activations and products are not. Prints the mean of both curves over windows of steps
and the largest distance between them, beside what another seed of the data does to the float32 curve.
"""
import argparse
import json
import tempfile
from pathlib import Path

import torch

import train
from data import Parser, positive, run
from model import PRESETS, write_json


def curve(folder, steps, preset, dtype_flags, seed=0):
    """Losses of one run of the base stage on generated texts."""
    train.main(["--stage", "base", "--preset", preset, "--steps", str(steps), "--eval-every", str(10 * steps), "--eval-texts", "2", "--vocab-size", "1024", "--batch", "16",
                "--curriculum", "0", "--max-facts", "3", "--seed", str(seed), "--out", str(folder), *dtype_flags])
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def windows(losses, count=10):
    size = max(1, len(losses) // count)
    return [sum(part) / len(part) for i in range(0, len(losses), size) if (part := losses[i:i + size])]


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive(int), default=500)
    parser.add_argument("--preset", default="nano", choices=list(PRESETS))
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as tmp:
        curves = {name: curve(Path(tmp) / name, args.steps, args.preset, flags, seed)
                  for name, flags, seed in (("float32", ["--float32"], 0), ("bf16", [], 0), ("float32, another seed", ["--float32"], 1))}
    means = {name: [round(v, 4) for v in windows(losses)] for name, losses in curves.items()}
    gap = lambda a, b: round(max(abs(x - y) / y for x, y in zip(means[a], means[b])), 4)
    result = {"steps": args.steps, "preset": args.preset, "machine": train.pick_device("auto")[2], "torch": torch.__version__, "mean loss of each tenth": means,
              "largest distance, bf16 to float32": gap("bf16", "float32"), "largest distance, another seed to float32": gap("float32, another seed", "float32"),
              "losses": {name: [round(v, 4) for v in losses] for name, losses in curves.items() if name != "float32, another seed"}}
    print(json.dumps({k: v for k, v in result.items() if k != "losses"}, indent=1))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run(main)
