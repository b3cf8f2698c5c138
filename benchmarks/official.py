"""Beside the paper's own code: the same weights and tokens on one machine in one run, each timing of theirs and of ours in turn.

    git clone https://github.com/MuLabPKU/SHINE official; git -C official checkout 5c3b00b
    pip install transformers==4.57.1                  in an environment of its own: what that code was written for (compat.py takes a newer one)
    python -m benchmarks.official official [--json OUT] [--size reference|qwen3-0.6b ...]

Theirs is imported from that folder as it is (LoraQwen.py, metanetwork_family.py) and used as its training and test scripts do: float32,
batch 1, `generate` of transformers. Ours works in float32 and, where the processor has it, in bf16. First both are compared in float32:
the largest difference over the largest entry, and greedy ids; where they disagree nothing is timed. Their training pass is decorated
with torch.compile, so it is timed as it is ("compiled", after half a minute of compiling) and without; ours is not compiled.
"""
import argparse
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.speed import SIZES, batch_of, build, keep
from data import Examples, Parser, Tokenizer, collate, positive, run
from model import QWEN3, Decoder, UserError, cut, flatten, pick_device
from shine import DEFAULT_MODEL
from train import one_pass

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"q_proj": ("attention", "q"), "k_proj": ("attention", "k"), "v_proj": ("attention", "v"), "o_proj": ("attention", "o"),
         "gate_proj": ("mlp", "gate"), "up_proj": ("mlp", "up"), "down_proj": ("mlp", "down")}      # their names of the linears


class Settings(dict):
    """A dict whose entries are attributes too, as their configuration's are."""
    __getattr__ = dict.__getitem__


def nested(lora):
    """Our LoRA (a list over layers of {name: (A, B)}, with a batch axis) -> theirs, {layer: {"attention": {"q": {"A", "B", "C"}}}}."""
    out = {}
    for i, layer in enumerate(lora):
        out[i] = {"attention": {}, "mlp": {}}
        for name, (A, B) in layer.items():
            block, short = PARTS[name.split(".")[1]]
            out[i][block][short] = {"A": A, "B": B, "C": None}
    return out


def listed(loradict, layer):
    """Their LoRA -> ours, with the names and the order of one of ours."""
    return [{name: tuple(loradict[i][block][short][half] for half in "AB") for name in layer for block, short in [PARTS[name.split(".")[1]]]}
            for i in range(len(loradict))]


def theirs(folder, shine):
    """-> (their Metanetwork with the weights of `shine` in float32, their meta LoRA)"""
    if not all((Path(folder) / f"{name}.py").is_file() for name in ("LoraQwen", "metanetwork_family")):
        raise UserError(f"{folder} is no checkout of the paper's code: it needs LoraQwen.py and metanetwork_family.py")
    sys.path.append(str(folder))
    try:
        from LoraQwen import LoraQwen3ForCausalLM, Qwen3Config
        from metanetwork_family import Metanetwork
    except ImportError as e:
        raise UserError(f"the code in {folder} cannot be imported ({e}); it was written for transformers 4.57.1") from None
    c, h = shine.base.config, shine.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
             "rope_theta", "rms_norm_eps", "tie_word_embeddings")
    config = Qwen3Config(**{name: getattr(c, name) for name in names}, num_mem_token=shine.M, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = LoraQwen3ForCausalLM(config)
    encoder = Settings(d_model=c.hidden_size, nhead=shine.m2p.transformer_layers[0].self_attn.heads, dim_feedforward=2 * c.hidden_size, dropout=0,
                       activation="gelu", layer_norm_eps=1e-5, batch_first=True, norm_first=False, bias=True)
    settings = Settings(hidden_size=c.hidden_size, num_layers=c.num_hidden_layers, num_mem_token=shine.M, model=Settings(lora_r=h.r), optim=Settings(adapter_reg=0.0),
                        metanetwork=Settings(type="transformer", method="rl", transformer_cfg=Settings(
                            encoder_cfg=encoder, couple_encoder_cfg=encoder, layer_transformer_first=True, mean_pool_size=1, num_layers=h.m2p_layers,
                            couple_num_layers=0, scale=h.scale)))
    whole = Metanetwork(model, settings, model.lora_params_numel(h.r))
    missing = model.load_state_dict(shine.base.state_dict() | {"model.mem_tokens": shine.memory.data}, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
    model.tie_weights()
    whole.metanetwork.load_state_dict(dict(shine.m2p.named_parameters()))
    for p in model.parameters():
        p.requires_grad_(p is model.model.mem_tokens)
    meta = [{name: tuple(t[None].detach().clone().requires_grad_() for t in pair) for name, pair in layer.items()}
            for layer in cut(shine.meta_lora.data, c, h.meta_r)]
    return whole, nested(meta)


def step_of_theirs(whole, meta, batch, compiled=False):
    """Their training step with AdamW, as a call. compiled: with the torch.compile that decorates their pass, if one does."""
    run_pass = whole if compiled else partial(inspect.unwrap(type(whole).forward), whole)
    meta_tensors = [pair[half] for layer in meta.values() for block in layer.values() for pair in block.values() for half in "AB"]
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad] + meta_tensors, lr=1e-5)
    labels = torch.where(batch["weights"].bool(), batch["input_ids"], -100)
    mask = lambda name, ids: batch.get(name, torch.ones_like(batch[ids]))

    def step():
        out = run_pass(input_ids=batch["input_ids"], input_attention_mask=mask("attention_mask", "input_ids"), evidence_ids=batch["context_ids"],
                       evidence_attention_mask=mask("context_mask", "context_ids"), labels=labels, metalora=meta)
        (out.loss + out.reg_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def step_of_ours(shine, batch):
    optimizer = torch.optim.AdamW(shine.trained().values(), lr=1e-5, fused=True)
    total = batch["weights"][:, 1:].sum()

    def step():
        one_pass(shine, batch, total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def ours(size, dtype):
    """A Shine of that size and the published scale with random weights, the same ones every time, rounded to bf16; all of them off their
    start, so that the comparison sees each."""
    torch.manual_seed(0)
    shine = build(size, torch.device("cpu"), dtype)
    shine.config = replace(shine.config, scale=0.001)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in shine.trained().values():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    for p in shine.base.parameters():
        p.data = p.data.to(torch.bfloat16).to(torch.bfloat16 if size in QWEN3 and dtype == torch.bfloat16 else dtype)
    return shine


def generated(size, count=16, length=256):
    """Examples of the procedural source -> (a batch of them for us, padded to the longest; the first of them alone, padded to `length` +
    `length` as their collators do). Their ids are those of the tokenizer that ships, modulo this size's vocabulary."""
    tokenizer = Tokenizer.load(DEFAULT_MODEL)
    examples = Examples("finetune", tokenizer, length, length)
    batch = collate([examples(i) for i in range(count)], tokenizer)
    batch |= {name: batch[name] % SIZES[size][0].vocab_size for name in ("context_ids", "input_ids")}
    alone = {name: F.pad(t[:1], (length - t.shape[1], 0)) for name, t in batch.items() if t.dim() == 2}      # on the left
    return batch, alone


def compare(whole, meta, shine, batch):
    """Largest difference over the largest entry: generated numbers, logits, loss, greedy ids that differ."""
    error = lambda a, b: float((a - b).abs().max() / b.abs().max())
    with torch.no_grad():
        their_lora = whole.generate_lora_dict(batch["context_ids"], torch.ones_like(batch["context_ids"]), meta)
        lora = shine.generate_lora(batch["context_ids"], None)
        logits = whole.metamodel(batch["input_ids"], loradict=their_lora, ignore_mem_token=True).logits
        out = {"LoRA": error(flatten(lora), flatten(listed(their_lora, lora[0]))), "logits": error(shine.base(batch["input_ids"], lora=lora), logits)}
        question = batch["input_ids"][:, :32]
        answer = list(shine.base.generate(question, lora=lora, max_new_tokens=16))
        out["greedy ids that differ"] = sum(a != b for a, b in zip([int(t) for t in answer], generate(whole, question, their_lora, 16)))
    return out


def generate(whole, question, loradict, new):
    ids = whole.metamodel.generate(question, attention_mask=torch.ones_like(question), loradict=loradict, ignore_mem_token=True, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return ids[0, question.shape[1]:].tolist()


def in_turn(calls, rounds, seconds=150):
    """{name: median seconds} of calls that are made one after the other, once to warm up and then `rounds` times (fewer when `seconds` are spent)."""
    times, began = {name: [] for name in calls}, time.perf_counter()
    for i in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
        if i and time.perf_counter() - began > seconds:
            break
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def peak(folder, size, whose, N, S):
    """GiB of a process that makes two training steps, Python, torch and (theirs) transformers included. whose: "theirs" or a dtype of ours."""
    make = "step_of_theirs(*theirs(%r, ours(%r, torch.float32)), batch)" % (str(folder), size) if whose == "theirs" else f"step_of_ours(ours({size!r}, {whose}), batch)"
    code = (f"from benchmarks.official import *; batch = batch_of(1, {N}, {S}, SIZES[{size!r}][0].vocab_size, torch.device('cpu')); step = {make}; step(); step();"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))")
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout) / 2 ** 20


def timings(folder, size, dtype, rounds):
    V, cpu = SIZES[size][0].vocab_size, torch.device("cpu")
    lengths, big = ((256, 256), (1024, 1024)), size in QWEN3
    dtypes = {"float32": torch.float32} | ({"bf16": dtype} if dtype == torch.bfloat16 else {})
    shines = {name: ours(size, one) for name, one in dtypes.items()}
    whole, meta = theirs(folder, shines["float32"])
    batch, rows = batch_of(1, 256, 256, V, cpu), {}
    result = {"differences": compare(whole, meta, shines["float32"], batch), "seconds": rows}
    print(json.dumps(result["differences"]), flush=True)
    if not max(result["differences"].values()) < 1e-4:      # of a NaN too
        raise UserError(f"the code in {folder} computes something else than ours, so there is nothing to compare: {result['differences']}")

    def timed(name, calls, share=1):
        """share: by what ours is divided, examples at a time"""
        rows[name] = {key: s / (1 if key.startswith("theirs") else share) for key, s in in_turn(calls, rounds).items()}
        print(name, {key: round(s, 4) for key, s in rows[name].items()}, flush=True)
    with torch.no_grad():
        for shine in shines.values():
            shine.eval()
        for N, _ in lengths:
            ids = batch_of(1, N, 1, V, cpu)["context_ids"]
            mask = torch.ones_like(ids)
            timed(f"LoRA from {N} tokens", {"theirs": lambda: whole.generate_lora_dict(ids, mask, meta)} | {f"ours, {k}": partial(s.generate_lora, ids, None) for k, s in shines.items()})
        question, lora = batch["input_ids"][:, :32], whole.generate_lora_dict(batch["context_ids"], torch.ones_like(batch["context_ids"]), meta)
        pairs = {k: (s.base, s.generate_lora(batch["context_ids"], None)) for k, s in shines.items()}
        decoders = {k: Decoder(*pair) for k, pair in pairs.items()}
        answer = lambda k, decoder: list(pairs[k][0].generate(question, lora=pairs[k][1], max_new_tokens=64, decoder=decoder))
        timed("64 new tokens after 32, first answer", {"theirs": lambda: generate(whole, question, lora, 64)} | {f"ours, {k}": lambda k=k: answer(k, Decoder(*pairs[k])) for k in shines})
        timed("64 new tokens after 32, later answers", {"theirs": lambda: generate(whole, question, lora, 64)} | {f"ours, {k}": lambda k=k: answer(k, decoders[k]) for k in shines})
        del decoders
    def steps(alone, many, compiled):
        calls = {"theirs": step_of_theirs(whole, meta, alone)} | ({"theirs, compiled": step_of_theirs(whole, meta, alone, True)} if compiled else {})
        return calls | {f"ours, {k}": step_of_ours(s, many) for k, s in shines.items()}
    for N, S in lengths[:1] if big else lengths:
        alone = batch_of(1, N, S, V, cpu)
        timed(f"training step, {N} + {S} tokens", steps(alone, alone, not big))
        if B := 0 if big else 16 * 256 // N:
            timed(f"training, one of {B} examples of {N} + {S} tokens, ours {B} at a time", steps(alone, batch_of(B, N, S, V, cpu), True), B)
    if not big:
        timed("training, one of 16 generated examples, theirs padded to 256 + 256 tokens, ours 16 at a time", steps(*reversed(generated(size)), True), 16)
    del shines, whole, meta, pairs
    if Path("/proc/self/status").is_file():
        result["GiB at most"] = {f"training step, {N} + {S} tokens": {"theirs": peak(folder, size, "theirs", N, S)} | {
            f"ours, {name}": peak(folder, size, one, N, S) for name, one in dtypes.items()} for N, S in (lengths[:1] if big else lengths)}
        print(json.dumps(result["GiB at most"]), flush=True)
    return result


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a checkout of the paper's code")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--size", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=positive(int), default=7, help="timings of each, one after the other, of which the median is taken (7)")
    args = parser.parse_args(argv)
    _, dtype, why = pick_device("cpu")
    for size in args.size:
        part = timings(args.folder, size, dtype, args.rounds)
        result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {why}", "torch": torch.__version__,
                  "transformers": metadata.version("transformers"), size: part}
        keep(args.json, result)


if __name__ == "__main__":
    run(main)
