"""Tokenizers: identical to tiktoken and tokenizers, lossless where they say so, never leaking the end-of-text id."""

import json
import pickle
import random
import re
import sys
import unicodedata

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from formats import tokenizer as tokenizer_module
from formats.fast_encoding import has_few_blanks
from formats.tokenizer import EOT, KINDS, TextTokenizer, gpt2_tokenizer, load_tokenizer
from preparation import sample_corpus
from preparation.tokenizer_kinds import byte_tokenizer, char_tokenizer, make_tokenizer, train_bpe
from tests.conftest import ROOT
from tests.runs import write_stories

TEXTS = [text for text, _ in sample_corpus.stories(sample_corpus.load_grammar(), 0, "test", 60)]
BPE = train_bpe(TEXTS, 600)
BYTE = byte_tokenizer()
TRAINED = {kind: make_tokenizer(kind, TEXTS, 600) for kind in KINDS if kind != "gpt2"}
LOWER = {kind: make_tokenizer(kind, TEXTS, 600, lowercase=True, nfc=True) for kind in KINDS if kind != "gpt2"}
BLANKS = st.text(st.sampled_from(" \n\t\r\u00a0\u3000\u2003\x1c\x85a1!'"), max_size=40)
ODD = ["", " ", "\n\n  \t", "naïve café 北京 🙂", "a" * 300, "\x00\x01", EOT, f"a{EOT}b", "don't we'll I'VE", "\u200d\u0301 x", "\r\n"]
ODD += ["## Title ### a##b #", "<|unk|><|pad|>", "\u1e9b\u0323 ſ İ ΑΣ Å"]


@pytest.mark.parametrize("tokenizer", [BPE, BYTE], ids=["bpe", "byte"])
@given(text=st.text(max_size=200) | BLANKS)
@settings(max_examples=300, deadline=None)
def test_byte_level_kinds_are_lossless_and_equal_tokenizers(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids
    assert ids == tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.loss_reason is None


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("text", ODD)
def test_odd_texts(kind, text):
    tokenizer = TRAINED[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.eot_id not in ids and tokenizer.pad_id not in ids
    if tokenizer.unknown_id is None or tokenizer.unknown_id not in ids:
        assert tokenizer.decode(ids) == text
    assert tokenizer.unknown_id is None or kind in ("word", "char", "wordpiece")


def test_runs_of_blanks_are_cut_as_tokenizers_cuts_them():
    """With a vocabulary that has tokens for such runs; most texts take the quick pattern, those with long runs the exact one."""
    tokenizer = train_bpe(["".join(random.Random(i).choices(" \n\t\u00a0\u3000\x1c\x85a1!'", k=60)) for i in range(400)], 800)
    seen = set()

    @given(texts=st.lists(BLANKS, min_size=1, max_size=4))
    @settings(max_examples=500, deadline=None)
    def check(texts):
        seen.update(map(has_few_blanks, texts))
        expected = [[*tokenizer.tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.eot_id] for text in texts]
        assert [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts] == expected
        ids, sizes = tokenizer.encode_documents(texts)
        assert ids.tolist() == [i for part in expected for i in part] and sizes.tolist() == [len(part) for part in expected]

    check()
    assert seen == {True, False} and any(len(token) > 2 for token in tokenizer.fast.exact._mergeable_ranks if not token.strip())


@pytest.mark.parametrize("kind", TRAINED)
@given(texts=st.lists(st.text(max_size=60) | BLANKS | st.sampled_from(ODD + TEXTS), max_size=6), piece=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_documents_at_once_and_in_pieces_have_the_ids_of_one_by_one(kind, texts, piece):
    tokenizer, before = TRAINED[kind], tokenizer_module.PIECE
    expected = [[*tokenizer.tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.eot_id] for text in texts]
    try:
        for tokenizer_module.PIECE in (before, piece):
            ids, counts = tokenizer.encode_documents(texts)
            assert ids.dtype == np.uint16 and counts.tolist() == [len(part) for part in expected]
            assert ids.tolist() == [i for part in expected for i in part]
            assert [tokenizer.encode(text) for text in texts] == [part[:-1] for part in expected]
    finally:
        tokenizer_module.PIECE = before


@pytest.mark.parametrize("kind", LOWER)
@given(text=st.one_of(st.text(max_size=100), st.sampled_from(ODD + TEXTS)))
@settings(max_examples=60, deadline=None)
def test_normalization_is_the_tokenizer_files_own(kind, text):
    tokenizer = LOWER[kind]
    normal = tokenizer.normalize(text)
    assert normal == tokenizer.normalize(normal) == tokenizer.tokenizer.normalizer.normalize_str(text)
    assert tokenizer.encode(text) == tokenizer.encode(normal) == tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    if text.isascii():
        assert normal == unicodedata.normalize("NFC", text.lower())
    if tokenizer.description.byte_level:
        assert tokenizer.decode(tokenizer.encode(text)) == normal
    assert "changes text" in tokenizer.loss_reason


@pytest.mark.parametrize("tokenizer", [BPE, BYTE], ids=["bpe", "byte"])
@given(ids=st.lists(st.integers(0, 256), max_size=40))
@settings(max_examples=100, deadline=None)
def test_decoding_ids_that_spell_no_text_is_as_tokenizers_does(tokenizer, ids):
    assert tokenizer.decode(ids) == tokenizer.tokenizer.decode(ids, skip_special_tokens=True)


def test_normalizing_keeps_the_fast_encoding_and_nfc_loses_nothing():
    assert LOWER["bpe"].fast is not None
    nfc = make_tokenizer("bpe", TEXTS, 600, nfc=True)
    assert nfc.loss_reason is None and nfc.encode("e\u0301") == nfc.encode("é") and nfc.decode(nfc.encode("e\u0301")) == "é"


def test_a_given_file_must_normalize_as_asked(tmp_path):
    (tmp_path / "tokenizer.json").write_text(BPE.json, encoding="utf-8")
    with pytest.raises(ValueError, match="was made without --lowercase"):
        make_tokenizer(str(tmp_path), (), 0, lowercase=True)


def test_tiktoken_is_used_and_survives_what_it_does_not(monkeypatch):
    assert BPE.fast is not None
    text = " " * 1_000_000 + "x"
    assert BPE.decode(BPE.encode(text)) == text
    monkeypatch.setattr(tokenizer_module, "PIECE", 2**21)
    ids, counts = BPE.encode_documents([text, "y"])
    assert counts.tolist() == [len(BPE.encode(text)) + 1, 2] and BPE.decode(ids.tolist()) == text + "y"


def test_no_fast_encoding_for_a_vocabulary_with_more_than_bytes():
    description = json.loads(BPE.json)
    description["model"]["vocab"]["北 "] = BPE.vocab_size
    changed = TextTokenizer(json.dumps(description))
    assert changed.fast is None and changed.encode(TEXTS[0]) == BPE.encode(TEXTS[0])
    ids = [5, BPE.vocab_size, 6]
    assert changed.decode(ids) == changed.tokenizer.decode(ids)


def test_no_fast_encoding_where_merge_order_and_ids_disagree():
    description = json.loads(BPE.json)
    vocab, merges = description["model"]["vocab"], description["model"]["merges"]
    first, last = ("".join(merges[i]) for i in (0, -1))
    vocab[first], vocab[last] = vocab[last], vocab[first]
    changed = TextTokenizer(json.dumps(description))
    assert changed.fast is None
    assert changed.encode(TEXTS[0]) == Tokenizer.from_str(changed.json).encode(TEXTS[0]).ids != BPE.encode(TEXTS[0])


def test_a_tokenizer_can_be_sent_to_a_process_that_was_not_forked():
    sent = pickle.loads(pickle.dumps(LOWER["bpe"]))
    assert sent.json == LOWER["bpe"].json and sent.encode(TEXTS[0]) == LOWER["bpe"].encode(TEXTS[0])


def test_bpe_tells_its_true_size():
    assert BPE.vocab_size == 600 and train_bpe(["ab ab"], 5000).vocab_size < 300


@pytest.mark.parametrize("kind", TRAINED)
def test_training_is_deterministic(kind, tmp_path):
    """Also in another process, whose hash tables are seeded anew."""
    import subprocess

    assert make_tokenizer(kind, TEXTS, 600).json == TRAINED[kind].json
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    code = f"import sys, json; sys.path.insert(0, {str(ROOT)!r}); from preparation.tokenizer_kinds import make_tokenizer; "
    code += f"print(make_tokenizer({kind!r}, json.load(open('texts.json')), 600).sha256)"
    other = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert other == TRAINED[kind].sha256


@pytest.mark.parametrize(("kind", "size"), [("bpe", 100), ("bpe", 70_000), ("wordpiece", 300), ("word", 3)])
def test_a_vocabulary_that_cannot_be(kind, size):
    with pytest.raises(ValueError, match=f"vocab_size={size} "):
        make_tokenizer(kind, TEXTS, size)


def test_char_is_lossless_for_known_characters_only():
    tokenizer = char_tokenizer(["abc\nd é"])
    assert tokenizer.decode(tokenizer.encode("é a\nb")) == "é a\nb"
    assert tokenizer.unknown_id in tokenizer.encode("xyz") and len(tokenizer.encode(EOT)) == len(EOT)
    assert tokenizer.eot_id not in tokenizer.encode(EOT)


def test_char_ids_are_those_of_nanogpt():
    """The places of the characters in the sorted text."""
    tokenizer = make_tokenizer("char", TEXTS, 0)
    characters = sorted(set("".join(TEXTS)))
    assert [tokenizer.encode(text) for text in TEXTS] == [[characters.index(c) for c in text] for text in TEXTS]
    assert tokenizer.eot_id >= len(characters)


def test_whole_words_from_whose_text_the_decoder_takes_signs_are_not_lossless():
    """The decoder of word parts, which takes ## away, behind a model of whole words, which never puts it there."""
    content = json.loads(TRAINED["wordpiece"].json)
    assert TRAINED["wordpiece"].loss_reason is None
    content["model"] = {"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": content["model"]["unk_token"]}
    assert "does not give back" in TextTokenizer(json.dumps(content)).loss_reason


def test_an_interruption_of_tiktoken_is_no_panic_of_its_own(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        BPE.encode("a text")


@pytest.mark.parametrize("kind", ["word", "wordpiece"])
def test_words_and_word_parts_give_known_text_back_exactly(kind):
    tokenizer = make_tokenizer(kind, TEXTS, 4000)
    assert tokenizer.loss_reason is None
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.unknown_id not in ids and tokenizer.decode(ids) == text
    assert (tokenizer.unknown_id in tokenizer.encode("xylophon")) == (kind == "word")
    assert tokenizer.unknown_id in tokenizer.encode("x" * 200)  # WordPiece reads no word of over 100 bytes


def test_padding_and_truncation():
    ids, mask = TRAINED["word"].encode_padded([TEXTS[0], "", TEXTS[1]], max_length=20)
    assert ids.shape == mask.shape == (3, 20) and mask.sum(1).tolist() == [20, 0, 20]
    assert ids[0].tolist() == TRAINED["word"].encode(TEXTS[0])[:20] and set(ids[1].tolist()) == {TRAINED["word"].pad_id}
    ids, mask = BPE.encode_padded(["a", "abc abc"])
    assert BPE.pad_id == BPE.eot_id and ids[0][~mask[0]].tolist() == [BPE.eot_id] * (len(BPE.encode("abc abc")) - 1)


def test_byte_ids_are_the_bytes():
    assert BYTE.encode("aé\n") == list("aé\n".encode()) and BYTE.eot_id == 256 and BYTE.vocab_size == 257


def test_loading(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(BPE.json, encoding="utf-8")
    assert load_tokenizer(path).sha256 == load_tokenizer(tmp_path).sha256 == BPE.sha256
    for content, part in (
        ("{}", "no Hugging Face tokenizer"),
        (BPE.json.replace(EOT, "<|x|>"), "has no <|endoftext|>"),
        ("\x00", "no Hugging Face"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=part.replace("|", r"\|")):
            load_tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        load_tokenizer(path)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing.json")


@pytest.mark.parametrize("kind", TRAINED)
def test_transformers_and_tokenizers_read_our_files(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    path.write_text(LOWER[kind].json, encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    plain = Tokenizer.from_file(str(path))
    for text in TEXTS[:5] + ODD[:6]:
        assert theirs.encode(text) == LOWER[kind].encode(text) == (plain.encode(text).ids if EOT not in text else LOWER[kind].encode(text))
    text = TEXTS[0].lower()
    if LOWER[kind].unknown_id not in LOWER[kind].encode(text):
        assert theirs.decode(theirs.encode(text), clean_up_tokenization_spaces=False) == text


def test_gpt2_equals_tiktoken_on_real_languages(real_data):
    ours, theirs = gpt2_tokenizer(), tiktoken.get_encoding("gpt2")
    assert (ours.vocab_size, ours.eot_id) == (50257, 50256) and ours.fast is not None
    texts = [path.read_text(encoding="utf-8") for path in sorted((real_data / "multilingual").glob("*.txt"))] + ODD
    for text in texts:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids and ours.decode(ids) == text
        assert ours.encode(" ".join(text.split())) == theirs.encode_ordinary(" ".join(text.split()))  # no runs of blanks: another pattern
        assert ours.tokenizer.encode(text[:2000], add_special_tokens=False).ids == theirs.encode_ordinary(text[:2000])
    ids, counts = ours.encode_documents(texts)
    assert ids.tolist() == [i for text in texts for i in (*theirs.encode_ordinary(text), 50256)] and len(counts) == len(texts)


def test_hugging_faces_own_file_of_gpt2_has_the_same_ids(real_data):
    """It writes "" where ours leaves a prefix or suffix unset, keeps the EOT in the vocabulary, and pairs as texts, without a type."""
    ours = gpt2_tokenizer()
    description = json.loads(ours.json)
    model = {name: value for name, value in description["model"].items() if name in ("dropout", "unk_token", "fuse_unk")}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model |= {"vocab": description["model"]["vocab"] | {EOT: 50256}, "merges": [" ".join(pair) for pair in description["model"]["merges"]]}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    theirs = TextTokenizer(json.dumps(description | {"model": model, "pre_tokenizer": byte_level, "post_processor": byte_level}))
    assert theirs.sha256 != ours.sha256 and theirs.same_ids(ours) and ours.same_ids(theirs) and theirs.fast is not None
    assert theirs.encode(TEXTS[0] + " naïve 🙂") == ours.encode(TEXTS[0] + " naïve 🙂")
    changed = json.dumps(description | {"model": description["model"] | {"end_of_word_suffix": "</w>"}})
    assert not TextTokenizer(changed).same_ids(ours) and not BPE.same_ids(ours)


def test_every_kind_on_real_languages(real_data, monkeypatch):
    """48 languages: byte-level kinds give everything back, others what they know; cut into pieces the ids stay the same."""
    for path in sorted((real_data / "multilingual").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        for tokenizer in TRAINED.values():
            ids = tokenizer.encode(text)
            if tokenizer.unknown_id not in ids:
                assert tokenizer.decode(ids) == text
            with monkeypatch.context() as patch:
                patch.setattr(tokenizer_module, "PIECE", 1000)
                assert tokenizer.encode(text) == ids
        assert TRAINED["bpe"].unknown_id is TRAINED["byte"].unknown_id is None


def test_gpt2_without_network_names_the_way_out(tmp_path, program):
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time.\n" * 50)
    offline = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    process = program("prepare_data.py", "--input", story, "--output", tmp_path / "data", code=2, **offline)
    assert "--tokenizer bpe" in process.stderr and not (tmp_path / "data").exists()


def test_training_tells_how_good_a_tokenizer_is_and_shows_it(tmp_path, script, program):
    write_stories(tmp_path / "s.txt", TEXTS * 3)  # 60 different ones
    offline = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    flags = ["--input", "s.txt", "--kind", "word", "--vocab_size", 300, "--lowercase", "--output", "t.json"]
    process = program("tokenizer_train.py", *flags, cwd=tmp_path, **offline)
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.vocab_size == 300 and tokenizer.normalizers == ("Lowercase",)
    assert re.search(r"\d\.\d\d bytes/token on [\d,]+ characters of held-out text; GPT-2's can't be had", process.stdout)
    assert "longest tokens: ' " in process.stdout and "of 297 tokens don't occur" in process.stdout
    assert "of the held-out tokens are unknown" in process.stderr
    text = "Once upon a time, ONCE Ünknown"
    lines = script("tokenizer_train.py", "--show", text, "--tokenizer", "t.json", cwd=tmp_path).stdout.splitlines()
    assert [int(line.split()[0]) for line in lines[1:-1]] == tokenizer.encode(text)
    assert lines[1].endswith("'once'") and "' upon'" in lines[2] and "<|unk|>" in lines[-2]
    assert lines[-1].startswith(f"{len(lines) - 2} tokens, {len(text.encode())} bytes; decoded, which differs: once upon a time, once")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--show", "text"], "belong together"),
        (["--show", "text", "--tokenizer", "nothing.json"], "no tokenizer at nothing.json"),
        ([], "give either --input"),
        (["--input", "blank.txt"], "holds no text"),
        (["--input", "s.txt", "--kind", "wordpiece", "--vocab_size", "400"], "vocab_size=400 must be between 515"),
        (["--input", "s.txt", "--kind", "gpt2"], "gpt2"),
    ],
)
def test_mistakes_in_training(tmp_path, mistake, flags, part):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "s.txt").write_text("a text")
    assert part in mistake("tokenizer_train.py", *flags, cwd=tmp_path) and not (tmp_path / "tokenizer.json").exists()
