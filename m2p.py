"""The M2P Transformer (Memory-to-Parameter): memory states (B, L, M, H) -> LoRA parameters.  (paper, section 4)

         M memory tokens                       numbers       checkpoints/small, r = 72, B of down_proj       Qwen3-8B, r = 8
       +-----------------+                     L             10                                              36
     L | .  .  .  .  .   |                     H             384                                             4096
       | .  .  x  .  .   |  each . is a        M             72                                              148
       | .  .  .  .  .   |  vector of H        P = M * H     27648                                           606208
       +-----------------+
     layers 0, 2, ..: x attends over its column (the L axis: information moves between depths)
     layers 1, 3, ..: x attends over its row    (the M axis: between the memory tokens of one depth)

The output needs no head: row i, (M, H), is read as one flat vector of M * H numbers, which are the P numbers of layer
i's LoRA (model.cut cuts them into A and B). So M * H = P = r * sum(in + out), which fixes M. (Where B alone is generated, r * sum(out).)
The names of the parameters are those of the published code, whose checkpoints therefore load by name.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def memory_tokens(lora_size, hidden_size):
    """M = P / H; refuses sizes that do not divide. ValueError names the numbers.

    >>> memory_tokens(13824, 192)
    72
    """
    if lora_size % hidden_size:
        raise ValueError(f"a LoRA of {lora_size} numbers a layer cannot be cut out of memory states of width {hidden_size}: "
                         f"{lora_size} / {hidden_size} = {lora_size / hidden_size:.3f} memory tokens; choose another rank or size")
    return lora_size // hidden_size


def attention_heads(hidden_size):
    """The published setting, 32 heads at H = 4096 and 8 at 1024: H / 128, at least 4 where H divides."""
    heads = max(4, hidden_size // 128)
    while hidden_size % heads:
        heads -= 1
    return heads


class Linear(nn.Linear):
    """With torch's initial values, but none on the meta device, where they would load torch's compiler (a second)."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class SelfAttention(nn.Module):
    def __init__(self, H, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * H, H)), nn.Parameter(torch.zeros(3 * H))
        self.out_proj = Linear(H, H)
        if not self.in_proj_weight.is_meta:
            nn.init.xavier_uniform_(self.in_proj_weight)
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):
        """x (..., T, H) -> (..., T, H): bidirectional over the T axis, all axes before it are batch."""
        *lead, T, H = x.shape
        qkv = F.linear(x, self.in_proj_weight.to(x.dtype), self.in_proj_bias.to(x.dtype))
        q, k, v = qkv.view(-1, T, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4)     # (-1, heads, T, H / heads)
        if x.device.type == "cpu":       # faster than the kernel for rows as short as L
            y = torch.softmax(q * (H // self.heads) ** -0.5 @ k.transpose(-1, -2), -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(*lead, T, H)
        return F.linear(y, self.out_proj.weight.to(x.dtype), self.out_proj.bias.to(x.dtype))


class EncoderLayer(nn.Module):
    """x = norm1(x + attention(x)); x = norm2(x + linear2(gelu(linear1(x)))): post-norm, feed-forward 2H, biases on."""

    def __init__(self, H, heads):
        super().__init__()
        self.self_attn, self.linear1, self.linear2 = SelfAttention(H, heads), Linear(H, 2 * H), Linear(2 * H, H)
        self.norm1, self.norm2 = nn.LayerNorm(H, eps=1e-5), nn.LayerNorm(H, eps=1e-5)

    def forward(self, x):
        """x (..., T, H) -> (..., T, H)"""
        apply = lambda module, z: F.linear(z, module.weight.to(x.dtype), module.bias.to(x.dtype))
        norm = lambda module, z: F.layer_norm(z, z.shape[-1:], module.weight.to(x.dtype), module.bias.to(x.dtype), module.eps)
        x = norm(self.norm1, x + self.self_attn(x))
        return norm(self.norm2, x + apply(self.linear2, F.gelu(apply(self.linear1, x))))


AXES = ("both", "rows", "columns")


class M2P(nn.Module):
    """D encoder layers over the (L, M) grid of memory states; even ones along L, odd ones along M.

    axes "rows" (all layers along M) and "columns" (all along L) are for the ablation of section 4's design.
    normalize (not in the paper): each memory state is divided by its root mean square first. Raw ones have norms of 50 to 200, against
    which the embeddings are nothing and the first layer's softmax sees little more than one key; it bears higher learning rates.
    """

    def __init__(self, L, M, H, num_layers=4, heads=None, axes="both", normalize=False):
        super().__init__()
        if axes not in AXES:
            raise ValueError(f"m2p_axes {axes!r} is not one of {', '.join(AXES)}")
        self.axes, self.normalize = axes, normalize
        heads = heads or attention_heads(H)
        if H % heads:
            raise ValueError(f"a hidden size of {H} does not divide into {heads} M2P heads")
        self.layer_pe, self.token_pe = nn.Parameter(torch.zeros(L, H)), nn.Parameter(torch.zeros(M, H))
        self.checkpointing = False      # keep each layer's input only and compute the layer again on the way back
        self.transformer_layers = nn.ModuleList(EncoderLayer(H, heads) for _ in range(num_layers))

    def forward(self, memory_states, trace=None):
        """memory states (B, L, M, H) -> flat parameters (B, L, M * H). `trace(name, tensor)` is shown every step."""
        (B, L, M, H), dtype = memory_states.shape, memory_states.dtype
        assert (L, H) == self.layer_pe.shape and M == len(self.token_pe), (memory_states.shape, self.layer_pe.shape)
        if self.normalize:
            memory_states = F.rms_norm(memory_states, (H,))      # each of the (B, L, M) vectors by itself
        x = memory_states + self.layer_pe.to(dtype)[:, None] + self.token_pe.to(dtype)      # (B, L, M, H)
        for i, layer in enumerate(self.transformer_layers):
            run = partial(checkpoint, layer, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else layer
            columns = i % 2 == 0 if self.axes == "both" else self.axes == "columns"
            # contiguous: F.linear of another grid, where nothing needs a gradient, is a batch of products, each with a copy of the weight
            x = run(x.transpose(1, 2).contiguous()).transpose(1, 2) if columns else run(x.contiguous())
            if trace:
                trace(f"M2P layer {i}, over the {'L axis' if columns else 'M axis'}", x)
        return x.reshape(B, L, M * H)
