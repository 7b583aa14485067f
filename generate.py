"""Checkpoint -> text: one prompt, a prompt a line from a pipe, or a conversation at the prompt.

python generate.py --prompt "Once upon a time"
python generate.py --model_path best_model.pt --prompt "Once upon a time" --max_length 100
python generate.py --checkpoint checkpoints/stories --temperature 0.7 --top_p 0.95 --num_samples 3 --seed 1
python generate.py --interactive
"""

import itertools
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from utils import Checked, Count, Seed, Text, choose_device, derived_seed, notice, read_command_line, run_script

from formats.run_directory import load_model
from formats.tokenizer import TextTokenizer
from generation.sampling import Sampling
from generation.streaming import encode_prompt, stream_text
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of generate.py."""

    checkpoint: str = "./checkpoints"
    """A .pt file, an HF folder, or a run directory, also by its name below ./checkpoints. Default: the newest finished run there."""
    prompt: Text | None = None
    """Text to continue. Without it: a conversation on a terminal, or one prompt a line from a pipe."""
    max_new_tokens: Count = 300
    """Stop after this many tokens, if the text has not ended before. Alias: --max_length."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Also stop before any of these texts."""
    seed: Seed | None = None
    """Same seed, same text. Default: a random one, which is printed."""
    num_samples: Count = 1
    """Texts for each prompt; text number i depends on (seed, i) alone."""
    interactive: bool = False
    """Ask for prompts, also after --prompt."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def piped_prompts() -> Iterator[str]:
    """A prompt on each line of standard input. Raises ValueError where there is none."""
    if sys.stdin is None:
        raise ValueError("there is no standard input to read prompts from; give --prompt TEXT")
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, {"model_path": "checkpoint", "max_length": "max_new_tokens"})
    model, tokenizer, *_ = load_model(args.checkpoint, choose_device(args.device))
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31)
    if args.seed is None and not args.sampling.greedy:
        notice(f"seed {seed}")
    if args.sampling.greedy and (args.sampling.top_k or args.sampling.top_p or args.sampling.min_p or args.num_samples > 1):
        notice("at temperature 0 the text is always the same: --top_k, --top_p, --min_p and --num_samples have no effect on it")
    interactive = args.interactive or (args.prompt is None and sys.stdin is not None and sys.stdin.isatty())
    prompts = [args.prompt] if args.prompt is not None else []
    more = () if interactive or args.prompt is not None else piped_prompts()
    writer = Writer(TorchEngine(model), tokenizer, args.sampling)
    for number, prompt in enumerate(itertools.chain(prompts, more)):
        ids = encode_prompt(tokenizer, prompt, model.config.block_size)
        for sample in range(args.num_samples):
            if args.num_samples > 1:
                print(f"--- {sample + 1} of {args.num_samples}")
            print(prompt, end="", flush=True)
            for piece in stream_text(writer, Row(ids, args.max_new_tokens, derived_seed(seed, number, sample)), args.stop):
                print(piece, end="", flush=True)
            print(flush=True)
    if interactive:
        from generation.prompt_loop import Conversation, Settings, talk

        settings = Settings(args.sampling, args.max_new_tokens, args.stop, "text", seed)
        colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ

        def load(name: str) -> tuple[TorchEngine, TextTokenizer]:
            model, tokenizer, *_ = load_model(name, choose_device(args.device))
            return TorchEngine(model), tokenizer

        talk(Conversation(load, args.checkpoint, settings, colours))
    return 0


if __name__ == "__main__":
    run_script(main)
