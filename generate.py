"""Checkpoint -> text: one prompt, a prompt a line from a pipe, or a conversation at the prompt.

python generate.py --prompt "Once upon a time"
python generate.py --model_path best_model.pt --prompt "Once upon a time" --max_length 100
python generate.py --checkpoint checkpoints/stories --temperature 0.7 --top_p 0.95 --num_samples 3 --seed 1
python generate.py --interactive
"""

from utils import choose_device, needs_packages, notice, read_command_line, run_script

with needs_packages():
    import contextlib
    import hashlib
    import secrets
    import sys
    from collections.abc import Iterable, Iterator
    from dataclasses import dataclass

    import torch
    from tokenizers.decoders import DecodeStream

    from formats.checkpoint import load_model
    from formats.tokenizer import TextTokenizer
    from models import GPT

ALIASES = {"model_path": "checkpoint", "max_length": "max_new_tokens"}


@dataclass(frozen=True)
class Arguments:
    """Flags of generate.py."""

    checkpoint: str = "./checkpoints"
    """A .pt file, a run directory (its best model), or the name of one under ./checkpoints. Alias: --model_path."""
    prompt: str | None = None
    """Text to continue. Without it: a conversation on a terminal, or one prompt a line from a pipe."""
    max_new_tokens: int = 300
    """Stop after this many tokens, if the text has not ended before. Alias: --max_length."""
    temperature: float = 0.8
    """Below 1 the probable becomes more probable; 0 always takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities add up to p."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the largest probability."""
    stop: tuple[str, ...] = ()
    """Also stop before any of these texts."""
    seed: int | None = None
    """Same seed, same text. Default: a random one, which is printed."""
    num_samples: int = 1
    """Texts for each prompt; text number i depends on (seed, i) alone."""
    interactive: bool = False
    """Ask for prompts, also after --prompt."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self):
        problems = [f"{k}={getattr(self, k)} must be at least 1" for k in ("max_new_tokens", "num_samples") if getattr(self, k) < 1]
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature={self.temperature} must be a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k={self.top_k} must be at least 1")
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                problems.append(f"{name}={getattr(self, name)} must be above 0 and at most 1")
        if "" in self.stop:
            problems.append("stop='' would stop at once; give a text")
        if self.seed is not None and self.seed < 0:
            problems.append(f"seed={self.seed} must be at least 0")
        if problems:
            raise ValueError("; ".join(problems))


def sample_generator(seed: int, sample: int) -> torch.Generator:
    """The random numbers of text number `sample`: a pure function of (seed, sample)."""
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def encode_prompt(tokenizer: TextTokenizer, prompt: str, block_size: int) -> torch.Tensor:
    """A document's beginning as token ids (1, T): an EOT, then the prompt; of a prompt longer than the context its tail."""
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    if len(ids) > block_size:
        notice(f"the prompt has {len(ids) - 1} tokens, the model's context {block_size}: only its last {block_size} tokens are read")
        ids = ids[-block_size:]
    return torch.tensor([ids])


def decode_stream(tokenizer: TextTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Token ids -> pieces of text, as soon as they are whole characters. Bytes that never become one end up as U+FFFD."""
    stream, kept, given = DecodeStream(skip_special_tokens=True), [], 0
    for i in ids:
        kept.append(i)
        piece = stream.step(tokenizer.tokenizer, i)
        if piece:
            given += len(piece)
            yield piece
    rest = tokenizer.decode(kept)[given:]
    if rest:
        yield rest


def until_stop(pieces: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """Pieces of text up to the first of `stops`; what could be the beginning of one is held back until that is decided."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            yield held[: min(found)]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def continue_text(model: GPT, tokenizer: TextTokenizer, prompt: torch.Tensor, args: Arguments, generator: torch.Generator) -> Iterator[str]:
    """Pieces of the text that follows a prompt (1, T), until the end of the text, a stop text, or max_new_tokens."""

    def ids() -> Iterator[int]:
        sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p}
        for token in model.stream(prompt.to(model.device), args.max_new_tokens, generator=generator, **sampling):
            if token.item() == tokenizer.eot_id:
                return
            yield token.item()

    return until_stop(decode_stream(tokenizer, ids()), args.stop)


def read_prompts(interactive: bool) -> Iterator[str]:
    """Prompts from a terminal, until Ctrl-D, or a line each from a pipe."""
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and editing
    notice("Type the beginning of a text and press Enter; an empty line starts a text from nothing. Ctrl-C stops a text, Ctrl-D ends.")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, ALIASES)
    model, tokenizer, path, content = load_model(args.checkpoint, choose_device(args.device))
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31)
    notice(f"{path}, step {content['step']}" + (f", seed {seed}" if args.seed is None and args.temperature > 0 else ""))
    if args.temperature == 0 and (args.top_k or args.top_p or args.min_p or args.num_samples > 1):
        notice("at temperature 0 the text is always the same: --top_k, --top_p, --min_p and --num_samples have no effect on it")
    interactive = args.interactive or (args.prompt is None and sys.stdin.isatty())
    first = () if args.prompt is None else (args.prompt,)
    more = read_prompts(interactive) if interactive or args.prompt is None else ()
    sample = 0
    for prompts in (first, more):
        for prompt in prompts:
            ids = encode_prompt(tokenizer, prompt, model.config.block_size)
            for number in range(args.num_samples):
                if args.num_samples > 1:
                    print(f"--- {number + 1} of {args.num_samples}")
                print(prompt, end="", flush=True)
                try:
                    for piece in continue_text(model, tokenizer, ids, args, sample_generator(seed, sample)):
                        print(piece, end="", flush=True)
                except KeyboardInterrupt:
                    if not interactive:
                        raise
                print(flush=True)
                sample += 1
    return 0


if __name__ == "__main__":
    run_script(main)
