"""generate.py as a user runs it, and the streams behind it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import GPTConfig
from formats.run_directory import load_model
from formats.tokenizer import TextTokenizer, load_tokenizer
from generation.beams import beam_search
from generation.sampling import Sampling
from generation.streaming import TextStream, encode_prompt
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer
from models import GPT
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


def test_a_stop_text_across_tokens_is_not_printed(trained_run, script):
    arguments = ["--prompt", "Once", "--temperature", 0, "--max_new_tokens", 60, "--json"]
    whole = json.loads(run(script, trained_run, *arguments).stdout)
    tokenizer = load_tokenizer(trained_run)
    pieces = [tokenizer.decode([i]) for i in whole["tokens"]]
    stop = pieces[9][-1] + pieces[10][:1]  # the end of a token and the beginning of the next one
    found = json.loads(run(script, trained_run, *arguments, "--stop", stop).stdout)
    cut = whole["text"].index(stop)
    assert found["finish"] == "stop" and found["text"] == whole["text"][:cut] and whole["finish"] == "length"
    assert found["tokens"] == whole["tokens"][: len(found["tokens"])] and stop in tokenizer.decode(found["tokens"])


def test_special_tokens_in_prompts(trained_run, script, mistake, tmp_path):
    """As text they are read letter by letter; as ids, a document's end stands between two documents; an EOT in front isn't doubled."""
    tokenizer, eot = load_tokenizer(trained_run), "<|endoftext|>"
    one, two = tokenizer.encode("One day"), tokenizer.encode("Once")
    assert encode_prompt(tokenizer, f"One day{eot}Once", 99, "encode") == [tokenizer.eot_id, *one, tokenizer.eot_id, *two]
    assert encode_prompt(tokenizer, f"{eot}Once", 99, "encode") == encode_prompt(tokenizer, "Once", 99) == [tokenizer.eot_id, *two]
    as_text = encode_prompt(tokenizer, f"One day{eot}", 99)
    assert as_text.count(tokenizer.eot_id) == 1 and tokenizer.decode(as_text) == f"One day{eot}"
    assert encode_prompt(tokenizer, "", 99, "reject") == [tokenizer.eot_id]  # an empty prompt starts a document
    said = mistake("generate.py", "--checkpoint", trained_run, "--prompt", f"One{eot}", "--special", "reject", cwd=tmp_path)
    assert "the prompt holds the special token <|endoftext|>" in said
    texts = {run(script, trained_run, "--prompt", prompt, "--special", "encode", "--seed", 1).stdout for prompt in (f"{eot}Once", "Once")}
    assert {text.removeprefix(eot) for text in texts} == {max(texts, key=len).removeprefix(eot)}


def test_json_lines_tell_what_the_model_thought(trained_run, script):
    """Log-probabilities are the model's own, whatever the settings made of them."""
    arguments = ["--prompt", "Once", "--seed", 3, "--num_samples", 3, "--max_new_tokens", 25]
    settings = ["--temperature", 2, "--top_k", 5, "--repetition_penalty", 1.2]
    lines = run(script, trained_run, *arguments, *settings, "--json", "--top_logprobs", 2).stdout.splitlines()
    model, tokenizer, *_ = load_model(str(trained_run))
    for number, line in enumerate(map(json.loads, lines)):
        ids = encode_prompt(tokenizer, "Once", 32)
        with torch.inference_mode():
            logs = model(torch.tensor([ids + line["tokens"]]))[0][0, len(ids) - 1 :].log_softmax(-1)
        for token, its, top, expected in zip(line["tokens"], line["logprobs"], line["top_logprobs"], logs):
            assert its == pytest.approx(expected[token].item(), abs=1e-4)
            values, best = expected.topk(2)
            assert [pair["token"] for pair in top] == best.tolist() and top[0]["text"] == tokenizer.decode(best[:1].tolist())
            assert [pair["logprob"] for pair in top] == pytest.approx(values.tolist(), abs=1e-4)
        assert (line["prompt"], line["sample"], line["seed"]) == ("Once", number, 3) and line["seconds"] > 0
        assert line["finish"] == ("eot" if line["tokens"][-1] == tokenizer.eot_id else "length")
    texts = run(script, trained_run, *arguments, *settings).stdout  # one after the other, streamed
    assert [part.split("\n", 1)[1] for part in texts.split("--- ")[1:]] == [f"Once{json.loads(line)['text']}\n" for line in lines]


def test_the_best_of_several(trained_run, script):
    """The one whose tokens have the highest mean log-probability of those that --num_samples writes."""
    arguments = ["--prompt", "Once", "--seed", 3, "--max_new_tokens", 12, "--temperature", 1.5, "--json"]
    every = [*map(json.loads, run(script, trained_run, *arguments, "--num_samples", 6).stdout.splitlines())]
    means = [sum(line["logprobs"]) / len(line["tokens"]) for line in every]
    kept = [*map(json.loads, run(script, trained_run, *arguments, "--num_samples", 2, "--best_of", 6).stdout.splitlines())]
    order = sorted(range(6), key=means.__getitem__, reverse=True)[:2]
    assert [line["text"] for line in kept] == [every[i]["text"] for i in order] and [line["sample"] for line in kept] == order
    assert [line["score"] for line in kept] == pytest.approx([means[i] for i in order])


def test_beams_find_more_probable_texts_than_drawing(trained_run, script):
    arguments = ["--prompt", "Once", "--max_new_tokens", 12, "--json"]
    found = [*map(json.loads, run(script, trained_run, *arguments, "--beams", 4, "--num_samples", 2).stdout.splitlines())]
    greedy = json.loads(run(script, trained_run, *arguments, "--temperature", 0).stdout)
    assert found[0]["score"] > found[1]["score"] and found[0]["score"] == pytest.approx(sum(found[0]["logprobs"]) / len(found[0]["tokens"]))
    assert sum(found[0]["logprobs"]) >= sum(greedy["logprobs"]) - 1e-4
    printed = run(script, trained_run, *arguments[:-1], "--beams", 4, "--num_samples", 2)
    assert printed.stdout == f"--- 1 of 2\nOnce{found[0]['text']}\n--- 2 of 2\nOnce{found[1]['text']}\n" and "seed" not in printed.stderr


def test_a_draft_changes_no_text_and_its_share_is_told(trained_run, script):
    arguments = ["--prompt", "Once upon a time", "--seed", 2, "--max_new_tokens", 50]
    plain = run(script, trained_run, *arguments)
    for draft in ("ngram", trained_run):
        process = run(script, trained_run, *arguments, "--draft", draft)
        assert process.stdout == plain.stdout and re.search(r"\d+ of \d+ tokens that the draft guessed were right", process.stderr)
    line = json.loads(run(script, trained_run, *arguments, "--draft", trained_run, "--json").stdout)
    assert 0 < line["draft"]["accepted"] == line["draft"]["guessed"]


def test_a_full_context_is_told_once(trained_run, script):
    process = run(script, trained_run, "--max_new_tokens", 60, "--temperature", 0, stdin="Once\nOne\n")
    assert process.stderr.count("a text grew beyond the model's context of 32 tokens") == 1
    assert "grew" not in run(script, trained_run, "--max_new_tokens", 5, "--prompt", "Once").stderr


def test_options_without_effect_are_told(trained_run, script):
    for arguments, told in (
        (["--temperature", 0, "--top_k", 3], "top_k have no effect"),
        (["--beams", 2, "--top_p", 0.5], "beams don't draw: top_p have no effect"),
        (["--beams", 2, "--draft", "ngram"], "beams need no draft"),
        (["--length_penalty", 2.0], "length_penalty is an option of beams"),
    ):
        assert told in run(script, trained_run, "--prompt", "x", "--max_new_tokens", 2, *arguments).stderr


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_padding_unknown_and_missing_ids_are_never_written(arch):
    """By a model that prefers them to everything else, drawing, greedy or with beams; nor ids beyond the tokenizer's."""
    tokenizer = char_tokenizer(["abc"])
    hole = load_hole(tokenizer)
    assert hole.never_drawn == sorted({hole.unknown_id, hole.pad_id, 9}) and BPE.never_drawn == []
    model = GPT(GPTConfig(block_size=16, vocab_size=hole.vocab_size + 5, n_layer=1, n_head=1, n_embd=8, arch=arch)).eval()
    with torch.no_grad():
        model.wte.weight[[*hole.never_drawn, *range(hole.vocab_size, hole.vocab_size + 5)]] = 5.0
        model.wte.weight[:, 0] += 1.0
    for sampling in (Sampling(1.0), Sampling(0.0), Sampling(3.0, top_k=2)):
        writer = Writer(TorchEngine(model), hole, sampling)
        rows = [Row([0], 20, seed) for seed in range(10)]
        [*writer.write(rows)]
        rows += [row for _, row in beam_search(writer, Row([0], 6), 3, 1.0)]
        written = {i for row in rows for i in row.drawn}
        assert written and not written & {*hole.never_drawn} and max(written) < hole.vocab_size


def load_hole(tokenizer: TextTokenizer) -> TextTokenizer:
    """A tokenizer with one token more, whose id leaves a hole at 9."""
    content = json.loads(tokenizer.json)
    assert tokenizer.vocab_size <= 9
    content["model"]["vocab"] |= {chr(200 + i): i for i in range(tokenizer.vocab_size, 11) if i != 9}
    return TextTokenizer(json.dumps(content))


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
        (["--repetition_penalty", "0"], "repetition_penalty=0.0"),
        (["--no_repeat_ngram", "0"], "no_repeat_ngram=0"),
        (["--beams", "2", "--best_of", "2"], "two ways to choose"),
        (["--beams", "2", "--num_samples", "3"], "num_samples=3 texts can't be kept of beams=2"),
        (["--best_of", "2", "--temperature", "0"], "raise temperature"),
        (["--top_logprobs", "3"], "add --json"),
        (["--output", "x.jsonl"], "output is for the texts of prompt_file"),
        (["--prompt_file", "p.txt"], "prompt_file takes the place of prompt"),
        (["--special", "drop"], "special"),
        (["--draft_tokens", "0"], "draft_tokens=0"),
        (["--draft_tokens", "3"], "add --draft"),
        (["--checkpoint", "missing.pt"], "no checkpoint at missing.pt"),
    ],
)
def test_mistakes_are_one_sentence(mistake, tmp_path, arguments, part):
    assert part in mistake("generate.py", "--prompt", "x", *arguments, cwd=tmp_path)
