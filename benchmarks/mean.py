"""The mean of the weights of models of one training, as a model folder.

    python -m benchmarks.mean OUT --model 0.5=runs/base 0.25=runs/a 0.25=runs/b [--hypernet 0.5=runs/a 0.5=runs/pretrain]

Points of one training that went on can be added up: their mean often answers texts of a kind they have not met better than the last of
them (RUNS.md). --model: shares that make 1, each of a folder with a language model; its settings and the tokenizer are those of the
first. --hypernet: likewise, of hypernetworks made for these language models or for ones near them; without it there is none in OUT, and
`train.py --stage pretrain --model OUT --hypernet FOLDER` makes one.
"""
from pathlib import Path

import torch

from data import Parser, run
from model import LanguageModel, UserError, new_folder
from shine import Shine, load_tokenizer
from train import save_base


def part(text):
    """An argparse type: "0.5=FOLDER" -> (0.5, "FOLDER")"""
    share, _, folder = text.partition("=")
    return float(share), Path(folder)


part.__name__ = "SHARE=FOLDER"


@torch.no_grad()
def mean(parts, load, tensors):
    """`parts` [(share, folder)] -> the first as load(folder) gives it, its parameters, tensors(model) {name: parameter}, the mean over all in float32."""
    if abs(sum(share for share, _ in parts) - 1) > 1e-6:
        raise UserError(f"the shares {', '.join(f'{share:g}' for share, _ in parts)} make {sum(share for share, _ in parts):g}, not 1")
    models = [load(folder) for _, folder in parts]
    for (_, folder), model in zip(parts, models):
        if model.config != models[0].config:
            raise UserError(f"{folder} has other settings than {parts[0][1]}: {model.config} and {models[0].config}")
    for name, parameter in tensors(models[0]).items():
        parameter.data = sum(share * tensors(model)[name].float() for (share, _), model in zip(parts, models))
    return models[0]


def main(argv=None):
    parser = Parser(description="The mean of the weights of models of one training, as a model folder.")
    parser.add_argument("out", metavar="OUT", help="new folder")
    parser.add_argument("--model", nargs="+", type=part, required=True, metavar="SHARE=FOLDER", help="language models")
    parser.add_argument("--hypernet", nargs="+", type=part, metavar="SHARE=FOLDER", help="hypernetworks")
    args = parser.parse_args(argv)
    base = mean(args.model, LanguageModel.load, lambda model: dict(model.named_parameters()))
    base.name, tokenizer = Path(args.out).resolve().name, load_tokenizer(args.model[0][1], base)
    shine = args.hypernet and mean(args.hypernet, lambda folder: Shine.load(folder, base=base, tokenizer=tokenizer, adopt=True), Shine.trained)
    with new_folder(args.out) as out:
        save_base(base, out)
        tokenizer.save(out)
        if shine:
            shine.save(out)


if __name__ == "__main__":
    run(main)
