"""The kinds of tokenizers that are made here, each as a tokenizer.json: gpt2, bpe, wordpiece, word, char, byte. Doesn't import torch."""

import re
from collections.abc import Iterable, Iterator

from utils import interruptible, notice

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from formats.tokenizer import BYTE_OF, EOT, MAX_VOCAB_SIZE, PADDING, UNKNOWN, TextTokenizer, byte_level, gpt2_tokenizer, load_tokenizer

SPECIAL = (EOT, UNKNOWN, PADDING)  # of the kinds that don't know every text
ALPHABET = sorted(BYTE_OF)
SMALLEST = {"bpe": 257, "wordpiece": 515, "word": 4}  # all bytes (wordpiece: at a word's beginning and inside) and the special tokens

LONGEST_WORD = 1000  # characters; the time to learn from a word grows with the square of its length
STRETCH = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD}}}\S+|(?<!\s)\s{{{LONGEST_WORD}}}\s+")  # where a longer word may be
SLICE = 2**20  # characters of a stretch that are looked at together


def _with_short_words(texts: Iterable[str], words: PreTokenizer) -> Iterator[str]:
    """Texts, cut within words of more than LONGEST_WORD characters, as `words` finds them: digits, DNA, blanks without end."""
    told = False
    for text in texts:
        done = 0
        for stretch in STRETCH.finditer(text):
            for offset in range(*stretch.span(), SLICE):
                for _, (start, end) in words.pre_tokenize_str(text[offset : min(offset + SLICE, stretch.end())]):
                    for cut in range(offset + start + LONGEST_WORD, offset + end, LONGEST_WORD):
                        yield text[done:cut]
                        done = cut
        if done and not told:
            notice(f"letters, digits or blanks stand in rows of more than {LONGEST_WORD}: the tokenizer learns from pieces of these rows")
            told = True
        yield text[done:]


def _finish(tokenizer: Tokenizer, *special: str) -> TextTokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (EOT, *special)])
    return TextTokenizer(tokenizer.to_str())


def train_bpe(texts: Iterable[str], vocab_size: int, normalizer: Normalizer | None = None) -> TextTokenizer:
    """Byte-level BPE (Sennrich et al. 2016) trained on `texts`; fewer tokens than asked for where the text gives no more merges."""
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=ALPHABET, show_progress=False)
    tokenizer = byte_level(models.BPE(), normalizer)
    interruptible(tokenizer.train_from_iterator, _with_short_words(texts, tokenizer.pre_tokenizer), trainer)
    return TextTokenizer(tokenizer.to_str())


def train_wordpiece(texts: Iterable[str], vocab_size: int, normalizer: Normalizer | None = None) -> TextTokenizer:
    """WordPiece (Schuster and Nakajima 2012, as BERT has it) over GPT-2's words, byte-level: each word is read as its longest known parts.

    Words of more than 100 bytes become `<|unk|>`. Each "#" of the text stands alone, so that "##" always marks a part inside a word.
    """
    special = [*SPECIAL, *(f"##{character}" for character in ALPHABET)]  # found in the text, the latter would get ids in random order
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=ALPHABET, show_progress=False)
    learner = byte_level(models.WordPiece(unk_token=UNKNOWN), normalizer)
    learner.pre_tokenizer = words = pre_tokenizers.Sequence([pre_tokenizers.Split("#", "isolated"), learner.pre_tokenizer])
    interruptible(learner.train_from_iterator, _with_short_words(texts, words), trainer)
    tokenizer = byte_level(models.WordPiece(learner.get_vocab(with_added_tokens=True), unk_token=UNKNOWN), normalizer)
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence([decoders.Replace("##", ""), tokenizer.decoder])
    return _finish(tokenizer, UNKNOWN, PADDING)


def train_word(texts: Iterable[str], vocab_size: int, normalizer: Normalizer | None = None) -> TextTokenizer:
    """The most frequent words of `texts`, as GPT-2's pattern cuts them (a word carries the space before it); others become `<|unk|>`."""
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer = byte_level(models.WordLevel(unk_token=UNKNOWN), normalizer)
    interruptible(tokenizer.train_from_iterator, texts, trainer)
    return TextTokenizer(tokenizer.to_str())


def byte_tokenizer(normalizer: Normalizer | None = None) -> TextTokenizer:
    """Each UTF-8 byte is its own id 0..255; `<|endoftext|>` is 256."""
    return _finish(byte_level(models.BPE(BYTE_OF, []), normalizer))


def char_tokenizer(texts: Iterable[str], normalizer: Normalizer | None = None) -> TextTokenizer:
    """Each character of `texts` is an id, others become `<|unk|>`; raises ValueError if they are too many for uint16.

    The characters come first and in their order, so that these are the ids of nanoGPT's shakespeare_char.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text if normalizer is None else normalizer.normalize_str(text))
    characters = sorted(found)
    vocab = {token: i for i, token in enumerate((*characters, *SPECIAL))}
    if len(vocab) > MAX_VOCAB_SIZE:
        raise ValueError(f"the text has {len(characters)} different characters, too many for uint16 token files; pass --tokenizer bpe")
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.normalizer = normalizer
    return _finish(tokenizer, UNKNOWN, PADDING)


TRAINED = {"bpe": train_bpe, "wordpiece": train_wordpiece, "word": train_word}  # kinds with a vocab_size


def text_normalizer(lowercase: bool, nfc: bool) -> Normalizer | None:
    """What is done to every text, at preparation and at prompts; it becomes part of the tokenizer file."""
    parts = [normalizers.Lowercase()] * lowercase + [normalizers.NFC()] * nfc  # in this order the result is in NFC
    return normalizers.Sequence(parts) if len(parts) > 1 else parts[0] if parts else None


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, lowercase: bool = False, nfc: bool = False) -> TextTokenizer:
    """The tokenizer of a kind (`KINDS`), trained deterministically on `texts` where the kind is trained, or read from a path.

    Raises ValueError for a vocab_size out of range, and for a file that doesn't normalize text as asked.
    """
    normalizer = text_normalizer(lowercase, nfc)
    if kind in TRAINED:
        if not SMALLEST[kind] <= vocab_size <= MAX_VOCAB_SIZE:
            needs = "all bytes and the special tokens" if kind != "word" else "the special tokens and a word"
            limits = f"between {SMALLEST[kind]} ({needs}) and {MAX_VOCAB_SIZE} (uint16 token files)"
            raise ValueError(f"vocab_size={vocab_size} must be {limits} for {kind}")
        tokenizer = TRAINED[kind](texts, vocab_size, normalizer)
        if tokenizer.vocab_size < vocab_size:
            notice(f"the text gives only {tokenizer.vocab_size} tokens of the {vocab_size} asked for")
        return tokenizer
    if kind == "char":
        return char_tokenizer(texts, normalizer)
    if kind == "byte":
        return byte_tokenizer(normalizer)
    if kind == "gpt2":
        return gpt2_tokenizer(normalizer)
    tokenizer = load_tokenizer(kind)
    for asked, name, flag in ((lowercase, "Lowercase", "--lowercase"), (nfc, "NFC", "--nfc")):
        if asked and name not in tokenizer.normalizers:
            advice = f"make a tokenizer with {flag}, or leave it out"
            raise ValueError(f"{kind} was made without {flag}, so prompts would stay as they are; {advice}")
    if tokenizer.left_out:
        such = f"characters that it doesn't know, such as {tokenizer.left_out[0]!r}"
        notice(f"warning: {kind} leaves out {such}; bpe and byte keep every text")
    elif tokenizer.loss_reason is not None:
        notice(f"warning: {kind}: {tokenizer.loss_reason}, so there will be no bits per byte; bpe and byte keep every text")
    return tokenizer
