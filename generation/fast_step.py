"""One more token for each row on a CPU: the same network in fewer and faster operations.

A step of a small model spends its time on calling operations and on reading weights, not on arithmetic. So the weights are laid out
once as (in, out), which torch multiplies a row with at nearly the memory's speed; what norms multiply by is multiplied into them; and
queries and keys are normalised and rotated together. Sums are rounded in another order, so logits agree to about 1e-6 of their size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import GPT, KVCache, rotary_angles


class Affine(NamedTuple):
    """A linear layer with what the norm before it multiplies and adds: weight (in, out), bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Module, before: nn.Module | None = None) -> "Affine":
        weight, bias = linear.weight, getattr(linear, "bias", None)
        if before is not None:
            shift = getattr(before, "bias", None)
            if shift is not None:
                bias = weight @ shift if bias is None else bias + weight @ shift
            weight = weight * before.weight * (1 if isinstance(before, nn.LayerNorm) else weight.size(1) ** 0.5)
        return cls(weight.T.contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        result = torch.addmm(residual, x, self.weight)
        return result if self.bias is None else result.add_(self.bias)


class Layer(NamedTuple):
    qkv: Affine
    out: Affine
    up: Affine  # gate and up where the family is gated
    down: Affine
    turn: tuple[Tensor, Tensor] | None  # cosines and sines of all positions for queries and keys, times their norms' weights


def turns(q_weight: Tensor, k_weight: Tensor, model: GPT) -> tuple[Tensor, Tensor]:
    """Factors (block_size, H + K, D) of normalised queries and keys, and of the same with their halves swapped; then the sum is rotated."""
    config = model.config
    cos, sin = (angles[:, None] for angles in rotary_angles(torch.arange(config.block_size), config))
    weight = torch.cat((q_weight.expand(config.n_head, -1), k_weight.expand(config.kv_heads, -1))) * config.head_dim**0.5
    a, b = weight.chunk(2, dim=-1)
    return torch.cat((a * cos, b * cos), dim=-1), torch.cat((-b * sin, a * sin), dim=-1)


def direction(x: Tensor, eps: Tensor) -> Tensor:
    """RMSNorm of the last dimension, of size n, without its weight and divided by sqrt(n); eps: the root of n times the norm's own."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), eps)


class FastStep:
    """model: on the CPU, in evaluation mode; its weights are copied."""

    @torch.inference_mode()
    def __init__(self, model: GPT):
        self.model, config = model, model.config
        self.rotary = config.arch == "qwen3"
        self.layers = []
        for block in model.h:
            attn, mlp = block.attn, block.mlp
            turn = turns(attn.q_norm.weight, attn.k_norm.weight, model) if self.rotary else None
            qkv, up = Affine.of(attn.c_attn, block.ln_1), Affine.of(mlp.c_fc, block.ln_2)
            self.layers.append(Layer(qkv, Affine.of(attn.c_proj), up, Affine.of(mlp.c_proj), turn))
        self.head = Affine.of(model.wte, model.ln_f)
        self.eps, self.head_eps = (torch.tensor((n * 1e-6) ** 0.5) for n in (config.n_embd, config.head_dim))

    def norm(self, x: Tensor) -> Tensor:
        return direction(x, self.eps) if self.rotary else F.layer_norm(x, x.shape[-1:], eps=1e-5)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Read ids (B,) int64 behind what the cache holds; the logits (B, V) behind them. Raises ValueError where the cache is full."""
        if cache.length >= self.model.config.block_size:
            raise ValueError(f"{cache.length + 1} tokens do not fit into block_size={cache.length}; read the last part again")
        at = cache.length if cache.lengths is None else cache.lengths
        mask = None if cache.lengths is None else (torch.arange(cache.length + 1) <= at[:, None])[:, None, None]  # (B, 1, 1, S)
        x = self.model.wte.weight[ids]  # (B, C)
        if self.model.wpe is not None:
            x = x + self.model.wpe.weight[at]
        for number, layer in enumerate(self.layers):
            x = layer.out.add_to(x, self.attend(layer, number, self.norm(x), at, mask, cache))
            hidden = layer.up(self.norm(x))
            if self.rotary:
                gate, up = hidden.chunk(2, dim=-1)
                hidden = F.silu(gate).mul_(up)
            else:
                hidden = F.gelu(hidden, approximate="tanh")
            x = layer.down.add_to(x, hidden)
        cache.advance(1)
        return self.head(self.norm(x))

    def attend(self, layer: Layer, number: int, x: Tensor, at: int | Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """What attention finds for the new token of each row, (B, C). at: its position, for all rows or (B,)."""
        config = self.model.config
        H, K = config.n_head, config.kv_heads
        qkv = layer.qkv(x).view(len(x), H + 2 * K, -1)  # (B, H + 2 K, D)
        qk, v = qkv.split_with_sizes((H + K, K), dim=1)
        if layer.turn is not None:
            cos, sin = layer.turn
            qk = direction(qk, self.head_eps)
            qk = torch.addcmul(qk * cos[at], qk.roll(config.head_dim // 2, -1), sin[at])
        q, k = qk.unsqueeze(2).split_with_sizes((H, K), dim=1)  # (B, H, 1, D), (B, K, 1, D)
        k, v = cache.append(number, k, v.unsqueeze(2))  # (B, K, S, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != K).reshape(len(x), -1)
