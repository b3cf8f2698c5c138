"""Draw the README's figures from the committed results: python -m benchmarks.figures   (needs matplotlib)

    python -m benchmarks.figures --log base=runs/base hypernetwork=runs/hyper      first keeps the evaluations of these runs in training.json

    assets/quality.svg     exact match by condition on each set, benchmarks/results/small/quality_*.json
    assets/groups.svg      generated texts by facts, length and turn, benchmarks/results/small/quality_generated.json, quality_facts*.json
    assets/training.svg    tiny: exact match on unseen texts against training samples, benchmarks/results/training.json
    assets/from_nothing.svg     small: loss against minutes on one GPU, benchmarks/results/small/from_nothing.json
    assets/cost.svg        where SHINE starts to pay: milliseconds against text length, benchmarks/results/speed.json
    assets/precision.svg   loss in bf16 and in float32 on the same batches, benchmarks/results/precision.json
    assets/scaling.svg     exact match by size, rank, depth and axes of the M2P, benchmarks/results/scaling.json

A result that is not there yet draws no figure.

Grey text on no background: readable on a light and on a dark page.
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

try:
    import matplotlib
except ImportError:
    print("error: the figures need matplotlib: pip install -r benchmarks/requirements.txt", file=sys.stderr)
    sys.exit(2)
matplotlib.use("svg")
import matplotlib.pyplot as plt      # noqa: E402

from benchmarks import scaling as study      # noqa: E402
from benchmarks.tables import MODELS, by_length      # noqa: E402
from data import Parser      # noqa: E402
from model import write_json      # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS, ASSETS = ROOT / "benchmarks/results", ROOT / "assets"
MODEL = MODELS[0]
SETS = {"generated": "generated", "strangers": "strangers,\ndev", "strangers_test": "strangers,\ntest", "fairytaleqa": "FairytaleQA\nval", "squad_dev": "SQuAD\ndev", "babi_dev": "bAbI\ndev"}
CONDITIONS = {"shine": ("SHINE", "#2f80d0"), "in-context": ("text in the prompt", "#e08a2e"), "question": ("question alone", "#8a8a8a")}
GREY = "#808080"
plt.rcParams |= {"text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY,
                 "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "shine", "axes.spines.top": False, "axes.spines.right": False}


def save(figure, name):
    figure.tight_layout()
    figure.savefig(ASSETS / name, transparent=True, metadata={"Date": None})
    plt.close(figure)


def quality():
    sets = {title: json.loads(path.read_text())["conditions"] for key, title in SETS.items() if (path := RESULTS / f"{MODEL}/quality_{key}.json").is_file()}
    figure, axis = plt.subplots(figsize=(7.5, 3))
    for i, (condition, (label, color)) in enumerate(CONDITIONS.items()):
        em = [result[condition]["em"] for result in sets.values()]
        spread = [[e["mean"] - e["low"] for e in em], [e["high"] - e["mean"] for e in em]]
        axis.bar([x + 0.27 * (i - 1) for x in range(len(sets))], [e["mean"] for e in em], 0.25, yerr=spread, color=color, ecolor=GREY, label=label)
    axis.set_xticks(range(len(sets)), sets)
    axis.set_ylabel("exact match, %")
    axis.set_ylim(0, 100)
    axis.legend(frameon=False, ncols=3, loc="upper right")
    save(figure, "quality.svg")


def groups():
    scored = json.loads((RESULTS / MODEL / "quality_generated.json").read_text())["conditions"]
    part = lambda pattern: {m[1]: {c: scored[c]["groups"][name]["em"]["mean"] for c in CONDITIONS} for name, row in scored["shine"]["groups"].items()
                            if (m := re.fullmatch(pattern, name)) and row["em"]["questions"] >= 20}
    panels = {"facts in the text": part(r"(\d+) facts?"), "tokens in the text": by_length(MODEL), "question of the conversation": part(r"turn (\d+)")}
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 2.8), sharey=True)
    for axis, (title, points) in zip(axes, panels.items()):
        for condition, (label, color) in CONDITIONS.items():
            axis.plot([name.replace(" to ", "\n-") for name in points], [row[condition] for row in points.values()], "o-", color=color, label=label, markersize=3)
        axis.set_xlabel(title)
        axis.set_ylim(0, 100)
    axes[0].set_ylabel("exact match, %")
    axes[-1].legend(frameon=False, fontsize=8, loc="center right")
    save(figure, "groups.svg")


def training():
    """The stages of the language model and of the hypernetwork, each one after the other: a line down where one begins."""
    stages = json.loads((RESULTS / "training.json").read_text())
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), sharey=True)
    for axis, kind, title in zip(axes, ("base", "hypernetwork"), ("language model", "hypernetwork")):
        began, labels = 0.0, {label for label, _ in CONDITIONS.values()}
        for stage, points in stages.items():
            name, _, what = stage.partition(", ")
            if name != kind:
                continue
            end = began + points[-1]["samples"] / 1000
            for condition, (label, color) in CONDITIONS.items():
                if not (found := [(began + p["samples"] / 1000, 100 * p[condition]["em"]) for p in points if condition in p]):
                    continue
                style = "o-"
                if len(found) == 1:      # measured once, since the language model is frozen
                    style, found = "-", [(began, found[0][1]), (end, found[0][1])]
                axis.plot(*zip(*found), style, color=color, label=label if label in labels else None, markersize=3)
                labels.discard(label)
            if began:
                axis.axvline(began, color=GREY, linestyle=":", linewidth=1)
            axis.annotate(what, (began, 0), (3, 12), textcoords="offset points", fontsize=7, color=GREY, rotation=90, va="bottom")
            began = end
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("thousand samples")
        axis.set_ylim(0, 100)
    axes[0].set_ylabel("exact match, %")
    axes[-1].legend(frameon=False, fontsize=7, loc="center right")
    save(figure, "training.svg")


def from_nothing():
    figure, axis = plt.subplots(figsize=(7.5, 2.6))
    began = 0.0
    seen = set()
    for name, run in json.loads((RESULTS / MODEL / "from_nothing.json").read_text()).items():
        stage = name.split()[0]      # "base 2" goes on with "base"
        axis.plot([began + m for m, _ in run["losses"]], [loss for _, loss in run["losses"]],
                  color={"base": "#e08a2e", "gist": "#8a8a8a", "pretrain": "#2f80d0"}[stage], label=None if stage in seen else stage)
        seen.add(stage)
        began += run["minutes"]
    axis.set_yscale("log")
    axis.set_xlabel("minutes of training on one GPU")
    axis.set_ylabel("training loss")
    axis.legend(frameon=False, ncols=3)
    save(figure, "from_nothing.svg")


def cost():
    shipped = json.loads((RESULTS / "speed.json").read_text())["tiny"]
    prepare = {int(key.split(" x ")[1]): row["ms"] for key, row in shipped["text to LoRA"].items() if key.startswith("1 x ")}
    prompt = {int(key.split()[2]): row["first token ms"] for key, row in shipped["answering"].items() if key.startswith("text of ")}
    lora = shipped["answering"]["LoRA, as a conversation does it"]["first token ms"]
    lengths = sorted(prepare.keys() & prompt.keys())
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.9))
    left.plot(lengths, [prepare[n] for n in lengths], "o-", color="#2f80d0", markersize=3, label="text -> LoRA, once")
    left.plot(lengths, [prompt[n] for n in lengths], "o-", color="#e08a2e", markersize=3, label="first token, text in the prompt")
    left.axhline(lora, color="#2f80d0", linestyle="--", label="first token, LoRA")
    left.set_ylabel("milliseconds")
    pays = [(n, prepare[n] / (prompt[n] - lora)) for n in lengths if prompt[n] > lora]
    right.plot(*zip(*pays), "o-", color="#2f80d0", markersize=3)
    right.set_ylabel("questions until SHINE is ahead")
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, lengths)
        axis.set_xlabel("tokens in the text")
    left.legend(frameon=False, fontsize=8)
    save(figure, "cost.svg")


def precision():
    curves = json.loads((RESULTS / "precision.json").read_text())["losses"]
    figure, axis = plt.subplots(figsize=(7.5, 2.6))
    for (name, losses), style in zip(curves.items(), ({"color": "#e08a2e", "linewidth": 2.5, "alpha": 0.6}, {"color": "#2f80d0", "linewidth": 1})):
        axis.plot([statistics.mean(losses[max(0, i - 10):i + 1]) for i in range(len(losses))], label=name, **style)
    axis.set_xlabel("step (mean of the last 11)")
    axis.set_ylabel("loss")
    axis.legend(frameon=False)
    save(figure, "precision.svg")


def scaling():
    cells = json.loads((RESULTS / "scaling.json").read_text())["cells"].values()
    groups = {}      # {group: {value: its cells}}, of groups with more than the shared cell
    for group, shared in study.SHARED.items():
        values = dict.fromkeys([cell[group] for cell in study.GROUPS.get(group, ())] + [shared])
        found = {v: same for v in values if (same := [c for c in cells if study.SHARED | c["cell"] == study.SHARED | {group: v}])}
        if len(found) > 1:
            groups[group] = dict(sorted(found.items())) if all(isinstance(v, int) for v in found) else found
    kinds = [study.GROUPS["recipe"][2], *study.GROUPS["target_modules"], *study.GROUPS["static_a"]]      # which LoRA some 72 memory tokens become
    called = lambda cell: f"{cell.get('target_modules', 'all').replace('_proj', '').replace(',', ', ')}, r\u00a0{cell.get('rank', study.SHARED['rank'])}" + ("\nB\u00a0alone" if "static_a" in cell else "")
    groups["LoRA"] = {called(kind): same for kind in kinds if (same := [c for c in cells if study.SHARED | c["cell"] == study.SHARED | kind])}
    figure, rows = plt.subplots(2, len(groups), figsize=(2.2 + 2.2 * len(groups), 5), sharey="row", squeeze=False)
    for axis, below, (group, found) in zip(*rows, groups.items()):
        ticks = [str(v).replace(", ", "\n").replace(" ", "\n") for v in found]
        for key, label, color in (("em", "questions", "#2f80d0"), ("reconstruction", "reconstruction, tokens", "#e08a2e")):
            percent = [[100 * c[key] for c in same] for same in found.values()]
            axis.errorbar(ticks, list(map(statistics.mean, percent)), [statistics.stdev(p) if len(p) > 1 else 0 for p in percent], fmt="o", color=color, ecolor=GREY, label=label)
        axis.set_title(group.replace("_", " "), fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
        for i, (value, same) in enumerate(found.items()):      # the means over seeds, point by point
            points = [[statistics.mean(column) for column in zip(*point)] for point in zip(*(c["curve"] for c in same))]
            below.plot([samples / 1000 for samples, *_ in points], [100 * em for _, em, _ in points], "o-", markersize=2, label=str(value),
                       color=plt.cm.viridis(0.85 * i / (len(found) - 1)))
        below.legend(frameon=False, fontsize=7)
        below.set_xlabel("thousand samples")
    rows[0, 0].legend(frameon=False, fontsize=7)
    rows[0, 0].set_ylabel("right, %")
    rows[1, 0].set_ylabel("SHINE, exact match, %")
    save(figure, "scaling.svg")


def keep(logs, result, summary):
    """NAME=RUN ... -> results/RESULT.json: {name: summary(lines of the run's log)}. A NAME without a RUN stays as it is there."""
    path, stages = RESULTS / f"{result}.json", {}
    for name, _, run in (log.partition("=") for log in logs):
        if run:
            stages[name] = summary([json.loads(line) for line in (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines()])
        else:
            stages[name] = json.loads(path.read_text(encoding="utf-8"))[name]
    write_json(path, stages)


def evaluations(lines):
    return [{k: line[k] for k in ("minutes", "samples")} | line["unseen"] for line in lines if "unseen" in line]


def whole(lines):
    """What a stage took, its loss (about 60 means over the run), and its evaluations."""
    head, steps = lines[0], list({line["step"]: line for line in lines if "tokens" in line}.values())      # after a resumed run each step once
    every = max(1, len(steps) // 60)
    return {"machine": head["machine"], "torch": head["torch"], "minutes": steps[-1]["seconds"] / 60, "batch": head["args"]["batch"], "steps": len(steps),
            "samples": steps[-1]["samples"], "tokens": sum(s["tokens"] for s in steps), "waited": steps[-1]["waited"],
            "losses": [(round(part[-1]["seconds"] / 60, 3), round(statistics.mean(s["loss"] for s in part), 4)) for i in range(0, len(steps), every) if (part := steps[i:i + every])],
            "evaluations": evaluations(lines) if head["args"]["eval_texts"] >= 30 else []}      # fewer say nothing


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", nargs="*", default=[], metavar="NAME=RUN", help="all stages to show, in order; NAME alone: as the result has it already")
    parser.add_argument("--to", metavar="RESULT", default="training", help="which of the results the logs are: training, gist, answer_rank/training, small/from_nothing ...")
    if (args := parser.parse_args()).log:
        keep(args.log, args.to, whole if args.to.endswith("from_nothing") else evaluations)
    quality()
    groups()
    training()
    for draw, result in ((from_nothing, f"{MODEL}/from_nothing"), (cost, "speed"), (precision, "precision"), (scaling, "scaling")):
        if (RESULTS / f"{result}.json").is_file():
            draw()
