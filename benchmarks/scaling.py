"""How SHINE scales at our sizes (paper, section 7): language model, rank, meta rank, depth of the M2P, two ablations, and the recipe of new ones.

    python -m benchmarks.scaling                                     trains and scores every cell of the table, on generated texts
    python -m benchmarks.scaling --text DIR --qa FILE ...            with real ones among them
    python -m benchmarks.scaling --only rank m2p_layers --seeds 3    some groups, three seeds
    python -m benchmarks.scaling --show                              the table of what is there already

Every cell is a hypernetwork from new, trained on the same samples with the same settings but for the one thing its group
changes; the cell that all groups share stands first. A cell that the JSON has already is not run again, so that a stopped
study goes on where it was, and two processes may share a JSON, each with its own groups and --out. Scored by train.py on unseen generated texts; the curves are kept.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from data import Parser, positive, run
from model import UserError, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"model": "shipped", "rank": 4, "meta_rank": 24, "m2p_layers": 4, "m2p_axes": "both", "order": "mixed",
          "m2p_norm": "no", "rates": "1e-3 2e-3", "target_modules": "all", "static_a": "no"}      # what a group leaves alone; rates: of AdamW and of Muon
GROUPS = {
    "shared": [{}],
    "model": [{"model": "nano"}, {"model": "micro"}, {"model": "tiny"}],                     # language models trained here on equal samples
    "rank": [{"rank": 2}, {"rank": 8}],
    "meta_rank": [{"meta_rank": 0}, {"meta_rank": 4}, {"meta_rank": 64}],
    "m2p_layers": [{"m2p_layers": 0}, {"m2p_layers": 2}, {"m2p_layers": 6}],
    "m2p_axes": [{"m2p_axes": "rows"}, {"m2p_axes": "columns"}],
    "order": [{"order": "pretrain first"}, {"order": "questions only"}],                     # half reconstruction, then half questions
    "recipe": [{"m2p_norm": "yes"}, {"rates": "4e-3 6e-3"}, {"m2p_norm": "yes", "rates": "4e-3 6e-3"},      # the last of these is train.py's for a new one,
               {"m2p_norm": "yes", "rates": "4e-3 6e-3", "order": "gist first"}],                             # here after half of the samples without an M2P
    "target_modules": [{"m2p_norm": "yes", "rates": "4e-3 6e-3", "rank": 12, "target_modules": "o_proj,down_proj"},      # 68 memory tokens instead of 72
                       {"m2p_norm": "yes", "rates": "4e-3 6e-3", "rank": 36, "target_modules": "o_proj"}],                # 72
    "static_a": [{"m2p_norm": "yes", "rates": "4e-3 6e-3", "rank": 36, "target_modules": "o_proj,down_proj", "static_a": "yes"},     # 72, all of them for B
                 {"m2p_norm": "yes", "rates": "4e-3 6e-3", "rank": 72, "target_modules": "down_proj", "static_a": "yes"}],
}


def name(cell, seed):
    """A cell's key in the JSON; its oldest know no target modules and no static A."""
    return ", ".join(f"{k} {v}" for k, v in cell.items() if (k, v) not in (("target_modules", "all"), ("static_a", "no"))) + f", seed {seed}"


def call(out, *args):
    """One run of train.py in a process of its own (each run compiles and seeds afresh) -> its log's lines."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--out", str(out), *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{out}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def language_model(preset, args, data):
    """The folder of a language model of this size, trained where it is not there yet; all sizes share one tokenizer's recipe."""
    if preset == "shipped":
        return ROOT / "checkpoints/tiny"
    out = args.out / f"base-{preset}"
    if not (out / "done").is_file():
        shutil.rmtree(out, ignore_errors=True)
        call(out, "--stage", "base", "--preset", preset, "--steps", args.base_steps, "--eval-every", args.base_steps, *data)
        (out / "done").touch()
    return out


def measure(cell, seed, args, data):
    """Train and score one cell -> {"em", "reconstruction", "in-context", "minutes", "samples", "curve", ...}."""
    cell = SHARED | cell
    base, out = language_model(cell["model"], args, data), args.out / "hypernetwork"
    shutil.rmtree(args.out / "fresh", ignore_errors=True)
    shutil.copytree(base, args.out / "fresh", ignore=shutil.ignore_patterns("hypernet*", "state*", "log*", "done"))      # without its hypernetwork
    sizes = [f"--{k.replace('_', '-')}={cell[k]}" for k in ("rank", "meta_rank", "m2p_layers", "m2p_axes", "target_modules")]
    sizes += [f"--{'' if cell[k] == 'yes' else 'no-'}{k.replace('_', '-')}" for k in ("m2p_norm", "static_a")]
    sizes += ["--answer-rank=0"]      # its first rows are older than the LoRA for answering
    lr, muon_lr = cell["rates"].split()
    common = ["--lr", lr, "--read-lr", lr, "--muon-lr", muon_lr, "--seed", seed, "--warmup", args.steps // 6, "--conversations", 4, "--eval-texts", args.eval_texts, *data]
    phases = {"mixed": [("pretrain", 0.8, args.steps)], "questions only": [("pretrain", 1.0, args.steps)],
              "pretrain first": [("pretrain", 0.0, args.steps // 2), ("finetune", 1.0, args.steps // 2)],
              "gist first": [("gist", 0.6, 4 * (args.steps // 2)), ("pretrain", 0.8, args.steps // 2)]}[cell["order"]]      # its batches are of 8
    started, model, log, samples = time.perf_counter(), args.out / "fresh", [], 0
    for stage, share, steps in phases:
        shutil.rmtree(out, ignore_errors=True)
        more = [] if stage == "finetune" else ["--question-share", share, *sizes]
        lines = call(out, "--stage", stage, "--model", model, "--steps", steps, "--eval-every", steps if stage == "gist" else -(-args.steps // 4), *more, *common)
        log += [line | {"samples": samples + line["samples"]} for line in lines if "samples" in line]      # the second phase goes on counting
        samples = log[-1]["samples"]
        if len(phases) > 1:
            model = args.out / "first"
            shutil.rmtree(model, ignore_errors=True)
            out.rename(model)
    metrics = [line for line in log if "shine" in line.get("unseen", ())]      # gisting has no LoRA to answer with
    last, first = metrics[-1]["unseen"], metrics[0]["unseen"]
    loss = last["loss"] if stage == "pretrain" else None      # that of another stage is not to be compared
    return {"em": last["shine"]["em"], "f1": last["shine"]["f1"], "loss": loss, "reconstruction": last["reconstruction"],
            "in-context": first["in-context"]["em"], "question": first["question"]["em"], "minutes": round((time.perf_counter() - started) / 60, 2),
            "samples": samples, "curve": [[line["samples"], line["unseen"]["shine"]["em"], line["unseen"]["loss"]] for line in metrics]}


def table(results):
    """Markdown: one row a cell, the mean over seeds and their spread."""
    def spread(values, digits=1, scale=100):
        values = [scale * v for v in values if v is not None]
        return (f"{statistics.mean(values):.{digits}f}" if values else "") + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
    lines = ["| | SHINE, exact match, % | text in the prompt, % | reconstruction, % of tokens | loss, unseen | seeds |", "|---|---|---|---|---|---|"]
    for group, cells in GROUPS.items():
        for cell in cells:
            rows = [r for r in results["cells"].values() if SHARED | r["cell"] == SHARED | cell]
            if rows:
                title = ", ".join(f"{k.replace('_', ' ')} {'checkpoints/tiny' if v == 'shipped' else v}" for k, v in (cell or SHARED).items())
                lines.append(f"| {title} | " + " | ".join([*(spread([r[k] for r in rows]) for k in ("em", "in-context", "reconstruction")), spread([r["loss"] for r in rows], 3, 1)])
                             + f" | {len(rows)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="*", default=list(GROUPS), choices=list(GROUPS), help="groups")
    add("--seeds", type=positive(int), default=1)
    add("--steps", type=positive(int), default=150, help="optimizer steps of each hypernetwork, 32 texts each")
    add("--base-steps", type=positive(int), default=600, help="optimizer steps of each language model of the group `model`, 64 texts each")
    add("--eval-texts", type=positive(int), default=100)
    add("--text", help="as in train.py")
    add("--qa", nargs="*", default=[], help="as in train.py")
    add("--out", type=Path, default=ROOT / "runs/scaling", help="folder for what is trained")
    add("--json", default=str(ROOT / "benchmarks/results/scaling.json"))
    add("--show", action="store_true")
    add("--limit-minutes", type=positive(float), default=float("inf"), help="start no cell after so long")
    args = parser.parse_args(argv)
    settings = {"steps": args.steps, "base steps": args.base_steps, "texts scored": args.eval_texts,
                "language model": read_json(ROOT / "checkpoints/tiny/hypernet.json")["base"],      # of the cells that train none of their own
                "real texts": [Path(p).name for p in ([args.text] if args.text else []) + args.qa]}
    results = read_json(args.json) if Path(args.json).is_file() else {"settings": settings, "cells": {}}
    if not args.show and results["settings"] != settings:
        raise UserError(f"{args.json} was made with {results['settings']}; use these or another --json")
    data = ["--scene-share", 0] + (["--text", args.text] if args.text else []) + (["--qa", *args.qa] if args.qa else [])
    started = time.perf_counter()
    for seed in range(0 if args.show else args.seeds):
        for group in args.only:
            for cell in GROUPS[group]:
                if name(SHARED | cell, seed) in results["cells"] or time.perf_counter() - started > 60 * args.limit_minutes:
                    continue
                args.out.mkdir(parents=True, exist_ok=True)
                row = {"cell": SHARED | cell, "seed": seed} | measure(cell, seed, args, data)
                if Path(args.json).is_file():      # another process may have added cells of other groups
                    results = read_json(args.json)
                results["cells"][name(SHARED | cell, seed)] = row
                write_json(args.json, results)
                print(f"{name(cell or SHARED, seed)}: {row['em']:.3f} SHINE, {row['reconstruction']:.3f} reconstruction, {row['minutes']} minutes", flush=True)
    print(table(results))


if __name__ == "__main__":
    run(main)
