"""How well are questions about a text answered: by the generated LoRA, with the text in the prompt, with neither?

    python -m benchmarks.quality --data FILE.jsonl [--model DIR] [--json OUT]     any set of conversations (see data.py)
    python -m benchmarks.quality --generate 400                                   held-out texts of the procedural source
    python -m benchmarks.quality --generate 100 --baselines                       and against LoRAs trained by gradient, with costs

Every question is answered greedily, one conversation a text, with the model's own earlier answers in the history. Exact
match and token F1 follow SQuAD; intervals are 95 % bootstrap intervals over texts. (paper, section 7) And how much of the texts
themselves the LoRAs give back (section 6).

The baselines train a LoRA of the generated one's rank, on the same linears, for each text, by AdamW (a LoRA for answering stands
beside it, as it is, where SHINE is named, and nowhere else):
    sft N         on N conversations about the text (generated texts, or a field "others" in the set), 10 epochs
    ttt N         N steps of language modelling on the text itself (test-time training)
    shine+ttt N   the same from the generated LoRA on
Their learning rates are chosen on other generated texts, which are printed with the result.
"""
import argparse
import random
import time
import warnings
from bisect import bisect_right
from pathlib import Path

import numpy as np
import torch

from torch.utils.flop_counter import FlopCounterMode

from data import Parser, Source, collate, positive, read_conversations, render, run, typist
from model import UserError, flatten, lora_layout, pick_device, read_json, write_json
from shine import DEFAULT_MODEL, Shine, answer_batch
from train import Peak, evaluate, token_accuracy

CONDITIONS = {"shine": "SHINE", "in-context": "text in the prompt", "question": "question alone"}
KINDS = ("sft", "ttt", "shine+ttt")      # of baselines
SFT, TTT, EPOCHS = (1, 5, 10), (1, 3, 10, 30, 100), 10
OTHERS = (5,) * max(SFT)      # questions in each conversation to train on
FOUND = "learning rates", "F1 by learning rate, 16 other texts", "costs"      # what --baselines finds out before it scores
RATES, RATED = (3e-3, 1e-2, 3e-2), 16      # learning rates, and texts they are chosen on
LENGTHS = (0, 10, 25, 50, 100, 150, 200, 300, 400)      # of texts in tokens, for the groups


# ---------------------------------------------------------------------------- LoRAs trained by gradient
def plain_start(shine, rows, seed=0):
    """A LoRA's usual start, flat (rows, L, P): A uniform within 1 / sqrt(in), B zero. Of all layers, also where K < L of them have a generated one."""
    c, r, generator = shine.base.config, shine.config.r, torch.Generator().manual_seed(seed)
    parts = []
    for _, n_in, n_out in lora_layout(c, shine.config.target_modules):
        parts += [(torch.rand(c.num_hidden_layers, n_in * r, generator=generator) * 2 - 1) / n_in ** 0.5, torch.zeros(c.num_hidden_layers, r * n_out)]
    return torch.cat(parts, -1).to(shine.device).expand(rows, -1, -1).clone()


def generated_part(shine, lora):
    """A generated LoRA -> its own numbers, flat (rows, K, P), without what stands beside them for answering."""
    return flatten(shine.apart(lora)[0])


def as_lora(shine, flat, beside):
    """flat (rows, K, P) -> the LoRA that answers; beside: with the hypernetwork's own LoRA for answering beside it."""
    return shine.beside(shine.cut(flat)) if beside else shine.cut(flat)


def fit(shine, start, examples, steps, lr, dtype=None, mask=None, beside=False):
    """Train one LoRA a text, all at once: AdamW works number by number, so the rows never meet. Yields (step, flat (rows, K, P)).

    examples: for each text a list of (ids, weights), of which each step takes the next one. dtype: of the activations (None: of the weights).
    mask (1, K, P): 1 where the LoRA trains, 0 where it stays. beside: see as_lora; it stays.
    """
    flat = start.float().clone().requires_grad_()
    optimizer = torch.optim.AdamW([flat], lr=lr, weight_decay=0.0)
    for step in range(1, steps + 1):
        batch = collate([(None, *rows[(step - 1) % len(rows)]) for rows in examples], shine.tokenizer)
        batch["weights"] /= batch["weights"].sum(1, keepdim=True)              # the mean of each row; the rows are added
        shine.base.compute_dtype = dtype
        shine.base.loss({k: v.to(shine.device) for k, v in batch.items()}, as_lora(shine, flat, beside), total=1.0).backward()
        shine.base.compute_dtype = None                                        # between steps LoRAs are scored
        if mask is not None:
            flat.grad.mul_(mask)
        norm = flat.grad.flatten(1).norm(dim=1)[:, None, None]                 # each row's own gradient is clipped at 1
        flat.grad.mul_((1 / norm.clamp(min=1e-12)).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        yield step, flat.detach()


def train_dtype(shine):
    """bf16 where the processor multiplies it, as in train.py; answers are given in the dtype of the weights."""
    return pick_device(shine.device.type)[1]


def conversation_rows(shine, record, count):
    """[(ids, weights)] of `count` conversations about the text, which stand in record["others"]."""
    return [render(shine.tokenizer, [(t["role"], t["content"]) for t in turns]) for turns in record["others"][:count]]


def text_rows(shine, record):
    """[(ids, weights)]: the text as plain language modelling."""
    ids = [shine.tokenizer.end, *shine.encode_context(record["context"])[0], shine.tokenizer.end]
    return [(ids, [0.0] + [1.0] * (len(ids) - 1))]


def trained(shine, records, kind, rates, wanted=None, group=50):
    """{condition: flat LoRAs (rows, K, P)} of one kind ("sft", "ttt", "shine+ttt"), trained here group by group. wanted: these counts only."""
    out, wanted = {}, wanted or (SFT if kind == "sft" else TTT)
    counts = wanted if kind == "sft" else (max(wanted),)
    for count in counts:
        if kind == "sft" and any(len(r.get("others", ())) < count for r in records):
            continue
        for first in range(0, len(records), group):
            part = records[first:first + group]
            rows = [conversation_rows(shine, r, count) if kind == "sft" else text_rows(shine, r) for r in part]
            start = generated_part(shine, shine.generate_lora([r["context"] for r in part])) if kind == "shine+ttt" else plain_start(shine, len(part))
            for step, flat in fit(shine, start, rows, EPOCHS * count if kind == "sft" else count, rates[kind], train_dtype(shine), beside=kind == "shine+ttt"):
                if kind != "sft" and step in wanted:
                    out.setdefault(f"{kind} {step}", []).append(flat.clone())
            if kind == "sft":
                out.setdefault(f"sft {count}", []).append(flat)
    return {name: torch.cat(parts) for name, parts in out.items()}


def score(shine, records, flat, beside=False):
    """Rows of train.evaluate for one trained LoRA a record."""
    place = {id(r): i for i, r in enumerate(records)}
    make = lambda group: as_lora(shine, flat[[place[id(r)] for r in group]], beside)
    return evaluate(shine.base, shine.tokenizer, records, "trained", make_lora=make)


def choose_rates(shine, records, kinds=KINDS):
    """The learning rate of each kind with the best F1 on other texts, at the count in the middle -> ({kind: lr}, {kind: {lr: F1}})."""
    tried = {}
    for kind in kinds:
        for lr in RATES:
            (flat,) = trained(shine, records, kind, {kind: lr}, (SFT[1] if kind == "sft" else TTT[3],)).values()
            rows = score(shine, records, flat, kind == "shine+ttt")
            tried.setdefault(kind, {})[lr] = round(100 * sum(r["f1"] for r in rows) / len(rows), 1)
    return {kind: max(f1, key=f1.get) for kind, f1 in tried.items()}, tried


def costs(shine, records, rates, conditions=tuple(CONDITIONS)):
    """What a condition costs for one text and its first question, medians over records, one at a time (paper, section 7).

    Memory of a training is that of one step; FLOPs are those of the first step (with the start, where that is generated) and of as many second ones.
    """
    shine.requires_grad_(False)      # torch's counter follows modules by hooks, which fail on parameters met without a gradient
    generated = lambda r: generated_part(shine, shine.generate_lora(r["context"]))

    def training(kind, rows, steps, start=lambda r: plain_start(shine, 1)):
        return steps, lambda r, n: [flat for _, flat in fit(shine, start(r), [rows(r)], n, rates[kind], train_dtype(shine), beside=kind == "shine+ttt")][-1]

    text = lambda r: text_rows(shine, r)
    ways = {"shine": (1, lambda r, n: generated(r)), "in-context": (0, None), "question": (0, None),
            "ttt 30": training("ttt", text, 30), "shine+ttt 30": training("shine+ttt", text, 30, generated)}
    for count in SFT:
        if all(len(r.get("others", ())) >= count for r in records):
            ways[f"sft {count}"] = training("sft", lambda r, count=count: conversation_rows(shine, r, count), EPOCHS * count)
    table = {}
    for name, (steps, prepare) in ((name, way) for name, way in ways.items() if name in conditions or name.split()[0] in rates):
        rows = []
        for r in records:
            started = time.perf_counter()
            lora = as_lora(shine, prepare(r, steps), name.startswith("shine")) if prepare else None
            seconds = time.perf_counter() - started if prepare else 0.0
            talk = shine.conversation(lora, r["context"] if name == "in-context" else None)
            ids = torch.tensor([talk.prompt(r["conversations"][0]["content"])], device=shine.device)
            times = [time.perf_counter()]
            for _ in shine.base.generate(ids, None, lora, 16):
                times.append(time.perf_counter())
            with FlopCounterMode(display=False) as first, torch.no_grad():
                shine.base.hidden(ids, None, lora)
            row = {"prepare s": seconds, "first token s": times[1] - times[0], "tokens/s": 15 / (times[-1] - times[1]), "prompt tokens": ids.shape[1],
                   "GFLOP of the prompt": first.get_total_flops() / 1e9, "GFLOP to prepare": 0.0, "MiB to prepare": 0.0}
            if prepare:
                done = []
                for n in (1, min(2, steps)):
                    with FlopCounterMode(display=False) as counter:
                        prepare(r, n)
                    done.append(counter.get_total_flops() / 1e9)
                with Peak(shine) as live:
                    prepare(r, 1)
                row |= {"GFLOP to prepare": done[0] + (steps - 1) * (done[1] - done[0]), "MiB to prepare": live.peak / 2 ** 20}
            rows.append(row)
        table[name] = {k: float(f"{np.median([row[k] for row in rows]):.4g}") for k in rows[0]}
    return table


# ---------------------------------------------------------------------------- scoring


def interval(rows, key, draws=1000):
    """Mean of rows[key] in percent and its 95 % interval, texts drawn with replacement."""
    texts = {}
    for row in rows:
        texts.setdefault(row["record"], []).append(row[key])
    sums, counts = np.array([[sum(v), len(v)] for v in texts.values()], dtype=float).T
    pick = np.random.default_rng(0).integers(0, len(sums), (draws, len(sums)))
    low, high = np.percentile(sums[pick].sum(1) / counts[pick].sum(1), [2.5, 97.5])
    return {"mean": round(100 * sums.sum() / counts.sum(), 2), "low": round(100 * low, 2), "high": round(100 * high, 2), "questions": len(rows)}


def groups(records, rows, sizes):
    """{name: rows}: everything, then by turn, length of the text (sizes: tokens of each), and kind of question, facts, where the set says so."""
    out = {"all": rows}
    spans = [f"text of {low} to {high - 1} tokens" for low, high in zip(LENGTHS, LENGTHS[1:])] + [f"text of {LENGTHS[-1]} tokens or more"]
    for row in rows:
        meta, turns = records[row["record"]].get("meta"), len(records[row["record"]]["conversations"]) // 2
        meta = meta if isinstance(meta, dict) and isinstance(meta.get("turns"), list) and len(meta["turns"]) == turns else {}
        names = [f"turn {min(row['turn'] + 1, 8)}"] + [spans[bisect_right(LENGTHS, sizes[row["record"]]) - 1]] + (["conversations of 3 or more turns"] if turns >= 3 else [])
        names += [f"kind: {meta['turns'][row['turn']]}"] if "turns" in meta else []
        names += [f"{meta['facts']} facts"] if "facts" in meta else []
        names += [f"source: {records[row['record']]['source']}"] if "source" in records[row["record"]] else []
        for name in names:
            out.setdefault(name, []).append(row)
    return out


def measure(shine, records, rates=None, conditions=tuple(CONDITIONS)):
    """-> {"conditions": {condition: {"em", "f1", "seconds", "groups"}}, "answers": [...]}; with rates the baselines too."""
    result, answers = {}, [{"context": r["context"], "turns": []} for r in records]
    sizes = [len(shine.tokenizer.encode(r["context"].strip())) for r in records]
    flats = {name: flat for kind in rates or () for name, flat in trained(shine, records, kind, rates).items()}
    for condition in [*conditions, *flats]:
        started = time.perf_counter()
        rows = score(shine, records, flats[condition], condition.startswith("shine")) if condition in flats else evaluate(shine.base, shine.tokenizer, records, condition, shine)
        seconds = time.perf_counter() - started
        result[condition] = {"em": interval(rows, "em"), "f1": interval(rows, "f1"), "seconds": round(seconds, 1),
                             "groups": {name: {"em": interval(part, "em"), "f1": interval(part, "f1")["mean"]}
                                        for name, part in sorted(groups(records, rows, sizes).items())}}
        for row in rows:
            turns = answers[row["record"]]["turns"]
            if row["turn"] >= len(turns):
                question, gold = (t["content"] for t in records[row["record"]]["conversations"][2 * row["turn"]:][:2])
                turns.append({"asked": question, "answer": gold})      # "question" is a condition
            turns[row["turn"]][condition] = row["prediction"]
    return {"conditions": result, "answers": answers}


def by_condition(result):
    """Markdown: one row a condition."""
    show = lambda v: f"{v['mean']:.1f} ({v['low']:.0f}-{v['high']:.0f})"
    return "\n".join(["| | EM | F1 |", "|---|---|---|"] + [f"| {CONDITIONS.get(name, name)} | {show(r['em'])} | {show(r['f1'])} |" for name, r in result.items()])


def table(result):
    """Markdown: one row a group of questions, for the three conditions of the paper's figure."""
    result = {name: r for name, r in result.items() if name in CONDITIONS}
    lines = ["| | " + " | ".join(f"{CONDITIONS[c]}: EM" for c in result) + " | " + " | ".join(f"{CONDITIONS[c]}: F1" for c in result)
             + " | questions |", "|---" * (2 * len(result) + 2) + "|"]
    for name in next(iter(result.values()))["groups"]:
        part = [r["groups"][name] for r in result.values()]
        em = [f"{p['em']['mean']:.1f} ({p['em']['low']:.1f}-{p['em']['high']:.1f})" if name == "all" else f"{p['em']['mean']:.1f}" for p in part]
        lines.append(f"| {name} | " + " | ".join(em) + " | " + " | ".join(f"{p['f1']:.1f}" for p in part) + f" | {part[0]['em']['questions']} |")
    return "\n".join(lines)


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="JSON lines: context, conversations, optionally accept (right answers of each question)")
    add("--generate", type=positive(int), metavar="N", help="N held-out generated texts instead")
    add("--split", choices=("heldout", "train"), default="heldout", help="with --generate: words never used in training, or those used")
    add("--scenes", nargs="?", const="", metavar="PREFIX", help="with --generate: scenes of assets/scenes, all or those whose names begin so, filled with such words: how well "
        "what training has met is learnt, and an evaluation of weights that have not met them (train.py --skip-scenes)")
    add("--turns", type=positive(int), help="with --generate: questions on each text (default: 1 to 8)")
    add("--facts", type=positive(int), help="with --generate: facts in each text (default: 1 to 8)")
    add("--only", nargs="+", choices=CONDITIONS, help="these conditions; what --json has of the others on the same texts and language model is kept; with "
        "--baselines: of those only what starts from the generated LoRA, if SHINE is named")
    add("--baselines", action="store_true", help="also LoRAs trained by gradient, and what each condition costs")
    add("--rates", metavar="RESULT", help="with --baselines: learning rates and costs as this result has them, not found anew")
    add("--typed", action="store_true", help="the texts and what is said about them as people type: short units, signs of money, small letters (data.typist)")
    add("--limit", type=positive(int), help="at most so many texts of the set, evenly spread over it")
    add("--model", default=str(DEFAULT_MODEL))
    add("--json", metavar="OUT", help="write everything measured")
    add("--answers", metavar="OUT", help="write every text, question and answer")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--float32", action="store_true", help="also where the device multiplies bf16")
    add("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if (args.data is None) == (args.generate is None):
        parser.error("give --data FILE or --generate N")
    if args.rates and not args.baselines:
        parser.error("--rates RESULT is for --baselines")
    return args


def reconstruction(shine, texts, longest=128, batch=50):
    """How much of the texts their LoRAs give back (paper, section 6): the tokens that are right, each behind the true ones before it; and the texts
    of at most `longest` tokens that are right to the last sign when they are written out with nothing but the LoRA."""
    short = sorted((t for t in texts if len(shine.tokenizer.encode(t.strip())) <= min(longest, shine.config.context_length)), key=len)
    right, ask = 0, [("user", [shine.tokenizer.recon])]
    for first in range(0, len(short), batch):
        group = short[first:first + batch]
        written = answer_batch(shine.base, shine.tokenizer, [ask] * len(group), shine.generate_lora(group), max_new_tokens=longest + 8)
        right += sum(a == t.strip() for a, t in zip(written, group))
    out = {"reconstruction token accuracy": round(100 * token_accuracy(shine, texts), 2)}
    return out | ({"written out": {"texts": len(short), "right": round(100 * right / len(short), 2)}} if short else {})


def texts(args):
    """The records that the flags ask for, of a file or generated; --typed: as a typist has each."""
    return [as_typed(record, random.Random(i)) for i, record in enumerate(untyped(args))] if args.typed else untyped(args)


def as_typed(record, rng):
    """A record in another way of writing; what was right stays right."""
    typed = typist(record["context"], rng)
    turns = [turn | {"content": typed(turn["content"], turn["role"] == "user")} for turn in record["conversations"]]
    golds = record.get("accept") or [[turn["content"]] for turn in record["conversations"][1::2]]
    return record | {"context": typed(record["context"]), "conversations": turns, "accept": [[*gold, *map(typed, gold)] for gold in golds]}


def untyped(args):
    """`texts` before a typist has them."""
    if args.data:
        records = read_conversations(args.data)
        n, wanted = len(records), min(args.limit or len(records), len(records))
        return [records[i * n // wanted] for i in range(wanted)]      # sets are often in the order of their sources
    source = Source(args.split)
    if args.scenes is not None:
        source.scene_share, source.scenes = 1.0, source.scenes_named(args.scenes)
    return [source.sample(random.Random(args.seed * 10**6 + i), args.facts, args.turns, OTHERS if args.baselines else ()) for i in range(args.generate)]


def main(argv=None):
    args = parse(argv)
    kept = read_json(args.json) if args.only and args.json and Path(args.json).is_file() else {}
    warnings.filterwarnings("ignore", message="the text is longer")
    device, dtype, why = pick_device(args.device, args.float32)
    shine, records = Shine.load(args.model, device, dtype), texts(args)
    longer = sum(shine.encode_context(r["context"])[1] > 0 for r in records)
    about = {"set": Path(args.data).name if args.data else f"{args.generate} generated texts, split {args.split}, seed {args.seed}"
             + (f", scenes {args.scenes or 'of all names'}" if args.scenes is not None else "") + ", as people type" * args.typed,
             "model": Path(args.model).name, "language model": shine.base_id, "machine": why, "threads": torch.get_num_threads(),
             "torch": torch.__version__, "texts": len(records), "texts cut to the model's length": longer}
    if different := [k for k in ("set", "language model", "texts") if kept.get(k, about[k]) != about[k]]:
        raise UserError(f"{args.json}: its {different[0]} is {kept[different[0]]}, here it is {about[different[0]]}; without --only it is made anew")
    conditions, rates, extra, known = args.only or tuple(CONDITIONS), None, {}, tuple(CONDITIONS)
    if args.baselines:
        kinds, known = KINDS if not args.only else ("shine+ttt",) if "shine" in args.only else (), known + KINDS
        if args.rates:
            extra = {name: read_json(args.rates).get(name, {}) for name in FOUND}
            rates = {kind: extra["learning rates"][kind] for kind in kinds if kind in extra["learning rates"]}
            if len(rates) < len(kinds):
                raise UserError(f"{args.rates} has no learning rate of {', '.join(kind for kind in kinds if kind not in rates)}: it was made without --baselines")
        else:
            others = [Source("heldout").sample(random.Random(10**8 + i), n_turns=4, others=OTHERS) for i in range(RATED)]
            rates, tried = choose_rates(shine, others, kinds)
            extra = dict(zip(FOUND, (rates, tried, costs(shine, records[:5], rates, conditions))))
        extra = {name: kept.get(name, {}) | part for name, part in extra.items()}
    result = measure(shine, records, rates, conditions)
    answers = result.pop("answers")
    result["conditions"] = {c: r for c, r in kept.get("conditions", {}).items() if c.split()[0] in known} | result["conditions"]
    result |= extra | about
    result |= {k: kept[k] for k in ("reconstruction token accuracy", "written out") if k in kept}      # SHINE's
    if "shine" in conditions:
        result |= reconstruction(shine, [r["context"] for r in records[:200]])
    print(by_condition(result["conditions"]) + "\n\n" + table(result["conditions"]))
    print("\n" + "\n".join(f"{k}: {v}" for k, v in result.items() if k != "conditions"))
    if args.json:
        write_json(args.json, result)
    if args.answers:
        write_json(args.answers, answers)


if __name__ == "__main__":
    run(main)
