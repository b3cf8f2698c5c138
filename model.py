"""The language model: a decoder-only transformer with the Qwen3 computation, and LoRA as an argument.

Shapes, with the symbols of the paper: B batch, T tokens of a row (N of a context, S of a conversation), L layers,
H hidden_size, M memory tokens, r LoRA rank, q = num_attention_heads * head_dim, k = num_key_value_heads * head_dim,
I intermediate_size, V vocab_size.

    ids (B, T) -> embed_tokens -> (B, T, H) -> L x decoder layer -> norm -> lm_head -> logits (B, T, V)

    the seven linears     in -> out      A          B            y = x W^T + (x A) B            (paper, section 5)
    self_attn.q_proj      H  -> q        (H, r)     (r, q)       x (B, T, in)   y (B, T, out)   W (out, in)
    self_attn.k_proj      H  -> k        (H, r)     (r, k)       one pair (A, B) shared by all rows as above, or
    self_attn.v_proj      H  -> k        (H, r)     (r, k)       one pair a row: A (B, in, r), B (B, r, out)
    self_attn.o_proj      q  -> H        (q, r)     (r, H)
    mlp.gate_proj         H  -> I        (H, r)     (r, I)
    mlp.up_proj           H  -> I        (H, r)     (r, I)
    mlp.down_proj         I  -> H        (I, r)     (r, H)

This file knows no text, no optimizer and no M2P. Parameter and config names are those of Hugging Face's Qwen3, so a
folder with config.json and model.safetensors loads by name.
"""
import json
import math
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """What the user can mend: one line that says what is wrong and what to do. The commands print it and exit with 2."""


@dataclass(frozen=True)
class Config:
    """Sizes of a language model; the field names are those of a Hugging Face Qwen3 config.json."""
    vocab_size: int = 512
    hidden_size: int = 48             # H
    num_hidden_layers: int = 2        # L
    num_attention_heads: int = 4
    num_key_value_heads: int = 2      # heads / kv heads query heads share one key-value head
    head_dim: int = 12                # heads * head_dim need not be H
    intermediate_size: int = 96       # I, of the SwiGLU
    rope_theta: float = 10000.0       # base of the rotary frequencies
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True  # the output matrix is the input embedding
    max_position_embeddings: int = 1024

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                            f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")

    @classmethod
    def load(cls, folder):
        """Read folder/config.json. Fields we do not have are ignored unless they change the computation."""
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is not a model folder")
        raw = read_json(Path(folder) / "config.json")
        rope, layers = raw.get("rope_parameters") or {}, raw.get("layer_types") or ["full_attention"]
        if isinstance(rope, dict) and all(rope.get(k, "default") == "default" for k in ("rope_type", "type")):
            raw, rope = raw | {k: v for k, v in rope.items() if k == "rope_theta"}, None
        if isinstance(layers, list) and all(kind == "full_attention" for kind in layers):
            layers = None
        for key, value, plain in (
                ("architectures", raw.get("architectures") or ["Qwen3ForCausalLM"], ["Qwen3ForCausalLM"]),
                ("rope_parameters", rope, None), ("layer_types", layers, None),
                *((key, raw.get(key, plain), plain) for key, plain in (
                    ("model_type", "qwen3"), ("attention_bias", False), ("rope_scaling", None), ("use_sliding_window", False),
                    ("hidden_act", "silu"), ("quantization_config", None)))):
            if value != plain:
                raise UserError(f"{folder}/config.json: {key} = {value!r} is not supported" + (f", only {plain!r}" if plain else ""))
        missing = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"} - set(raw)
        if missing:
            raise UserError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
        for key, default in (("head_dim", 128), ("num_key_value_heads", 32), ("tie_word_embeddings", False)):   # Qwen3's own
            raw.setdefault(key, default)
        return from_json(cls, raw, f"{folder}/config.json")

    def save(self, folder):
        head = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False}
        write_json(Path(folder) / "config.json", head | asdict(self))


PRESETS = {  # our own models: the same class at other sizes; vocab_size comes from the tokenizer
    "test": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                 intermediate_size=64),                                                  # 0.02 M + embeddings: the suite
    "nano": dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                 intermediate_size=192),                                                 # 0.15 M + embeddings } benchmarks.scaling
    "micro": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                  intermediate_size=384),                                                # 0.8 M + embeddings  }
    "tiny": dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3, head_dim=32,
                 intermediate_size=512),                                                 # 2.4 M + embeddings: a laptop
    "small": dict(hidden_size=384, num_hidden_layers=10, num_attention_heads=6, num_key_value_heads=3, head_dim=64,
                  intermediate_size=1024, max_position_embeddings=2048),                 # 16.2 M + embeddings: one GPU
}
QWEN3 = {  # the released sizes: H, L, heads, I, tied embeddings; what they share stands below
    name: dict(vocab_size=151936, hidden_size=H, num_hidden_layers=L, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
               intermediate_size=I, rope_theta=1e6, tie_word_embeddings=tied, max_position_embeddings=40960)
    for name, H, L, heads, I, tied in (
        ("qwen3-0.6b", 1024, 28, 16, 3072, True), ("qwen3-1.7b", 2048, 28, 16, 6144, True), ("qwen3-4b", 2560, 36, 32, 9728, True),
        ("qwen3-8b", 4096, 36, 32, 12288, False), ("qwen3-14b", 5120, 40, 40, 17408, False), ("qwen3-32b", 5120, 64, 64, 25600, False))
}


# ---------------------------------------------------------------------------- LoRA: the layout, said once
def lora_layout(config, modules="all"):
    """The linears of a decoder layer that have a LoRA, in the paper's order: [(name, in, out)]. Everything about LoRA walks this.

    modules: "all", the seven of the paper, or some of their last names, "o_proj,down_proj".

    >>> [(n.split(".")[1], i, o) for n, i, o in lora_layout(Config())][:2]
    [('q_proj', 48, 48), ('k_proj', 48, 24)]
    """
    H, I = config.hidden_size, config.intermediate_size
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layout = [("self_attn.q_proj", H, q), ("self_attn.k_proj", H, k), ("self_attn.v_proj", H, k), ("self_attn.o_proj", q, H),
              ("mlp.gate_proj", H, I), ("mlp.up_proj", H, I), ("mlp.down_proj", I, H)]
    names = [name.split(".")[1] for name, _, _ in layout]
    wanted = names if modules == "all" else modules.split(",")
    if wrong := [name for name in wanted if name not in names]:
        raise UserError(f"target_modules {modules!r}: {wrong[0]!r} is not one of {', '.join(names)}")
    return [linear for linear, name in zip(layout, names) if name in wanted]


def lora_size(config, r, modules="all", halves="AB"):
    """P, the numbers a LoRA of rank r has in one layer: r * sum(in + out); of its "A" or "B" alone r * sum(in), r * sum(out)."""
    return r * sum(n_in * ("A" in halves) + n_out * ("B" in halves) for _, n_in, n_out in lora_layout(config, modules))


def cut(flat, config, r, modules="all", halves="AB"):
    """Cut flat parameters into a LoRA; no parameter is involved (paper, section 4).

    flat (L, P) or (B, L, P), row-major: for each linear in layout order first A (in, r), then B (r, out); L: of the model, or of some layers.
    Returns a LoRA: a list over these layers of {name: (A, B)} with A ([B,] in, r), B ([B,] r, out). halves "A" or "B": flat holds
    these alone, and the list is of {name: (A,)} or {name: (B,)}.
    """
    layout, lead = lora_layout(config, modules), flat.shape[:-2]
    assert flat.shape[-1] == lora_size(config, r, modules, halves), (flat.shape, r)
    shapes = {name: [{"A": (n_in, r), "B": (r, n_out)}[half] for half in halves] for name, n_in, n_out in layout}
    sizes = [a * b for pair in shapes.values() for a, b in pair]
    lora = []
    for layer in flat.unbind(-2):
        parts = iter(layer.split(sizes, -1))
        lora.append({name: tuple(next(parts).reshape(*lead, *shape) for shape in pair) for name, pair in shapes.items()})
    return lora


def flatten(lora):
    """The inverse of cut: a LoRA -> flat ([B,] L, P), L: the layers that have one."""
    return torch.stack([torch.cat([t.flatten(-2) for pair in layer.values() for t in pair], -1) for layer in lora if layer], -2)


def map_lora(fn, lora):
    """Apply fn to every A and B."""
    return [{name: (fn(A), fn(B)) for name, (A, B) in layer.items()} for layer in lora]


def linear(x, weight, ab=None):
    """y = x W^T + (x A) B (paper, section 5).  x (B, T, in), weight (out, in), ab None or (A, B) with or without a batch axis."""
    y = product(x, weight)
    if ab is not None:
        A, B = ab
        y = y + (x @ A.to(x.dtype)) @ B.to(x.dtype)
    return y


def product(x, weight):
    """x W^T in the dtype of x. bf16 weights that meet float32 activations (a CPU without bf16 hardware) are turned into float32
    for the moment of the product, a part at a time; a single row, a decode step, is rounded to bf16 instead: 4 times as fast."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight)
    if torch.is_grad_enabled():
        return F.linear(x, weight.to(x.dtype)) if weight.requires_grad else FrozenProduct.apply(x, weight)
    if x.numel() == x.shape[-1] and weight.dtype == torch.bfloat16:
        return F.linear(x.to(weight.dtype), weight).to(x.dtype)
    if weight.numel() > 2 ** 25:      # an output matrix: 0.6 GB in float32 for Qwen3-0.6B
        return torch.cat([F.linear(x, part.to(x.dtype)) for part in weight.split(16384)], -1)
    return F.linear(x, weight.to(x.dtype))


class FrozenProduct(torch.autograd.Function):
    """x W^T for a frozen W of another dtype, which is cast anew on the way back: no copy of it is kept in between."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0].to(grad.dtype), None


# ---------------------------------------------------------------------------- the transformer
class Linear(nn.Linear):
    """Without initial values of its own: LanguageModel sets them, and on the meta device torch's would load its compiler (a second)."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):
        pass


class Embedding(nn.Embedding):
    """The same for the table of tokens."""

    def reset_parameters(self):
        pass


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if x.is_cuda:      # one kernel there, in float32 inside
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        if torch.is_grad_enabled() and x.requires_grad:
            return TrainedNorm.apply(x, self.weight, self.eps)
        return (x * inverse_rms(x, self.eps)).to(x.dtype) * self.weight.to(x.dtype)


def inverse_rms(x, eps):
    """x (..., n) -> 1 / sqrt(mean of x^2 + eps), (..., 1), in float32."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_() / x.shape[-1] + eps).rsqrt_()


class TrainedNorm(torch.autograd.Function):
    """RMSNorm with its gradient by hand: in bf16 one float32 number a row instead of float32 copies of x, 4 to 8 times as fast.

    y = w x s with s = 1 / sqrt(mean of x^2 + eps);  dx = s (g - u mean(g u)) with u = x s and g = w dy.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        s = inverse_rms(x, eps)
        u, s = x * s.to(x.dtype), s.to(x.dtype)
        ctx.save_for_backward(u, s, weight)
        return u * weight.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        u, s, weight = ctx.saved_tensors
        grad_weight = (grad * u).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = grad * weight.to(grad.dtype)
        mean = torch.linalg.vecdot(g, u)[..., None] / u.shape[-1]
        return torch.addcmul(g, u, mean, value=-1) * s, grad_weight, None


def rope(positions, head_dim, theta):
    """Rotary angles: positions (B, T) -> cos, sin (B, 1, T, head_dim), halves repeated as in Qwen3, sin negative in the first."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)   # (head_dim / 2,)
    angle = positions[:, None, :, None].float() * frequency                                           # (B, 1, T, head_dim / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """x (B, heads, T, head_dim) turned by its position: (a, b) -> (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class KVCache:
    """Keys and values of the tokens so far, allocated once: (L, B, kv heads, length, head_dim) each."""

    def __init__(self, config, batch, length, dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        # zeros: a step of a Decoder on a GPU multiplies what is not written yet by a weight of zero, which NaN would survive
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        self.mask = None                                  # (B, length), True where a real token stands; None: everywhere
        self.used, self.length, self.ids = 0, length, []      # ids: what `LanguageModel.generate` put in, [(B, T), ...]

    def begin(self, ids, resume):
        """ids (B, T) -> those that are still to be read, (B, T - n): with `resume` the cache goes on from the first n that it holds
        already. What it held behind them is forgotten."""
        held, self.used = torch.cat(self.ids, 1)[:, :self.used] if resume and self.ids else ids[:, :0], 0
        if n := min(held.shape[1], ids.shape[1] - 1):      # at least one is read: its logits say what follows
            self.used = int((held[:, :n] == ids[:, :n]).all(0).cumprod(0).sum())
        self.ids = [ids]
        return ids[:, self.used:]

    def store(self, layer, k, v):
        """Put k, v (B, kv heads, T, head_dim) behind the used positions; return all keys and values up to there."""
        end = self.used + k.shape[2]
        assert end <= self.length, f"cache of {self.length} tokens, {end} needed"
        self.keys[layer, :, :, self.used:end], self.values[layer, :, :, self.used:end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class MemoryCache:
    """Keys and values of M memory tokens behind a context, for gisting (Shine.gist): reading fills it, answering sees it.

    positions (B,): the position behind each row's last memory token, where its conversation begins.
    """

    def __init__(self, M, positions, layers=None):
        self.M, self.positions, self.layers, self.full = M, positions, layers or {}, layers is not None

    def filled(self):
        """The same for answering. An object of its own: with checkpointing a layer reads again on the way back, behind the answer."""
        return MemoryCache(self.M, self.positions, self.layers)

    def store(self, layer, k, v):
        """Reading: keep the last M of k, v (B, kv heads, N + M, head_dim). Answering: put them in front of k, v."""
        if self.full:
            return tuple(torch.cat((memory, own), 2) for memory, own in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k[:, :, -self.M:], v[:, :, -self.M:]
        return k, v


class BlockAttention(torch.autograd.Function):
    """Causal attention on a CPU, forward and back by hand: a block of queries at a time, with the keys up to its last query alone, so
    that in long rows half of the scores are never computed. The probabilities are kept for the way back, about T^2 / 2 a head.

    q (B, heads, T, D), scaled, stand at the last T of the positions of k, v (B, kv heads, keys, D); heads that share keys are rows of
    one product. bias (B or 1, 1, T, keys) is added to the scores and lets no query see what is behind it; None: it sees all
    before it. -> y (B, T, heads, D).
    With P = softmax(q k^T):  dv = P^T dy,  dS = P (dP - sum of P dP over the keys) with dP = dy v^T,  dq = dS k,  dk = dS^T q.
    """
    BLOCK = 128         # queries
    LONGEST = 2048      # keys of full rows; for more of them the kernel, which keeps no probabilities

    @staticmethod
    def blocks(T, keys):
        """[(first query, behind the last, how many keys the last one sees)]"""
        ends = [min(start + BlockAttention.BLOCK, T) for start in range(0, T, BlockAttention.BLOCK)]
        return list(zip([0] + ends, ends, [keys - T + end for end in ends]))

    @staticmethod
    def forward(ctx, q, k, v, bias):
        (B, heads, T, D), (kv, keys) = q.shape, k.shape[1:3]
        k, v = k.reshape(B * kv, keys, D), v.reshape(B * kv, keys, D)
        ahead = torch.full((BlockAttention.BLOCK,) * 2, float("-inf"), dtype=q.dtype).triu(1) if bias is None else None
        y, kept = q.new_empty(B, T, heads, D), []
        for a, b, seen in BlockAttention.blocks(T, keys):
            scores = q[:, :, a:b].reshape(B * kv, -1, D) @ k[:, :seen].mT
            if bias is None:
                scores.view(-1, b - a, seen)[..., seen - b + a:] += ahead[:b - a, :b - a]
            else:
                scores.view(B, heads, b - a, seen).add_(bias[:, :, a:b, :seen])
            P = torch.softmax(scores, -1)
            y[:, a:b] = (P @ v[:, :seen]).view(B, heads, b - a, D).transpose(1, 2)
            kept += [P] if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(q, k, v, *kept)
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        (B, heads, T, D), (rows, keys, _) = q.shape, k.shape
        dq, dk, dv, grad = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), grad.transpose(1, 2)
        for (a, b, seen), P in zip(BlockAttention.blocks(T, keys), kept):
            part, dy = (t[:, :, a:b].reshape(rows, -1, D) for t in (q, grad))
            dS = torch._softmax_backward_data(dy @ v[:, :seen].mT, P, -1, P.dtype)
            dq[:, :, a:b] = (dS @ k[:, :seen]).view(B, heads, b - a, D)
            dv[:, :seen].baddbmm_(P.mT, dy)
            dk[:, :seen].baddbmm_(dS.mT, part)
        return dq, dk.view(B, -1, keys, D), dv.view(B, -1, keys, D), None


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj, self.k_proj = Linear(c.hidden_size, q), Linear(c.hidden_size, k)
        self.v_proj, self.o_proj = Linear(c.hidden_size, k), Linear(q, c.hidden_size)
        self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, angles, bias, lora, cache=None, layer=0, last=0):
        """x (B, T, H) -> (B, T, H), or (B, last, H) where only the last positions are wanted. bias (B, 1, T, keys) is added to
        the scores; None: the T tokens are the last of the keys, and each sees all up to itself."""
        c, (B, T, _) = self.config, x.shape
        heads, groups, D = c.num_attention_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim
        project = lambda name, x: linear(x, getattr(self, name).weight, lora.get(f"self_attn.{name}")).view(B, x.shape[1], -1, D)
        q = self.q_norm(project("q_proj", x[:, -last:])).transpose(1, 2)         # (B, heads, last or T, D); x[:, -0:] is x
        q = rotate(q, *(t[:, :, -last:] for t in angles))
        k = rotate(self.k_norm(project("k_proj", x)).transpose(1, 2), *angles)   # (B, kv heads, T, D)
        v = project("v_proj", x).transpose(1, 2)
        if cache is not None:
            k, v = cache.store(layer, k, v)
        if bias is not None:
            bias = bias[:, :, -last:]
        T, keys = q.shape[2], k.shape[2]
        full = bias is None and 1 < T == keys                                    # what the kernels know as causal
        if x.device.type == "cpu" and T > 1 and (not full or x.dtype == torch.bfloat16 and keys <= BlockAttention.LONGEST):
            y = BlockAttention.apply(q * D ** -0.5, k, v, bias)
        else:
            if bias is None and 1 < T < keys:
                bias = torch.full((T, keys), float("-inf"), dtype=x.dtype, device=x.device).triu(keys - T + 1)
            if T == 1:                                                           # heads that share keys: rows of one product
                q = q.reshape(B, -1, groups, D)
            elif bias is not None and groups > 1:                                # no masked kernel shares keys between heads
                k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=full, enable_gqa=q.shape[1] > k.shape[1])
            y = y.reshape(B, heads, T, D).transpose(1, 2)
        return linear(y.reshape(B, T, heads * D), self.o_proj.weight, lora.get("self_attn.o_proj"))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x, lora):
        """x (B, T, H) -> (B, T, H)"""
        gate = linear(x, self.gate_proj.weight, lora.get("mlp.gate_proj"))
        up = linear(x, self.up_proj.weight, lora.get("mlp.up_proj"))
        return linear(F.silu(gate) * up, self.down_proj.weight, lora.get("mlp.down_proj"))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.hidden_size, c.rms_norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.hidden_size, c.rms_norm_eps), MLP(c)

    def forward(self, x, angles, bias, lora, cache=None, layer=0, last=0):
        x = x[:, -last:] + self.self_attn(self.input_layernorm(x), angles, bias, lora, cache, layer, last)
        return x + self.mlp(self.post_attention_layernorm(x), lora)


class Body(nn.Module):
    """What Hugging Face calls `model.`: embedding, layers, final norm."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class LanguageModel(nn.Module):
    """Decoder-only language model. A LoRA is an argument of every call and never kept."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config, self.model = config, Body(config)
        self.compute_dtype = None      # dtype of the activations; None: that of the weights
        self.name = ""                 # of the folder it came from
        self.checkpointing = False     # keep each layer's input only and compute the layer again on the way back
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        generator = torch.Generator().manual_seed(seed)
        if self.model.embed_tokens.weight.is_meta:
            return
        for name, p in self.named_parameters():
            if p.dim() == 2:   # fan-in scaling; the two matrices that write to the residual stream start smaller
                depth = math.sqrt(2 * config.num_hidden_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                p.data.normal_(0, 0.5 / math.sqrt(p.shape[1]) / depth, generator=generator)

    def forward(self, input_ids, attention_mask=None, lora=None):
        """ids (B, T), mask (B, T) of 1 for real tokens or None -> logits (B, T, V)."""
        return self.head(self.hidden(input_ids, attention_mask, lora))

    def loss(self, batch, lora=None, total=None, memory=None):
        """Next-token cross-entropy of batch["input_ids"] (B, S), each token times its weight (paper, section 6). A batch without
        an "attention_mask" has full rows of one conversation each, which needs no bias: half of the scores are then never computed.

        total: what the sum is divided by; None: the sum of this batch's weights. memory: a filled MemoryCache that every
        conversation sees. Logits are computed only where a token counts: at the positions batch["counted"] (K,) of the flattened
        (B, S - 1); found here where the batch lacks them.
        """
        hidden = self.hidden(batch["input_ids"], batch.get("attention_mask"), lora, memory=memory)[:, :-1].flatten(0, 1)
        weights, targets = batch["weights"][:, 1:].flatten(), batch["input_ids"][:, 1:].flatten()
        counted = batch["counted"] if "counted" in batch else weights.nonzero()[:, 0]
        logits = self.head(hidden[counted]).float()                                          # (K, V)
        losses = F.cross_entropy(logits, targets[counted], reduction="none")
        return (losses * weights[counted]).sum() / (weights.sum() if total is None else total)

    def head(self, hidden):
        """hidden (..., H) -> logits (..., V)."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return product(hidden, weight)

    def hidden(self, input_ids, attention_mask=None, lora=None, cache=None, last=0, memory=None):
        """The states behind the last norm, (B, T, H), or of the last positions only. With a cache the ids continue what it holds;
        memory: a filled MemoryCache that all of them see."""
        return self.model.norm(self._layers(self._embed(input_ids), attention_mask, lora, cache, last, memory)[0])

    def read(self, input_ids, attention_mask, memory, lora=None, keep=None):
        """Read a context (paper, section 3): ids (B, N), mask (B, N) or None, memory (M, H) -> memory states (B, L, M, H).

        The M memory embeddings follow the context; kept are their states after each layer, before the final norm; their keys and
        values in `keep`, a new MemoryCache, if there is one.
        """
        x, M = self._embed(input_ids), len(memory)
        x = torch.cat((x, memory.to(x.dtype).expand(len(x), -1, -1)), 1)                     # (B, N + M, H)
        if attention_mask is not None:
            if x.is_cuda and (short := -x.shape[1] % 16):      # masked kernels want keys in sixteens, compiled ones above all (pytorch issue 124502)
                x, attention_mask = F.pad(x, (0, 0, short, 0)), F.pad(attention_mask, (short, 0))
            attention_mask = F.pad(attention_mask, (0, M), value=1)
        return torch.stack(self._layers(x, attention_mask, lora, last=M, memory=keep)[1], 1)

    def _embed(self, input_ids):
        x = self.model.embed_tokens(input_ids)
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def _layers(self, x, mask, lora, cache=None, last=0, memory=None):
        """x (B, T, H) through all layers -> (x, [the same after each layer]), of all positions or of the `last` ones, which alone go
        through the whole of the last layer: of the others it needs keys and values."""
        T, start = x.shape[1], 0 if cache is None else cache.used
        if cache is not None:
            if mask is not None and cache.mask is None:
                cache.mask = torch.ones(len(x), cache.length, dtype=torch.bool, device=x.device)
            if cache.mask is not None:
                cache.mask[:, start:start + T] = True if mask is None else mask.bool()
                mask = cache.mask[:, :start + T]
        angles, bias = self._positions(x, mask, start, memory if memory and memory.full else None)
        kept = []
        for i, layer in enumerate(self.model.layers):
            args = x, angles, bias, lora[i] if lora else {}, memory or cache, i, last if layer is self.model.layers[-1] else 0
            x = checkpoint(layer, *args, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else layer(*args)
            if last:
                kept.append(x[:, -last:])
        if cache is not None:
            cache.used += T
        return x, kept

    def _positions(self, x, mask, start, memory=None):
        """Rotary angles and attention bias for T new tokens behind `start` old ones; mask (B, start + T) or None; memory: a
        filled MemoryCache that all T see, behind which their positions go on.

        A token sees those before it that have its own number in the mask, where 0 is padding.
        Positions count real tokens only, so that padding on either side changes nothing for them. Where it stands at the end of
        rows of one conversation each, nothing real sees it, and long rows do without a mask, as full ones.
        """
        T, c, device = x.shape[1], self.config, x.device
        if memory and mask is None:
            mask = torch.ones(1, T, device=device)
        if mask is not None and not memory and start == 0 and T >= 512 and device.type == "cpu" and mask.max() <= 1 and not (mask[:, 1:] > mask[:, :-1]).any():
            mask = None
        if mask is None:
            positions = torch.arange(start, start + T, device=device)[None]
        else:
            positions = ((mask != 0).long().cumsum(1) - 1).clamp(min=0)[:, start:]
        if memory:
            positions = positions + memory.positions[:, None]
        angles = tuple(t.to(x.dtype) for t in rope(positions, c.head_dim, c.rope_theta))
        if mask is None and (start == 0 or T == 1):
            return angles, None
        if mask is None:
            mask = torch.ones(1, start + T, device=device)
        row = torch.arange(start, start + T, device=device)[:, None]                 # query positions in the padded row
        column = torch.arange(start + T, device=device)[None]                        # key positions
        own = (mask[:, None, None, :] == mask[:, None, start:, None]) & (mask != 0)[:, None, None, :]
        seen = (column <= row) & own | (column == row)                               # a padded query sees itself: no NaN
        bias = torch.zeros(seen.shape, dtype=x.dtype, device=device).masked_fill_(~seen, float("-inf"))
        return angles, F.pad(bias, (memory.M, 0)) if memory else bias

    # ------------------------------------------------------------------------ generation
    @torch.inference_mode()
    def generate(self, input_ids, attention_mask=None, lora=None, max_new_tokens=64, stop=(), temperature=0.0, top_k=0,
                 top_p=1.0, seed=0, decoder=None, resume=False):
        """Yield the next tokens (B,) one step after the other; ids (B, T), left-padded where rows differ (mask (B, T)).

        temperature 0 is greedy. A row that has given a token in `stop` goes on giving it; the generator ends when all
        rows have, or after max_new_tokens. decoder: a Decoder of this model and LoRA, for rows without padding; with `resume` the
        beginning of the ids that its cache holds from the call before (turns of the same conversation) is not read again.
        """
        B, T = input_ids.shape
        p = self.model.norm.weight
        assert decoder is None or attention_mask is None and decoder.model is self and decoder.lora is lora, "this decoder is not for these rows"
        cache = decoder.room(B, T + max_new_tokens) if decoder else KVCache(self.config, B, T + max_new_tokens, self.compute_dtype or p.dtype, p.device)
        input_ids = cache.begin(input_ids, resume)
        generator = torch.Generator(p.device).manual_seed(seed)
        stops = torch.tensor(sorted(stop), device=p.device)
        done, last = torch.zeros(B, dtype=torch.bool, device=p.device), None
        logits = self.head(self.hidden(input_ids, attention_mask, lora, cache, last=1)[:, -1])
        for i in range(max_new_tokens):
            token = pick(logits.float(), temperature, top_k, top_p, generator)
            token = torch.where(done, last, token) if last is not None else token
            yield token
            done, last = done | torch.isin(token, stops), token
            if len(stop) and bool(done.all()) or i + 1 == max_new_tokens:
                return
            cache.ids.append(token[:, None])
            logits = decoder(token) if decoder and decoder.pays() else self.head(self.hidden(token[:, None], None, lora, cache)[:, -1])

    @contextmanager
    @torch.no_grad()
    def merged(self, lora):
        """Inside this block the weights hold W + (A B)^T of one shared LoRA; afterwards each is bitwise what it was."""
        kept = []
        try:
            for layer, pairs in zip(self.model.layers, lora or []):
                for name, (A, B) in pairs.items():
                    assert A.shape[:-2].numel() == 1, f"only one LoRA can be merged, this one has {A.shape[0]} rows"
                    weight = layer.get_submodule(name).weight
                    kept.append((weight, weight.data))
                    delta = A.reshape(A.shape[-2:]).float() @ B.reshape(B.shape[-2:]).float()      # (in, out)
                    weight.data = (weight.float() + delta.T.to(weight.device)).to(weight.dtype)
            yield self
        finally:
            for weight, original in kept:
                weight.data = original

    # ------------------------------------------------------------------------ folders
    @classmethod
    def load(cls, folder, device="cpu", dtype=None):
        """Read a folder of config.json and model.safetensors, or the files its model.safetensors.index.json names.

        Every tensor is checked by name and shape. Files are memory-mapped: on the CPU and without a dtype nothing is copied,
        on a GPU each tensor goes straight there.
        """
        config = Config.load(folder)
        with torch.device("meta"):
            model = cls(config)
        tensors, where = {}, {}
        for path in weight_files(folder):
            part = read_tensors(path, device)
            if twice := sorted(set(part) & set(tensors)):
                raise UserError(f"{path} holds {twice[0]}, which another file of {folder} holds too")
            where |= dict.fromkeys(part, path)
            tensors |= {k: part.pop(k).to(dtype) if dtype else part.pop(k) for k in list(part)}
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        check_tensors(folder, tensors, {k: v.shape for k, v in model.state_dict().items()}, where)
        one = tensors["model.embed_tokens.weight"].dtype        # of all: norms are sometimes stored in another
        tensors = {k: v.to(one) for k, v in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        model.name = Path(folder).resolve().name
        return model


class Decoder:
    """The cache of a conversation, and one more token for every row of a batch: DecoderLayer for T = 1, written for speed (measured
    in benchmarks/speed.py).

    Such a step reads every weight once and computes little, so what it costs is memory traffic and the number of operations
    started. Here the products of one input are one product (q, k, v; gate, up), in a copy of the weights that holds the weight of the
    norm before it, and a LoRA too where the copy is float32, as it is even of a bf16 model if that is SMALL. On x86 a product with one
    row is `embedding_bag`, which adds up rows of a matrix, each times a number, in float32: it reads the matrix at the rate of the
    memory, for which torch's products with one row use one thread or, in bf16, pack the matrix anew. There a matrix lies as
    (P, in, out / P), P parts for the threads to share.
    On a GPU the step is captured once as a CUDA graph; nothing in it depends on the position but the tensor `at`. Its logits are
    overwritten by the next step. compiled: there, what a layer does is compiled first (once for all layers, half a minute), so that
    some forty small kernels of it become few and its products with one row sums that are read at full speed.
    """

    compiled = False
    SMALL = 2 ** 22      # numbers in the layers: in float32 the caches hold those, and a step has half the products

    @staticmethod
    def suits(model, lora):
        """Whether the copy pays: up to 2 GB of bf16, or float32 weights on a CPU that stay small; and one LoRA for all rows, or none."""
        p, size = model.model.norm.weight, Decoder.size(model)
        one = not lora or all(A.dim() == 2 or len(A) == 1 for layer in lora for A, _ in layer.values())
        return one and size < (2 ** 30 if p.is_cuda else 2 ** 26 if p.dtype == torch.float32 else 2 ** 30 if Decoder.bags(p) else 0)

    @staticmethod
    def size(model):
        return sum(p.numel() for p in model.model.layers.parameters())

    @staticmethod
    def bags(p):
        """Whether `embedding_bag` has a fast kernel for weights like p: on x86 processors."""
        return p.dtype in (torch.bfloat16, torch.float32) and p.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")

    def __init__(self, model, lora=None):
        p = model.model.norm.weight
        self.model, self.config, self.lora, self.dtype, self.device = model, model.config, lora, model.compute_dtype or p.dtype, p.device
        self.layers = self.cache = self.graph = None
        self.state = torch.float32 if p.device.type == "cpu" else self.dtype      # dtype between the products: for one row float32 costs no more
        self.fast, self.asked = Decoder.suits(model, lora), 0
        self.rows = {}      # for embedding_bag: {(P, in): (numbers of the rows (P in,), where each part starts (P,))}
        self.at = torch.zeros(1, dtype=torch.long, device=p.device)

    def pays(self):
        """Count a step asked for -> whether to take it here, if this `suits`: on a CPU the copy costs as much as it saves in two to five
        steps, a large one in some twenty, on a GPU its graph in eight, and many an answer is shorter."""
        self.asked += 1
        return self.fast and self.asked > (8 if self.device.type == "cuda" else 20 if self.config.hidden_size > 512 else 3)

    def join(self):
        """Copy the weights, at the first step."""
        c, model, p = self.config, self.model, self.model.model.norm.weight
        dtype = self.dtype if not self.bags(p) else torch.float32 if self.size(model) < self.SMALL else p.dtype

        def joined(layer, pairs, *names, norm=None):
            """diag(norm) W^T of linears side by side, in parts, (P, in, out / P). A LoRA is in it where it is float32; in bf16 the sum
            W + A B would round away what is small beside W: so B stands below W, as (names * r, out), and A^T (names * r, in) beside it."""
            behind = lambda x: x if norm is None else x * norm.to(x.dtype)                       # (n, in)
            weights = [layer.get_submodule(n).weight for n in names]
            W = behind(torch.cat(weights).to(dtype))                                             # (out, in)
            if not any(n in pairs for n in names):
                return self.parts(W), None
            A, B = ([pairs[n][i].reshape(pairs[n][i].shape[-2:]).float() if n in pairs else w.new_zeros((w.shape[1], 0) if i == 0 else (0, len(w)))
                     for n, w in zip(names, weights)] for i in (0, 1))      # of rank 0 where a linear has none
            A, B = behind(torch.cat(A, 1).T), torch.block_diag(*B).T                             # (names * r, in), (out, names * r)
            if dtype == torch.float32:
                return self.parts(W + B @ A), None
            return self.parts(torch.cat((W, B.to(dtype)), 1)), A.to(self.state).contiguous()
        self.eps = torch.full((1,), c.rms_norm_eps, device=p.device)
        layers, turned = [], []
        for i, layer in enumerate(model.model.layers):
            pairs, attention = self.lora[i] if self.lora else {}, layer.self_attn
            layers.append((
                joined(layer, pairs, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", norm=layer.input_layernorm.weight),
                joined(layer, pairs, "self_attn.o_proj"),
                joined(layer, pairs, "mlp.gate_proj", "mlp.up_proj", norm=layer.post_attention_layernorm.weight),
                joined(layer, pairs, "mlp.down_proj")))
            turned.append(torch.cat((attention.q_norm.weight.to(self.state).expand(c.num_attention_heads, -1) * c.head_dim ** -0.5,
                                     attention.k_norm.weight.to(self.state).expand(c.num_key_value_heads, -1))))
        # RoPE meets the weights of the norms of q and k: x w cos + roll(x) roll(w) sin; those of q have the scale of the scores
        self.turned = torch.stack(turned), torch.stack(turned).roll(c.head_dim // 2, -1)             # (L, heads of q and k, D) each
        output = (model.model.embed_tokens if c.tie_word_embeddings else model.lm_head).weight
        self.output = self.parts(output.to(dtype) * model.model.norm.weight.to(dtype)), None
        self.layers = layers      # last: a copy that Ctrl-C stops half-way is made anew

    def parts(self, W):
        """(out, in) -> (P, in, out / P): parts of 256 columns or fewer for `embedding_bag`, which goes through a part row by row."""
        out, rows = W.shape
        threads = 1 if W.is_cuda else torch.get_num_threads()
        columns, P = math.gcd(out, 256 if out >= 256 * threads else 32), math.gcd(threads, out)
        if self.bags(W) and columns >= 32:
            P = out // columns
            self.rows[P, rows] = torch.arange(P * rows, dtype=torch.int32), torch.arange(0, P * rows, rows, dtype=torch.int32)
        return W.view(P, -1, rows).transpose(1, 2).contiguous()

    def room(self, batch, length):
        """The cache, with room for so many rows and tokens: the one from before where that is large enough, or what it holds in a larger one."""
        old = self.cache
        if old is None or old.length < length or old.keys.shape[1] != batch:
            new = KVCache(self.config, batch, -(-length // 128) * 128, self.dtype, self.device)
            if old is not None and old.keys.shape[1] == batch:
                new.keys[..., :old.length, :], new.values[..., :old.length, :] = old.keys, old.values
                new.used, new.ids = old.used, old.ids
            angles = rope(torch.arange(new.length, device=self.device)[None], self.config.head_dim, self.config.rope_theta)
            self.angles = [t[0, 0].to(self.state) for t in angles]                                    # cos, sin: (length, head_dim)
            self.cache, self.graph = new, None      # last, as in `join`
        return self.cache

    @torch.inference_mode()
    def __call__(self, token):
        """token (B,), which continues what the cache holds -> logits (B, V)."""
        if self.layers is None:
            self.join()
            if self.compiled and self.device.type == "cuda":
                self.layer = torch.compile(self.layer, dynamic=False, options={"coordinate_descent_tuning": True})
        self.at.fill_(self.cache.used)
        logits = self.replay(token) if self.device.type == "cuda" else self.step(token, self.cache.used + 1)
        self.cache.used += 1                               # last: a step that Ctrl-C stops half-way is not in the cache
        return logits

    def replay(self, token):
        """The step as a CUDA graph, captured when it is first asked for."""
        if self.graph is None:
            self.token = token.clone()
            self.step(self.token, None)                    # once outside the graph: libraries set themselves up
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self.step(self.token, None)
            self.graph = graph
        self.token.copy_(token)
        self.graph.replay()
        return self.logits

    def step(self, token, end):
        """token (B,) at position `at` -> logits (B, V). It sees the cache up to `end`; None: all of it, the rest masked."""
        cos, sin = (w * t.index_select(0, self.at) for w, t in zip(self.turned, self.angles))        # (L, heads of q and k, D)
        bias = None
        if end is None:
            later = torch.arange(self.cache.length, device=self.device) > self.at
            bias = torch.zeros(1, self.cache.length, dtype=self.dtype, device=self.device).masked_fill_(later, float("-inf"))
        x = self.model.model.embed_tokens(token).to(self.state)                                      # (B, H)
        for rest in zip(self.layers, self.cache.keys[..., :end, :], self.cache.values[..., :end, :], cos, sin):
            x = self.layer(x, *rest, bias)
        return self.product(x * self.inverse_rms(x), self.output)

    def layer(self, x, weights, keys, values, cos, sin, bias):
        """x (B, H) through a layer; keys and values (B, KV, length, D) get those of `at`."""
        c, B = self.config, len(x)
        heads, kv, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv, o, gate_up, down = weights
        y = self.product(x * self.inverse_rms(x), qkv).view(B, -1, D)                            # the heads of q, k, v
        qk, v = y.split((heads + kv, kv), 1)
        q, k = (torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin) * self.inverse_rms(qk)).to(keys.dtype).split((heads, kv), 1)
        keys.index_copy_(2, self.at, k.unsqueeze(2))
        values.index_copy_(2, self.at, v.unsqueeze(2).to(values.dtype))
        q = q.reshape(B, kv, heads // kv, D)                                                     # heads of one group: rows over the same keys
        if bias is None:
            y = F.scaled_dot_product_attention(q, keys, values, scale=1.0)
        else:
            y = torch.softmax(q @ keys.mT + bias, -1) @ values
        x = x + self.product(y.reshape(B, heads * D), o)
        gate, up = self.product(x * self.inverse_rms(x), gate_up).chunk(2, -1)
        return x + self.product(F.silu(gate) * up, down)

    def inverse_rms(self, x):
        """As `inverse_rms`, in fewer operations. The weight of each RMSNorm is in what x is multiplied by next."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(self.eps, size, size, value=1 / x.shape[-1]).rsqrt_().to(self.state)

    def product(self, x, linear):
        """x (B, in) -> (B, out); linear: what join made. With a LoRA [x, x A] [W; B] = x W + x A B."""
        W, A = linear
        if A is not None:
            x = torch.cat((x, F.linear(x.to(A.dtype), A)), 1)
        x = x.to(W.dtype).expand(len(W), *x.shape)                                               # (P, B, in)
        if x.shape[1] == 1 and (bags := self.rows.get(W.shape[:2])):
            return F.embedding_bag(bags[0], W.flatten(0, 1), bags[1], mode="sum", per_sample_weights=x.flatten()).view(1, -1)
        return torch.bmm(x, W).transpose(0, 1).reshape(x.shape[1], -1)


class Recorded:
    """A function of tensors as CUDA graphs, one for each shape of what it is given.

    A pass starts some thousand small kernels, which may take the host longer than the GPU has work with them; a recorded one is
    started at once. A shape that is met for the first time runs kernel by kernel (libraries set themselves up, layers are compiled) and is
    recorded when it comes again; the records share one pool of memory, since no two run at the same time. What is returned is
    overwritten by the next call.
    """

    def __init__(self, function):
        self.function, self.records, self.pool = function, {}, torch.cuda.graph_pool_handle()

    def __call__(self, *inputs):
        shapes = tuple(t.shape for t in inputs)
        if shapes not in self.records:
            self.records[shapes] = None
            return self.function(*inputs)
        if self.records[shapes] is None:
            held, graph = [t.clone() for t in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):      # another thread pins the next batches
                result = self.function(*held)
            self.records[shapes] = held, graph, result
        held, graph, result = self.records[shapes]
        for t, value in zip(held, inputs):
            t.copy_(value)
        graph.replay()
        return result


def pick(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> next token (B,): the largest at temperature 0, else a draw after top-k and top-p."""
    if temperature <= 0:
        return logits.argmax(-1)
    ordered, ids = (logits / temperature).sort(-1, descending=True)
    if top_k:
        ordered, ids = ordered[:, :top_k], ids[:, :top_k]
    p = ordered.softmax(-1)
    out = p.cumsum(-1) - p >= top_p                       # what lies behind the first top_p of the mass
    out[:, 0] = False
    return ids.gather(1, torch.multinomial(p.masked_fill(out, 0), 1, generator=generator))[:, 0]


def pick_device(name="auto", float32=False):
    """-> (device, dtype of the activations, why). bf16 where the device multiplies it in hardware, unless float32 is asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but no GPU is visible here; use --device cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        device, fast = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), True
    else:
        device, fast = torch.device("cpu"), torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    fast = fast and not float32
    return device, torch.bfloat16 if fast else torch.float32, f"{device.type.upper()}, {'bf16' if fast else 'float32'}"


# ---------------------------------------------------------------------------- files, read and written with care
def read_file(path):
    """A text file as str, or a UserError that names the file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_json(path):
    """A JSON object as a dict, or a UserError that names the file."""
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def from_json(cls, raw, path, zero=()):
    """A dataclass of what the JSON object `raw` has of its fields, each of the right kind; numbers are above 0, of the fields `zero` at least that."""
    for f in (f for f in fields(cls) if f.name in raw):
        value, whole = raw[f.name], type(raw[f.name]) is int
        if not {str: isinstance(value, str), bool: isinstance(value, bool), int: whole and value >= (f.name not in zero),
                float: (whole or isinstance(value, float)) and 0 < value < math.inf}[f.type]:
            raise UserError(f"{path}: {f.name} = {value!r} is not of the right kind or size")
    return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})


def weight_files(folder):
    """The safetensors files of a model folder: model.safetensors, or the shards of model.safetensors.index.json."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) and Path(name).name == name for name in where.values()):
        raise UserError(f"{index} has no weight_map of file names")
    files = [folder / name for name in sorted(set(where.values()))]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing, {index.name} names it; fetch it again")
    return files


def read_tensors(path, device="cpu"):
    """All tensors of a safetensors file, or a UserError that names the file."""
    try:
        if not Path(path).is_file():
            raise UserError(f"{path} is missing")
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); fetch it again") from None


def read_header(path):
    """{name: dtype as safetensors spells it} of a file, without its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); fetch it again") from None


def check_tensors(path, tensors, shapes, where={}):
    """Refuse tensors that are missing, left over, or of another shape than `shapes` {name: shape} says; `where`: {name: file}."""
    for name in sorted(set(shapes) | set(tensors)):
        if name not in tensors:
            raise UserError(f"{path} lacks the tensor {name}")
        file, t = where.get(name, path), tensors[name]
        if name not in shapes:
            raise UserError(f"{file} holds {name}, which this model does not have")
        if tuple(t.shape) != tuple(shapes[name]):
            raise UserError(f"{file}: {name} is {tuple(t.shape)}, expected {tuple(shapes[name])}")
        if t.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16) or t.layout != torch.strided or t.is_meta:
            raise UserError(f"{file}: {name} is not a plain tensor of floating-point numbers ({t.dtype}, {t.layout})")


def target(path, kind):
    """Where to write a "file" or a "folder", links followed: a name that is free, or has something of that kind."""
    if not Path(path).name:
        raise UserError(f"cannot write {path}: name a {kind}")
    path = os.path.realpath(path)
    if os.path.exists(path) and not (os.path.isfile(path) if kind == "file" else os.path.isdir(path)):
        raise UserError(f"cannot write {path}: it is there already and not a {kind}")
    return Path(path)


def write_file(path, write):
    """Call write(temporary path), then rename: the file is there whole or not at all, and an older one survives a failure."""
    path = target(path, "file")
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)        # safetensors writes files that only their owner may read
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"cannot write {path}: {error}") from None
        raise


@contextmanager
def new_folder(path):
    """A folder that is there whole or not at all: what the block writes into the temporary one it is given is renamed at the end."""
    path = target(path, "folder")
    part = path.with_name(f".{path.name}.part")
    try:
        if path.exists() and any(path.iterdir()):
            raise UserError(f"{path} is there already and not an empty folder: choose another folder")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if path.exists():
            path.rmdir()
        part.rename(path)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"cannot write {path}: {error}") from None
        raise


def write_json(path, value):
    write_file(path, lambda p: p.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace"))
