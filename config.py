"""What people edit: the shape of the network, how it is trained, and the presets.

A value comes from the first place that has it: a flag, then `--preset` (only if given), then what stands in this file.
To run an experiment, change `model_config` or `train_config` at the end of this file, or pass the field's name as a flag:

    python train.py --n_layer 4 --learning_rate 1e-3
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from utils import Checked, Count, Fraction01, Natural, NonNegative, ProperFraction, Seed, Text

from annotated_types import Ge, Gt, Le

# Far beyond what anybody trains, and small enough that sizes and sample numbers fit into 64 bits and estimates take no time
Layers = Annotated[int, Ge(1), Le(256)]
Size = Annotated[int, Ge(1), Le(2**24)]
Rate = Annotated[float, Gt(0), Le(1000)]
WINDOWS_PER_STEP, WINDOWS = 2**24, 2**40  # the most in one optimizer step, and in a run


@dataclass(frozen=True)
class GPTConfig(Checked):
    """The shape of the network. A field that is None takes its family's own value (see `arch`)."""

    block_size: Size = 1024
    """Context length in tokens: how far back the model can look."""
    vocab_size: Size = 50257
    """Number of token ids. train.py takes it from the tokenizer of the data; a flag that differs is refused."""
    n_layer: Layers = 12
    """Number of transformer blocks."""
    n_head: Size = 12
    """Number of attention heads; n_embd must be divisible by it."""
    n_embd: Size = 768
    """Width of the residual stream."""
    dropout: ProperFraction = 0.0
    """Probability of dropping an activation in training. 0 is best while the model sees its data only a few times."""
    bias: bool | None = None
    """Biases in linears and norms. None: the family's own (gpt2 True; qwen3 has none and refuses True)."""
    arch: Literal["gpt2", "qwen3"] = "gpt2"
    """Family: gpt2 (learned positions, LayerNorm, GELU) or qwen3 (rotary positions, RMSNorm, QK-norm, SwiGLU)."""
    flash: bool = True
    """Fused attention kernel; False runs the explicit masked softmax, the readable reference."""
    n_kv_head: Size | None = None
    """qwen3 only: number of key/value heads shared by the query heads. None: n_head."""
    n_hidden: Size | None = None
    """Width inside the MLP. None: 4 n_embd (gpt2), or 8/3 n_embd rounded up to a multiple of 64 (qwen3, about as many parameters)."""
    rope_theta: Annotated[float, Ge(1), Le(1e12)] | None = None
    """qwen3 only: base of the rotary frequencies. None: 10,000."""

    def __post_init__(self):
        super().__post_init__()
        if self.bias is None:
            object.__setattr__(self, "bias", self.arch == "gpt2")

    def problems(self) -> list[str]:
        problems = []
        if self.n_head >= 1 and self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / self.n_head)) * self.n_head
            problems.append(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; try n_embd={nearest}")
        if self.arch == "qwen3":
            if self.bias:
                problems.append("bias=True is an option of arch=gpt2; qwen3 has no biases, leave it out")
            if self.n_kv_head and self.n_head % self.n_kv_head:
                problems.append(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
            if self.n_head >= 1 and (self.n_embd // self.n_head) % 2:
                problems.append(f"rotary positions need an even n_embd / n_head, not {self.n_embd // self.n_head}")
        else:
            for name in ("n_kv_head", "rope_theta"):
                if getattr(self, name) is not None:
                    problems.append(f"{name}={getattr(self, name)} is an option of arch=qwen3; leave it out or pass --arch qwen3")
        return problems

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self) -> int:
        return self.n_hidden or (4 * self.n_embd if self.arch == "gpt2" else -(-8 * self.n_embd // (3 * 64)) * 64)

    @property
    def theta(self) -> float:
        return self.rope_theta or 10_000.0

    @classmethod
    def nano(cls, **overrides) -> "GPTConfig":
        """About 1M parameters with a vocabulary of its own: minutes on a laptop's CPU. Family chosen by measurement (MEASUREMENTS.md)."""
        return cls(**{"block_size": 512, "vocab_size": 1500, "n_layer": 4, "n_head": 2, "n_embd": 128, "arch": "qwen3"} | overrides)

    @classmethod
    def mini(cls, **overrides) -> "GPTConfig":
        """6 layers x 384: about 11M parameters besides the token embedding, 30M with GPT-2's vocabulary. Family chosen by measurement."""
        return cls(**{"block_size": 128, "n_layer": 6, "n_head": 6, "n_embd": 384, "arch": "qwen3"} | overrides)

    @classmethod
    def tiny(cls, **overrides) -> "GPTConfig":
        """About 50M parameters with GPT-2's vocabulary."""
        return cls(**{"block_size": 512, "n_layer": 8, "n_head": 8, "n_embd": 512} | overrides)

    @classmethod
    def small(cls, **overrides) -> "GPTConfig":
        """About 100M parameters with GPT-2's vocabulary."""
        return cls(**{"block_size": 1024, "n_layer": 9, "n_head": 12, "n_embd": 768} | overrides)

    @classmethod
    def medium(cls, **overrides) -> "GPTConfig":
        """About 300M parameters with GPT-2's vocabulary."""
        return cls(**{"block_size": 1024, "n_layer": 20, "n_head": 16, "n_embd": 1024} | overrides)


ModelConfig = GPTConfig


@dataclass(frozen=True)
class TrainConfig(Checked):
    """How a model is trained. Every field is a flag of train.py."""

    data_dir: tuple[str, ...] = ("./data",)
    """Data directories, DIR or DIR:WEIGHT. Several are read as one; with weights they are mixed in those shares."""
    out_dir: str | None = None
    """The run directory. None: ./checkpoints for ./data, ./checkpoints/NAME for a data directory or dataset of that name."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the matrices inside the blocks and AdamW for the rest; adamw: AdamW for everything."""
    learning_rate: Rate = 3e-4
    """Peak learning rate of the AdamW part (embeddings and norms under muon, everything under adamw)."""
    muon_learning_rate: Rate = 0.02
    """Peak learning rate of the Muon part."""
    weight_decay: Annotated[float, Ge(0), Le(1000)] = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: ProperFraction = 0.9
    """AdamW: decay of the gradient's running mean."""
    beta2: ProperFraction = 0.95
    """AdamW: decay of the squared gradient's running mean."""
    grad_clip: NonNegative = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    ema_decay: ProperFraction = 0.0
    """Decay of a running mean of the weights (EMA) which is then evaluated, sampled and kept as the best model; 0: off."""
    batch_size: Size = 32
    """Windows of block_size tokens in one forward pass (the micro-batch)."""
    gradient_accumulation_steps: Size = 4
    """Forward passes added up to one optimizer step. The effective batch is batch_size times this, over all processes together."""
    max_steps: Count = 100_000
    """Optimizer steps of the whole run."""
    epochs: Annotated[float, Gt(0), Le(1e6)] | None = None
    """Length of the run in passes over the training data, instead of max_steps."""
    max_tokens: Count | None = None
    """Length of the run in tokens, instead of max_steps; rounded up to whole steps."""
    patience: Natural = 0
    """Stop early after this many evaluations in a row without a better validation loss; 0: never."""
    lr_schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay after warmup."""
    warmup_steps: Natural = 2000
    """Steps of linear warmup; at most a tenth of the run unless this very flag is given."""
    final_lr_fraction: Fraction01 = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    eval_interval: Count = 500
    """Steps between two evaluations on the validation split; the last step always evaluates."""
    eval_tokens: Count = 200_000
    """Length of the fixed beginning of the validation split that is evaluated while training."""
    checkpoint_interval: Count = 1000
    """Steps between two complete, resumable checkpoints; the last step always writes one."""
    keep_checkpoints: Count | Literal["all"] = 2
    """How many of the newest step checkpoints to keep: a number, or all."""
    log_interval: Count = 10
    """Steps between two lines of metrics.jsonl."""
    sample_tokens: Natural = 40
    """Length of the sample text that each evaluation prints and logs; 0: none."""
    sample_prompt: Text = ""
    """Beginning of the sample texts; empty: the beginning of a document."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the run's tensorboard/ (needs: pip install tensorboard)."""
    seed: Seed = 1337
    """Seed of the initial weights, the data order and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps. auto takes CUDA, then MPS, then the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward and backward pass. auto: bfloat16 where the hardware computes in it and it pays."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile: True, False, or auto (on CUDA, and on a CPU in runs long enough to win the compilation's time back)."""

    def __post_init__(self):
        if isinstance(self.data_dir, str | list):
            object.__setattr__(self, "data_dir", (self.data_dir,) if isinstance(self.data_dir, str) else tuple(self.data_dir))
        super().__post_init__()

    def problems(self) -> list[str]:
        problems = []
        if self.epochs is not None and self.max_tokens is not None:
            problems.append("epochs and max_tokens both set the length of the run; give one of them")
        if not self.data_dir:
            problems.append("data_dir needs a directory; make one with prepare_data.py")
        if self.windows_per_step > WINDOWS_PER_STEP or self.windows_per_step * self.max_steps > WINDOWS:
            batch = f"batch_size={self.batch_size} times gradient_accumulation_steps={self.gradient_accumulation_steps}"
            most = f"a step may have {WINDOWS_PER_STEP:,} windows, a run {WINDOWS:,}"
            problems.append(f"{batch} in max_steps={self.max_steps} steps is too much: {most}")
        return problems

    @property
    def windows_per_step(self) -> int:
        """Windows of block_size tokens in one optimizer step: the effective batch."""
        return self.batch_size * self.gradient_accumulation_steps


# A preset is a model and the training values that go with it; values it does not name stay as they stand in train_config.
# nano's and mini's values were measured (MEASUREMENTS.md). The larger ones follow a rule and are unmeasured: the AdamW part's peak
# falls with the width, from 3e-3 at 384 on the cautious side (6e-4 at 512, 3e-4 at 1024), Muon's stays, warmup is the default.
SHORT = {"gradient_accumulation_steps": 1, "warmup_steps": 100, "lr_schedule": "linear", "final_lr_fraction": 0.0}
NANO = {"batch_size": 2, "max_steps": 1600, "learning_rate": 1e-2, "muon_learning_rate": 0.01, "eval_interval": 400, "eval_tokens": 50_000}
PRESETS = {
    "nano": (GPTConfig.nano, SHORT | NANO | {"checkpoint_interval": 400}),
    "mini": (GPTConfig.mini, SHORT | {"batch_size": 16, "max_steps": 5_000, "learning_rate": 3e-3, "muon_learning_rate": 0.01}),
    "tiny": (GPTConfig.tiny, {"learning_rate": 6e-4, "max_steps": 20_000}),
    "small": (GPTConfig.small, {"learning_rate": 4e-4}),
    "medium": (GPTConfig.medium, {"learning_rate": 3e-4}),
}

# What --init_from sets unless a flag says otherwise, for a model that already knows something; measured (MEASUREMENTS.md).
# The AdamW part's rate is that of a width of 128; it falls with the width, as the presets' rates do.
FINE_TUNING = SHORT | {"learning_rate": 1e-3, "muon_learning_rate": 2e-3, "batch_size": 8, "epochs": 2.0, "warmup_steps": 50}
FINE_TUNING |= {"eval_interval": 200, "checkpoint_interval": 200}

# The two lines to edit for an experiment, e.g. ModelConfig.tiny(block_size=256, dropout=0.1) and
# TrainConfig(data_dir="./data_v1", learning_rate=1e-3).
model_config = ModelConfig.small()
train_config = TrainConfig()
