"""--prompt_file and --output: order, settings of single lines, broken lines, and work that is continued."""

import json
from pathlib import Path

import pytest

import generate
from generation import prompt_file
from generation.session import Session
from generation.settings import Settings

PROMPTS = ["Once upon a time", "", "One day, Lily", "Once", "The dog and the cat were", "He"]
FLAGS = ["--max_new_tokens", 9, "--device", "cpu"]
CLOCK = {"seconds", "tokens_per_second"}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    return tmp_path


def texts(output: str) -> list[dict]:
    """The lines without what the clock says, and without the last digits, which depend on who is computed beside."""
    lines = [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in output.splitlines()]
    return [line | {"logprobs": [round(value, 3) for value in line["logprobs"]]} for line in lines]


def test_texts_are_those_of_a_pipe_whatever_stands_beside_them(folder, trained_run, script):
    flags = ["--checkpoint", trained_run, *FLAGS, "--seed", 5, "--num_samples", 2]
    piped = script("generate.py", *flags, stdin="\n".join(PROMPTS) + "\n").stdout
    for batch_size in (1, 5, 100):
        assert script("generate.py", *flags, "--prompt_file", folder / "p.txt", "--batch_size", batch_size).stdout == piped


def test_lines_with_settings_of_their_own(folder, trained_run, script):
    lines = [
        {"prompt": "Once", "temperature": 0.0, "max_new_tokens": 4},
        {"prompt": "One day", "num_samples": 2, "seed": 7, "stop": ["zzz"]},
        {"prompt": "", "beams": 3, "num_samples": 2, "length_penalty": 0.5},
        {"prompt": "He\nsaid", "best_of": 3, "top_k": 4},
    ]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--checkpoint", trained_run, *FLAGS, "--seed", 1, "--json"]
    found = texts(script("generate.py", *flags, "--prompt_file", folder / "p.jsonl").stdout)
    assert [line["prompt"] for line in found] == ["Once", "One day", "One day", "", "", "He\nsaid"]
    assert [line["seed"] for line in found] == [1, 7, 7, 1, 1, 1] and len(found[0]["tokens"]) == 4
    alone = texts(script("generate.py", *flags, "--prompt", "Once", "--temperature", 0).stdout)
    assert found[0] | {"tokens": []} == alone[0] | {"tokens": [], "text": found[0]["text"], "logprobs": alone[0]["logprobs"][:4]}
    assert ["score" in line for line in found] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "no JSON"),
        ('["Once"]', "must be an object"),
        ("{}", "has no 'prompt'"),
        ('{"prompt": 3}', "prompt=3"),
        ('{"prompt": "x", "temprature": 1}', "temprature is unknown here"),
        ('{"prompt": "x", "temperature": -1}', "temperature=-1"),
        ('{"prompt": "x", "top_k": "5"}', "top_k='5'"),
        ('{"prompt": "x", "beams": 2, "num_samples": 3}', "can't be kept of beams=2"),
        ("", "no JSON"),
        ('{"prompt": "\xff"}', "UTF-8"),
    ],
)
def test_a_broken_line_is_named_before_anything_is_written(mistake, folder, trained_run, line, part):
    (folder / "p.jsonl").write_bytes(b'{"prompt": "Once"}\n' + line.encode("latin-1") + b'\n{"prompt": ""}\n')
    said = mistake("generate.py", "--checkpoint", trained_run, "--prompt_file", "p.jsonl", "--output", "o.jsonl", cwd=folder)
    assert said.splitlines()[-1].startswith("error: line 2 of p.jsonl") and part in said and not (folder / "o.jsonl").exists()


def test_files_that_are_no_prompts(mistake, folder, trained_run):
    (folder / "empty.txt").write_text("")
    assert "empty.txt holds no prompts" in mistake("generate.py", "--checkpoint", trained_run, "--prompt_file", "empty.txt", cwd=folder)
    assert "nowhere.txt" in mistake("generate.py", "--checkpoint", trained_run, "--prompt_file", "nowhere.txt", cwd=folder)
    (folder / "p.jsonl").write_text('{"prompt": "a <|endoftext|>"}')
    flags = ["--prompt_file", "p.jsonl", "--special", "reject"]
    assert "special token" in mistake("generate.py", "--checkpoint", trained_run, *flags, cwd=folder)


def test_work_is_continued_wherever_it_was_killed(folder, trained_run, script, monkeypatch):
    """What is whole stays as it is, byte for byte; the rest is what one run would have written."""
    flags = ["--checkpoint", trained_run, *FLAGS, "--num_samples", 2, "--prompt_file", folder / "p.txt", "--output", folder / "o.jsonl"]
    script("generate.py", *flags)
    whole = (folder / "o.jsonl").read_bytes()
    assert [line["prompt"] for line in texts(whole.decode())] == [prompt for prompt in PROMPTS for _ in range(2)]
    begun = []
    monkeypatch.setattr(Session, "begin", lambda self, task, number, real=Session.begin: begun.append(task) or real(self, task, number))
    script("generate.py", *flags, "--batch_size", 3)
    assert (folder / "o.jsonl").read_bytes() == whole and not begun
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    for cut in (1, 30, ends[0], ends[4] + 3, ends[7] + 1, len(whole) - 1):
        (folder / "o.jsonl").write_bytes(whole[:cut])
        script("generate.py", *flags, "--batch_size", 3)
        after = (folder / "o.jsonl").read_bytes()
        kept = whole[:cut].rpartition(b"\n")[0]
        assert after.startswith(kept) and texts(after.decode()) == texts(whole.decode())


def test_an_interruption_keeps_what_is_whole(folder, trained_run, script, monkeypatch):
    flags = ["--checkpoint", trained_run, *FLAGS, "--prompt_file", folder / "p.txt", "--output", folder / "o.jsonl", "--batch_size", 1]
    add, done = prompt_file.OutputFile.add, []

    def stopped(self, session, written):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(written[0].task.prompt)
        add(self, session, written)

    with monkeypatch.context() as patch:
        patch.setattr(prompt_file.OutputFile, "add", stopped)
        script("generate.py", *flags, code=130)
    lines = (folder / "o.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == done and len(done) == 3
    script("generate.py", *flags)
    after = (folder / "o.jsonl").read_text().splitlines()
    assert set(lines) <= set(after) and [json.loads(line)["prompt"] for line in after] == PROMPTS


def test_what_belongs_to_something_else_is_refused(folder, trained_run, script, mistake):
    flags = ["--checkpoint", trained_run, *FLAGS, "--prompt_file", "p.txt"]
    script("generate.py", *flags, "--output", "o.jsonl", cwd=folder)
    before = (folder / "o.jsonl").read_bytes()
    for change in (["--seed", 9], ["--temperature", 0.5], ["--top_logprobs", 1], ["--special", "encode"]):
        assert "holds something else: line 1" in mistake("generate.py", *flags, "--output", "o.jsonl", *change, cwd=folder)
    (folder / "p.txt").write_text("Once\n")
    assert "holds something else" in mistake("generate.py", *flags, "--output", "o.jsonl", cwd=folder)
    (folder / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    for content in (b"my notes", b"my notes\n", b'{"key": 3}\n', before.splitlines()[0][:90] + b"\n"):
        (folder / "x.jsonl").write_bytes(content)
        said = mistake("generate.py", *flags, "--output", "x.jsonl", cwd=folder)
        assert "x.jsonl" in said and (folder / "x.jsonl").read_bytes() == content
    assert "this command reads it" in mistake("generate.py", *flags, "--output", "p.txt", cwd=folder)
    assert (folder / "o.jsonl").read_bytes() == before


def test_settings_of_lines_are_those_of_the_flags():
    """Whatever can be asked for all prompts can be asked for one."""
    assert prompt_file.PromptLine.__annotations__.keys() == {"prompt"} | Settings.__dataclass_fields__.keys()
    assert generate.Arguments().settings == Settings()
