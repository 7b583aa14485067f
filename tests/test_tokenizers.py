"""Tokenizers: identical to tiktoken and tokenizers, lossless where they say so, never leaking the end-of-text id."""

import json

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import sample_corpus
from tokenizers_io import EOT, TextTokenizer, byte_tokenizer, char_tokenizer, gpt2_tokenizer, load_tokenizer, train_bpe

TEXTS = [text for text, _ in sample_corpus.stories(sample_corpus.load_grammar(), 0, "test", 60)]
BPE = train_bpe(TEXTS, 600)
BYTE = byte_tokenizer()
ODD = ["", " ", "\n\n  \t", "naïve café 北京 🙂", "a" * 300, "\x00\x01", EOT, f"a{EOT}b", "don't we'll I'VE", "\u200d\u0301 x", "\r\n"]


@pytest.mark.parametrize("tokenizer", [BPE, BYTE], ids=["bpe", "byte"])
@given(text=st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_byte_level_kinds_are_lossless_and_equal_tokenizers(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids
    assert ids == tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.loss_reason is None


@pytest.mark.parametrize("tokenizer", [BPE, BYTE], ids=["bpe", "byte"])
@pytest.mark.parametrize("text", ODD)
def test_odd_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.eot_id not in tokenizer.encode(text)


def test_the_twin_is_used_and_survives_what_tiktoken_does_not():
    assert BPE.twin is not None
    text = " " * 1_000_000 + "x"
    assert BPE.decode(BPE.encode(text)) == text


def test_no_twin_where_merge_order_and_ids_disagree():
    description = json.loads(BPE.json)
    vocab, merges = description["model"]["vocab"], description["model"]["merges"]
    first, last = ("".join(merges[i]) for i in (0, -1))
    vocab[first], vocab[last] = vocab[last], vocab[first]
    changed = TextTokenizer(json.dumps(description))
    assert changed.twin is None
    assert changed.encode(TEXTS[0]) == Tokenizer.from_str(changed.json).encode(TEXTS[0]).ids != BPE.encode(TEXTS[0])


def test_bpe_training_is_deterministic_and_tells_its_true_size():
    assert train_bpe(TEXTS, 600).json == BPE.json and BPE.vocab_size == 600
    assert train_bpe(["ab ab"], 5000).vocab_size < 300
    with pytest.raises(ValueError, match="vocab_size=100 "):
        train_bpe(TEXTS, 100)
    with pytest.raises(ValueError, match="70000"):
        train_bpe(TEXTS, 70_000)


def test_char_is_lossless_for_known_characters_only():
    tokenizer = char_tokenizer(["abc\nd é"])
    assert tokenizer.decode(tokenizer.encode("é a\nb")) == "é a\nb"
    assert tokenizer.unknown_id in tokenizer.encode("xyz") and len(tokenizer.encode(EOT)) == len(EOT)
    assert tokenizer.eot_id not in tokenizer.encode(EOT)


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


def test_transformers_reads_our_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    path.write_text(BPE.json, encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in TEXTS[:5] + ODD[:6]:
        assert theirs.encode(text) == BPE.encode(text)


def test_gpt2_equals_tiktoken_on_real_languages(real_data):
    ours, theirs = gpt2_tokenizer(), tiktoken.get_encoding("gpt2")
    assert (ours.vocab_size, ours.eot_id) == (50257, 50256) and ours.twin is not None
    texts = [path.read_text(encoding="utf-8") for path in sorted((real_data / "multilingual").glob("*.txt"))] + ODD
    for text in texts:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids and ours.decode(ids) == text
        assert ours.tokenizer.encode(text[:2000], add_special_tokens=False).ids == theirs.encode_ordinary(text[:2000])


def test_bpe_is_lossless_on_real_languages(real_data):
    for path in sorted((real_data / "multilingual").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        assert BPE.decode(BPE.encode(text)) == text


def test_gpt2_without_network_names_the_way_out(tmp_path, script):
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time.\n" * 50)
    offline = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    process = script("prepare_data.py", "--input", story, "--output", tmp_path / "data", code=2, **offline)
    assert "--tokenizer bpe" in process.stderr and not (tmp_path / "data").exists()
