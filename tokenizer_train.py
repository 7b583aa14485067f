"""Text -> tokenizer.json: a tokenizer of one's own, for prepare_data.py --tokenizer PATH, and how good it is beside GPT-2's.

python tokenizer_train.py --input stories.txt --kind bpe --vocab_size 4096 --output tokenizer.json
python tokenizer_train.py --show "Once upon a time" --tokenizer tokenizer.json
python prepare_data.py --input stories.txt --tokenizer tokenizer.json
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from utils import Checked, Count, Text, interruptible, notice, read_command_line, run_script

import numpy as np

from formats.outputs import output_file, write_text
from formats.tokenizer import TextTokenizer, bytes_of_token, gpt2_tokenizer
from preparation.cleaning import Cleaning, Splitting
from preparation.corpus import Limits, open_corpus
from preparation.sources import Format
from preparation.tokenizer_kinds import TRAINED, make_tokenizer, text_normalizer

SEED = 1337
HELD_OUT = 0.05  # share of the documents that the tokenizer doesn't see
HELD_OUT_CHARACTERS = 1_000_000
USED_CHARACTERS = 10_000_000  # of the training text, in which ids are looked for


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of tokenizer_train.py."""

    input: tuple[str, ...] = ()
    """Files, directories or globs, of all kinds that prepare_data.py reads."""
    kind: Literal["bpe", "wordpiece", "word", "char", "byte"] = "bpe"
    """bpe: byte-level byte pairs, lossless on any text; wordpiece: longest known parts; word: frequent words; char; byte: the 256 bytes."""
    vocab_size: Count = 4096
    """Number of tokens of bpe, wordpiece and word, special tokens included."""
    output: str = "tokenizer.json"
    """The file to write."""
    form: Format = field(default_factory=Format)
    train_bytes: Count = 50_000_000
    """Learn from a sample of at most this much text."""
    lowercase: bool = False
    """Lowercase every text, here and wherever the tokenizer is used."""
    nfc: bool = False
    """Write each character in one way, Unicode's NFC, here and wherever the tokenizer is used."""
    show: Text | None = None
    """Instead of training: show what --tokenizer makes of this text."""
    tokenizer: str | None = None
    """For --show: a tokenizer.json, a directory that holds one, gpt2 or byte."""

    def problems(self) -> list[str]:
        problems = []
        if (self.show is None) != (self.tokenizer is None):
            problems.append("--show TEXT and --tokenizer PATH belong together")
        elif (self.show is None) == (not self.input):
            problems.append("give either --input FILE... to train on, or --show TEXT --tokenizer PATH")
        elif self.tokenizer in {*TRAINED, "char"}:
            problems.append(f"a {self.tokenizer} tokenizer is made from text; name its file for --show, or one of gpt2 and byte")
        return problems


def readable(tokenizer: TextTokenizer, token_id: int) -> str:
    """A token as people can read it, in quotes; with part of a character as its bytes, e.g. <C3>."""
    token = tokenizer.tokenizer.id_to_token(token_id) or ""
    of_bytes = token_id not in tokenizer.special_ids and "ByteLevel" in tokenizer.description.decoders
    data = bytes_of_token(token) if of_bytes else None
    try:
        return repr(token if data is None else data.decode())
    except UnicodeDecodeError:
        return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"<{byte:02X}>" for byte in data)


def show(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    print(f"{'id':>6}  piece")
    for i in ids:
        print(f"{i:>6}  {readable(tokenizer, i)}")
    decoded = tokenizer.decode(ids)
    print(f"{len(ids)} tokens, {len(text.encode())} bytes; decoded{'' if decoded == text else ', which differs'}: {decoded}")


def beginning(texts: Iterator[str], characters: int) -> list[str]:
    """The first texts, until they have so many characters; the rest stays in `texts`."""
    first, size = [], 0
    for text in texts:
        first.append(text)
        size += len(text)
        if size >= characters:
            break
    return first


def bytes_per_token(tokenizer: TextTokenizer, texts: list[str]) -> tuple[float, float]:
    """UTF-8 bytes per token, and the share of tokens that are unknown."""
    ids = np.concatenate([tokenizer.encode_documents([tokenizer.normalize(text)])[0][:-1] for text in texts])
    return sum(len(text.encode()) for text in texts) / max(1, len(ids)), float((ids == tokenizer.unknown_id).mean()) if len(ids) else 0.0


def report(tokenizer: TextTokenizer, held_out: list[str], training: list[str]) -> None:
    """Print how the tokenizer does on text that it was not made from, and what its ids are."""
    if held_out:
        ours, unknown = bytes_per_token(tokenizer, held_out)
        line = f"  {ours:.2f} bytes/token on {sum(map(len, held_out)):,} characters of held-out text"
        try:
            theirs = gpt2_tokenizer()
            line += f"; GPT-2's {theirs.vocab_size:,} tokens: {bytes_per_token(theirs, held_out)[0]:.2f}"
        except ValueError:
            line += "; GPT-2's can't be had without network"
        print(line)
        if unknown:
            notice(f"warning: {unknown:.2%} of the held-out tokens are unknown to it; bpe and byte know every text")
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    longest = sorted(ordinary, key=lambda i: (-len(tokenizer.tokenizer.id_to_token(i) or ""), i))[:8]
    print(f"  longest tokens: {', '.join(readable(tokenizer, i) for i in longest)}")
    used = np.zeros(tokenizer.vocab_size, bool)
    for text in training:
        used[tokenizer.encode_documents([tokenizer.normalize(text)])[0]] = True
    unused = [i for i in ordinary if not used[i]]
    examples = f", e.g. {', '.join(readable(tokenizer, i) for i in unused[-5:])}" if unused else ""
    print(f"  {len(unused)} of {len(ordinary)} tokens don't occur in {sum(map(len, training)):,} characters of the training text{examples}")


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__)
    if args.show is not None:
        show(make_tokenizer(args.tokenizer, (), 0), args.show)
        return 0
    corpus = open_corpus({"input": args.input}, args.form, Splitting("auto", SEED, HELD_OUT), Cleaning(), Limits())
    output = output_file(args.output, "tokenizer", corpus.files, make_parents=True)
    normalizer = text_normalizer(args.lowercase, args.nfc)
    texts = corpus.training_texts(normalizer, args.train_bytes)
    first = beginning(texts, USED_CHARACTERS)  # kept for the report
    if not first:
        raise ValueError(f"{', '.join(args.input)} holds no text; give files with some")
    tokenizer = make_tokenizer(args.kind, itertools.chain(first, texts), args.vocab_size, args.lowercase, args.nfc)
    if args.kind not in TRAINED and args.vocab_size != Arguments.vocab_size:
        notice(f"--vocab_size has no effect with the {args.kind} tokenizer")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, tokenizer.json)
    print(f"{output}: {tokenizer.vocab_size} tokens")
    interruptible(report, tokenizer, list(corpus.held_out_texts(normalizer, HELD_OUT_CHARACTERS)), first)
    return 0


if __name__ == "__main__":
    run_script(main)
