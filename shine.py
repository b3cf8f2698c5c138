"""SHINE: a text becomes LoRA parameters of a language model in one forward pass, and the model then talks about it.

    pass 1, reading (paper, section 3)                    pass 2, answering (section 5)
    context (B, N) + memory embeddings (M, H)             conversation (B, S), the text is not in it
            |                                                      |
    frozen language model + meta LoRA                      frozen language model + generated LoRA -> answer
            |                                                      ^
    memory states (B, L, M, H) -> M2P (section 4) -> cut into A, B |

What trains: memory embeddings, meta LoRA, M2P (and A, where ShineConfig.static_a generates B alone, and a LoRA for answering, where
answer_r wants one). Nothing else; the language model is the same frozen one in both passes.

    python shine.py "Mara keeps a green parrot called Biscuit in the lighthouse." --chat
    python shine.py --file notes.txt --ask "Who came?" --ask "When?" --save notes.safetensors
    python shine.py --load notes.safetensors --chat
    python shine.py "Some text." --inspect
    python shine.py "Some text." --base Qwen3-8B --hypernet SHINE-8B --chat        (Hugging Face and published folders)
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from data import Ids, Parser, Tokenizer, pad, positive, render, run
from m2p import M2P, memory_tokens
from model import (Decoder, LanguageModel, MemoryCache, Recorded, UserError, check_tensors, cut, flatten, from_json, lora_layout, lora_size, map_lora, pick_device,
                   new_folder, read_json, read_tensors, weight_files, write_file, write_json)

DEFAULT_MODEL = Path(__file__).parent / "checkpoints/small"      # checkpoints/tiny beside it is smaller and faster, and knows less


@dataclass(frozen=True)
class ShineConfig:
    """Sizes of a hypernetwork; M is not among them, it follows (paper, section 4)."""
    r: int = 4                      # rank of the generated LoRA
    meta_r: int = 8                 # rank of the trained meta LoRA
    m2p_layers: int = 4             # D
    m2p_heads: int = 0              # 0: by the published rule, m2p.attention_heads
    scale: float = 0.02             # what is generated is multiplied by sqrt(scale); the paper's 0.001 belongs to H = 4096
    context_length: int = 256       # longest text in tokens
    conversation_length: int = 384  # longest conversation in tokens
    m2p_axes: str = "both"          # "rows", "columns": for the ablation, see m2p.M2P
    m2p_norm: bool = False          # memory states divided by their root mean square first, see m2p.M2P
    target_modules: str = "all"     # the linears that a LoRA is generated for: the paper's seven, or some, "o_proj,down_proj"
    static_a: bool = False          # A is trained, the same for every text, and B alone generated (not in the paper): more rank from as many memory tokens
    lora_layers: int = 0            # the last so many layers have a generated LoRA, and the M2P sees their memory states alone (not in the paper); 0: all L
    answer_r: int = 0               # rank of a LoRA for answering, of the paper's seven linears, trained, the same for every text (not in the paper)

    @property
    def generated(self):
        """The halves of a LoRA that come from the text; see model.cut."""
        return "B" if self.static_a else "AB"


PUBLISHED = ("metanetwork.pth", "metalora.pth", "mem_tokens.pt")          # the files of a hypernetwork as its authors release it
PUBLISHED_LENGTHS = dict(context_length=2380, conversation_length=1150)     # the longest of section 6


class LoRA(list):
    """A generated LoRA: a list over the L layers of {name: (A, B)}; `info` says what it was made from. r: the rank that is generated;
    a linear may have another, where something trained stands beside it (Shine.beside), and a layer none (ShineConfig.lora_layers)."""

    def __init__(self, layers, r, info=None):
        super().__init__(layers)
        self.r, self.info = r, info or {}

    @property
    def ranks(self):
        """{linear of a layer: its rank}, "layers.0.mlp.down_proj": 72"""
        return {f"layers.{i}.{name}": B.shape[-2] for i, layer in enumerate(self) for name, (_, B) in layer.items()}

    @property
    def rows(self):
        """How many texts it is for: the length of the batch axis, which every A and B has."""
        return len(next(iter(self[-1].values()))[0])

    def row(self, i):
        """The LoRA of one row of the batch, still with a batch axis of 1; -1 is the last. IndexError where there is no such row."""
        i = range(self.rows)[i]
        info = {k: v[i] if isinstance(v, list) else v for k, v in self.info.items()}
        return LoRA(map_lora(lambda t: t[i:i + 1], self), self.r, info)

    def save(self, path):
        """Write one row as safetensors: layers.<i>.<linear>.lora_A (in, r), .lora_B (r, out); the text itself is not in it."""
        tensors = {f"layers.{i}.{name}.lora_{half}": t[0].detach().cpu().contiguous()
                   for i, layer in enumerate(self.one_row()) for name, pair in layer.items() for half, t in zip("AB", pair)}
        info = {k: str(v) for k, v in self.row(0).info.items()} | {"format": "shine-lora-1", "r": str(self.r)}
        write_file(path, lambda p: save_file(tensors, p, metadata=info))

    def export_peft(self, folder, base_name):
        """Write one row as a PEFT adapter into a new folder: lora_A.weight = A^T (r, in), lora_B.weight = B^T (out, r), alpha = r
        so that PEFT's factor alpha / r is 1. base_name: what PEFT's users load the language model by."""
        tensors = {f"base_model.model.model.layers.{i}.{name}.lora_{half}.weight": t[0].detach().float().cpu().T.contiguous()
                   for i, layer in enumerate(self.one_row()) for name, pair in layer.items() for half, t in zip("AB", pair)}
        other = {name: r for name, r in self.ranks.items() if r != self.r}
        with new_folder(folder) as folder:
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            write_json(folder / "adapter_config.json", {
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name),
                "target_modules": [name.split(".")[1] for name in self[-1]],
                "layers_to_transform": None if all(self) else [i for i, layer in enumerate(self) if layer],
                "r": self.r, "lora_alpha": self.r, "rank_pattern": other, "alpha_pattern": other, "lora_dropout": 0.0, "bias": "none",
                "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "use_rslora": False, "use_dora": False})

    def merge_into(self, base_folder, folder):
        """Write a new model folder with W + (A B)^T in the place of W, file by file, in the dtype of the base (bf16 rounds the sum)."""
        base_folder, layers = Path(base_folder), self.one_row()
        with new_folder(folder) as folder:
            for path in weight_files(base_folder):
                tensors = read_tensors(path)
                for i, layer in enumerate(layers):
                    for name, (A, B) in layer.items():
                        if (key := f"model.layers.{i}.{name}.weight") in tensors:
                            W = tensors[key]
                            tensors[key] = (W.float() + (A[0].float() @ B[0].float()).T.cpu()).to(W.dtype).contiguous()
                save_file(tensors, folder / path.name, metadata={"format": "pt"})
            for pattern in ("config.json", "generation_config.json", "*.index.json", "tokenizer*.json", "vocab.json", "merges.txt",
                            "special_tokens_map.json", "added_tokens.json", "chat_template.*", "bpe.json"):
                for path in base_folder.glob(pattern):
                    shutil.copyfile(path, folder / path.name)
            if (base_folder / "bpe.json").is_file():
                Tokenizer.load(base_folder).save_hugging_face(folder)

    def one_row(self):
        assert self.rows == 1, f"one row at a time: lora.row(i) first; this has {self.rows}"
        return self

    @classmethod
    def load(cls, path, base):
        """Read a saved LoRA for this language model; one made for another is refused."""
        tensors = read_tensors(path)
        with safe_open(path, framework="pt") as file:
            info = file.metadata() or {}
        if info.get("format") != "shine-lora-1":
            raise UserError(f"{path} is not a LoRA that --save wrote")
        if info.get("base") != fingerprint(base):
            raise UserError(f"{path} was made for another language model ({info.get('base_name') or 'unnamed'}, {info.get('base')}; "
                            f"this one is {fingerprint(base)})")
        layers, shapes, device = [], {}, base.model.norm.weight.device
        for i in range(base.config.num_hidden_layers):      # a layer may have a LoRA for some linears, of any rank, or none
            there = {name: sizes for name, *sizes in lora_layout(base.config) if f"layers.{i}.{name}.lora_A" in tensors}
            for name, (n_in, n_out) in there.items():
                A = f"layers.{i}.{name}.lora_A"
                shapes |= {A: (n_in, *tensors[A].shape[1:2]), A[:-1] + "B": (*tensors[A].shape[1:2], n_out)}
            layers.append(there)
        check_tensors(path, tensors, shapes)
        if not layers[-1]:
            raise UserError(f"{path} is damaged: it has no LoRA for the last layer")
        pair = lambda i, name: tuple(tensors[f"layers.{i}.{name}.lora_{half}"][None].to(device) for half in "AB")
        return cls([{name: pair(i, name) for name in there} for i, there in enumerate(layers)], int(info["r"]) if info.get("r", "").isdigit() else 0, info)


def smallest_rank(config, modules="all", halves="AB"):
    """The ranks whose LoRA can be cut out of memory states are its multiples."""
    return config.hidden_size // math.gcd(config.hidden_size, lora_size(config, 1, modules, halves))


def fingerprint(base):
    """Names a language model by a hash of its config and of the first numbers of every tensor, in bf16: 12 hex digits."""
    if base.model.norm.weight.is_meta:
        return ""
    state = json.dumps(asdict(base.config), sort_keys=True).encode()
    numbers = torch.cat([p.detach().flatten()[:64].bfloat16().float().cpu() for p in base.parameters()])
    return hashlib.sha256(state + numbers.numpy().tobytes()).hexdigest()[:12]


def load_tokenizer(folder, base):
    """The tokenizer of a model folder: ours (bpe.json) or Hugging Face's."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("bpe.json", "tokenizer.json", "vocab.json")):
        raise UserError(f"{folder} has no tokenizer: bpe.json is missing, and so are tokenizer.json and vocab.json "
                        "(without one, shine.py takes token ids: --ids)")
    tokenizer = Tokenizer.load(folder) if (folder / "bpe.json").is_file() else Tokenizer.from_hugging_face(folder)
    size, rows = tokenizer.vocab_size if tokenizer.prefix_space else tokenizer.recon, base.config.vocab_size      # ours has its task tokens, others lack them
    if size > rows or tokenizer.prefix_space and size != rows:
        raise UserError(f"the tokenizer of {folder} has {size} tokens, the model's embedding {rows} rows: they do not belong together")
    return tokenizer


def holds_hypernet(folder):
    """"ours", "published" or None: which kind of hypernetwork a folder holds."""
    there = lambda name: (Path(folder) / name).is_file()
    return "ours" if there("hypernet.json") else "published" if any(map(there, PUBLISHED)) else None


def read_published(folder):
    """The files of the published code (pickles, read as tensors and nothing else) -> {name: tensor} for load_published."""
    def read(name, kind):
        path = Path(folder) / name
        if not path.is_file():
            raise UserError(f"{path} is missing: a published hypernetwork has {', '.join(PUBLISHED)}")
        for mmap in (True, False):               # files of the older format cannot be mapped
            try:
                with warnings.catch_warnings(action="ignore"):
                    value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
                break
            except Exception as error:           # damaged pickles raise whatever they like
                if not mmap:
                    raise UserError(f"{path} is damaged or holds more than tensors ({(str(error).splitlines() or [type(error).__name__])[0][:80]}); "
                                    "nothing in it was run") from None
        if not isinstance(value, kind):
            raise UserError(f"{path} holds a {type(value).__name__}, not what the published code writes")
        return value
    net, memory, meta = read("metanetwork.pth", dict), read("mem_tokens.pt", torch.Tensor), read("metalora.pth", (list, tuple, dict))
    tensors = {"mem_tokens": memory} | {f"metanetwork.{n}": t for n, t in net.items()}
    try:
        for i, layer in meta.items() if isinstance(meta, dict) else enumerate(meta):
            for part, prefix in (("attention", "self_attn"), ("mlp", "mlp")):
                for key, pair in layer[part].items():
                    name = f"metalora.layers.{i}.{prefix}.{key}_proj"
                    tensors |= {f"{name}.lora_A": pair["A"], f"{name}.lora_B": pair["B"]}
                    if pair.get("C") is not None:
                        raise UserError(f"{folder}/metalora.pth: {name} has a bias C, which this project does not know")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/metalora.pth is not a meta LoRA as the published code writes it ({error!r})") from None
    wrong = [n for n, t in tensors.items() if not torch.is_tensor(t)]
    if wrong:
        raise UserError(f"{folder}: {wrong[0]} is not a tensor")
    return tensors


def published_config(folder, tensors, base_config, scale=None, m2p_heads=None):
    """The sizes that the tensors of a published hypernetwork tell; scale and heads they do not: by the paper's settings."""
    memory, A = tensors["mem_tokens"], tensors.get("metalora.layers.0.self_attn.q_proj.lora_A")
    if memory.dim() != 2 or A is None or A.dim() != 3 or not A.shape[-1]:
        raise UserError(f"{folder}: mem_tokens.pt is not (M, H), or metalora.pth has no A (1, in, rank) for layer 0's q")
    (M, H), per_rank = memory.shape, lora_size(base_config, 1)
    if H != base_config.hidden_size or M * H % per_rank or not M:
        raise UserError(f"{folder} was made for another language model: {M} memory tokens of width {H} (mem_tokens.pt) are no LoRA "
                        f"of one of width {base_config.hidden_size} with {per_rank} numbers a layer and rank")
    numbers = [n.split(".")[2] for n in tensors if n.startswith("metanetwork.transformer_layers.")]
    return ShineConfig(r=M * H // per_rank, meta_r=A.shape[-1], m2p_layers=len(set(numbers)), m2p_heads=m2p_heads or 0,
                       scale=scale or 0.001, **PUBLISHED_LENGTHS)


class Shine(nn.Module):
    """The hypernetwork around a frozen language model."""

    def __init__(self, base, tokenizer, config=ShineConfig(), seed=0):
        super().__init__()
        self.base, self.tokenizer, self.config = base.requires_grad_(False), tokenizer, config
        self.base_id = fingerprint(base)
        self.recorded = None               # see record()
        self.reads_only = False            # behind the stage gist: no M2P has trained yet
        c = base.config
        L, H, self.P = c.num_hidden_layers, c.hidden_size, lora_size(c, config.r, config.target_modules, config.generated)
        self.K = config.lora_layers or L      # the last layers, which a LoRA is generated for
        self.below = L - self.K               # those that have none
        if not 0 < self.K <= L:
            raise UserError(f"lora_layers {config.lora_layers}: the language model has {L} layers (0: all of them)")
        try:
            self.M = memory_tokens(self.P, H)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.m2p = M2P(self.K, self.M, H, config.m2p_layers, config.m2p_heads or None, config.m2p_axes, config.m2p_norm)
        except ValueError as error:
            fits = smallest_rank(c, config.target_modules, config.generated)
            hint = "" if config.r % fits == 0 else f" (--rank: a multiple of {fits} fits)"
            raise UserError(f"{error}{hint}") from None
        self.memory = nn.Parameter(torch.zeros(self.M, H))
        self.meta_lora = nn.Parameter(torch.zeros(L, lora_size(c, config.meta_r)))           # flat, and cut like the generated one
        self.lora_a = nn.Parameter(torch.zeros(self.K, lora_size(c, config.r, config.target_modules, "A"))) if config.static_a else None     # flat As, (K, in * r) where it is one linear's
        self.answer_lora = nn.Parameter(torch.zeros(L, lora_size(c, config.answer_r))) if config.answer_r else None     # flat (L, P), cut like the meta LoRA
        if self.memory.is_meta:
            return
        generator = torch.Generator().manual_seed(seed)
        # zero (the published start) meets RMSNorm with a gradient of 1e5; small and random does not
        self.memory.data.normal_(0, 0.02, generator=generator)
        self.meta_lora.data = self.new_meta_lora(config.meta_r, generator)
        if config.static_a:
            self.lora_a.data.normal_(0, math.sqrt(config.scale), generator=generator)       # as large as a generated one at the start
        if config.answer_r:
            self.answer_lora.data = self.new_meta_lora(config.answer_r, generator)          # B is zero: it changes nothing yet

    def new_meta_lora(self, meta_r, generator):
        """Flat (L, P) at its start: A normal times sqrt(scale), B zero (section 6)."""
        flat = torch.zeros(self.base.config.num_hidden_layers, lora_size(self.base.config, meta_r))
        for layer in cut(flat, self.base.config, meta_r):
            for A, _ in layer.values():
                A.normal_(0, math.sqrt(self.config.scale), generator=generator)
        return flat

    def grow_meta_lora(self, meta_r, seed=0):
        """Give the meta LoRA a larger rank; it computes the same, since the new rows of B are zero."""
        c, old_r = self.base.config, self.config.meta_r
        flat = self.new_meta_lora(meta_r, torch.Generator().manual_seed(seed))
        for new, old in zip(cut(flat, c, meta_r), cut(self.meta_lora.data, c, old_r)):
            for name, (A, B) in new.items():
                A[:, :old_r], B[:old_r] = old[name]
        self.meta_lora, self.config = nn.Parameter(flat.to(self.meta_lora)), replace(self.config, meta_r=meta_r)

    @torch.no_grad()
    def retargeted(self, config, texts, seed=0):
        """A hypernetwork with this one's reading and M2P that generates a LoRA of another rank, for other linears or layers, or of B alone.
        What its memory tokens say is new, so it has to be trained. UserError where that LoRA takes another number of memory tokens,
        unless it only grows: where B alone of one linear is generated a higher rank takes more memory tokens behind those that are there,
        whose rows of B are met by columns of A that start at zero.

        Where A becomes static it starts as this one's mean over `texts` in the ranks whose B is still read at the same place, else at zero.
        (Not in the paper; benchmarks/RUNS.md, "B alone".)
        """
        new, sizes, c = Shine(self.base, self.tokenizer, config, seed).to(self.device), self.base.config, self.config
        if c.answer_r and config.answer_r != c.answer_r:
            raise UserError(f"--answer-rank {config.answer_r}: the LoRA for answering of this hypernetwork has rank {c.answer_r}, and would be lost")
        layout = lora_layout(sizes, config.target_modules)
        grows = c.static_a and config.static_a and c.target_modules == config.target_modules and len(layout) == 1 and config.r > c.r
        if new.M != self.M and not grows:
            rank, left = divmod(config.r * self.M, new.M)
            raise UserError(f"such a LoRA is cut out of {new.M} memory tokens, this hypernetwork has {self.M}: "
                            + ("" if left else f"choose a rank of {rank}, or ") + "train a new one")
        own, both = new.trained(), min(self.K, new.K)
        for name, p in self.trained().items():
            if name in own and p.shape == own[name].shape:
                own[name].data = p.data.clone()
            elif grows and name in ("memory", "m2p.token_pe"):
                own[name].data[:len(p)] = p.data
            elif name in ("m2p.layer_pe", "lora_a") and p.shape[1] == own[name].shape[1]:      # of the layers that both generate for
                own[name].data[-both:] = p.data[-both:]
            elif grows and name == "lora_a":      # (K, in * r)
                A, old = (t.data.view(len(t), layout[0][1], -1) for t in (own[name], p))
                A.zero_()[-both:, :, :c.r] = old[-both:]
        if config.static_a and not self.config.static_a:
            where = [cut(torch.arange(self.P, device=self.device)[None], sizes, one.r, one.target_modules, one.generated)[0]
                     for one in (c, config)]      # which of the P numbers each A and B is made of
            lora = self.apart(self.generate_lora(texts))[0]
            for i, layer in enumerate(cut(own["lora_a"].data.zero_(), sizes, config.r, config.target_modules, "A"), new.below):
                for name, (A,) in layer.items():
                    if name in lora[i]:
                        same = (where[1][name][-1][:, None, 0] == where[0][name][-1][:, 0]).nonzero()      # ranks (new, old) with the same B
                        A[:, same[:, 0]] = lora[i][name][0].mean(0)[:, same[:, 1]]
        return new

    def trained(self):
        """What trains, {name: parameter}: all of this module but the base."""
        ours = {"memory": self.memory, "meta_lora": self.meta_lora} | {n: p for n, p in (("lora_a", self.lora_a), ("answer_lora", self.answer_lora)) if p is not None}
        return ours | {f"m2p.{n}": p for n, p in self.m2p.named_parameters()}

    # ------------------------------------------------------------------------ the two passes
    def read(self, context_ids, mask=None, keep=None, K=None):
        """Section 3: ids (B, N), mask (B, N) or None -> memory states (B, K, M, H) of the last K layers (default: those that a LoRA is
        generated for, which are all L in the paper); keys and values of all L in `keep`, a MemoryCache."""
        flat = self.meta_lora
        if torch.is_grad_enabled() and self.base.compute_dtype:      # in training cast once, not pair by pair; else a second copy of all would be too large
            flat = flat.to(self.base.compute_dtype)
        meta = cut(flat, self.base.config, self.config.meta_r) if self.config.meta_r else None
        return self.base.read(context_ids, mask, self.memory, meta, keep)[:, -(K or self.K):]

    def to_lora(self, memory_states, trace=None):
        """Section 4: memory states (B, K, M, H) -> LoRA, A (B, in, r) and B (B, r, out) for each of the linears that have one."""
        return self.assemble(self.m2p(memory_states, trace))

    def assemble(self, numbers):
        """What the M2P says (B, K, P) -> LoRA: times sqrt(scale), and cut (section 4, step 3)."""
        c, flat = self.config, numbers * math.sqrt(self.config.scale)
        info = {"base": self.base_id, "base_name": self.base.name}
        if not c.static_a:
            return self.beside(self.cut(flat, info))
        static = self.lora_a if torch.is_grad_enabled() else self.lora_a.detach()       # a view of a parameter requires grad even under no_grad
        As, Bs = (cut(t, self.base.config, c.r, c.target_modules, half) for t, half in ((static.to(flat.dtype), "A"), (flat, "B")))
        layers = [{name: (a[name][0].expand(len(flat), -1, -1), *b[name]) for name in a} for a, b in zip(As, Bs)]
        return self.beside(self.on_top(layers, info))

    def beside(self, lora):
        """What is generated and the LoRA for answering, if there is one: (B, in, r), (B, r, out) of a linear -> (B, in, r + answer_r),
        (B, r + answer_r, out), since x (A1 A2) (B1; B2) = (x A1) B1 + (x A2) B2."""
        if self.answer_lora is None:
            return lora
        _, B = next(iter(lora[-1].values()))
        flat = (self.answer_lora if torch.is_grad_enabled() else self.answer_lora.detach()).to(B.dtype)
        rows = lambda pair: tuple(t.expand(len(B), -1, -1) for t in pair)                               # (in, answer_r), (answer_r, out) -> one a row
        join = lambda one, two: (torch.cat((one[0], two[0]), -1), torch.cat((one[1], two[1]), -2))
        return LoRA([{name: join(layer[name], rows(pair)) if name in layer else rows(pair) for name, pair in trained.items()}
                     for layer, trained in zip(lora, cut(flat, self.base.config, self.config.answer_r))], lora.r, lora.info)

    def apart(self, lora):
        """`beside` undone -> [what is generated, the LoRA for answering, if there is one], each a list of {linear: (A, B)}."""
        linears, r = {name for name, _, _ in lora_layout(self.base.config, self.config.target_modules)}, self.config.r
        made = [set()] * self.below + [linears] * self.K
        ranks = lambda pair, which: (pair[0][..., which], pair[1][..., which, :])
        generated = [{name: ranks(pair, slice(r)) for name, pair in layer.items() if name in names} for layer, names in zip(lora, made)]
        trained = [{name: ranks(pair, slice(r if name in names else 0, None)) for name, pair in layer.items()} for layer, names in zip(lora, made)]
        return [generated] if self.answer_lora is None else [generated, trained]

    def cut(self, flat, info=None):
        """Flat (B, K, A and B) -> LoRA of the last K layers, of the rank and for the linears that this hypernetwork generates one for."""
        return self.on_top(cut(flat, self.base.config, self.config.r, self.config.target_modules), info)

    def on_top(self, layers, info=None):
        """What the last layers have -> LoRA of all L; those below have none."""
        return LoRA([{}] * (self.base.config.num_hidden_layers - len(layers)) + layers, self.config.r, info)

    def generate_lora(self, context, mask=None):
        """A text, a list of texts, or ids (B, N) with a mask -> LoRA with one row a text. Text in, no gradient."""
        if torch.is_tensor(context):
            return self.to_lora(self.read(context, mask))
        if self.memory.is_meta:
            raise UserError("there is no hypernetwork to read a text with, only a language model: name one with --hypernet DIR")
        texts = [context] if isinstance(context, str) else list(context)
        if not texts:
            raise UserError("there is no text to read: the list is empty")
        rows = []
        for text in texts:
            ids, left = self.encode_context(text)
            if left:
                warnings.warn(f"the text is longer than the {self.config.context_length} tokens this model reads; "
                              f"the last {left} tokens were left out", stacklevel=2)
            rows.append(ids)
        ids, mask = (t.to(self.device) for t in pad(rows, self.tokenizer.end, multiple=64 if self.recorded else 1))
        with torch.no_grad():
            if self.recorded:
                lora = self.assemble(self.recorded(ids, mask))      # which makes new tensors: a record overwrites its own
            else:
                lora = self.to_lora(self.read(ids, mask if len(rows) > 1 else None))
        lora.info |= {"tokens": [len(row) for row in rows],
                      "text": [hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12] for text in texts]}
        return lora

    def record(self):
        """On a GPU: read texts from now on by CUDA graphs, one for each number of texts and each length, up to the next multiple of 64."""
        self.recorded = Recorded(lambda ids, mask: self.m2p(self.read(ids, mask)))

    def forward(self, batch, total=None):
        """Section 6: the loss of a batch (data.py says its fields); gradients reach all that trains."""
        return self.base.loss(batch, self.generate_lora(batch["context_ids"], batch.get("context_mask")), total)

    def gist(self, batch, total=None):
        """The loss of a batch where the conversation attends to keys and values of the memory tokens, in every layer, in the place
        of a LoRA: no M2P in between, so that reading is learnt many times sooner (gist tokens, Mu et al. 2023; not in the paper)."""
        return self.base.loss(batch, None, total, self.memory_cache(batch["context_ids"], batch.get("context_mask")))

    def memory_cache(self, context_ids, mask):
        """ids (B, N), mask (B, N) or None -> the MemoryCache that a conversation about these texts sees."""
        lengths = context_ids.new_full((len(context_ids),), context_ids.shape[1]) if mask is None else mask.sum(1)
        cache = MemoryCache(self.M, lengths + self.M)
        self.read(context_ids, mask, cache)
        return cache.filled()

    def encode_context(self, text):
        """str -> (ids that fit, number of tokens left out)."""
        ids = self.tokenizer.encode(text.strip())
        if not ids:
            raise UserError("the text is empty: give at least one word")
        return ids[:self.config.context_length], max(0, len(ids) - self.config.context_length)

    @property
    def device(self):
        return self.base.model.norm.weight.device

    def from_published(self, tensors, folder="the published hypernetwork"):
        """Tensors as the published code names them -> as ours are named: mem_tokens (M, H), metanetwork.<M2P name>,
        metalora.layers.<i>.<linear>.lora_A (1, in, meta_r) and lora_B (1, meta_r, out)."""
        L, layout, r = self.base.config.num_hidden_layers, lora_layout(self.base.config), self.config.meta_r
        check_tensors(f"{folder}/metanetwork.pth", {n: t for n, t in tensors.items() if n.startswith("metanetwork.")},
                      {f"metanetwork.{n}": p.shape for n, p in self.m2p.named_parameters()})
        check_tensors(f"{folder}/metalora.pth", {n: t for n, t in tensors.items() if n.startswith("metalora.")},
                      {f"metalora.layers.{i}.{name}.lora_{half}": shape for i in range(L) for name, n_in, n_out in layout
                       for half, shape in (("A", (1, n_in, r)), ("B", (1, r, n_out)))})
        meta = [{name: tuple(tensors[f"metalora.layers.{i}.{name}.lora_{half}"][0] for half in "AB") for name, _, _ in layout} for i in range(L)]
        return {"memory": tensors["mem_tokens"], "meta_lora": flatten(meta)} | {
            "m2p." + n.removeprefix("metanetwork."): t for n, t in tensors.items() if n.startswith("metanetwork.")}

    # ------------------------------------------------------------------------ talking
    def answer(self, question, lora, **options):
        """One question, one answer. A batch (list of questions, LoRA of as many rows) gives a list."""
        if isinstance(question, str):
            return Conversation(self, lora, **options).ask(question)
        assert lora is None or lora.rows == len(question) > 0, f"as many questions as rows of the LoRA: {len(question)} and {lora.rows}"
        return answer_batch(self.base, self.tokenizer, [[("user", q)] for q in question], lora, **options)

    def conversation(self, lora=None, context=None, **options):
        return Conversation(self, lora, context, **options)

    # ------------------------------------------------------------------------ folders
    def save(self, folder, dtype=torch.bfloat16):
        """Write hypernet.json + hypernet.safetensors; the language model's own files are not written."""
        write_json(Path(folder) / "hypernet.json", asdict(self.config) | {"base": self.base_id, "base_name": self.base.name}
                   | ({"reads_only": True} if self.reads_only else {}))
        tensors = {n: p.detach().to("cpu", dtype).contiguous() for n, p in self.trained().items()}
        write_file(Path(folder) / "hypernet.safetensors", lambda p: save_file(tensors, p))

    @classmethod
    def load(cls, folder=None, device="cpu", dtype=torch.float32, base=None, tokenizer=None, scale=None, m2p_heads=None, adopt=False):
        """Read a hypernetwork folder: ours, or a published one (whose files tell neither scale nor m2p_heads).

        base: a language model or its folder, where it is not the same folder. dtype: of all weights; None: as stored.
        folder None: no hypernetwork, for talking with a saved LoRA. adopt: the hypernetwork may belong to an earlier state of the
        language model, as a start for training.
        """
        for path in (folder, base):
            if isinstance(path, (str, Path)) and not Path(path).is_dir():
                raise UserError(f"{path} is not a model folder")
        base_folder = folder if base is None or isinstance(base, LanguageModel) else base
        base = base if isinstance(base, LanguageModel) else LanguageModel.load(base_folder, device, dtype)
        tokenizer = Ids(base.config.vocab_size) if tokenizer is Ids else tokenizer or load_tokenizer(base_folder, base)
        config, tensors = ShineConfig(smallest_rank(base.config), **PUBLISHED_LENGTHS), None
        if folder is not None and holds_hypernet(folder) == "published":
            published = read_published(folder)
            config = published_config(folder, published, base.config, scale, m2p_heads)
        elif folder is not None:
            if not holds_hypernet(folder):
                raise UserError(f"{folder} holds no hypernetwork: neither hypernet.json nor {', '.join(PUBLISHED)}")
            if scale or m2p_heads:
                raise UserError(f"--scale and --m2p-heads are for published files; {folder}/hypernet.json has its own")
            published, path = None, Path(folder) / "hypernet.json"
            raw, config = hypernet_config(folder)
            if not adopt and raw.get("base") != fingerprint(base):
                raise UserError(f"{path} belongs to another language model ({raw.get('base_name') or raw.get('base')}) "
                                f"than the one in {base_folder}")
            tensors = read_tensors(path.with_suffix(".safetensors"))
        with torch.device("meta"):
            shine = cls(base, tokenizer, config)
        shine.reads_only = tensors is not None and raw.get("reads_only") is True
        if folder is None:
            return shine.eval()
        if tensors is None:
            tensors = shine.from_published(published, folder)
        check_tensors(folder, tensors, {n: p.shape for n, p in shine.trained().items()})
        shine.load_state_dict({n: t.to(device, dtype or t.dtype) for n, t in tensors.items()}, strict=False, assign=True)
        return shine.eval()


def hypernet_config(folder):
    """-> (folder/hypernet.json, the ShineConfig in it)"""
    raw = read_json(path := Path(folder) / "hypernet.json")
    return raw, from_json(ShineConfig, raw, path, zero=("meta_r", "m2p_layers", "m2p_heads", "lora_layers", "answer_r"))


class Conversation:
    """Several turns about one text: with its LoRA (SHINE), with the text in the prompt (context), or with neither."""

    def __init__(self, shine, lora=None, context=None, max_new_tokens=64, **sampling):
        if max_new_tokens > (most := shine.base.config.max_position_embeddings):
            raise UserError(f"{max_new_tokens} new tokens: this language model has positions for {most}")
        self.shine, self.lora = shine, lora.one_row() if isinstance(lora, LoRA) else lora
        self.context = shine.encode_context(context)[0] if context is not None else None      # ids, as many as the hypernetwork reads
        self.max_new_tokens, self.sampling, self.turns, self.dropped = max_new_tokens, sampling, [], 0
        self.decoder = Decoder(shine.base, lora)      # one for all turns

    def prompt(self, question):
        """Ids of the conversation so far and the question; the oldest turns go when it grows too long."""
        turns = self.turns
        while True:
            ids, _ = render(self.shine.tokenizer, turns + [("user", question)], self.context, open_ended=True)
            limit = self.shine.config.conversation_length + len(self.context or ())
            if len(ids) + self.max_new_tokens <= max(limit, self.max_new_tokens + 64):
                self.dropped += (len(self.turns) - len(turns)) // 2
                self.turns = turns
                return ids
            if not turns:
                raise UserError(f"the question has {len(ids)} tokens; with room for {self.max_new_tokens} of an answer "
                                f"this model holds {limit}")
            turns = turns[2:]

    def stream(self, question):
        """Yield the answer in pieces; what was yielded is the turn in the history, also when the caller stops early."""
        tokenizer, base = self.shine.tokenizer, self.shine.base
        ids = torch.tensor([self.prompt(question)], device=self.shine.device)
        answer, said = [], ""
        try:
            for token in base.generate(ids, None, self.lora, self.max_new_tokens, tokenizer.stops, decoder=self.decoder, resume=True, **self.sampling):
                if (token := int(token)) in tokenizer.stops:
                    break
                answer.append(token)
                text = tokenizer.decode(answer)
                if not text.endswith("\ufffd"):          # a character may take several tokens
                    yield text[len(said):]
                    said = text
            yield tokenizer.decode(answer)[len(said):]       # bytes that never became a character
        finally:
            self.turns += [("user", question), ("assistant", tokenizer.decode(answer))]

    def ask(self, question):
        return "".join(self.stream(question)).strip()


def answer_batch(base, tokenizer, conversations, lora=None, contexts=None, max_new_tokens=64, **sampling):
    """Answer the last turn of many conversations at once, row i with row i of the LoRA. -> [str]"""
    device, room = base.model.norm.weight.device, base.config.max_position_embeddings // 2
    rows = [render(tokenizer, turns, tokenizer.encode(contexts[i])[:room] if contexts else None, open_ended=True)[0]
            for i, turns in enumerate(conversations)]
    length = max(map(len, rows))
    ids = torch.tensor([[tokenizer.end] * (length - len(r)) + r for r in rows], device=device)     # padded on the left
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows], device=device)
    stop = tokenizer.stops
    steps = list(base.generate(ids, mask, lora, max_new_tokens, stop, **sampling))
    answers = []
    for row in torch.stack(steps, 1).tolist():
        ends = [i for i, t in enumerate(row) if t in stop]
        answers.append(tokenizer.decode(row[:ends[0]] if ends else row).strip())
    return answers


# ---------------------------------------------------------------------------- the command line
def inspect(shine, text, say=print):
    """Print every step from a text to LoRA parameters: tokens, shapes, norms, and how much each linear changes."""
    tok, c = shine.tokenizer, shine.base.config
    ids, _ = shine.encode_context(text)
    say(f"1. tokens (N = {len(ids)})\n   " + "|".join(map(tok.piece, ids)))
    context = torch.tensor([ids], device=shine.device)
    with torch.no_grad():
        states = shine.read(context, K=c.num_hidden_layers)
        say(f"2. reading: {len(ids)} context + {shine.M} memory tokens through {c.num_hidden_layers} layers with the meta LoRA of rank "
            f"{shine.config.meta_r}\n   memory states {shape(states)}; mean norm of a state after each layer:")
        say("   " + "  ".join(f"{i}: {n:.2f}" for i, n in enumerate(states[0].norm(dim=-1).mean(-1).tolist())))
        say(f"3. M2P: {shine.config.m2p_layers} encoder layers over the grid of L x M = {shine.K} x {shine.M}; "
            "mean norm, spread over L, spread over M" + (f" (L: the last {shine.K} layers)" if shine.below else ""))

        def trace(name, x):
            say(f"   {name}: {shape(x)}  {x.norm(dim=-1).mean():.2f}  {x.std(1, correction=0).mean():.3f}  {x.std(2, correction=0).mean():.3f}")
        lora = shine.to_lora(states[:, -shine.K:], trace)
        halves = "B (A is the same for every text)" if shine.config.static_a else "A, B"
        say(f"4. each layer's slice (M, H) = ({shine.M}, {c.hidden_size}) is read as P = {shine.P:,} numbers and cut into {halves} of rank "
            f"{shine.config.r}, times sqrt({shine.config.scale})")
        for title, part in zip(("5. what the generated LoRA does: |A B| / |W| and, in brackets, the effective rank of A B",
                                "6. and, the same for every text, the LoRA for answering beside it"), shine.apart(lora)):
            say(f"{title}\n   layer  " + "".join(f"{name.split('.')[1]:>15}" for name in part[-1]))
            for i, layer in enumerate(part):
                if not layer:
                    continue
                cells = (f"{size / shine.base.model.layers[i].get_submodule(name).weight.float().norm():8.1%} ({rank:.1f})"
                         for name, (size, rank) in ((name, size_and_rank(*pair)) for name, pair in layer.items()))
                say(f"   {i:5d}  " + "".join(f"{cell:>15}" for cell in cells))


def size_and_rank(A, B):
    """A (1, in, r), B (1, r, out) -> the norm of A B and its effective rank (exp of the entropy of its singular values)."""
    s = torch.linalg.svdvals(torch.linalg.qr(A[0].float())[1] @ torch.linalg.qr(B[0].float().T)[1].T)   # (r,) those of A B
    p = s / s.sum().clamp(min=1e-12)
    return s.norm(), math.exp(-(p * p.clamp(min=1e-12).log()).sum())


def shape(x):
    return "(" + ", ".join(map(str, x.shape)) + ")"


def read_text(args):
    """The text of the command line, or None with --load."""
    given = [args.text is not None, args.file is not None, args.load is not None]
    if sum(given) != 1:
        raise UserError("give one of: a TEXT (or - for standard input), --file PATH, --load LORA")
    if args.load is not None:
        return None
    if args.text is not None and args.text != "-":
        return args.text
    if args.file == "":
        raise UserError("the path of the file is empty")
    try:
        if args.file in (None, "-") and sys.stdin is None:
            raise UserError("standard input is closed")
        raw = sys.stdin.buffer.read() if args.file in (None, "-") else Path(args.file).read_bytes()
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{args.file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{args.file or 'standard input'} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def absorb(shine, text, say):
    """Text -> LoRA, and two lines that say what happened. -> (LoRA, facts for --json)"""
    ids, left = shine.encode_context(text)
    if left:
        say(f"note: the text has {len(ids) + left:,} tokens, this model reads {shine.config.context_length}: the first {len(ids)} are used")
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = shine.generate_lora(text)
    if shine.device.type == "cuda":
        torch.cuda.synchronize()
    ms = (time.perf_counter() - started) * 1000
    tensors = [t for layer in lora for pair in layer.values() for t in pair]
    numbers, size = shine.P * shine.K, sum(t.nbytes for t in tensors) / 1024
    say(f"read {len(ids)} tokens in one forward pass: {numbers:,} LoRA numbers in {ms:.0f} ms")
    linears = [len(lora_layout(shine.base.config, shine.config.target_modules)), len(lora[-1])]
    say(f"rank {lora.r} on {linears[0]} linear{'s' * (linears[0] > 1)} of {shine.K} layer{'s' * (shine.K > 1)}"
        + (f" beside one for answering, rank {shine.config.answer_r} on {linears[1]}" if shine.config.answer_r else "") + f", {size:.0f} KiB; the text is no longer needed")
    return lora, {"tokens": len(ids), "left_out": left, "numbers": numbers, "milliseconds": round(ms, 2), "rank": lora.r}


HELP = """  /text NEW TEXT   absorb another text      /file PATH   absorb a file
  /forget          clear the conversation, keep the text
  /compare         show beside each answer what the model says with the text in its prompt, and with nothing
  /save PATH       keep the LoRA            /quit        leave (or Ctrl-D)      Ctrl-C stops an answer"""


def chat(shine, lora, text, options, say, talk):
    """Multi-turn chat, going on from `talk`. Every line is a question or a /command; answers are streamed."""
    try:
        import readline  # noqa: F401  (line editing and history, where Python has it)
    except ImportError:
        pass
    compare, rivals = False, {}
    say("ask about the text; /help lists the commands")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            say()
            return
        except KeyboardInterrupt:
            say()
            continue
        command, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            if command in ("/quit", "/exit"):
                return
            elif command == "/help":
                say(HELP)
            elif command == "/forget":
                talk, rivals = Conversation(shine, lora, **options), {}
                say("the conversation is cleared, the text is kept")
            elif command in ("/text", "/file"):
                new = rest if command == "/text" else read_text(argparse.Namespace(text=None, file=os.path.expanduser(rest.strip()), load=None))
                lora, _ = absorb(shine, new, say)
                text, talk, rivals = new, Conversation(shine, lora, **options), {}
            elif command == "/compare":
                compare, rivals = not compare, {}
                say("comparison is " + ("on" if compare else "off") + ("" if text or not compare else " (no text at hand: a loaded LoRA does not hold it)"))
            elif command == "/save":
                if not rest.strip():
                    raise UserError("/save needs a path")
                lora.save(os.path.expanduser(rest.strip()))
                say(f"saved to {rest.strip()}")
            elif command.startswith("/"):
                raise UserError(f"there is no command {command}; /help lists them")
            else:
                history = list(talk.turns)
                try:
                    for piece in talk.stream(line):
                        print(piece, end="", flush=True)
                except KeyboardInterrupt:
                    pass
                print(flush=True)
                say_dropped(talk, say)
                if compare:
                    for name, context in (("text in the prompt", text), ("without the text", None)):
                        if name == "without the text" or text:
                            rivals.setdefault(name, Conversation(shine, None, context, **options))
                            rivals[name].turns = rivals[name].turns or history
                            say(f"  {name}: {rivals[name].ask(line)}")
        except UserError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            say()


def say_dropped(talk, say):
    """Say so where a conversation has grown too long -> how many turns went."""
    dropped, talk.dropped = talk.dropped, 0
    if dropped:
        say(f"  note: the conversation is full; its oldest {dropped} question(s) and answer(s) were dropped")
    return dropped


def check_flags(args):
    """Refuse flags that contradict each other or would be ignored."""
    content = [args.text, args.file, args.load, *args.ask, args.chat or None, args.save, args.inspect or None, args.export_peft, args.merge_into]
    for wrong, complaint in (
            (not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.top_k < 0 or args.max_new_tokens < 1 or not 0 <= args.seed < 2 ** 63,
             "--temperature, --top-k and --seed must be at least 0, --top-p in (0, 1], --max-new-tokens at least 1"),
            (any(getattr(args, name) == "" for name in ("model", "base", "hypernet", "load", "convert", "out", "save", "export_peft", "merge_into", "logits")),
             "a path is empty"),
            (not all(question.strip() for question in args.ask), "a question of --ask is empty"),
            (args.model and (args.base or args.hypernet), "--model DIR holds both parts: give it, or --base DIR and --hypernet DIR"),
            (args.hypernet and not args.base, "--hypernet needs the language model it was made for: --base DIR"),
            (args.convert and not (args.base and args.out), "--convert DIR needs --base DIR and --out DIR"),
            (args.convert and any(x is not None for x in (*content, args.hypernet)), "--convert takes no text and no --hypernet, and asks nothing"),
            (args.json and args.chat, "--json gives one JSON object and ends: without --chat"),
            (args.out and not args.convert, "--out is where --convert writes; --save, --export-peft and --merge-into take their own path"),
            (args.inspect and args.load is not None, "--inspect needs a text: a loaded LoRA does not hold it"),
            (args.base and not args.hypernet and (args.text is not None or args.file is not None),
             "--base alone cannot read a text: name a hypernetwork with --hypernet DIR, or a LoRA with --load"),
            (args.logits and not args.ask, "--logits keeps the logits of questions: it needs --ask"),
            ((args.scale or args.m2p_heads) and not (args.hypernet or args.convert), "--scale and --m2p-heads describe published files: --hypernet DIR")):
        if wrong:
            raise UserError(complaint)


def parse(argv):
    """Flags -> namespace; those that do not fit together are refused."""
    parser = Parser(description="Turn a text into LoRA parameters in one forward pass and talk about it.")
    add = parser.add_argument
    add("text", nargs="?", metavar="TEXT", help="the text, or - for standard input")
    add("--file", metavar="PATH", help="read the text from a file")
    add("--load", metavar="LORA", help="talk with a LoRA that --save wrote, without the text")
    add("--save", metavar="LORA", help="keep the generated LoRA (safetensors)")
    add("--chat", action="store_true", help="talk about the text")
    add("--ask", action="append", default=[], metavar="Q", help="answer this and exit; may be repeated: one conversation")
    add("--json", action="store_true", help="with --ask: one JSON object on standard output")
    add("--inspect", action="store_true", help="print every step from the text to the parameters")
    add("--model", metavar="DIR", help="model folder (default: checkpoints/small)")
    add("--base", metavar="DIR", help="language model: a Hugging Face Qwen3 folder; bf16 stays bf16")
    add("--hypernet", metavar="DIR", help="hypernetwork for --base: ours, or as its authors release it")
    add("--scale", type=positive(float), help="of a published hypernetwork, whose files do not tell it (default 0.001)")
    add("--m2p-heads", type=positive(int), help="likewise (default H / 128, at least 4)")
    add("--convert", metavar="DIR", help="write the published hypernetwork in DIR as ours into --out, and exit")
    add("--out", metavar="DIR", help="of --convert")
    add("--export-peft", metavar="DIR", help="write the generated LoRA as a PEFT adapter")
    add("--merge-into", metavar="DIR", help="write the language model with the LoRA in its weights as a Hugging Face folder")
    add("--ids", action="store_true", help="TEXT and questions are token ids, '5 17 3', for folders without a tokenizer; no chat format")
    add("--logits", metavar="PATH", help="with --ask: the logits over each prompt as safetensors, turn.<i> (tokens, vocabulary)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--float32", action="store_true", help="states in float32, also where the device multiplies bf16")
    add("--temperature", type=float, default=0.0, help="0 = greedy")
    add("--top-k", type=int, default=0)
    add("--top-p", type=float, default=1.0)
    add("--max-new-tokens", type=int, default=64, help="longest answer")
    add("--seed", type=int, default=0, help="of sampling")
    args = parser.parse_args(argv)
    check_flags(args)
    args.model = args.model or str(DEFAULT_MODEL)
    return args


def convert(args):
    """Write the published hypernetwork of --convert into --out as ours."""
    if holds_hypernet(args.convert) != "published":
        raise UserError(f"{args.convert} holds no published hypernetwork ({', '.join(PUBLISHED)})")
    shine = Shine.load(args.convert, base=args.base, dtype=None, tokenizer=Ids, scale=args.scale, m2p_heads=args.m2p_heads)
    shine.save(args.out, dtype=None)
    print(f"wrote {args.out}: M = {shine.M}, rank {shine.config.r}, meta rank {shine.config.meta_r}, "
          f"{shine.config.m2p_layers} M2P layers, for {shine.base.name}")


def load_model(args):
    """The language model and hypernetwork that the flags name, in bf16 where they are stored so and the device multiplies it; weights
    of a Hugging Face folder stay as they are stored."""
    device, dtype, _ = pick_device(args.device, args.float32)
    tokenizer = Ids if args.ids else None
    if not args.base:
        shine = Shine.load(args.model, device, dtype if device.type == "cuda" else None, tokenizer=tokenizer)
        return shine.float() if dtype == torch.float32 else shine
    shine = Shine.load(args.hypernet, device, None, args.base, tokenizer, args.scale, args.m2p_heads)
    if shine.base.model.norm.weight.dtype == torch.bfloat16:
        shine.base.compute_dtype = dtype
    return shine


def keep(args, lora, base_folder, say):
    """Write the LoRA wherever the flags want it."""
    if args.save:
        lora.save(args.save)
        say(f"saved to {args.save}")
    if args.export_peft:
        lora.export_peft(args.export_peft, base_folder)
        say(f"PEFT adapter written to {args.export_peft}")
    if args.merge_into:
        lora.merge_into(base_folder, args.merge_into)
        say(f"language model with the LoRA in its weights written to {args.merge_into}")


def ask(args, shine, talk, say):
    """The questions of --ask in turn -> [{"question", "answer"}], and "dropped" where the conversation was too long for its oldest turns; the logits over each prompt go where --logits says."""
    turns, logits = [], {}
    for question in args.ask:
        if args.logits:
            with torch.no_grad():
                ids = torch.tensor([talk.prompt(question)], device=shine.device)
                logits[f"turn.{len(turns)}"] = shine.base(ids, None, talk.lora)[0].float().cpu()
        turns.append({"question": question, "answer": talk.ask(question)})
        if not args.json:
            say(f"> {question}\n{turns[-1]['answer']}")
        if dropped := say_dropped(talk, say):
            turns[-1]["dropped"] = dropped
    if args.logits:
        write_file(args.logits, lambda p: save_file(logits, p))
    return turns


def main(argv=None):
    args = parse(argv)
    if args.convert:
        return convert(args)
    text = read_text(args)
    shine = load_model(args)
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    if text is None:
        lora, facts = LoRA.load(args.load, shine.base), {"loaded": args.load}
        say(f"loaded {args.load}: rank {lora.r}, made from a text of {lora.info.get('tokens', '?')} tokens")
    else:
        if shine.reads_only:
            say(f"{args.hypernet or args.model} is from the stage gist: its M2P has not trained, so the answers cannot fit (train.py --stage pretrain --model goes on from it)")
        lora, facts = absorb(shine, text, say)
    if args.inspect:
        inspect(shine, text, say)
    keep(args, lora, args.base or args.model, say)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    talk = Conversation(shine, lora, **options)
    turns = ask(args, shine, talk, say)
    if args.json:
        print(json.dumps(facts | {"turns": turns}, ensure_ascii=False))
    if args.chat:
        if "-" in (args.text, args.file):      # standard input held the text; the keyboard is the terminal
            try:
                os.dup2(os.open("/dev/tty", os.O_RDONLY), 0)
            except OSError:
                raise UserError("--chat needs a terminal when the text comes from standard input; use --file") from None
        chat(shine, lora, text, options, say, talk)


if __name__ == "__main__":
    run(main)
