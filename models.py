"""The network: one GPT module, two families chosen by `GPTConfig.arch`.

gpt2  (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): learned positions, LayerNorm, tanh GELU.
qwen3 (Qwen Team 2025, "Qwen3 Technical Report"): rotary positions, RMSNorm, QK-norm, SwiGLU, shared key/value heads.

Each has a reference implementation in `transformers` (GPT2LMHeadModel, Qwen3ForCausalLM) that computes the same.
They differ in five places only: positions, norm, the norm of queries and keys, the gate of the MLP, and biases.

Letters in shape comments: B batch, T new tokens, S tokens attended to, C n_embd, H query heads, K key/value heads, D head_dim,
V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPTConfig

IGNORE = -1  # a target with this value adds nothing to the loss


class KVCache:
    """Keys and values of the tokens seen so far, (n_layer, B, K, block_size, D) each, allocated once.

    length: tokens of each row, of the longest one where they differ. lengths: (B,) int64 then, else None.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device="cpu", dtype=torch.float32):
        shape = (config.n_layer, batch_size, config.kv_heads, config.block_size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length, self.lengths = 0, None

    def set_lengths(self, lengths: Tensor) -> None:
        """Only the first tokens of each row count, lengths (B,) int64; what was stored behind them is overwritten."""
        self.length = int(lengths.max())
        self.lengths = None if (lengths == self.length).all() else lengths.to(self.k.device)

    def positions(self, T: int) -> Tensor:
        """Of the T tokens to come: (T,), or (B, T) where the rows' lengths differ."""
        new = torch.arange(T, device=self.k.device)
        return self.length + new if self.lengths is None else self.lengths[:, None] + new

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, (B, K, T, D), behind what is there; return all keys and values so far, (B, K, S, D)."""
        T, keys, values = k.size(2), self.k[layer], self.v[layer]
        if self.lengths is None:
            keys.narrow(2, self.length, T).copy_(k)
            values.narrow(2, self.length, T).copy_(v)
        else:
            at = self.positions(T)[:, None, :, None].expand_as(k)
            keys.scatter_(2, at, k)
            values.scatter_(2, at, v)
        return keys.narrow(2, 0, self.length + T), values.narrow(2, 0, self.length + T)

    def advance(self, T: int) -> None:
        """T tokens were stored in every layer."""
        self.length += T
        if self.lengths is not None:
            self.lengths = self.lengths + T


class RMSNorm(nn.RMSNorm):
    """Computes in float32 under autocast too, and gives back the dtype of its input (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


def norm(config: GPTConfig, width: int) -> nn.Module:
    return RMSNorm(width, eps=1e-6) if config.arch == "qwen3" else nn.LayerNorm(width, eps=1e-5, bias=config.bias)


def rotary_angles(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles of positions (T,), each (T, D/2) float32; of (B, T), (B, 1, T, D/2) (Su et al. 2021, "RoFormer")."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions.float()[..., None] / config.theta**exponents
    angles = angles if positions.dim() == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x (B, H, T, D) by their position's angle; dtype kept."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * config.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = norm(config, config.head_dim) if config.arch == "qwen3" else None
        self.k_norm = norm(config, config.head_dim) if config.arch == "qwen3" else None
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, layer: int, kv_cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        D = self.config.head_dim
        q, k, v = self.c_attn(x).split([h * D for h in self.heads], dim=2)
        q = q.view(B, T, -1, D)
        k = k.view(B, T, -1, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.view(B, T, -1, D).transpose(1, 2)  # (B, H, T, D), 2 x (B, K, T, D)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        past = 0
        if kv_cache is not None:
            past = kv_cache.length if kv_cache.lengths is None else kv_cache.lengths
            k, v = kv_cache.append(layer, k, v)  # (B, K, S, D)
        if k.size(1) != q.size(1):
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))  # (B, H, S, D)
        y = self.attend(q, k, v, past)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int | Tensor) -> Tensor:
        """Causal attention of queries q (B, H, T, D) at positions past.. over k, v (B, H, S, D) -> (B, H, T, D); past may be (B,)."""
        T, S = q.size(2), k.size(2)
        dropout = self.config.dropout if self.training else 0.0
        # SDPA's own causal mask aligns the first query with the first key: right only without a past. One query sees everything.
        mask = None
        if isinstance(past, Tensor):
            at = past[:, None, None, None] + torch.arange(T, device=q.device)[:, None]
            mask = torch.arange(S, device=q.device) <= at  # (B, 1, T, S)
        elif (past and T > 1) or not self.config.flash:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(past)
        if self.config.flash:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and past == 0)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))  # (B, H, T, S)
        return F.dropout(scores.masked_fill(~mask, -torch.inf).softmax(dim=-1), dropout) @ v


class MLP(nn.Module):
    """c_fc holds gate and up stacked in its rows where the family is gated."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gated = config.arch == "qwen3"
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width * (2 if self.gated else 1), bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.c_fc(x).chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(self.c_fc(x), approximate="tanh")
        return self.resid_dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = norm(config, config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, layer: int, kv_cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, layer, kv_cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer (Vaswani et al. 2017) with pre-norm blocks and a tied output layer.

    Parameter names are GPT-2's: wte, wpe, h.N.attn.c_attn, ..., ln_f. The output layer is wte's weight again, not a parameter.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.arch == "gpt2" else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config, config.n_embd)
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer), biases 0, norms 1.

        In qwen3 the first head of every block starts as a previous-token head, and the last head of the second block as an induction head.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.config.arch == "qwen3":
            self.start_previous_token_heads()
            self.start_induction_head()

    @torch.no_grad()
    def start_previous_token_heads(self) -> None:
        """Let head 0 of every block attend to the token before, at the start of training; it is free to learn something else.

        Such heads are what induction heads build on, which copy what followed a token earlier (Olsson et al. 2022, "In-context Learning
        and Induction Heads"); from random weights they take hundreds of steps to appear. Weights that begin near what training finds
        are Trockman and Kolter's idea (2023, "Mimetic Initialization of Self-Attention Layers"). How many and how sharp: MEASUREMENTS.md.

        Every embedding gets the same small constant, the only thing that this head's queries and keys see. Rotated to their positions,
        their product at a distance of d tokens is the sum of cos(f (d - 1)) over the fastest frequencies f, and largest at d = 1.
        """
        config, D = self.config, self.config.head_dim
        self.wte.weight += 0.02
        frequencies = config.theta ** -(torch.arange(0, D, 2) / D)  # (D/2,)
        fast = (torch.arange(D // 2) < max(1, D // 8)).float()
        key = torch.cat((fast, torch.zeros_like(fast)))
        query = torch.cat((fast * frequencies.cos(), -fast * frequencies.sin()))  # the key one position back
        for block in self.h:
            rows = block.attn.c_attn.weight
            rows[:D] = 0.02 * query[:, None]
            rows[config.n_embd : config.n_embd + D] = 0.02 * key[:, None]

    @torch.no_grad()
    def start_induction_head(self) -> None:
        """Let the last head of the second block start as an induction head: it looks for what followed the present token earlier, and
        copies it (Olsson et al. 2022). What it learns from there is up to the training. How much this helps: MEASUREMENTS.md.

        The first block's head 0 has written the values of the token before into each position. The queries are the values of the present
        token, the keys read what that head wrote, so they agree behind an earlier copy of the present token. Only slow rotary frequencies
        are used, which hardly depend on the distance. The output projection is the transpose of the values: what the head sees is added
        as it is, and the output layer, which is the token table, reads it as that token. All rows sum to zero, blind to the constant in
        every embedding.
        """
        if self.config.n_layer < 2:
            return
        D, (H, K, _) = self.config.head_dim, self.h[0].attn.heads
        first, second = self.h[0].attn, self.h[1].attn
        slow = (torch.arange(D // 2) >= 3 * D // 16).repeat(2)[:, None]
        read, written = first.c_attn.weight[-K * D :][:D], first.c_proj.weight[:, :D].T  # values and output of head 0, (D, C)
        q, k, v = (rows[-D:] for rows in second.c_attn.weight.split([H * D, K * D, K * D]))
        for rows, start in ((q, read * slow), (k, written * slow), (v, v)):
            start = start - start.mean(dim=1, keepdim=True)
            rows.copy_(start * (0.02 / start.std()))
        second.c_proj.weight[:, -D:] = 2 * v.T / math.sqrt(2 * self.config.n_layer)

    def forward(self, idx: Tensor, targets: Tensor | None = None, kv_cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the next token at every position.

        idx: (B, T) int64 token ids. targets: (B, T) int64, the tokens that follow, -1 where none counts.
        kv_cache: holds the tokens before idx, and idx after the call; for inference.
        Returns logits (B, T, vocab_size) in the computing precision, and the mean cross-entropy in nats (float32) or None.
        Raises ValueError if the tokens, with those in the cache, are more than block_size.
        """
        logits = self.head(self.features(idx, kv_cache))  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=IGNORE)
        return logits, loss

    def features(self, idx: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """What the output layer reads, (B, T, C), at every position of idx (B, T); otherwise as `forward`."""
        past = kv_cache.length if kv_cache is not None else 0
        T = idx.size(1)
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit into block_size={self.config.block_size}; pass the last block_size tokens")
        positions = kv_cache.positions(T) if kv_cache is not None else torch.arange(T, device=idx.device)
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        rotary = rotary_angles(positions, self.config) if self.wpe is None else None
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            x = block(x, rotary, layer, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(T)
        return self.ln_f(x)

    def head(self, features: Tensor) -> Tensor:
        """The output layer: features (..., C) -> logits (..., V)."""
        return F.linear(features, self.wte.weight)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def num_parameters(self, embedding: bool = True) -> int:
        """Number of weights; without `embedding`, those of the token table (which is the output layer too) are left out."""
        return sum(p.numel() for p in self.parameters()) - (0 if embedding else self.wte.weight.numel())

    def flops_per_token(self) -> int:
        """Floating-point operations of one training step per token, forward and backward (Chowdhery et al. 2022, PaLM, appendix B)."""
        used = self.num_parameters() - (self.wpe.weight.numel() if self.wpe is not None else 0)
        return 6 * used + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def parameter_groups(self, muon: bool) -> dict[str, list[nn.Parameter]]:
        """Every parameter once, as the optimizers treat them: matrices that Muon takes (none without `muon`), those decayed, the rest.

        Muon takes the matrices inside the blocks. Weight decay falls on matrices only, never on norms and biases.
        """
        groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "no_decay": []}
        for name, parameter in self.named_parameters():
            if muon and parameter.dim() == 2 and name.startswith("h."):
                groups["muon"].append(parameter)
            else:
                groups["decay" if parameter.dim() == 2 else "no_decay"].append(parameter)
        ids = [id(p) for group in groups.values() for p in group]
        assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in self.parameters()}, "each parameter must be in one group"
        return groups

    def fused_parts(self) -> dict[nn.Parameter, int | list[int]]:
        """For matrices that hold several maps in their rows (q, k, v; gate, up): the rows of each, as torch.split takes them."""
        parts: dict[nn.Parameter, int | list[int]] = {}
        for block in self.h:
            parts[block.attn.c_attn.weight] = [heads * self.config.head_dim for heads in block.attn.heads]
            if block.mlp.gated:
                parts[block.mlp.c_fc.weight] = self.config.mlp_width
        return parts


CHUNK = {"cpu": 512}  # rows of logits held at once in training: measured on a CPU (MEASUREMENTS.md)
GPU_CHUNK = 8192


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of F.linear(x, weight) without ever holding all logits: both gradients are made chunk by chunk going forward.

    Gradients stay free of the factor 1/N until the end, so that float16 keeps the small ones.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            loss, hits = x.new_zeros((), dtype=torch.float32), x.new_zeros((), dtype=torch.float32)
            x_grad, weight_grad = torch.empty_like(x, dtype=dtype), torch.zeros_like(weight)
            for start in range(0, len(x), chunk):
                rows, target = x[start : start + chunk].to(dtype), targets[start : start + chunk, None]
                log_probs = F.log_softmax(rows @ w.T, dim=-1, dtype=torch.float32)  # (chunk, V)
                chosen = log_probs.gather(1, target)
                loss -= chosen.sum()
                hits += (chosen == log_probs.amax(dim=1, keepdim=True)).sum()
                grad = log_probs.exp_().scatter_add_(1, target, torch.full_like(chosen, -1.0)).to(dtype)
                x_grad[start : start + chunk] = grad @ w
                weight_grad += grad.T @ rows
        ctx.save_for_backward(x_grad, weight_grad)
        ctx.x_dtype = x.dtype
        ctx.mark_non_differentiable(hits)
        return loss / len(x), hits / len(x)

    @staticmethod
    def backward(ctx, loss_grad: Tensor, _):
        x_grad, weight_grad = ctx.saved_tensors
        factor = loss_grad / len(x_grad)
        return (x_grad * factor).to(ctx.x_dtype), weight_grad * factor, None, None


class NextTokenLoss(nn.Module):
    """The training objective as a module, so that torch.compile and DistributedDataParallel have one thing to wrap."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows: (B, T + 1) int64, windows with the token behind each. Returns mean cross-entropy in nats and token accuracy, float32."""
        x = self.model.features(rows[:, :-1]).flatten(0, 1)  # (B T, C)
        return LinearCrossEntropy.apply(x, self.model.wte.weight, rows[:, 1:].flatten(), CHUNK.get(x.device.type, GPU_CHUNK))
