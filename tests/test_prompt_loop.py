"""The conversation of generate.py --interactive: commands, mistakes that don't end it, and a real terminal."""

import contextlib
import math
import os
import re
import select
import subprocess
import sys
import time

import pytest
import torch

from formats.run_directory import load_model
from generation.sampling import Sampling
from generation.streaming import encode_prompt
from generation.token_view import PLAIN, on_background, probability_bars, surprise_view
from preparation.tokenizer_kinds import byte_tokenizer
from tests.conftest import ROOT

DEADLINE = 60  # seconds, for a machine that is stuck: no measure of speed
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def say(trained_run, script, tmp_path):
    """say(*lines) -> how a conversation with the tiny model ended, lines coming from a pipe."""

    def run(*lines: str, **options):
        flags = [word for name, value in ({"max_new_tokens": 12, "seed": 5} | options).items() for word in (f"--{name}", value)]
        arguments = ["--checkpoint", trained_run, "--interactive", "--device", "cpu", *flags]
        return script("generate.py", *arguments, cwd=tmp_path, stdin="".join(f"{line}\n" for line in lines))

    return run


def test_a_conversation_writes_what_one_prompt_after_the_other_does(say, script, trained_run):
    flags = ("--checkpoint", trained_run, "--device", "cpu", "--seed", 5, "--max_new_tokens", 12)
    assert say("Once", "One day").stdout == script("generate.py", *flags, stdin="Once\nOne day\n").stdout


def test_settings_last_and_are_undone(say):
    greedy = say("/temperature 0", "Once", "/retry").stdout.splitlines()
    assert greedy[0] == "temperature is 0.0" and len({*"\n".join(greedy[1:]).split("Once")}) == 2  # nothing, and twice the same
    assert say("/top_k 1", "Once").stdout.split("\n", 1)[1] == say("/temperature 0", "Once").stdout.split("\n", 1)[1]
    assert say("/temperature", "/stop a\\nb", "/stop none", "/max_new_tokens 3").stdout.splitlines() == [
        f"temperature is {Sampling.temperature}",
        "stop is ('a\\nb',)",
        "stop is ()",
        "max_new_tokens is 3",
    ]


def test_retry_undo_continue_and_seed(say):
    first, second = re.split("(?=Zyx)", say("Zyx", "/retry").stdout)[1:]
    assert first != second
    again = say("Zyx", "/seed 5", "/retry").stdout
    assert again == 2 * first
    texts = say("/max_new_tokens 4", "Zyx", "/continue 8", "/undo", "/undo", "/temperature 0").stdout
    assert "there is no text any more" in texts
    greedy = say("/temperature 0", "/max_new_tokens 4", "Zyx", "/continue 8").stdout
    assert greedy.endswith(say("/temperature 0", "Zyx").stdout.partition("\n")[2])  # 4 + 8 tokens are 12 tokens


def test_mistakes_are_sentences_and_the_conversation_goes_on(say, tmp_path):
    (tmp_path / "mine").write_text("mine")
    lines = ["/retry", "/nosuch", "/temperature hot", "/top_p 2", "/max_new_tokens 0", "/model nowhere", "/save", "/special x", "/continue"]
    process = say(*lines, "/surprise", "/undo", "Once", "/save mine", "/save text")
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(lines) + 3 and "Traceback" not in process.stderr
    assert "/help lists them" in errors[1] and "temperature='hot'" in errors[2] and "no checkpoint at nowhere" in errors[5]
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "text").read_text() == process.stdout.partition("written")[0]


def test_help_names_every_command_and_setting(say):
    words = say("/help").stdout
    for name in (
        "retry",
        "undo",
        "continue",
        "probs",
        "surprise",
        "save",
        "model",
        "seed",
        "quit",
        "temperature",
        "no_repeat_ngram",
        "stop",
    ):
        assert re.search(rf"^/{name} ", words, re.MULTILINE), name


def test_quit_ends_and_a_double_slash_begins_a_text(say):
    assert say("/quit", "Once").stdout == ""
    assert say("//help").stdout.startswith("/help")


def test_another_model_takes_the_texts_over(say, trained_run):
    process = say("Once", f"/model {trained_run}", "/undo", "/model", "One day")
    assert process.stdout.count("One day") == 1 and process.stderr.count("error") == 1


def test_surprise_is_the_models_probability(say, trained_run):
    text = "Once there was"
    out = say(f"/surprise {text}").stdout
    model, tokenizer, *_ = load_model(str(trained_run))
    ids = encode_prompt(tokenizer, text, model.config.block_size)
    with torch.inference_mode():
        log_probabilities = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    expected = [log_probabilities[i, token].item() for i, token in enumerate(ids[1:])]
    assert [float(found) for found in re.findall(r"\[([\d.e-]+)\]", out)] == [pytest.approx(math.exp(p), rel=0.02) for p in expected]
    bits = -sum(expected) / math.log(2)
    assert f"{len(ids) - 1} tokens, {bits:.1f} bits, {bits / len(text):.3f} bits/byte" in out
    bars = say(f"/probs {text}").stdout.splitlines()
    best = log_probabilities[-1].exp().max().item()
    assert len(bars) == 10 and bars[0].startswith(f"{best:6.1%} ")


def test_a_character_of_several_tokens_is_shown_whole():
    tokenizer, text = byte_tokenizer(), "é\n€"
    ids = tokenizer.encode(text)
    logits = torch.zeros(len(ids), tokenizer.vocab_size)
    shown = surprise_view(tokenizer, ids, logits, colours=False)
    p = 1 / tokenizer.vocab_size
    assert shown.startswith(f"é[{p**2:.2g}]\n[{p:.2g}]€[{p**3:.2g}]")
    coloured = surprise_view(tokenizer, ids, logits, colours=True)
    assert ANSI.sub("", coloured).startswith(text) and coloured.count("\x1b[38") == coloured.count(PLAIN)
    assert on_background("likely", 0.7) == "likely"
    assert "<|endoftext|>" in probability_bars(tokenizer, torch.arange(tokenizer.vocab_size).float())


class Terminal:
    """generate.py at a pseudo-terminal."""

    def __init__(self, arguments, cwd, **environment):
        import pty

        self.master, follower = pty.openpty()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment
        command = [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]
        streams = {"stdin": follower, "stdout": follower, "stderr": follower}
        self.process = subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **streams, preexec_fn=self.lead)
        os.close(follower)
        self.shown = ""

    @staticmethod
    def lead():
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches it

    def read(self, deadline: float) -> None:
        """What has appeared meanwhile. Nobody reading it, the program would wait."""
        if time.monotonic() > deadline:
            self.process.kill()
            pytest.fail(f"the program is stuck behind {self.shown!r}")
        with contextlib.suppress(OSError):  # it has ended
            if select.select([self.master], [], [], 0.1)[0]:
                self.shown += ANSI.sub("", os.read(self.master, 10000).decode(errors="replace"))

    def wait_for(self, words: str) -> None:
        """Read until these words have appeared, and forget all up to them."""
        deadline = time.monotonic() + DEADLINE
        while words not in self.shown:
            self.read(deadline)
        self.shown = self.shown.partition(words)[2]

    def end(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + DEADLINE
        while self.process.poll() is None:
            self.read(deadline)
        os.close(self.master)
        return self.process.returncode

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_real_terminal(trained_run, tmp_path):
    """Editing, Ctrl-C that stops a text and not the program, several lines, history of an earlier conversation."""
    arguments = ["--checkpoint", trained_run, "--device", "cpu", "--seed", 1, "--max_new_tokens", 5]
    terminal = Terminal(arguments, tmp_path, XDG_STATE_HOME=str(tmp_path))
    terminal.wait_for(">")
    terminal.type("Onc\x7fce upon\r")  # a backspace
    terminal.wait_for("of the context used")
    terminal.type("/max_new_tokens 1000000\r")
    terminal.wait_for("is 1000000")
    terminal.type("/repetition_penalty 1e6\r")  # no token twice, the EOT stands in front
    terminal.wait_for("penalty is 1000000")
    terminal.wait_for(">")  # typed earlier, a terminal makes other bytes of Enter
    terminal.type("One\x1b\rday\r")  # Alt-Enter
    terminal.wait_for("day")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.wait_for(">")
    terminal.type("/max_new_tokens 3\r")
    terminal.wait_for("is 3")
    terminal.type("/quit\r")
    assert terminal.end() == 0
    second = Terminal(arguments, tmp_path, XDG_STATE_HOME=str(tmp_path))
    second.wait_for(">")
    deadline = time.monotonic() + DEADLINE
    while "/max_new_tokens 3" not in second.shown:
        second.type("\x1b[A\x1b[A")  # up, up: what was typed before /quit; nothing as long as the history isn't read
        for _ in range(20):
            second.read(deadline)
    second.type("\r")
    second.wait_for("max_new_tokens is 3")
    second.wait_for(">")
    second.type("\x04")
    assert second.end() == 0
    assert "One\n+day" in (tmp_path / "small_language_models" / "prompts").read_text()
