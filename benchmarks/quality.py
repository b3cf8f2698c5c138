"""How well are questions about a text answered: by the generated LoRA, with the text in the prompt, with neither?

    python -m benchmarks.quality --data FILE.jsonl [--model DIR] [--json OUT]     any set of conversations (see data.py)
    python -m benchmarks.quality --generate 400                                   held-out texts of the procedural source

Every question is answered greedily, one conversation a text, with the model's own earlier answers in the history. Exact
match and token F1 follow SQuAD; intervals are 95 % bootstrap intervals over texts. (paper, section 7)
"""
import argparse
import random
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from data import Parser, Source, positive, read_conversations, run
from model import pick_device, write_json
from shine import DEFAULT_MODEL, Shine
from train import evaluate, token_accuracy

CONDITIONS = {"shine": "SHINE", "in-context": "text in the prompt", "question": "question alone"}


def interval(rows, key, draws=1000):
    """Mean of rows[key] in percent and its 95 % interval, texts drawn with replacement."""
    texts = {}
    for row in rows:
        texts.setdefault(row["record"], []).append(row[key])
    sums, counts = np.array([[sum(v), len(v)] for v in texts.values()], dtype=float).T
    pick = np.random.default_rng(0).integers(0, len(sums), (draws, len(sums)))
    low, high = np.percentile(sums[pick].sum(1) / counts[pick].sum(1), [2.5, 97.5])
    return {"mean": round(100 * sums.sum() / counts.sum(), 2), "low": round(100 * low, 2), "high": round(100 * high, 2), "questions": len(rows)}


def groups(records, rows):
    """{name: rows}: everything, then by kind of question, turn, facts, where the set says so."""
    out = {"all": rows}
    for row in rows:
        meta, turns = records[row["record"]].get("meta"), len(records[row["record"]]["conversations"]) // 2
        meta = meta if isinstance(meta, dict) and len(meta.get("turns", ())) == turns else {}
        names = [f"turn {min(row['turn'] + 1, 8)}"] + (["conversations of 3 or more turns"] if turns >= 3 else [])
        names += [f"kind: {meta['turns'][row['turn']]}"] if "turns" in meta else []
        names += [f"{meta['facts']} facts"] if "facts" in meta else []
        names += [f"source: {records[row['record']]['source']}"] if "source" in records[row["record"]] else []
        for name in names:
            out.setdefault(name, []).append(row)
    return out


def measure(shine, records, conditions=CONDITIONS):
    """-> {"conditions": {condition: {"em", "f1", "seconds", "groups"}}, "answers": [...]}"""
    result, answers = {}, [{"context": r["context"], "turns": []} for r in records]
    for condition in conditions:
        started = time.perf_counter()
        rows = evaluate(shine.base, shine.tokenizer, records, condition, shine)
        seconds = time.perf_counter() - started
        result[condition] = {"em": interval(rows, "em"), "f1": interval(rows, "f1"), "seconds": round(seconds, 1),
                             "groups": {name: {"em": interval(part, "em"), "f1": interval(part, "f1")["mean"]}
                                        for name, part in sorted(groups(records, rows).items())}}
        for row in rows:
            turns = answers[row["record"]]["turns"]
            if row["turn"] >= len(turns):
                question, gold = (t["content"] for t in records[row["record"]]["conversations"][2 * row["turn"]:][:2])
                turns.append({"question": question, "answer": gold})
            turns[row["turn"]][condition] = row["prediction"]
    return {"conditions": result, "answers": answers}


def table(result):
    """Markdown: one row a condition, then one a group."""
    lines = ["| | " + " | ".join(f"{CONDITIONS[c]}: EM" for c in result) + " | " + " | ".join(f"{CONDITIONS[c]}: F1" for c in result)
             + " | questions |", "|---" * (2 * len(result) + 2) + "|"]
    for name in next(iter(result.values()))["groups"]:
        part = [r["groups"][name] for r in result.values()]
        em = [f"{p['em']['mean']:.1f} ({p['em']['low']:.1f}-{p['em']['high']:.1f})" if name == "all" else f"{p['em']['mean']:.1f}" for p in part]
        lines.append(f"| {name} | " + " | ".join(em) + " | " + " | ".join(f"{p['f1']:.1f}" for p in part) + f" | {part[0]['em']['questions']} |")
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="JSON lines: context, conversations, optionally accept (right answers of each question)")
    add("--generate", type=positive(int), metavar="N", help="N held-out generated texts instead")
    add("--split", choices=("heldout", "train"), default="heldout", help="with --generate: words never used in training, or those used")
    add("--turns", type=positive(int), help="with --generate: questions on each text (default: 1 to 8)")
    add("--facts", type=positive(int), help="with --generate: facts in each text (default: 1 to 8)")
    add("--limit", type=positive(int), help="at most so many texts of the set")
    add("--model", default=str(DEFAULT_MODEL))
    add("--json", metavar="OUT", help="write everything measured")
    add("--answers", metavar="OUT", help="write every text, question and answer")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if (args.data is None) == (args.generate is None):
        parser.error("give --data FILE or --generate N")
    warnings.filterwarnings("ignore", message="the text is longer")
    device, dtype, why = pick_device(args.device)
    shine = Shine.load(args.model, device, dtype if device.type == "cuda" else torch.float32)
    if args.data:
        records = read_conversations(args.data)[:args.limit]
    else:
        source = Source(args.split)
        records = [source.sample(random.Random(args.seed * 10**6 + i), args.facts, args.turns) for i in range(args.generate)]
    longer = sum(shine.encode_context(r["context"])[1] > 0 for r in records)
    result = measure(shine, records)
    answers = result.pop("answers")
    result |= {"set": Path(args.data).name if args.data else f"{args.generate} generated texts, split {args.split}, seed {args.seed}", "model": Path(args.model).name, "machine": why,
               "torch": torch.__version__, "texts": len(records), "texts cut to the model's length": longer}
    if args.generate:
        result["reconstruction token accuracy"] = round(100 * token_accuracy(shine, [r["context"] for r in records[:200]]), 2)
    print(table(result["conditions"]))
    print("\n" + "\n".join(f"{k}: {v}" for k, v in result.items() if k != "conditions"))
    if args.json:
        write_json(args.json, result)
    if args.answers:
        write_json(args.answers, answers)


if __name__ == "__main__":
    run(main)
