"""Where in a generated LoRA is the text? Parts of it are replaced by what they are on average over other texts, and questions asked.

    python -m benchmarks.where [--model DIR] [--json OUT] [--gradient 0: without the last part, which takes the most time]

A part that is replaced still does what it does for every text (to answer briefly, to not say that there is no text), and nothing for
this one. Beside it the share of a part's numbers that depends on the text: variance over texts over mean square. And what the part can
hold: from the mean on, it alone is trained by gradient on ten other conversations about each text, and the same questions are asked.
"""
import argparse
import random
from pathlib import Path

import torch

from benchmarks.quality import EPOCHS, OTHERS, conversation_rows, fit, generated_part, interval, score, train_dtype
from data import Parser, Source, positive, run
from model import map_lora, write_json
from shine import DEFAULT_MODEL, LoRA, Shine
from train import evaluate

WRITERS = ("self_attn.o_proj", "mlp.down_proj")      # the two linears that write to the residual stream
PARTS = {      # name: is (layer counted from the end, linear, half) the text's own?
    "all of it": lambda above, linear, half: True,
    "none of it": lambda above, linear, half: False,
    "B alone": lambda above, linear, half: half == "B",
    "A alone": lambda above, linear, half: half == "A",
    "the last layer": lambda above, linear, half: above == 0,
    "the last three layers": lambda above, linear, half: above < 3,
    "all but the last layer": lambda above, linear, half: above > 0,
    "o_proj and down_proj of the last layer": lambda above, linear, half: above == 0 and linear in WRITERS,
    "their B alone": lambda above, linear, half: above == 0 and linear in WRITERS and half == "B",
    "the same B one layer before": lambda above, linear, half: above == 1 and linear in WRITERS and half == "B",
    "all but these two": lambda above, linear, half: above > 0 or linear not in WRITERS,
}


def mean_row(lora):
    """The mean over a LoRA's rows: A (rows, in, r) -> (1, in, r), B (rows, r, out) -> (1, r, out)."""
    return map_lora(lambda t: t.mean(0, keepdim=True), lora)


def mixed(lora, mean, own):
    """LoRA of the same rows: where own(layer from the end, linear, half) its own numbers, elsewhere those of `mean`."""
    pick = lambda i, name, k, half: lora[i][name][k] if own(len(lora) - 1 - i, name, half) else mean[i][name][k].expand_as(lora[i][name][k])
    return LoRA([{name: tuple(pick(i, name, k, half) for k, half in enumerate("AB")) for name in layer} for i, layer in enumerate(lora)], lora.r)


def shares(lora):
    """{linear: {half: [share of the numbers of each layer that has any that depends on the text]}} of a LoRA of many rows."""
    share = lambda t: round(((t - t.mean(0)).square().mean() / t.square().mean()).item(), 4)
    return {name: {half: [share(layer[name][k]) for layer in lora if layer] for k, half in enumerate("AB")} for name in lora[-1]}


def by_gradient(shine, records, mean, own, rate):
    """One LoRA a record, flat (rows, K, P): the mean, and where own(...) what gradient steps on the record's other conversations make of it."""
    mask = generated_part(shine, mixed(LoRA(map_lora(torch.ones_like, mean), shine.config.r), map_lora(torch.zeros_like, mean), own))
    rows, start = [conversation_rows(shine, r, len(OTHERS)) for r in records], generated_part(shine, mean).repeat(len(records), 1, 1)
    steps = EPOCHS * len(OTHERS) if mask.any() else 0
    return [start, *(flat for _, flat in fit(shine, start, rows, steps, rate, train_dtype(shine), mask, beside=True))][-1]


def asked_before(records):
    """{(record, turn)} of the questions that stand with their answer in the record's other conversations, word for word."""
    pairs = lambda turns: [(q["content"], a["content"]) for q, a in zip(turns[::2], turns[1::2])]
    return {(i, turn) for i, r in enumerate(records) for turn, pair in enumerate(pairs(r["conversations"])) if any(pair in pairs(other) for other in r["others"])}


def measure(shine, records, others, gradient, rate):
    """-> {"parts": {part: exact match}, "by gradient": the same, "by gradient, not asked before": of these questions, "shares": ...};
    others: texts whose mean LoRA stands in.

    gradient: so many of the records are learnt by gradient.
    """
    elsewhere = shine.generate_lora(others)
    mean, parts, held, unmet, some = mean_row(elsewhere), {}, {}, {}, records[:gradient]
    met = asked_before(some)
    for part, own in PARTS.items():
        rows = evaluate(shine.base, shine.tokenizer, records, part, make_lora=lambda group: mixed(shine.generate_lora([r["context"] for r in group]), mean, own))
        parts[part] = interval(rows, "em")
        print(f"{part}: {parts[part]['mean']:.1f}", flush=True)
    for part, own in PARTS.items() if some else ():
        rows = score(shine, some, by_gradient(shine, some, mean, own, rate), beside=True)
        held[part], unmet[part] = interval(rows, "em"), interval([row for row in rows if (row["record"], row["turn"]) not in met], "em")
        print(f"{part}, by gradient: {held[part]['mean']:.1f}, not asked before {unmet[part]['mean']:.1f}", flush=True)
    return {"parts": parts, "by gradient": held, "by gradient, not asked before": unmet, "shares": shares(shine.apart(elsewhere)[0])}


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--texts", type=positive(int), default=150, help="held-out generated texts, 4 questions each")
    parser.add_argument("--gradient", type=positive(int, zero=True), default=40, help="of these so many by gradient too")
    parser.add_argument("--rate", type=positive(float), default=0.01, help="its learning rate (default: the one benchmarks.quality chose)")
    parser.add_argument("--json", metavar="OUT", help="write everything measured")
    args = parser.parse_args(argv)
    shine, source = Shine.load(args.model), Source("heldout")
    records = [source.sample(random.Random(4 * 10**6 + i), n_turns=4, others=OTHERS) for i in range(args.texts)]
    others = [source.sample(random.Random(5 * 10**6 + i), n_turns=1)["context"] for i in range(64)]
    result = measure(shine, records, others, args.gradient, args.rate) | {"model": Path(args.model).name, "texts": args.texts, "rate": args.rate, "torch": torch.__version__}
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run(main)
