"""Text -> tokenizer.json: a byte-level BPE (Sennrich et al. 2016) of one's own, for prepare_data.py --tokenizer PATH.

python tokenizer_train.py --input stories.txt --kind bpe --vocab_size 4096 --output tokenizer.json
python prepare_data.py --input stories.txt --tokenizer tokenizer.json
"""

from utils import needs_packages, notice, read_command_line, run_script, write_atomically

with needs_packages():
    from dataclasses import dataclass
    from pathlib import Path
    from typing import Literal

    from text_sources import find_files, first_bytes
    from tokenizer_kinds import make_tokenizer
    from tokenizers_io import EOT


@dataclass(frozen=True)
class Arguments:
    """Flags of tokenizer_train.py."""

    input: tuple[str, ...]
    """Text files (UTF-8), directories (their *.txt files) or globs."""
    kind: Literal["bpe", "byte", "char"] = "bpe"
    """bpe: byte-level byte pair encoding, lossless on any text; byte: the 256 bytes; char: one id per character of the input."""
    vocab_size: int = 4096
    """Number of tokens of a bpe, <|endoftext|> and the 256 bytes included."""
    output: str = "tokenizer.json"
    """The file to write."""
    separator: str = EOT
    """What stands between two documents."""
    train_bytes: int = 100_000_000
    """See at most this much text, from its beginning."""


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__)
    files = find_files(args.input, args.separator)
    tokenizer = make_tokenizer(args.kind, first_bytes((text for file in files for text in file), args.train_bytes), args.vocab_size)
    if args.kind == "bpe" and tokenizer.vocab_size < args.vocab_size:
        notice(f"the text gives only {tokenizer.vocab_size} tokens of the {args.vocab_size} asked for")
    if args.kind != "bpe" and args.vocab_size != Arguments.vocab_size:
        notice(f"--vocab_size has no effect with the {args.kind} tokenizer")
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda file: file.write(tokenizer.json.encode()))
    print(f"{output}: {tokenizer.vocab_size} tokens")
    return 0


if __name__ == "__main__":
    run_script(main)
