"""generate.py as a user runs it, and the streams behind it."""

import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.streaming import TextStream
from preparation.tokenizer_kinds import byte_tokenizer, char_tokenizer, train_bpe
from tests.conftest import ROOT

BPE, BYTE = train_bpe(["one little two little three little frogs"], 280), byte_tokenizer()


def run(script, checkpoint, *args, **options):
    return script("generate.py", "--checkpoint", checkpoint, "--device", "cpu", *args, **options)


def test_the_line_of_the_readme(tmp_path, trained_run, script, program):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(trained_run / "best_model.pt", tmp_path / "checkpoints")
    arguments = ["--model_path", "best_model.pt", "--prompt", "Once upon a time", "--max_length", 100]
    process = program("generate.py", *arguments, cwd=tmp_path)
    assert process.stdout.startswith("Once upon a time")
    seed = re.search(r"seed (\d+)", process.stderr)[1]
    assert script("generate.py", *arguments, "--seed", seed, cwd=tmp_path).stdout == process.stdout


def test_generation_does_not_load_the_compiler_of_torch(trained_run):
    """It would take longer to load than the text to write."""
    arguments = ["--checkpoint", str(trained_run), "--prompt", "Once", "--max_new_tokens", "1", "--device", "cpu"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import generate; generate.main({arguments}); "
    assert subprocess.run([sys.executable, "-c", code + "sys.exit('torch._dynamo' in sys.modules)"]).returncode == 0


def test_seeds(trained_run, script):
    first = run(script, trained_run, "--prompt", "Once", "--seed", 3, "--num_samples", 3).stdout
    assert first == run(script, trained_run, "--prompt", "Once", "--seed", 3, "--num_samples", 3).stdout
    samples = first.split("--- ")[1:]
    assert len({sample.split("\n", 1)[1] for sample in samples}) == 3
    one = run(script, trained_run, "--prompt", "Once", "--seed", 3).stdout
    assert samples[0].split("\n", 1)[1] == one  # sample i depends on (seed, i) alone
    assert one != run(script, trained_run, "--prompt", "Once", "--seed", 4).stdout


def test_temperature_zero_is_greedy(trained_run, script):
    greedy = {run(script, trained_run, "--prompt", "Once", "--temperature", 0, "--seed", seed).stdout for seed in (1, 2)}
    assert greedy == {run(script, trained_run, "--prompt", "Once", "--top_k", 1, "--seed", 5).stdout}


def test_a_pipe_gives_one_prompt_a_line(trained_run, script):
    process = run(script, trained_run, "--max_new_tokens", 3, stdin="Once\nOne day\n")
    assert process.stdout.startswith("Once") and "\nOne day" in process.stdout


def test_a_prompt_longer_than_the_context_keeps_its_tail_and_says_so(trained_run, script):
    process = run(script, trained_run, "--prompt", "Once upon a time " * 40, "--max_new_tokens", 40)
    assert "only its last 32 tokens are read" in process.stderr and process.stdout.startswith("Once upon a time Once")


def test_a_literal_end_of_text_in_a_prompt_is_text(trained_run, script):
    assert run(script, trained_run, "--prompt", "a <|endoftext|> b", "--max_new_tokens", 3).stdout.startswith("a <|endoftext|> b")


def test_stop_texts(trained_run, script):
    text = run(script, trained_run, "--prompt", "Once", "--temperature", 0, "--max_new_tokens", 60).stdout
    stop = text[20:24]
    stopped = run(script, trained_run, "--prompt", "Once", "--temperature", 0, "--max_new_tokens", 60, "--stop", stop, "zzz").stdout
    assert stopped.rstrip("\n") == "Once" + text[4:].split(stop)[0].rstrip("\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_conversation_on_a_terminal(trained_run):
    import os
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(trained_run), "--max_new_tokens", "5", "--seed", "1"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    os.write(ours, b"Once upon\nOne\n\x04")
    stdout, stderr = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0 and "Ctrl-D" in stderr and stdout.count("> ") == 3
    assert "Once upon" in stdout and "One" in stdout


def pieces_of(tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stops)
    return [*map(stream.add, ids), stream.end()]


@pytest.mark.parametrize(
    "tokenizer", [BPE, BYTE, char_tokenizer(["abcé🙂 \n中文字あ가\u0301\u200d👩🚀ا\u0e33"])], ids=["bpe", "byte", "char"]
)
@given(text=st.text(alphabet="abcé🙂 \n中文字あ가\u0301\u200d👩🚀ا\u0e33", max_size=40))
@settings(max_examples=60, deadline=None)
def test_streams_give_whole_characters_and_the_whole_text(tokenizer, text):
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 255), max_size=20))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_text_come_out_as_the_decoder_says(ids):
    assert "".join(pieces_of(BYTE, ids)) == BYTE.decode(ids) == bytes(ids).decode(errors="replace")


@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=8),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_stopping_equals_cutting_the_whole_text(pieces, stops):
    whole = "".join(pieces)
    stream, got = TextStream(BPE, tuple(stops)), ""
    for piece in pieces:
        if not stream.stopped:
            got += stream.hold(piece)
    got += stream.end()
    assert stream.stopped == any(stop in whole for stop in stops)
    cuts = [whole.index(stop) for stop in stops if stop in whole]
    if not cuts:
        assert got == whole
    else:  # a piece may complete two stops at once; the text stops before one of those
        assert whole.startswith(got) and not any(stop in got for stop in stops)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top_p", "1.5"], "top_p=1.5"),
        (["--top_k", "0"], "top_k=0"),
        (["--max_new_tokens", "0"], "max_new_tokens=0"),
        (["--seed", "-3"], "seed=-3"),
        (["--checkpoint", "missing.pt"], "no checkpoint at missing.pt"),
    ],
)
def test_mistakes_are_one_sentence(mistake, tmp_path, arguments, part):
    assert part in mistake("generate.py", "--prompt", "x", *arguments, cwd=tmp_path)
