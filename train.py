"""One training loop for every stage; a stage is data + what trains + defaults.

    stage      data (data.Examples)                              what trains                        starts from
    base       conversations with the text in the prompt, text   the language model                 nothing, or --model
    gist       as pretrain, and questions; no LoRA: the          memory embeddings, meta LoRA       the base of --model
               conversation sees the memory tokens themselves
    pretrain   reconstruction and completion (section 6)         memory embeddings, meta LoRA, M2P, the base or hypernetwork of --model
                                                                 A of the LoRA and a LoRA for
                                                                 answering (with --no-static-a,
                                                                 as in the paper, neither)
    finetune   questions about a text                            the same                           the hypernetwork of --model,
                                                                                                    a new one where there is none

    python train.py --stage pretrain                     on a base that ships, procedural texts, a few minutes
    python train.py --stage base --preset tiny --text DIR --qa FILE --minutes 40 --out runs/tiny
    python train.py --stage pretrain --resume            exactly where a killed run stood, with its settings
    torchrun --nproc_per_node=4 train.py --stage pretrain
    python train.py --stage pretrain --base Qwen3-8B --preset paper --text DIR      the paper's settings, on its language model
    python train.py --stage pretrain --base qwen3-8b --preset paper --dry-run       what that takes, nothing allocated

What it writes into --out: the model folder that shine.py reads, log.jsonl, state.safetensors (masters, moments, position) for
--resume, and the one before it: should the loss rise far above what it was, training goes on from there at half the rates.
"""
import argparse
import ctypes
import json
import math
import os
import random
import re
import shutil
import string
import time
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data import (ASSETS, SPECIAL, Examples, Ids, Parser, Source, Tokenizer, batches, collate, load_assets, positive, read_conversations, read_texts, run,
                  share, train_bpe)
from m2p import AXES
from model import (PRESETS, QWEN3, Config, LanguageModel, Recorded, UserError, pick_device, read_header, read_json, weight_files, write_file,
                   write_json)
from shine import DEFAULT_MODEL, Shine, ShineConfig, answer_batch, holds_hypernet, hypernet_config, load_tokenizer

STAGES = {  # the defaults of each stage; more of them in COMMON
    "base": dict(lr=2e-3, muon_lr=4e-3, warmup=100, batch=64, weight_decay=0.05, betas=(0.9, 0.98), curriculum=20000, minutes=30),
    "gist": dict(lr=4e-3, muon_lr=0.0, warmup=30, batch=8, weight_decay=0.01, betas=(0.9, 0.999), curriculum=0, minutes=10,
                 question_share=0.6, conversations=4),
    "pretrain": dict(lr=4e-3, muon_lr=6e-3, warmup=100, batch=32, weight_decay=0.01, betas=(0.9, 0.999), curriculum=0, minutes=10),
    "finetune": dict(lr=1e-3, muon_lr=2e-3, warmup=100, batch=32, weight_decay=0.01, betas=(0.9, 0.999), curriculum=0, minutes=10),
}
COMMON = dict(accumulate=1, question_share=0.0, conversations=1, max_turns=10, packing=0.4, text_share=0.5, record_share=0.15, wild_share=0.3, random_share=0.15,
              rival_share=0.25, mined_share=0.15, scene_share=0.25, company_share=0.5, exchange_share=0.3, typed_share=0.3)
SIZES = dict(rank=72, meta_rank=24, lora_layers=0, answer_rank=8, m2p_layers=4, context_length=192, conversation_length=256)      # of a new hypernetwork
PAPER = dict(batch=1, accumulate=4, muon_lr=0.0, rank=8, meta_rank=128, m2p_layers=4, m2p_norm=False, static_a=False, scale=0.001, packing=1.0,      # section 6, on 8 GPUs;
             text_share=1.0, record_share=1.0, wild_share=0.0, random_share=0.0, rival_share=0.0, mined_share=0.0, scene_share=0.0, company_share=0.0,
             exchange_share=0.0, typed_share=0.0)                    # real text only
PAPER_STAGES = {  # --preset paper, or paper-1qa in the finetune stage
    ("pretrain", "paper"): dict(lr=5e-5, warmup=200, context_length=1141, conversation_length=1150),
    ("finetune", "paper"): dict(lr=3e-5, warmup=400, context_length=1150, conversation_length=1150),
    ("finetune", "paper-1qa"): dict(lr=1e-5, warmup=400, context_length=2380, conversation_length=100, max_turns=1)}


# ---------------------------------------------------------------------------- scoring, as SQuAD does it
def normalize(text):
    """Lower case, no punctuation, no articles, single spaces: "The  Red hat." -> "red hat"."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction, accepted):
    return float(any(normalize(prediction) == normalize(a) for a in accepted))


def f1_score(prediction, accepted):
    """Token F1, the best over the accepted answers."""
    def one(answer):
        got, gold = normalize(prediction).split(), normalize(answer).split()
        same = sum((Counter(got) & Counter(gold)).values())
        if not got or not gold:
            return float(got == gold)
        return 2 * same / (len(got) + len(gold))
    return max(map(one, accepted))


@torch.no_grad()
def evaluate(base, tokenizer, records, condition, shine=None, batch=50, make_lora=None):
    """Answer every question of every record greedily, one conversation a record, with the model's own earlier answers.

    condition: "in-context" (text in the prompt), "question" (no text), "shine" (generated LoRA, no text).
    make_lora: records -> LoRA of one row each, in the place of the generated one under any other name of a condition.
    -> [{"record", "turn", "prediction", "em", "f1"}]
    """
    results = []
    for first in range(0, len(records), batch):
        group = records[first:first + batch]
        lora = make_lora(group) if make_lora else shine.generate_lora([r["context"] for r in group]) if condition == "shine" else None
        histories = [[] for _ in group]
        for turn in range(max(len(r["conversations"]) for r in group) // 2):
            rows = [i for i, r in enumerate(group) if len(r["conversations"]) > 2 * turn]
            asked = [histories[i] + [("user", group[i]["conversations"][2 * turn]["content"])] for i in rows]
            part = [{n: (A[rows], B[rows]) for n, (A, B) in layer.items()} for layer in lora] if lora else None
            contexts = [group[i]["context"] for i in rows] if condition == "in-context" else None
            for i, said, answer in zip(rows, asked, answer_batch(base, tokenizer, asked, part, contexts)):
                histories[i] = said + [("assistant", answer)]
                gold = [group[i]["conversations"][2 * turn + 1]["content"], *(group[i]["accept"][turn] if group[i].get("accept") else ())]
                results.append({"record": first + i, "turn": turn, "prediction": answer,
                                "em": exact_match(answer, gold), "f1": f1_score(answer, gold)})
    return results


@torch.no_grad()
def token_accuracy(shine, texts, gist=False):
    """Share of tokens that reconstruction gets right, each predicted behind the true ones before it (section 6).

    gist: by attention to the memory tokens, without the M2P and its LoRA."""
    right = total = 0
    for text in texts:
        ids, _ = shine.encode_context(text)
        tok = shine.tokenizer
        head = tok.roles["user"] + [tok.recon, tok.im_end] + tok.newline + tok.roles["assistant"]
        row = torch.tensor([head + ids], device=shine.device)
        context = torch.tensor([ids], device=shine.device)
        seen = {"memory": shine.memory_cache(context, torch.ones_like(context))} if gist else {"lora": shine.generate_lora(context)}
        guess = shine.base.head(shine.base.hidden(row, **seen)).argmax(-1)[0, len(head) - 1:-1]
        right, total = right + int((guess == row[0, len(head):]).sum()), total + len(ids)
    return right / total


# ---------------------------------------------------------------------------- setup
class Base(nn.Module):
    """The base stage as a module whose forward is the loss, like Shine's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, total=None):
        return self.model.loss(batch, total=total)

    def trained(self):
        return dict(self.model.named_parameters())


class Gist(nn.Module):
    """The gist stage likewise; a new M2P waits for the next stage."""

    def __init__(self, shine):
        super().__init__()
        self.shine = shine.requires_grad_(False)
        for p in self.trained().values():
            p.requires_grad_(True)

    def forward(self, batch, total=None):
        return self.shine.gist(batch, total)

    def trained(self):
        return {"memory": self.shine.memory, "meta_lora": self.shine.meta_lora}


class AdamW16(torch.optim.Optimizer):
    """AdamW with moments in bf16: 4 bytes a parameter instead of 8. The second moment moves by less than bf16 resolves (0.001 of
    it a step, against 0.004), so it is rounded up or down by chance, in proportion to what rounding cuts off."""

    def __init__(self, params, lr, betas, eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p, dtype=torch.bfloat16),
                              "exp_avg_sq": torch.zeros_like(p, dtype=torch.bfloat16)}
                state["step"] += 1
                m = state["exp_avg"].float().lerp_(p.grad.float(), 1 - b1)
                v = state["exp_avg_sq"].float().lerp_(p.grad.float().square(), 1 - b2)
                step = state["step"].item()
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(m, (v / (1 - b2 ** step)).sqrt_().add_(group["eps"]), value=-lr / (1 - b1 ** step))
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(round_by_chance(v))


class Muon(torch.optim.Optimizer):
    """Muon for matrices (out, in): a step along the momentum, made orthogonal by Newton-Schulz iterations, with AdamW's root mean square.

    torch.optim.Muon with two differences: the iterations run in `dtype` (torch's in bf16, which a CPU without bf16 hardware multiplies
    hundreds of times slower than float32), and on all matrices of one shape at once.
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95, iterations=5):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, iterations=iterations))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():      # many small matrices: one kernel for all of a shape, not one each
                grads, momenta = [p.grad for p in same], [self.state[p]["momentum_buffer"] for p in same]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])       # Nesterov's
                steps = orthogonal(torch.stack(ahead).to(self.dtype), group["iterations"]).to(same[0].dtype)
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, list(steps), alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def orthogonal(x, iterations):
    """x (n, out, in) = U S V^T -> about U V^T, each singular value between 0.7 and 1.2: x <- a x + (b G + c G G) x with G = x x^T."""
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        G = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(G, G, G, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def round_by_chance(x):
    """float32 -> float32 that bf16 holds exactly; right in the mean: the 16 bits that go are compared with random ones."""
    bits = x.view(torch.int32) + torch.randint_like(x, 2 ** 16, dtype=torch.int32)
    return (bits & ~0xFFFF).view(torch.float32)


def matrices(trained):
    """The names of the matrices of transformer layers, which Muon takes where it has a rate."""
    return {n for n, p in trained.items() if p.dim() == 2 and "layers." in n}


def make_optimizers(module, lr, muon_lr, weight_decay, betas, moments16=False, dtype=torch.float32, read_lr=None):
    """-> (optimizers, {clipping group: parameters}); together exactly what requires grad. Each group of an optimizer has its peak rate in "peak".

    With a muon_lr the matrices of transformer layers are Muon's (ahead of AdamW at equal samples: benchmarks/RUNS.md), AdamW
    has the rest, with read_lr (default lr) for what reads: memory embeddings and meta LoRA. Weight decay on matrices only. dtype: of Muon's iterations.
    """
    trained = module.trained()
    matrix = matrices(trained)
    vectors = {n for n, p in trained.items() if p.dim() < 2 or n in ("memory", "m2p.layer_pe", "m2p.token_pe")}   # no decay
    reading = set(trained) & {"memory", "meta_lora"}
    pick = lambda names: [p for n, p in trained.items() if n in names]
    adam = [{"params": pick(kind & part), "weight_decay": decay, "peak": peak}
            for part, peak in ((reading, read_lr or lr), (set(trained) - reading, lr))
            for kind, decay in ((vectors, 0.0), (set(trained) - vectors - (matrix if muon_lr else set()), weight_decay))]
    adam = [g for g in adam if g["params"]]
    optimizers = [AdamW16(adam, lr, betas) if moments16 else torch.optim.AdamW(adam, lr=lr, betas=betas, fused=True)]
    if muon_lr and matrix:      # an M2P of no layers has none
        optimizers.append(Muon([{"params": pick(matrix), "peak": muon_lr}], muon_lr, weight_decay, dtype))
    clips = {}
    for n, p in trained.items():      # memory embeddings meet RMSNorm: their gradient is of another size, so a group of its own
        clips.setdefault(n if n in reading else "rest", []).append(p)
    ours = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(ours) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    return optimizers, clips


def make_tokenizer(texts, vocab_size, seed=0):
    """BPE over generated texts with their questions, the special values of the word lists, and a part of the plain text."""
    source, rng, every = Source(), random.Random(seed), load_assets(ASSETS)[0]
    samples = [source.sample(rng) for _ in range(5 * vocab_size // 2)]
    lines = [" " + s["context"] + "".join(" " + t["content"] for t in s["conversations"]) for s in samples]
    words = [" " + w for kind in every.values() for w in kind if "{" not in w]
    rng.shuffle(part := list(texts))
    return Tokenizer(train_bpe(lines + words * 3 + [" " + t for t in part[:6000]], vocab_size))


def learning_rate(progress, step, peak, warmup):
    """Warm-up over `warmup` steps, then linear decay to zero at progress 1."""
    return peak * min(1.0, (step + 1) / max(1, warmup)) * max(0.0, 1 - progress)


BEFORE = "state.before.safetensors"      # the checkpoint before the last one
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")


def save_state(out, module, optimizers, state):
    """Everything a resumed run needs, in one file that is renamed into place; the one before it stays beside it, for go_back."""
    tensors = {"rng": torch.get_rng_state()}
    for name, p in module.trained().items():
        tensors["param." + name] = p.detach()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                assert key in MOMENTS, f"the optimizer keeps {key}, which a resumed run would miss"
                tensors[f"{key}.{name}"] = value
    path = out / "state.safetensors"
    if path.is_file():
        write_file(out / BEFORE, lambda p: shutil.copyfile(path, p))
    write_file(path, lambda p: save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, p, metadata={"state": json.dumps(state)}))
    write_json(out / "state.json", state)


def load_state(out, module, optimizers):
    """The inverse of save_state -> the state dict; a file of another run is refused."""
    path = out / "state.safetensors"
    trained = module.trained()
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    try:
        with safe_open(path, framework="pt") as file:
            state, names = json.loads(file.metadata()["state"]), set(file.keys())
            if {n[6:] for n in names if n.startswith("param.")} != set(trained):
                raise UserError(f"{path} belongs to a run of another stage or size")
            for n, p in trained.items():
                saved = file.get_tensor("param." + n)
                if saved.shape != p.shape:
                    raise UserError(f"{path}: {n} is {tuple(saved.shape)}, this run has {tuple(p.shape)}")
                p.data.copy_(saved)
                for key in MOMENTS:
                    if f"{key}.{n}" in names:
                        value, optimizer = file.get_tensor(f"{key}.{n}"), owner[id(p)]
                        small = isinstance(optimizer, AdamW16) and key != "step"
                        optimizer.state[p][key] = value.to(p.device, torch.bfloat16 if small else torch.float32)
            torch.set_rng_state(file.get_tensor("rng"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); start the run without --resume") from None
    return state


class Watch:
    """Tells when training has come apart: the mean loss of about the last 100 steps is 30 % (and 0.1) above the lowest it has been.

    Batches differ too much for fewer steps. Of 24 runs (benchmarks/RUNS.md) it finds the one that did, and of the others none rose by 10 %."""

    def __init__(self, steps=100):
        self.steps, self.seen, self.mean, self.lowest = steps, 0, 0.0, 1e9

    def __call__(self, loss):
        self.seen += 1
        self.mean += (loss - self.mean) / min(self.seen, self.steps)
        if self.seen >= self.steps:
            self.lowest = min(self.lowest, self.mean)
        return self.mean > 1.3 * self.lowest + 0.1


def go_back(out, module, optimizers, state, watch, rank, world, say):
    """Weights and moments of the checkpoint before the last one, which may have been ill already, and half the rates; data and clock go on."""
    before, last = out / BEFORE, out / "state.safetensors"
    if rank == 0 and before.is_file():
        before.replace(last)
    if world > 1:
        dist.barrier()
    state["slowed"] = state.get("slowed", 1.0) / 2
    step = load_state(out, module, optimizers)["step"] if last.is_file() else None
    say(f"step {state['step']}: the mean loss is {watch.mean:.2f} and was {watch.lowest:.2f}: training has come apart; " +
        (f"back to the weights of step {step}" if step is not None else "there is no checkpoint to go back to (--save-every)") +
        f", the rates are now {state['slowed']:g} of what they were to be")


def flags():
    """The parser of the command line; None where a default depends on the stage."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", required=True, choices=STAGES)
    add("--preset", choices=[*PRESETS, *QWEN3, "paper", "paper-1qa"],
        help="stage base: size of a new language model (default tiny); else paper, paper-1qa: the paper's settings")
    add("--model", default=None, help="model folder to start from (default: checkpoints/small on a GPU, checkpoints/tiny on a CPU; stage base: nothing)")
    add("--base", help="stages gist, pretrain and finetune: a Hugging Face Qwen3 folder as the frozen language model")
    add("--hypernet", help="stages gist, pretrain and finetune: start from this folder's hypernetwork, made for an earlier state of the language model, or, with "
        "--rank, --target-modules, --static-a, --lora-layers, --answer-rank, for another LoRA from as many memory tokens (a larger --rank: from more)")
    add("--out", default=None, help="folder to write (default: runs/STAGE)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--steps", type=positive(int), help="optimizer steps (instead of --minutes)")
    add("--minutes", type=positive(float), help="wall clock of the run; the learning rate decays to its end")
    add("--batch", type=positive(int), help="examples of one pass and process")
    add("--accumulate", type=positive(int), help="passes of one optimizer step")
    add("--lr", type=positive(float), help="peak, of AdamW")
    add("--muon-lr", type=positive(float, zero=True), help="peak, of Muon for the matrices of layers; 0: AdamW for everything")
    add("--read-lr", type=positive(float), help="peak, of AdamW for memory embeddings and meta LoRA (default: that of --lr, with --m2p-norm in the stage pretrain a quarter)")
    add("--warmup", type=positive(int, zero=True), help="steps")
    add("--weight-decay", type=positive(float, zero=True))
    add("--clip", type=positive(float), default=1.0, help="gradient norm of each clipping group")
    add("--text", help="folder of .txt / .txt.xz documents to mix in, or one such file")
    add("--qa", nargs="*", default=[], help="JSON-lines files of conversations to mix in")
    add("--strict", action="store_true", help="stop at a broken line of a QA file")
    add("--text-share", type=share, help="share of real passages among the passages (default 0.5 where --text gives some)")
    add("--record-share", type=share, help="share of real conversations among the conversations (default 0.15 where --qa gives some)")
    add("--copy-share", type=share, default=0.2, help="stage base: share of examples that repeat or complete the text")
    add("--plain-share", type=share, default=0.1, help="stage base: share of plain text, where --text gives some")
    add("--wild-share", type=share, help="share (default 0.3) of generated values that are any word of the tokenizer")
    add("--random-share", type=share, help="share (default 0.15) of passages to copy that are tokens in random order")
    add("--question-share", type=share, help="share of question examples in the stages pretrain (default 0) and gist (0.6)")
    add("--rival-share", type=share, help="share (default 0.25) of generated texts that say mostly one thing of several people")
    add("--scene-share", type=share, help="share (default 0.25) of generated texts that are one scene of assets/scenes")
    add("--company-share", type=share, help="share (default 0.5) of these scenes that stand in a text with one to three single facts about others")
    add("--exchange-share", type=share, help="share (default 0.3) of the values of a scene's own lists that come from another scene's, among those that look alike")
    add("--typed-share", type=share, help="share (default 0.3) of texts with short units, prices in signs, titles with a full stop and the like, or in small letters (data.typist)")
    add("--skip-scenes", default="", metavar="BEGINNINGS", help="scenes to leave out, by how their names begin (fh_,hm_), to test on them: benchmarks.quality --scenes")
    add("--mined-share", type=share, help="share (default 0.15 where --text gives some) of conversations on pieces of plain text (data.Miner)")
    add("--recall-share", type=share, default=0.0, help="question examples: share that asks for the whole text too (<RECON>)")
    add("--conversations", type=positive(int), help="question examples: so many conversations about one text, as far as they fit (default 1; stage gist 4)")
    add("--max-turns", type=positive(int), help="questions of one conversation (default 10, of which a real text has 8; --preset paper-1qa 1)")
    add("--max-facts", type=positive(int), default=8, help="facts in a generated text")
    add("--curriculum", type=positive(int, zero=True), help="examples over which texts grow from 2 facts to --max-facts")
    add("--packing", type=share, help="chance that one more short text joins a reconstruction example; 1: until it is full")
    add("--context-length", type=positive(int), help="longest text in tokens (default: that of --model, 192 for a new one)")
    add("--conversation-length", type=positive(int), help="longest conversation in tokens (likewise, 256)")
    add("--vocab-size", type=int, default=8192, help="of a new tokenizer (stage base), at least 256 bytes and what is special")
    add("--tokenizer", help="stage base: a folder whose tokenizer a new language model takes instead of a new one")
    add("--rank", type=positive(int), help="r of a new hypernetwork (default 72, with --no-static-a 4); larger than that of --hypernet, where it generates B of one linear: it grows")
    add("--lora-layers", type=positive(int, zero=True), help="of a new hypernetwork: the last so many layers get a generated LoRA, the others none (default 0: all); with --hypernet another number")
    add("--answer-rank", type=positive(int, zero=True), help="of a trained LoRA for answering, the same for every text, beside the generated one (default 8, with --no-static-a 0: none); with --hypernet it may be added")
    add("--meta-rank", type=positive(int, zero=True), help="of a new hypernetwork (default 24); larger than that of --model: its meta LoRA grows")
    add("--m2p-layers", type=positive(int, zero=True), help="of a new hypernetwork (default 4)")
    add("--m2p-axes", choices=AXES, help="of a new hypernetwork (default both): along which axes of its grid the M2P attends")
    add("--m2p-norm", action=argparse.BooleanOptionalAction, help="of a new hypernetwork (default: yes): memory states of unit size for the M2P")
    add("--m2p-heads", type=positive(int), help="of a published hypernetwork in --model, whose files do not tell it")
    add("--target-modules", metavar="NAMES", help="of a new hypernetwork: the linears it generates a LoRA for: down_proj (default), some, o_proj,down_proj, or all (default with --no-static-a)")
    add("--static-a", action=argparse.BooleanOptionalAction, help="of a new hypernetwork (default: yes): A of its LoRA is trained and the same for every text, B alone generated; no: both are, as in the paper")
    add("--scale", type=positive(float), help="of a new hypernetwork (default: 0.02, from H = 192 on smaller in proportion)")
    add("--eval-every", type=positive(float), default=5, help="minutes (steps with --steps) between evaluations and checkpoints")
    add("--save-every", type=positive(float), help="the same between checkpoints without one (default: none)")
    add("--eval-texts", type=positive(int), default=60)
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--float32", action="store_true", help="activations, and Muon's iterations, in float32 whatever the machine")
    add("--compile", action="store_true", help="torch.compile the layers, for long runs on a GPU; on a CPU it takes minutes and gains nothing in bf16")
    add("--cuda-graphs", action="store_true", help="on one GPU: record each shape of batch as a CUDA graph, which starts a pass at once; lengths in multiples of 32")
    add("--checkpointing", action="store_true", help="activation checkpointing: less memory, a third more work")
    add("--moments16", action="store_true", help="AdamW's moments in bf16 instead of float32")
    add("--shard", action="store_true", help="under torchrun: spread the frozen language model over the GPUs (fully_shard)")
    add("--dry-run", action="store_true", help="print parameters, memory and FLOPs of such a run and exit; nothing is allocated")
    add("--flops", type=positive(float), default=4e14, help="FLOP/s a GPU reaches, for --dry-run's times")
    add("--workers", type=positive(int, zero=True), default=1, help="processes that make the batches (a GPU eats what several make), the same in a resumed run; 0: the loop does")
    return parser


def check_flags(args):
    """Refuse flags that do not fit the stage or each other."""
    base, paper = args.stage == "base", str(args.preset).startswith("paper")
    fits = [preset for stage, preset in PAPER_STAGES if stage == args.stage]
    for wrong, complaint in (
            (args.tokenizer and (not base or args.model), f"--tokenizer {args.tokenizer} is for a new language model: --stage base without --model"),
            (base and (args.base or paper), f"--{'base' if args.base else 'preset'} {args.base or args.preset} is for the stages gist, pretrain and finetune; "
                                            "stage base makes a language model of --preset " + ", ".join(PRESETS) + ", or goes on with --model DIR"),
            (base and args.hypernet, f"--hypernet {args.hypernet} is for the stages gist, pretrain and finetune: stage base has no hypernetwork"),
            (args.vocab_size < (least := 256 + len(SPECIAL)), f"--vocab-size {args.vocab_size} is less than the {least} tokens that every tokenizer has"),
            (base and args.read_lr, "--read-lr is for the stages gist, pretrain and finetune: stage base has no memory embeddings and no meta LoRA"),
            (base and args.shard, "--shard spreads a frozen language model: stages gist, pretrain and finetune"),
            (base and args.preset in QWEN3 and not (args.model or args.dry_run), f"--preset {args.preset}: from nothing, only with --dry-run; choose one of {', '.join(PRESETS)}"),
            (not base and args.preset and args.preset not in fits, f"--preset {args.preset} is not one of stage {args.stage}: " + " or ".join([*fits, "none"])),
            (not base and args.preset and not (args.steps or args.minutes or args.dry_run),
             f"--preset {args.preset}: say how long with --steps N or --minutes M (the paper: one pass over its 6 B tokens, two over the MQA data, one over the 1QA data)"),
            # a compiled layer would be compiled again for each state of the MemoryCache
            (args.stage == "gist" and args.compile, "--compile is for the other stages: in the stage gist layers pass keys and values on, which is not compiled; leave it out")):
        if wrong:
            raise UserError(complaint)


def parse(argv):
    """Flags -> namespace: what is said; of a resumed run what is not said as it was; else the defaults of the stage."""
    parser = flags()
    args = parser.parse_args(argv)
    if args.resume:
        anew = {"resume", "dry_run", "model", "hypernet", "out", "device"} | ({"steps", "minutes"} if args.steps or args.minutes else set())
        parser.set_defaults(**{name: value for name, value in saved_args(args).items() if name in vars(args) and name not in anew})
        args = parser.parse_args(argv)
    check_flags(args)
    defaults = COMMON | STAGES[args.stage]
    if args.stage == "base":
        args.preset = args.preset or "tiny"
    elif args.preset:
        defaults |= PAPER | PAPER_STAGES[args.stage, args.preset]
    elif args.stage == "pretrain" and not unit_memory_states(args):      # without them the higher rates are worse than the lower ones
        defaults |= {name: STAGES["finetune"][name] for name in ("lr", "muon_lr")}
    for name, value in defaults.items():
        if getattr(args, name, None) is None and not (name == "minutes" and args.steps is not None):
            setattr(args, name, value)
    if args.read_lr is None and args.stage != "base":      # reading that trains as fast as the rest comes apart in a long run
        args.read_lr = args.lr / 4 if args.stage == "pretrain" and not args.preset and unit_memory_states(args) else args.lr
    return args


def saved_args(args):
    """The settings of the run in --out, {} where there is none."""
    out = Path(args.out or f"runs/{args.stage}")
    try:
        with safe_open(out / "state.safetensors", framework="pt") as file:
            before = json.loads(file.metadata()["state"]).get("args", {})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):      # load_state says what is wrong
        return {}
    if before.get("stage", args.stage) != args.stage:
        raise UserError(f"{out} holds a run of stage {before['stage']}: go on with --stage {before['stage']}")
    return before if args.stage != "base" else before | {"read_lr": None}


def unit_memory_states(args):
    """Whether the hypernetwork of this run, a new one or that of a folder, divides memory states by their root mean square."""
    start = args.out or f"runs/{args.stage}" if args.resume else args.hypernet or args.model
    kind = holds_hypernet(start) if start else None
    return bool(read_json(Path(start) / "hypernet.json").get("m2p_norm")) if kind == "ours" else kind is None and args.m2p_norm is not False


def new_config(args, config):
    """The sizes of a new hypernetwork for a language model: what the flags say, else SIZES."""
    static_a = args.static_a is not False
    sizes = SIZES if static_a else SIZES | {"rank": 4, "answer_rank": 0}      # as many memory tokens: B of down_proj is (r, H), one a rank
    size = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in sizes.items()}
    scale = round(args.scale or 0.02 * min(1, 192 / config.hidden_size), 6)      # see ShineConfig.scale
    return ShineConfig(size["rank"], size["meta_rank"], size["m2p_layers"], args.m2p_heads or 0, scale, size["context_length"],
                       size["conversation_length"], args.m2p_axes or "both", args.m2p_norm is not False, args.target_modules or ("down_proj" if static_a else "all"), static_a,
                       size["lora_layers"], size["answer_rank"])


FLAGS = {"r": "rank", "meta_r": "meta_rank", "answer_r": "answer_rank"}      # fields of ShineConfig whose flag has another name


def asked_sizes(args, *names):
    """{field of ShineConfig: what its flag says} of those that are given."""
    return {name: value for name in names if (value := getattr(args, FLAGS.get(name, name))) is not None}


def shipped(device):
    """The folder that ships whose language model a run starts from: on a CPU the smaller one, which learns in minutes."""
    return DEFAULT_MODEL if device.type == "cuda" else DEFAULT_MODEL.parent / "tiny"


def build(args, device, dtype, texts):
    """-> (module whose forward is the loss, language model, tokenizer, Shine or None)"""
    if args.stage == "base":
        args.context_length, args.conversation_length = (getattr(args, n) or SIZES[n] for n in ("context_length", "conversation_length"))
        if args.model:
            model = LanguageModel.load(args.model, device, torch.float32)
            tokenizer = load_tokenizer(args.model, model)
        else:
            tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else make_tokenizer(texts, args.vocab_size, args.seed)
            model = LanguageModel(Config(vocab_size=tokenizer.vocab_size, **PRESETS[args.preset]), args.seed).to(device)
        model.compute_dtype, model.checkpointing = dtype, args.checkpointing
        return Base(model), model, tokenizer, None
    folder = Path(args.base or args.model or shipped(device))
    world = int(os.environ.get("WORLD_SIZE", 1))
    first = "cpu" if args.shard and world > 1 else device                                   # each GPU takes its part of each layer
    model = LanguageModel.load(folder, first, None if args.base and device.type == "cpu" else dtype)      # frozen: cast once
    model.compute_dtype, tokenizer = dtype, load_tokenizer(folder, model)
    if args.stage == "pretrain" and tokenizer.comp >= model.config.vocab_size:
        raise UserError(f"{folder}: the embedding has {model.config.vocab_size} rows, none is free for <RECON> and <COMP>")
    start = Path((not args.resume and args.hypernet) or args.model or folder)
    if args.hypernet and holds_hypernet(start) != "ours":
        raise UserError(f"--hypernet {start}: no hypernet.json there")
    if holds_hypernet(start) and (args.model or args.hypernet or args.stage == "finetune"):
        shine = Shine.load(start, first, base=model, tokenizer=tokenizer, adopt=bool(args.hypernet), **(
            {"scale": args.scale, "m2p_heads": args.m2p_heads} if holds_hypernet(start) == "published" else {}))
        c = shine.config
        if args.meta_rank and args.meta_rank > c.meta_r > 0 and not args.resume:
            shine.grow_meta_lora(args.meta_rank, args.seed)
            c = shine.config
        asked = asked_sizes(args, "r", "target_modules", "static_a", "lora_layers", "answer_r")
        if args.static_a and not c.static_a and not args.target_modules:      # as a new one: see new_config
            asked |= {"r": args.rank or shine.M, "target_modules": "down_proj"}
        if args.hypernet and not args.resume and (asked := {k: v for k, v in asked.items() if v != getattr(c, k)}):
            source = Source()
            shine = shine.retargeted(replace(c, **asked), [source.sample(random.Random(args.seed + i), 1)["context"] for i in range(64)], args.seed)
            c = shine.config
        for name, value in asked_sizes(args, "r", "meta_r", "m2p_layers", "m2p_axes", "m2p_norm", "target_modules", "static_a", "lora_layers", "answer_r").items():
            if value != getattr(c, name):
                raise UserError(f"--{FLAGS.get(name, name).replace('_', '-')} {value}: the hypernetwork in {start} has {getattr(c, name)}")
        shine.config = replace(c, **asked_sizes(args, "context_length", "conversation_length"))
    elif args.base and args.model:
        raise UserError(f"{start} holds no hypernetwork (hypernet.json or metanetwork.pth)")
    else:
        shine = Shine(model, tokenizer, new_config(args, model.config), args.seed)
        shine.reads_only = True
    args.context_length, args.conversation_length = shine.config.context_length, shine.config.conversation_length
    model.checkpointing = shine.m2p.checkpointing = args.checkpointing
    if args.shard and world > 1:
        from torch.distributed.fsdp import fully_shard
        for layer in model.model.layers:      # gathered when it is met; embeddings and norm stay whole
            fully_shard(layer)
    shine.to(device)
    shine.reads_only &= args.stage == "gist"      # a hypernetwork whose M2P has trained may read on
    return Gist(shine) if args.stage == "gist" else shine, model, shine.tokenizer, shine


def give_back_memory():
    """glibc keeps freed blocks of up to 32 MB for itself: 1 GB beside Qwen3-0.6B. Larger than 256 KB now go back at once."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option in (-1, -3):      # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 2 ** 18)


def refuse(args, out, device, rank, world):
    """What the folder of the run or the machine does not allow ends here, in one line."""
    if rank == 0 and not args.resume and (out / "state.safetensors").exists():
        raise UserError(f"{out} holds a run: go on with --resume, or choose another --out")
    if rank == 0 and not args.resume and (held := [name for name in ("model.safetensors", "model.safetensors.index.json", "hypernet.json") if (out / name).exists()]):
        raise UserError(f"{out} holds a model ({held[0]}), which this run would write over: choose another --out")
    if args.resume and not (out / "state.safetensors").is_file():
        raise UserError(f"--resume: {out / 'state.safetensors'} does not exist; start the run without --resume")
    if args.cuda_graphs and (device.type != "cuda" or world > 1 or args.checkpointing):
        raise UserError("--cuda-graphs is for one GPU, without --checkpointing: leave it out")
    if args.shard and world == 1:
        raise UserError("--shard spreads the language model over processes: start with torchrun --nproc_per_node=N train.py ...")


def open_log(args, out, step):
    """Make the folder of a run, open its log; of a resumed one without what it holds of steps behind the checkpoint's, which come again."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            (out / BEFORE).unlink(missing_ok=True)      # another run's
        elif (log := out / "log.jsonl").is_file():
            lines = log.read_text(encoding="utf-8").splitlines()
            write_file(log, lambda p: p.write_text("".join(line + "\n" for line in lines if step_of(line) <= step), encoding="utf-8"))
        return open(out / "log.jsonl", "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; choose another --out") from None


def step_of(line):
    """The step of a line of a log; 0: it has none, infinite: a kill cut it off."""
    try:
        return json.loads(line).get("step", 0)
    except ValueError:
        return math.inf


def take_up(out, module, optimizers, args, world, say):
    """Restore a run from its folder -> its state; changed settings are named."""
    state = load_state(out, module, optimizers)
    if (before := state.get("world", world)) != world:
        say(f"note: the run had {before} process(es), now {world}: it goes on behind the examples it has met, but for a few that are met twice or never")
    for name, before in state.get("args", {}).items():
        if name == "workers" and max(1, before) != max(1, args.workers):
            raise UserError(f"the run in {out} has --workers {before}: with {args.workers} it would meet some examples twice and others never; give the same")
        if name not in ("resume", "model", "out", "workers") and before != json.loads(json.dumps(vars(args).get(name))):
            say(f"note: --{name.replace('_', '-')} was {before}, now {vars(args).get(name)}")
    return state


class Stream(torch.utils.data.IterableDataset):
    """data.batches as a dataset, from batch `start` on; each worker process of a DataLoader, which asks them in turn, makes its own.

    shapes: `multiple` and `quarters` of data.collate."""

    def __init__(self, examples, batch_size, start, rank, world, pool, *shapes):
        self.examples, self.batch_size, self.start, self.ranks, self.pool, self.shapes = examples, batch_size, start, (rank, world), pool, shapes

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        workers = info.num_workers if info else 1
        number = self.start + (info.id if info else 0)      # of the batch that is asked of this process first
        return batches(self.examples, self.batch_size, number // workers, *self.ranks, self.pool, number % workers, workers, *self.shapes)


def loader(examples, args, start, rank, world, device, pool=None):
    """Batches from number `start` on, made by processes of their own unless --workers 0; for a GPU, whose masked attention wants
    that, with lengths in multiples of 16, and for CUDA graphs, one a shape, in multiples of 32."""
    shapes = 32 if args.cuda_graphs else 16 if device.type == "cuda" else 8, args.cuda_graphs
    return iter(torch.utils.data.DataLoader(Stream(examples, args.batch, start, rank, world, pool, *shapes), batch_size=None, num_workers=args.workers,
                                            generator=torch.Generator(), prefetch_factor=8 if args.workers else None,      # enough to go on while a worker makes its next pool
                                            pin_memory=device.type == "cuda"))


class Unseen:
    """What a run is measured on: held-out texts with their questions, and a batch of the stage's own examples on other such texts."""

    def __init__(self, args, tokenizer):
        source = Source("heldout", args.max_facts)
        self.records = [source.sample(random.Random(10**9 + i), n_turns=4) for i in range(args.eval_texts)]
        examples = Examples(args.stage, tokenizer, args.context_length, args.conversation_length, seed=10**6,
                            max_facts=args.max_facts, split="heldout", packing=args.packing)
        self.batch = collate([examples(i) for i in range(min(32, args.eval_texts))], tokenizer)

    def score(self, module, model, tokenizer, shine, conditions, device):
        """-> {"loss", condition: {"em", "f1"}, "reconstruction"}"""
        module.eval()
        torch.compiler.set_stance("force_eager")       # every decode step is another shape: not worth compiling
        with torch.no_grad():
            metrics = {"loss": round(module({k: v.to(device) for k, v in self.batch.items()}).item(), 4)}
        for condition in conditions:
            scored = evaluate(model, tokenizer, self.records, condition, shine)
            metrics[condition] = {k: round(sum(r[k] for r in scored) / len(scored), 4) for k in ("em", "f1")}
        if shine:
            metrics["reconstruction"] = round(token_accuracy(shine, [r["context"] for r in self.records], isinstance(module, Gist)), 4)
        torch.compiler.set_stance("default")
        module.train()
        return metrics


def compile_layers(model, shine=None, dynamic=True):
    """torch.compile of the layers of the language model and of the M2P, when they first run. dynamic: one compilation for all lengths; without,
    one for each, which for a single shape is several times as quick (benchmarks/RUNS.md)."""
    torch._dynamo.config.recompile_limit = 32      # the layers of reading and answering, first, last and others, are all cases of one function
    for layer in [*model.model.layers, *(shine.m2p.transformer_layers if shine else ())]:
        # for dynamic lengths torch 2.11 fails on a GPU in an analysis that is for fixed ones (an AssertionError in tiling_utils)
        layer.compile(dynamic=dynamic, options={"triton.coalesce_tiling_analysis": False})


def one_pass(module, batch, total):
    """Forward and backward -> the loss, detached; gradients are added to those in the parameters."""
    loss = module(batch, total)
    loss.backward()
    return loss.detach()


class Graphs(Recorded):
    """one_pass of a module as CUDA graphs, one for each shape of a batch."""

    def __init__(self, module):
        super().__init__(lambda *tensors: one_pass(module, dict(zip(self.fields, tensors)), tensors[-1]))
        self.module = module
        for p in module.trained().values():      # a record adds to the gradients where they lie now
            p.grad = torch.zeros_like(p)

    def __call__(self, module, batch, total):
        assert module is self.module
        self.fields = list(batch)      # a mask that is left out makes the shapes others
        return super().__call__(*batch.values(), total)


def gradients(step_module, micro, clips, clip, world, device, run_pass=one_pass):
    """Forward and backward of the passes of one step, each adding its part of one mean over all counted tokens.

    -> (1 + groups,): the loss, then the norm of each clipping group before clipping, still on the device: whoever reads them waits for
    it. The gradients, clipped, are in the parameters. run_pass: one_pass, or a Graphs of the module.
    """
    says_nothing = lambda k, v: k.endswith("_mask") and bool((v == 1).all())      # on the CPU still: nothing waits for the device
    micro = [{k: v.to(device, non_blocking=True) for k, v in batch.items() if not says_nothing(k, v)} for batch in micro]
    total = torch.stack([batch["weights"][:, 1:].sum() for batch in micro]).sum()
    if world > 1:
        dist.all_reduce(total)
    loss = torch.zeros((), device=device)
    for i, batch in enumerate(micro):
        if world > 1:
            step_module.require_backward_grad_sync = i == len(micro) - 1
        loss += run_pass(step_module, batch, total / world)
    if world > 1:
        dist.all_reduce(loss)
        loss /= world
    norms = [nn.utils.clip_grad_norm_(params, clip) for params in clips.values()]
    return torch.stack([loss, *norms])


class Run:
    """One run of a stage: what it trains and with what, its folder and log. `state` is what its checkpoints keep besides tensors."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out or f"runs/{args.stage}")
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, dtype, self.machine = pick_device(args.device, args.float32)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        torch.manual_seed(args.seed)
        refuse(args, self.out, self.device, self.rank, self.world)
        if args.base and self.device.type == "cpu":
            give_back_memory()
        texts = read_texts(args.text) if args.text else []
        records = [read_conversations(path, args.strict) for path in args.qa]
        if args.resume:
            args.model = str(self.out)
        self.module, self.model, self.tokenizer, self.shine = build(args, self.device, dtype, texts)
        flag, wanted, given = ("--text", args.text_share, texts) if args.stage == "pretrain" else ("--qa", args.record_share, records)
        if wanted == 1 and not given:
            self.say(f"note: there is no {flag}, so all examples come from the procedural source")
        self.examples = Examples(args.stage, self.tokenizer, args.context_length, args.conversation_length, texts, records, args.seed, args.max_facts,
                                 **{name: getattr(args, name) for name in (
                                     "text_share", "record_share", "question_share", "curriculum", "copy_share", "plain_share", "wild_share", "packing",
                                     "random_share", "recall_share", "rival_share", "conversations", "max_turns", "mined_share", "scene_share", "company_share", "exchange_share", "typed_share", "skip_scenes")})
        self.unseen = Unseen(args, self.tokenizer)
        self.optimizers, self.clips = make_optimizers(self.module, args.lr, args.muon_lr, args.weight_decay, args.betas, args.moments16, dtype, args.read_lr)
        self.state = {"step": 0, "seconds": 0.0, "waited": 0.0, "samples": 0, "tokens": 0, "metrics": {}}
        if args.resume:
            self.state = {"waited": 0.0} | take_up(self.out, self.module, self.optimizers, args, self.world, self.say)
        self.log = open_log(args, self.out, self.state["step"]) if self.rank == 0 else None
        self.state |= {"args": vars(args), "world": self.world}
        if args.compile:
            compile_layers(self.model, self.shine)
        self.graphs = Graphs(self.module) if args.cuda_graphs else None
        self.step_module = self.module
        if self.world > 1:
            self.step_module = nn.parallel.DistributedDataParallel(self.module, init_sync=not args.shard)      # all ranks start alike: one seed
        self.bad = 0                        # steps in a row without a finite loss

    def say(self, *line):
        if self.rank == 0:
            print(*line, flush=True)

    def log_line(self, **line):
        if self.rank == 0:
            self.log.write(json.dumps(line) + "\n")

    def announce(self):
        """Print and log what this run is."""
        args, count = self.args, lambda parameters: sum(p.numel() for p in parameters)
        here = count(p.to_local() if args.shard else p for p in self.model.model.layers.parameters())
        self.say(f"{args.stage} on {self.machine}: {count(self.module.trained().values()):,} parameters train, "
                 f"{count(p for p in self.module.parameters() if not p.requires_grad):,} frozen"
                 + (f" (of those of layers {here:,} in this process)" if args.shard else "")
                 + (f", M = {self.shine.M} memory tokens, {self.shine.P * self.shine.K:,} numbers in a LoRA" if self.shine else ""))
        self.log_line(args=vars(args), machine=self.machine, torch=torch.__version__)

    def checkpoint(self):
        """The model folder first, the state last: a kill in between leaves the older state, which fits any of these files."""
        if self.rank == 0:
            if not self.args.base:      # a Hugging Face folder stays where it is
                self.tokenizer.save(self.out)
                save_base(self.model, self.out)
            if self.shine:
                self.shine.save(self.out)
            save_state(self.out, self.module, self.optimizers, self.state)

    def score(self):
        """Score on unseen texts, into the state, the log and state.json."""
        if self.rank and not self.args.shard:      # a sharded model answers on all ranks or on none
            return
        state, shine = self.state, self.shine
        fixed = () if shine and state["metrics"] else ("in-context", "question")      # the frozen base's own, which do not change
        metrics = self.unseen.score(self.module, self.model, self.tokenizer, shine, fixed + (("shine",) if shine is self.module else ()), self.device)
        state["metrics"] = state["metrics"] | metrics
        if self.rank:
            return
        write_json(self.out / "state.json", state)
        self.say("  unseen texts: " + ", ".join(f"{k} {v if isinstance(v, float) else '%.3f EM %.3f F1' % (v['em'], v['f1'])}"
                                                for k, v in state["metrics"].items()))
        self.log_line(step=state["step"], samples=state["samples"], minutes=round(state["seconds"] / 60, 2), unseen=metrics)

    def progress(self):
        """How far the run is, 0 to 1: of its steps, or of its minutes; then every rank calls it once a step, and sets its clock by that of rank 0."""
        if self.args.steps:
            return self.state["step"] / self.args.steps
        if self.world > 1:
            clock = torch.tensor(self.state["seconds"], dtype=torch.float64, device=self.device)
            dist.broadcast(clock, 0)
            self.state["seconds"] = clock.item()
        return self.state["seconds"] / 60 / self.args.minutes

    def draw(self, data):
        """The batches of one step; the time this takes is added to `waited`."""
        started = time.perf_counter()
        try:
            micro = [next(data) for _ in range(self.args.accumulate)]
        except UserError as error:      # of a worker process, with its traceback in it
            raise UserError(str(error).rstrip().splitlines()[-1].removeprefix("model.UserError: ")) from None
        self.state["waited"] += time.perf_counter() - started
        return micro

    def update(self, report):
        """One step of the optimizers with the gradients that are there; report: what `gradients` says -> the loss, the norms before clipping."""
        loss, *norms = report.tolist()      # the one time in a step that the host waits for a GPU
        if all(map(math.isfinite, (loss, *norms))):
            self.bad = 0
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            self.bad += 1
            self.say(f"step {self.state['step']}: loss {loss}, gradient norms {[round(n, 2) for n in norms]}; step skipped")
            if self.bad == 5:
                raise UserError("five steps in a row had no finite loss: lower --lr; the last checkpoint is untouched")
        self.module.zero_grad(set_to_none=self.graphs is None)
        return loss, norms

    def tell(self, loss, norms, lr, tokens, seconds, progress):
        """Print and log a step, which took so many seconds."""
        state = self.state
        left = f"  {(1 - progress) * state['seconds'] / progress / 60:.1f} min left" if progress else ""
        self.say(f"step {state['step']:5d}  loss {loss:.4f}  lr {lr:.2e}  norm " + "/".join(f"{n:.2f}" for n in norms)
                 + f"  {tokens / seconds:,.0f} tok/s  {state['samples']:,} samples{left}")
        self.log_line(step=state["step"], loss=round(loss, 6) if math.isfinite(loss) else None, lr=lr, tokens=tokens, samples=state["samples"],
                      seconds=round(state["seconds"], 2), waited=round(state["waited"], 3), norms={k: round(n, 4) for k, n in zip(self.clips, norms)})

    def train(self):
        """The loop of every stage. Pauses for scores and the checkpoints that are due are left out of its clock."""
        args, state, watch = self.args, self.state, Watch()
        vars(watch).update(state.get("watch", {}))
        data = loader(self.examples, args, -(-state["samples"] // (args.batch * self.world)), self.rank, self.world, self.device)
        last = time.perf_counter()
        started = last - state["seconds"]
        micro = self.draw(data)
        self.module.train()
        now = lambda: state["step"] if args.steps else state["seconds"] / 60      # what --eval-every and --save-every count
        progress = self.progress()
        next_eval, next_save = now() + args.eval_every, now() + (args.save_every or math.inf)
        while progress < 1:
            lr = learning_rate(progress, state["step"], args.lr, args.warmup) * state.get("slowed", 1.0)
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = lr * group["peak"] / args.lr
            tokens = self.world * sum(int((mask > 0).sum()) for batch in micro for name, mask in batch.items() if name.endswith("_mask"))      # as if each process had as many
            report = gradients(self.step_module, micro, self.clips, args.clip, self.world, self.device, self.graphs or one_pass)
            micro = self.draw(data)      # the next step's, while a GPU is at work
            loss, norms = self.update(report)

            took, last = time.perf_counter() - last, time.perf_counter()
            state |= {"step": state["step"] + 1, "samples": state["samples"] + args.batch * args.accumulate * self.world, "tokens": state["tokens"] + tokens,
                      "seconds": last - started}
            self.tell(loss, norms, lr, tokens, took, progress)
            if ill := self.bad == 0 and watch(loss):
                go_back(self.out, self.module, self.optimizers, state, watch, self.rank, self.world, self.say)
                watch = Watch()
            state["watch"] = vars(watch)
            if ill:
                self.checkpoint()      # a run that is killed now goes on from here

            progress = self.progress()
            due = now() >= next_eval or progress >= 1
            if due or now() >= next_save:
                paused = time.perf_counter()
                self.checkpoint()
                if due:
                    self.score()
                    next_eval = now() + args.eval_every
                next_save = now() + (args.save_every or math.inf)
                self.log and self.log.flush()
                last = time.perf_counter()
                started += last - paused


def main(argv=None):
    args = parse(argv)
    if args.dry_run:
        return dry_run(args)
    job = Run(args)
    job.announce()
    job.train()
    job.say(f"done: {job.state['step']} steps, {job.state['samples']:,} samples, {job.state['seconds'] / 60:.1f} minutes; the model is in {job.out}"
            + (f"; it reads, but its M2P did not train: go on with --stage pretrain --model {job.out}" if args.stage == "gist" else ""))
    if job.world > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- --dry-run
class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that live inside the block. On the meta device nothing is allocated, but every tensor has a
    size, so that `peak` is what the same computation takes. Tensors of `known` modules count for nothing."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {t.untyped_storage()._cdata for p in known.parameters() for t in (p, p.grad) if t is not None}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t) and (key := (storage := t.untyped_storage())._cdata) not in self.alive:
                self.alive.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, key, storage.nbytes())
        return out

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size


def pass_peak(module, batch):
    """Bytes beyond weights and gradients at the worst moment of one training pass on the meta device."""
    for p in module.trained().values():
        p.grad = torch.empty_like(p)
    with Peak(module) as live:
        module(batch).backward()
    return live.peak


def dry_run(args):
    """Print what a run takes. Its passes run on the meta device, so activations are counted tensor by tensor, not by a formula."""
    if args.device == "cuda":      # also where there is none
        device, dtype, why = torch.device("cuda"), *((torch.float32, "CUDA, float32") if args.float32 else (torch.bfloat16, "CUDA, bf16"))
    else:
        device, dtype, why = pick_device(args.device, args.float32)
    name, tables = args.base or args.model or (args.preset if args.stage == "base" else str(shipped(device))), PRESETS | QWEN3
    config = Config(**({"vocab_size": args.vocab_size} | tables[name])) if name in tables else Config.load(name)
    attention = F.scaled_dot_product_attention
    with torch.device("meta"):
        model = LanguageModel(config)
        if args.stage == "base":
            module, shine, length = Base(model), None, lambda name: getattr(args, name) or SIZES[name]
        else:
            stored = stored_dtype(name) if args.base and device.type == "cpu" else dtype         # as build does it
            start = args.hypernet or args.model or (name if args.stage == "finetune" else None)
            own = start and holds_hypernet(start) == "ours"
            shine = Shine(model.to(stored), Ids(), replace(hypernet_config(start)[1], **asked_sizes(
                args, "r", "meta_r", "target_modules", "static_a", "lora_layers", "answer_r", "context_length", "conversation_length")) if own else new_config(args, config))
            module = Gist(shine) if args.stage == "gist" else shine
            length = lambda name: getattr(shine.config, name)
        model.compute_dtype = dtype
        B, N, S = args.batch, length("context_length"), length("conversation_length")
        S += N * (shine is None)                                       # there the text is in the prompt
        ones = lambda *shape: torch.ones(*shape, dtype=torch.long)
        batch = {"input_ids": ones(B, S), "attention_mask": ones(B, S), "weights": torch.ones(B, S), "counted": ones(B * (S - 1)),
                 **({"context_ids": ones(B, N), "context_mask": ones(B, N)} if shine else {})}
        try:      # meta tensors know no attention kernel: the one of the device stands in, for a CPU's blocks all of a row's scores at once
            F.scaled_dot_product_attention = plain_attention if device.type == "cpu" else flash_attention
            activations = {}
            for on in (False, True):
                model.checkpointing = on
                if shine:
                    shine.m2p.checkpointing = on
                activations[on] = pass_peak(module, batch)
                if on == args.checkpointing:
                    with FlopCounterMode(display=False) as counter:
                        module(batch).backward()
            if shine:
                with torch.no_grad(), Peak(module) as reading:
                    shine.generate_lora(batch["context_ids"][:1], batch["context_mask"][:1])
        finally:
            F.scaled_dot_product_attention = attention
    step_flops = counter.get_total_flops() * args.accumulate
    gib = lambda n: f"{n / 2 ** 30:9.3f}"
    trained = module.trained()
    count = sum(p.numel() for p in trained.values())
    frozen = [p for p in module.parameters() if not p.requires_grad]
    frozen, frozen_count = sum(p.nbytes for p in frozen), sum(p.numel() for p in frozen)
    parts = {"memory": "memory embeddings", "meta_lora": "meta LoRA", "m2p": "M2P", "lora_a": "A of the LoRA", "answer_lora": "LoRA for answering"}
    sizes = {called: sum(p.numel() for n, p in trained.items() if n.split(".")[0] == part) for part, called in parts.items()}
    muons = sum(trained[n].numel() for n in matrices(trained)) if args.muon_lr else 0
    moments = (count - muons) * (4 if args.moments16 else 8) + muons * 4
    print(f"{args.stage}, {name}: L = {config.num_hidden_layers}, H = {config.hidden_size}, vocabulary {config.vocab_size:,}; {why}")
    print(f"parameters    frozen {frozen_count:,}, trained {count:,}"
          + (f" ({', '.join(f'{called} {size:,}' for called, size in sizes.items() if size)})" if shine else ""))
    if shine:
        print(f"LoRA          rank {shine.config.r}, M = {shine.M} memory tokens, {shine.P * shine.K:,} numbers")
    print(f"pass          {B} x " + (f"({N} context + {S} conversation tokens)" if shine else f"{S} tokens")
          + f", {args.accumulate} of them a step, loss on all of the conversation")
    print("memory, GiB   activations kept   checkpointing   (this run: " + ("the second)" if args.checkpointing else "the first)"))
    rows = {"frozen weights": frozen, "trained weights": count * 4, "gradients": count * 4, "Muon, AdamW" if muons else f"AdamW, {'bf16' if args.moments16 else 'float32'}": moments}
    for title, size in rows.items():
        print(f"  {title:18s}{gib(size)}{gib(size):>16s}")
    print(f"  {'activations':18s}{gib(activations[False])}{gib(activations[True]):>16s}")
    total = {on: sum(rows.values()) + activations[on] for on in activations}
    print(f"  {'together':18s}{gib(total[False])}{gib(total[True]):>16s}")
    tokens = B * args.accumulate * (S + (N if shine else 0))
    if shine:
        print(f"to talk, GiB  language model {frozen / 2 ** 30:.3f}, hypernetwork {count * 4 / 2 ** 30:.3f}, reading {N} tokens {reading.peak / 2 ** 30:.3f}")
    print(f"work          {step_flops:.3e} FLOPs a step of {tokens:,} tokens; at {args.flops:.1e} FLOP/s {step_flops / args.flops:.3g} s a step, "
          f"{step_flops / tokens * 1e9 / args.flops / 3600:.3g} hours per billion tokens")
    return {"activations": activations, "total": total, "talk": frozen + count * 4 + (reading.peak if shine else 0), "flops": step_flops, "trained": count, "frozen_bytes": frozen}


def stored_dtype(folder):
    """The dtype of a model folder's embedding; bf16, that of the released ones, where there are no weights yet."""
    for path in weight_files(folder) if Path(folder).is_dir() else ():
        if path.is_file() and (t := read_header(path).get("model.embed_tokens.weight")):
            return {"F32": torch.float32, "F16": torch.float16}.get(t, torch.bfloat16)
    return torch.bfloat16


def plain_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + (0 if attn_mask is None else attn_mask), -1) @ v


def flash_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def save_base(model, out):
    """config.json + model.safetensors in bf16, by Hugging Face's names."""
    model.config.save(out)
    tensors = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    write_file(Path(out) / "model.safetensors", lambda p: save_file(tensors, p, metadata={"format": "pt"}))


if __name__ == "__main__":
    run(main)
