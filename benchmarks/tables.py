"""Write the tables of both READMEs from the committed results: python -m benchmarks.tables

What stands between <!-- table: NAME --> and <!-- end --> in README.md and benchmarks/README.md is made here, by the function NAME;
`tests/test_quality.py` compares. Numbers are exact match in percent, mean (95 % interval), unless a column says otherwise.
"""
import argparse
import json
import re
from pathlib import Path

from benchmarks import scaling as study
from benchmarks.where import WRITERS
from data import Parser
from model import write_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = ROOT / "README.md", ROOT / "benchmarks/README.md"
CONDITIONS = ("shine", "in-context", "question")
MODELS = ("small", "tiny")      # folders of checkpoints/ and of results/; the first is the one that shine.py takes
SETS = {"typed": "the generated texts as people type", "strangers": "strangers dev, 61 texts", "strangers_test": "strangers test, 60 texts",
        "strangers_wide": "strangers in other words, dev, 60 texts", "strangers_wide_test": "strangers in other words, test, 100 texts",
        "babi_dev": "bAbI dev, 250 contexts", "fairytaleqa": "FairytaleQA val, 200 sections (cut to {lengths} tokens)",
        "squad_dev": "SQuAD (XQuAD English) dev", "new_scenes": "scenes these weights have not met, 150 texts"}
SHORT = {"strangers": "strangers dev", "strangers_test": "strangers test", "strangers_wide": "other words dev", "strangers_wide_test": "other words test", "babi_dev": "bAbI", "fairytaleqa": "FairytaleQA", "squad_dev": "SQuAD", "new_scenes": "scenes"}


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cell(em):
    return f"{em['mean']:.1f} ({em['low']:.0f}-{em['high']:.0f})" if "low" in em else f"{em['mean']:.1f}"


def row(title, models, group="all"):
    """One line of the table `quality`: all conditions of the first model, those with the text of the second."""
    ems = [conditions[c]["groups"][group]["em"] for conditions, shown in zip(models, (CONDITIONS, CONDITIONS[:2])) for c in shown]
    return f"| {title} | {ems[0]['questions']} | " + " | ".join(map(cell, ems)) + " |"


def joined(conditions, names):
    """One group out of several: the mean over their questions, without an interval."""
    out = {}
    for c in CONDITIONS:
        ems = [conditions[c]["groups"][name]["em"] for name in names]
        count = sum(e["questions"] for e in ems)
        out[c] = {"groups": {"all": {"em": {"mean": sum(e["mean"] * e["questions"] for e in ems) / count, "questions": count}}}}
    return out


def by_length(model):
    """{"10 to 24": {condition: mean over questions, "questions"}} of generated texts of 1 to 48 facts; spans with fewer than 20 questions are left out."""
    sums = {}
    for name in ("generated", "facts16", "facts32", "facts48"):
        for condition, result in read(f"{model}/quality_{name}")["conditions"].items():
            for group, part in result["groups"].items():
                if span := re.fullmatch(r"text of (\d+ to \d+) tokens", group):
                    total = sums.setdefault(span[1], {}).setdefault(condition, [0, 0])
                    total[0] += part["em"]["mean"] * part["em"]["questions"]
                    total[1] += part["em"]["questions"]
    spans = sorted(sums, key=lambda span: int(span.split()[0]))
    return {span: {c: total / count for c, (total, count) in sums[span].items()} | {"questions": count} for span in spans if (count := sums[span]["shine"][1]) >= 20}


def lengths():
    """Sensitivity to the length of a text."""
    first, second = map(by_length, MODELS)
    lines = ["| tokens in the text | questions | small: SHINE | small: text in the prompt | small: question alone | tiny: SHINE | tiny: text in the prompt |", "|---|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {span} | {row['questions']} | " + " | ".join(f"{part[c]:.1f}" for part, shown in ((row, CONDITIONS), (second[span], CONDITIONS[:2])) for c in shown)
                               + " |" for span, row in first.items()])


def quality():
    results = {name: [read(f"{model}/quality_{name}")["conditions"] for model in MODELS] for name in ("generated", *SETS)}
    generated = results["generated"]
    facts = lambda low, high: [joined(conditions, [f"{n} facts" for n in range(low, high + 1)]) for conditions in generated]
    lines = ["| | questions | small: SHINE, no text in the prompt | small: text in the prompt | small: question alone | tiny: SHINE | tiny: text in the prompt |", "|---|---|---|---|---|---|---|",
             row("generated texts of 1 to 9 facts, all", generated), row("texts of 1 to 3 facts", facts(1, 3)), row("texts of 4 to 6 facts", facts(4, 6))]
    for title, group in (("conversations of 3 or more turns", "conversations of 3 or more turns"), ("first question of a conversation", "turn 1"),
                         ("seventh question", "turn 7"), ("questions about a fact", "kind: fact"), ("yes or no", "kind: yes or no"),
                         ('right answer "The text does not say."', "kind: unknown")):
        lines.append(row(title, generated, group))
    lengths = " and ".join(str(json.loads((ROOT / f"checkpoints/{model}/hypernet.json").read_text())["context_length"]) for model in MODELS)
    lines += [row(title.format(lengths=lengths), results[name]) for name, title in SETS.items()]
    f1 = ", ".join(f"{SHORT.get(name, name)} " + " / ".join(f"{r[c]['f1']['mean']:.1f}" for c in CONDITIONS) for name, (r, _) in results.items())
    back = {name: [read(f"{model}/quality_{name}") for model in MODELS] for name in ("generated", *SETS)}
    tokens = ", ".join(f"{SHORT.get(name, name)} " + " / ".join(f"{r['reconstruction token accuracy']:.1f}" for r in pair) for name, pair in back.items())
    written = ", ".join(f"{SHORT.get(name, name)} {pair[0]['written out']['texts']}: " + " / ".join(f"{r['written out']['right']:.0f}" for r in pair)
                        for name, pair in back.items() if pair[0].get("written out", {"texts": 0})["texts"] >= 50)
    bf16 = ", ".join(f"{model} " + " / ".join(f"{read(f'bf16/{model}_{name}')['conditions']['shine']['groups']['all']['em']['mean']:.1f}"
                                              for name in ("generated", "strangers", "strangers_test")) for model in MODELS)
    return "\n".join(lines) + f"\n\nF1 of small (SHINE / text in the prompt / question alone): {f1}.\nReconstruction of a set's first 200 texts, small / tiny, in % of tokens, each right behind the true ones before it: {tokens}. " \
        + f"Texts of up to 128 tokens that are without an error when written out with nothing but the LoRA, in % (behind their number): {written}." \
        + f"\nAll in float32. In bf16 SHINE has, generated / strangers dev / strangers test: {bf16}."


def baselines():
    small, tiny = (read(f"{model}/baselines") for model in MODELS)
    names = {"shine": "SHINE", "in-context": "text in the prompt", "question": "question alone"}
    lines = ["| | small: EM | F1 | seconds to prepare | GFLOP to prepare | MiB to prepare | tokens in the prompt | ms to the first token | tiny: EM | F1 | seconds to prepare |", "|---" * 11 + "|"]
    for condition, scored in small["conditions"].items():
        kind, _, count = condition.partition(" ")
        title = names.get(condition) or {"sft": f"SFT, conversations: {count}", "ttt": f"TTT, steps: {count}", "shine+ttt": f"SHINE + TTT, steps: {count}"}[kind]
        cost, other = (r["costs"].get(condition) for r in (small, tiny))
        costs = (f"{cost['prepare s']:.3g}", f"{cost['GFLOP to prepare']:.3g}", f"{cost['MiB to prepare']:.3g}", f"{cost['prompt tokens']:.0f}",
                 f"{1000 * cost['first token s']:.1f}") if cost else ("",) * 5
        em_f1 = lambda scored: f"{cell(scored['em'])} | {scored['f1']['mean']:.1f}"
        lines.append(f"| {title} | {em_f1(scored)} | " + " | ".join(costs) + f" | {em_f1(tiny['conditions'][condition])} | " + (f"{other['prepare s']:.3g} |" if other else "|"))
    rates = lambda r: ", ".join(f"{k} {v:g}" for k, v in r["learning rates"].items())
    counts = ", of tiny ".join(dict.fromkeys(f"{r['texts']} held-out generated texts, {r['conditions']['shine']['em']['questions']} questions" for r in (small, tiny)))
    return "\n".join(lines) + f"\n\n{counts}; learning rates (chosen on 16 other texts) {rates(small)} " \
        f"(tiny {rates(tiny)}); costs on {' and '.join(dict.fromkeys((small['machine'], tiny['machine'])))}, one thread beside other processes, medians of five texts."


def latency():
    columns = {f"{model}: {result['machine'].split(', ', 2)[-1]}": result for file in ("latency", "latency_bf16") for model in MODELS for result in [read(f"{model}/{file}")]}
    results, answers = columns.values(), [result["one answer, warm, ms"] for result in columns.values()]
    line = lambda title, cells: f"| {title} | " + " | ".join(cells) + " |"
    turns = [result.get("first token of each turn, ms") for result in results]
    tokens = " and ".join(dict.fromkeys(str(r["text of the next, tokens"]) for r in results if "text of the next, tokens" in r))
    return "\n".join([line("x86_64, 2 cores, medians", columns), "|---" * (1 + len(columns)) + "|",
                      line("first answer from a cold start of the command, s", (str(r["cold start"]["first answer s"]) for r in results)),
                      line("LoRA from a text of 100 tokens, warm, ms", (str(r["LoRA from N tokens, warm, ms"]["100"]) for r in results)),
                      line("one answer, warm, SHINE / text in the prompt, ms", (f"{a['SHINE']} / {a['text in the prompt']}" for a in answers)),
                      *(line(f"first token of the {name} question about {tokens} tokens, the same, ms", (f"{a['SHINE'][i]} / {a['text in the prompt'][i]}" if a else "" for a in turns))
                        for i, name in ((0, "first"), (-1, "eighth")))])


def from_nothing():
    """The run on one GPU that made checkpoints/small, stage by stage."""
    lines = ["| stage | minutes | batch | steps | samples | tokens, M | tokens/s | waiting for data | loss, unseen texts | text in the prompt | SHINE | reconstruction |", "|---" * 12 + "|"]
    for stage, run in read("small/from_nothing").items():
        last, em = (run["evaluations"] or [{}])[-1], {k: v for e in run["evaluations"] for k, v in e.items()}
        percent = lambda x: f"{100 * x:.1f} %" if x is not None else ""
        lines.append(f"| `{stage}` | {run['minutes']:.1f} | {run['batch']} | {run['steps']:,} | {run['samples']:,} | {run['tokens'] / 1e6:.1f} | {run['tokens'] / run['minutes'] / 60:,.0f} | "
                     f"{percent(run['waited'] / run['minutes'] / 60)} | {format(last['loss'], '.2f') if last else ''} | " + " | ".join(
                         percent(em[k]["em"]) if k in em else "" for k in ("in-context", "shine")) + f" | {percent(last.get('reconstruction'))} |")
    return "\n".join(lines)


def speed(name="speed"):
    result = read(name)
    sizes = [name for name in ("tiny", "small", "reference", "qwen3-0.6b") if name in result]

    def line(title, *path, show="{:,.0f}".format):
        values = []
        for size in sizes:
            found = result[size]
            for key in path:
                found = found.get(key, {})
            values.append(show(found) if found else "")
        return f"| {title} | " + " | ".join(values) + " |" if any(values) else None
    training = lambda row: " / ".join([f"{row['samples/s']:.3g}", f"{100 * row['of matmul rate']:.0f} %"] + [f"{row['peak GiB']:.2f}"] * ("peak GiB" in row))
    milliseconds = lambda row: f"{row['ms']:,.0f}"
    answer = lambda row: f"{row['first token ms']:,.0f} / {row['tokens/s']:,.0f}"
    lines = ["| | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|",
             line("the machine's rate of matrix products in that minute, GFLOP/s", "matmul GFLOP/s"), line("and of reading memory, GB/s", "read GB/s"),
             line("language model, 16 x 256 tokens: tokens/s, share of that rate", "base training", "16 x 256",
                  show=lambda row: f"{row['tokens/s']:,.0f} / {100 * row['of matmul rate']:.0f} %")]
    lines += [line(f"hypernetwork, {key} tokens: samples/s, share of that rate, GiB at most", "training", key, show=training)
              for key in ("1 x (256 + 256)", "16 x (256 + 256)", "1 x (1024 + 1024)")]
    saving = lambda row: f"{row['with checkpointing: samples/s']:.3g} / {row['with checkpointing: peak GiB']:.2f}" if "with checkpointing: peak GiB" in row else ""
    lines += [line(f"the same {key} with `--checkpointing`: samples/s, GiB at most", "training", key, show=saving) for key in ("1 x (256 + 256)", "1 x (1024 + 1024)")]
    lines += [line(f"LoRA from {n} tokens, ms", "text to LoRA", f"1 x {n}", show=milliseconds) for n in (64, 256, 1024, 4096)]
    lines += [line(title + ": first token ms / tokens/s", "answering", key, show=answer) for title, key in (
        ("question of 32 tokens, 64 of an answer, one LoRA", "LoRA, as a conversation does it"), ("the same, layer by layer", "LoRA, layer by layer"),
        ("and without a LoRA, which merging it would give", "no LoRA, layer by layer"),
        ("16 questions and LoRAs at once", "16 questions, 16 LoRAs"), ("question behind 256 tokens of text", "text of 256 tokens in the prompt"),
        ("question behind 1,024 tokens of text", "text of 1024 tokens in the prompt"))]
    lines.append(line("decoding: bytes of the weights a second, share of the rate of reading memory", "answering", "LoRA, as a conversation does it", "of the bandwidth",
                      show=lambda share: f"{100 * share:.0f} %"))
    grows = ", ".join(f"{name} {row['exponent']:.2f}" for name, row in result.get("growth", {}).items())
    return "\n".join(filter(None, lines)) + f"\n\n{result['machine']}, torch {result['torch']}; medians." \
        + (f" Milliseconds from text to LoRA grow as a power of (reference): {grows}." if grows else "")


def speed_bf16():
    return speed("speed_bf16")


def official():
    """Ours beside the paper's own code: milliseconds, and how many times as fast ours is in bf16."""
    result = read("official")
    columns = ("theirs", "ours, float32", "ours, bf16")
    lines = ["| | " + " | ".join(columns) + " | bf16 against theirs |", "|---" * (len(columns) + 2) + "|"]
    for size in ("reference", "qwen3-0.6b"):
        for name, row in result[size]["seconds"].items():
            cells = [f"{1000 * row[c]:,.0f}" for c in columns]
            if "theirs, compiled" in row:
                cells[0] += f" (compiled {1000 * row['theirs, compiled']:,.0f})"
            lines.append(f"| {size}: {name}, ms | " + " | ".join(cells) + f" | {row['theirs'] / row['ours, bf16']:.1f} times as fast |")
        for name, row in result[size]["GiB at most"].items():
            lines.append(f"| {size}: {name}, GiB at most | " + " | ".join(f"{row[c]:.2f}" for c in columns) + f" | {100 * row['ours, bf16'] / row['theirs']:.0f} % of it |")
    apart = max(v for size in ("reference", "qwen3-0.6b") for k, v in result[size]["differences"].items() if k in ("LoRA", "logits"))
    return "\n".join(lines) + f"\n\n{result['machine'].rsplit(', ', 2)[0]}, torch {result['torch']}, transformers {result['transformers']}; medians of timings made in turn, each size in a run of its own. Largest difference in float32: " \
        f"{apart:.0e} of the largest entry of LoRA or logits; greedy ids are the same."


def speed_gpu():
    result = read("speed_gpu")
    sizes = [name for name in ("small", "qwen3-0.6b") if name in result]
    line = lambda title, show: f"| {title} | " + " | ".join(show(result[size]) for size in sizes) + " |"
    step = lambda key: lambda part: f"{1000 * part['training'][key]['seconds']:,.0f} / {part['training'][key]['peak GiB']:.1f}" if key in part["training"] else ""
    answer = lambda key: lambda part: f"{part['answering'][key]['first token ms']:.0f} / {part['answering'][key]['tokens/s']:,.0f} / {100 * part['answering'][key]['of the bandwidth']:.0f} %"
    lines = ["| | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    lines += [line(f"training step of the hypernetwork, {key} tokens: ms / GiB at most", step(key)) for key in ("1 x (256 + 256)", "128 x (64 + 160)", "4 x (1024 + 1024)")]
    lines += [line(f"LoRA from {title} tokens, ms; read by a CUDA graph", lambda part, key=key: "{:.1f}; {:.1f}".format(*(part["text to LoRA"][key][k] for k in ("ms", "as a CUDA graph: ms"))))
              for title, key in (("64", "1 x 64"), ("1,024", "1 x 1024"), ("16 x 64", "16 x 64"), ("16 x 1,024", "16 x 1024"))]
    lines += [line(f"{title}: first token ms / tokens/s / share of the memory bandwidth", answer(key)) for title, key in (
        ("question of 32 tokens, one LoRA, a CUDA graph a token", "LoRA, as a conversation does it"), ("layer by layer", "LoRA, layer by layer"),
        ("behind 1,024 tokens of text, a CUDA graph a token", "text of 1024 tokens in the prompt"))]
    return "\n".join(lines) + f"\n\nOne H100, {result['machine'].split(', ', 3)[-1]}, torch {result['torch']}; not compiled, medians. It reads {result[sizes[0]]['read GB/s']:,.0f} GB/s."


def where():
    """Of the weights that ship (B alone is the text's), then of hypernetworks from before that made A and B of seven linears, where_pairs."""
    (small, tiny), (small_pairs, tiny_pairs) = ([read(f"{model}/{name}") for model in MODELS] for name in ("where", "where_pairs"))
    columns = {"small": small["parts"], "tiny": tiny["parts"], "A and B of seven linears: small, earlier": small_pairs["parts"], "tiny, earlier": tiny_pairs["parts"],
               "tiny, earlier, by gradient on 10 conversations": tiny_pairs["by gradient"]}
    lines = ["| what is the text's own | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"] \
        + ["| " + " | ".join([part, *(cell(ems[part]) if part in ems else "" for ems in columns.values())]) + " |" for part in small["parts"]]
    counts = [f"{next(iter(ems.values()))['questions']}" for ems in columns.values()]
    share = lambda result, last, name="mlp.down_proj": " / ".join(f"{100 * share:.0f}" for share in result["shares"][name]["B"][-last:])
    pairs = lambda result, last: ", ".join(f"{share(result, last, name)} % of B of {name.split('.')[1]}" for name in WRITERS)
    return "\n".join(lines) + f"\n\nHeld-out generated texts, {', '.join(counts[:-1])} and {counts[-1]} questions; the rest of the LoRA is its mean over 64 other texts. By gradient: rate {tiny_pairs['rate']}. " \
        f"Share of the squared numbers that depends on the text, layer by layer: small {share(small, 99)} % of B; tiny, last two, {share(tiny, 99)} %; small, earlier, last four layers, {pairs(small_pairs, 4)}; " \
        f"tiny, earlier, last two, {pairs(tiny_pairs, 2)}."


def scaling():
    return study.table(read("scaling"))


def gist():
    lines = ["| | minutes | samples | loss, unseen | reconstruction, % of tokens | SHINE, exact match, % |", "|---|---|---|---|---|---|"]
    for title, points in read("gist").items():
        p = points[-1]
        lines.append(f"| {title} | {p['minutes']:.0f} | {p['samples']:,} | {p['loss']:.3f} | {100 * p['reconstruction']:.1f} | " + (f"{100 * p['shine']['em']:.1f} |" if "shine" in p else "|"))
    return "\n".join(lines)


def fill(text):
    """The text of a page -> the same with every table made anew."""
    make = lambda m: f"<!-- table: {m[1]} -->\n{globals()[m[1]]()}\n<!-- end -->"
    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", make, text, flags=re.S)


if __name__ == "__main__":
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        filled = fill(page.read_text(encoding="utf-8"))
        write_file(page, lambda p: p.write_text(filled, encoding="utf-8"))
