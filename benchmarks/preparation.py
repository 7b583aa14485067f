"""benchmark.py prepare: megabytes per second and memory of prepare_data.py, beside two usual ways to encode a text.

Each usual way runs as a process of its own, `python -m benchmarks.preparation bare_loop corpus.txt gpt2`, which doesn't import torch.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils import notice

import numpy as np

from benchmarks.harness import our_script, peak_memory, print_matrix_rate, run, spread
from formats.data_directory import DTYPE
from formats.tokenizer import EOT, TextTokenizer
from preparation import sample_corpus
from preparation.sources import Format, TextFile
from preparation.tokenizer_kinds import gpt2_tokenizer, make_tokenizer


def documents(path: str | Path) -> Iterator[str]:
    return iter(TextFile(Path(path), Format(EOT)))


def bare_loop(path: str, tokenizer: str) -> float:
    """Seconds of encode_ordinary, document by document in one thread; reading, hashing and writing not counted."""
    texts, encoding = list(documents(path)), make_tokenizer(tokenizer, (), 0).fast.exact
    encoding.encode_ordinary(texts[0])
    started = time.perf_counter()
    for text in texts:
        encoding.encode_ordinary(text)
    return time.perf_counter() - started


def map_way(path: str, tokenizer: str) -> float:
    """Seconds of datasets.map in 2 processes and writing the ids shard by shard, as is usual; loading the texts not counted."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": list(documents(path))})
    made = make_tokenizer(tokenizer, (), 0)
    json, eot_id = made.json, made.eot_id
    state: dict = {}

    def encode(row: dict) -> dict:
        if "encoding" not in state:  # once in each process
            state["encoding"] = TextTokenizer(json).fast.exact
        ids = state["encoding"].encode_ordinary(row["text"])
        ids.append(eot_id)
        return {"ids": ids, "len": len(ids)}

    started = time.perf_counter()
    encoded = rows.map(encode, remove_columns=["text"], num_proc=2, load_from_cache_file=False)
    out = np.memmap(Path(path).with_suffix(".peer.bin"), DTYPE, mode="w+", shape=(int(np.sum(encoded["len"], dtype=np.uint64)),))
    shards, at = min(1024, len(encoded)), 0
    for i in range(shards):
        shard = encoded.shard(num_shards=shards, index=i, contiguous=True).with_format("numpy")
        ids = np.concatenate(shard["ids"])
        out[at : at + len(ids)] = ids
        at += len(ids)
    out.flush()
    return time.perf_counter() - started


PEERS = {"bare tiktoken loop": bare_loop, "datasets.map, 2 processes": map_way}


@dataclass
class Way:
    """A way to prepare corpus.txt, and the seconds of each of its runs, which a peer prints itself."""

    name: str
    command: list[str]
    is_peer: bool
    seconds: list[float] = field(default_factory=list)

    def run(self, cwd: Path) -> None:
        done = run(self.command, cwd)
        self.seconds.append(float(done.output.split()[-1]) if self.is_peer else done.seconds)


def prepare_command(corpus: str, tokenizer: str, report: bool) -> list[str]:
    return our_script("prepare_data.py", {"input": corpus, "tokenizer": tokenizer, "output": "prepared", "report": report})


def ways_with(tokenizer: str) -> list[Way]:
    """All ways to prepare the corpus with one tokenizer, the peers first."""
    command = [sys.executable, "-m", "benchmarks.preparation"]
    peers = [Way(name, [*command, function.__name__, "corpus.txt", tokenizer], True) for name, function in PEERS.items()]
    ours = {"prepare_data.py": False, "prepare_data.py with report": True}
    return peers + [Way(name, prepare_command("corpus.txt", tokenizer, report), False) for name, report in ours.items()]


def write_corpus(texts: list[str], megabytes: int, path: Path) -> None:
    """A text file of that size: the texts again and again, each time with another number before them, so that no two are equal."""
    size = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(itertools.cycle(texts)):
            size += file.write(f"{number} {text}\n{EOT}\n")
            if size >= megabytes * 10**6:
                return


def available_tokenizers(cwd: Path) -> dict[str, str]:
    """Name for people -> --tokenizer: a BPE trained on the corpus, and GPT-2's where its files can be had."""
    run(our_script("tokenizer_train.py", {"input": "corpus.txt", "train_bytes": 10**7, "output": "bpe.json"}), cwd)
    tokenizers = {"gpt2": "gpt2", "bpe of 4,096": "bpe.json"}
    try:
        gpt2_tokenizer()
    except ValueError as error:
        notice(f"without gpt2: {error}")
        del tokenizers["gpt2"]
    return tokenizers


def measure(rounds: int, file: str | None, megabytes: int, large_megabytes: int | None, cwd: Path) -> None:
    """Prepare a corpus made of the file's documents, or of the sample corpus, in each way in turn; print medians and memory."""
    if file is not None:
        texts = [text for text in documents(file) if text.strip()]
    else:
        texts = [text for text, _ in sample_corpus.stories(sample_corpus.load_grammar(), 1337, "train", 10_000)]
    write_corpus(texts, megabytes, cwd / "corpus.txt")
    size = (cwd / "corpus.txt").stat().st_size / 1e6
    tokenizers = available_tokenizers(cwd)
    ways = {name: ways_with(tokenizer) for name, tokenizer in tokenizers.items()}
    for i in range(rounds):
        for name in tokenizers:
            for way in ways[name]:
                way.run(cwd)
            times = ", ".join(f"{way.name} {way.seconds[-1]:.2f} s" for way in ways[name])
            notice(f"round {i + 1} of {rounds}, {name}: {times}")
    print_matrix_rate("cpu")
    print(f"{size:.0f} MB on {os.cpu_count()} cores; prepare_data.py is timed as a whole process")
    for name in tokenizers:
        for way in ways[name]:
            print(f"{name:13} {way.name:27} {spread([size / t for t in way.seconds])} MB/s{ratios(way, ways[name])}")
    corpora = {"corpus.txt": megabytes}
    if large_megabytes is not None:
        write_corpus(texts, large_megabytes, cwd / "large.txt")
        corpora["large.txt"] = large_megabytes
    for name, tokenizer in tokenizers.items():
        peaks = {n: peak_memory(prepare_command(corpus, tokenizer, True), cwd) / 1e6 for corpus, n in corpora.items()}
        memory = ", ".join(f"{n} MB of text {peak:.0f} MB" for n, peak in peaks.items())
        print(f"{name:13} peak memory of all processes: {memory}")


def ratios(way: Way, others: list[Way]) -> str:
    """How many times faster a way of ours is than each peer, as the end of its line."""
    peers = [] if way.is_peer else [other for other in others if other.is_peer]
    speeds = {peer.name.split(",")[0]: [theirs / mine for theirs, mine in zip(peer.seconds, way.seconds)] for peer in peers}
    return "".join(f"; {spread(speed)} x {name}" for name, speed in speeds.items())


if __name__ == "__main__":
    print({function.__name__: function for function in PEERS.values()}[sys.argv[1]](sys.argv[2], sys.argv[3]))
