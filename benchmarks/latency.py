"""How long until the first answer: cold start of the command line, and warm LoRA generation against text length.

    python -m benchmarks.latency [--json OUT]        medians of several runs; the machine is named in the output
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from data import Parser, run
from model import pick_device, write_json
from shine import DEFAULT_MODEL, Conversation, Shine

ROOT = Path(__file__).resolve().parent.parent
TEXT = "Mara keeps a green parrot called Biscuit in the lighthouse."
QUESTION = "What is the parrot called?"


def cold_start(runs, model, *flags):
    """Seconds from starting `python shine.py TEXT --ask Q` to its first answer byte, and to its end."""
    first, total = [], []
    for _ in range(runs):
        started = time.perf_counter()
        with subprocess.Popen([sys.executable, "-u", "shine.py", TEXT, "--ask", QUESTION, "--model", model, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True) as p:
            for line in p.stdout:
                if line.startswith("> "):
                    first.append(time.perf_counter() - started)
        total.append(time.perf_counter() - started)
    return {"first answer s": round(statistics.median(first), 2), "whole command s": round(statistics.median(total), 2), "runs": runs}


def median_ms(call, runs=15, warm=3):
    times = []
    for i in range(runs + warm):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1000)
    return round(statistics.median(times[warm:]), 1)


def along(talk, turns=8, runs=5):
    """Milliseconds to the first token of each turn of a conversation, medians; talk() begins one."""
    rows = []
    for _ in range(runs):
        rows.append([])
        conversation = talk()
        for _ in range(turns):
            started = time.perf_counter()
            pieces = conversation.stream(QUESTION)
            next(pieces)
            rows[-1].append((time.perf_counter() - started) * 1000)
            list(pieces)
    return [round(statistics.median(column), 1) for column in zip(*rows)]


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--float32", action="store_true", help="no bf16, also where the processor multiplies it")
    args = parser.parse_args(argv)
    _, dtype, why = pick_device("cpu", args.float32)
    shine = Shine.load(args.model, dtype=dtype)
    result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {why}", "torch": torch.__version__,
              "cold start": cold_start(args.runs, args.model, *["--float32"] * args.float32), "LoRA from N tokens, warm, ms": {}}
    words = "the old man of the hill has a red boat and ".split() * 40
    with torch.no_grad():
        for n in (16, 50, 100, 200, 256):
            ids = torch.tensor([shine.tokenizer.encode(" ".join(words))[:n]])
            result["LoRA from N tokens, warm, ms"][n] = median_ms(lambda: shine.generate_lora(ids))
    lora = shine.generate_lora(TEXT)
    result["one answer, warm, ms"] = {"SHINE": median_ms(lambda: Conversation(shine, lora).ask(QUESTION)),
                                      "text in the prompt": median_ms(lambda: Conversation(shine, None, TEXT).ask(QUESTION))}
    text = " ".join(words)[:700]
    result["text of the next, tokens"], lora = len(shine.tokenizer.encode(text)), shine.generate_lora(text)
    result["first token of each turn, ms"] = {"SHINE": along(lambda: Conversation(shine, lora)), "text in the prompt": along(lambda: Conversation(shine, None, text))}
    print(json.dumps(result, indent=1))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run(main)
