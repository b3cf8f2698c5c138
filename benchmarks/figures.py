"""Draw the README's figures from the committed results: python -m benchmarks.figures   (needs matplotlib)

    assets/quality.svg     exact match by condition on each set, benchmarks/results/quality_*.json
    assets/training.svg    exact match on unseen texts against training samples, benchmarks/results/training.json

Grey text on no background: readable on a light and on a dark page.
"""
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt      # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS, ASSETS = ROOT / "benchmarks/results", ROOT / "assets"
SETS = {"generated": "generated", "strangers": "strangers'\n61 texts", "fairytaleqa": "FairytaleQA\nval", "squad_dev": "SQuAD\ndev", "babi_dev": "bAbI\ndev"}
CONDITIONS = {"shine": ("SHINE", "#2f80d0"), "in-context": ("text in the prompt", "#e08a2e"), "question": ("question alone", "#8a8a8a")}
GREY = "#808080"
plt.rcParams |= {"text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY,
                 "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "shine", "axes.spines.top": False, "axes.spines.right": False}


def save(figure, name):
    figure.tight_layout()
    figure.savefig(ASSETS / name, transparent=True, metadata={"Date": None})
    plt.close(figure)


def quality():
    sets = {title: json.loads(path.read_text())["conditions"] for key, title in SETS.items() if (path := RESULTS / f"quality_{key}.json").is_file()}
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


def training():
    stages = json.loads((RESULTS / "training.json").read_text())
    figure, axes = plt.subplots(1, len(stages), figsize=(7.5, 2.8), sharey=True)
    for axis, (stage, points) in zip(axes, stages.items()):
        for condition, (label, color) in CONDITIONS.items():
            found = [(p["samples"] / 1000, 100 * p[condition]["em"]) for p in points if condition in p]
            if len(found) == 1:      # measured once, since the language model is frozen
                axis.axhline(found[0][1], color=color, linestyle="--")
            elif found:
                axis.plot(*zip(*found), "o-", color=color, label=label, markersize=3)
        axis.set_title(stage, fontsize=10)
        axis.set_xlabel("thousand samples")
    axes[0].set_ylabel("exact match, %")
    axes[-1].legend(frameon=False)
    save(figure, "training.svg")


if __name__ == "__main__":
    quality()
    training()
