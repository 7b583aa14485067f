"""benchmark.py prepare: megabytes per second and memory of prepare_data.py, beside two usual ways to encode a text.

Each usual way runs as a process of its own, without torch: `python -m benchmarks.preparation "bare tiktoken loop" corpus.txt gpt2`.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from utils import notice

import numpy as np

from benchmarks.harness import our_script, peak_memory, print_matrix_rate, run, spread
from formats.data_directory import DTYPE
from formats.tokenizer import EOT
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

    def encode(row: dict) -> dict:
        ids = made.fast.exact.encode_ordinary(row["text"])
        ids.append(made.eot_id)
        return {"ids": ids, "len": len(ids)}

    started = time.perf_counter()
    encoded = rows.map(encode, remove_columns=["text"], num_proc=2, load_from_cache_file=False)
    out = np.memmap(Path(path).with_suffix(".peer.bin"), DTYPE, mode="w+", shape=(int(np.sum(encoded["len"], dtype=np.uint64)),))
    shards, at = min(1024, len(encoded)), 0
    for i in range(shards):
        ids = np.concatenate(encoded.shard(num_shards=shards, index=i, contiguous=True).with_format("numpy")["ids"])
        out[at : at + len(ids)] = ids
        at += len(ids)
    out.flush()
    return time.perf_counter() - started


PEERS = {"bare tiktoken loop": bare_loop, "datasets.map, 2 processes": map_way}
REPORTED = "prepare_data.py with report"


def ways_with(tokenizer: str, corpus: str = "corpus.txt") -> dict[str, list[str]]:
    """Each way to prepare a corpus with one tokenizer, and its command; the peers first."""
    peers = {name: [sys.executable, "-m", "benchmarks.preparation", name, corpus, tokenizer] for name in PEERS}
    values = {"input": corpus, "tokenizer": tokenizer, "output": "prepared"}
    ours = {"prepare_data.py": False, REPORTED: True}
    return peers | {name: our_script("prepare_data.py", values | {"report": report}) for name, report in ours.items()}


def write_corpus(texts: list[str], megabytes: int, path: Path) -> None:
    """A text file of that size: the texts again and again, each time with another number before them, so that no two are equal."""
    size = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(itertools.cycle(texts)):
            size += file.write(f"{number} {text}\n{EOT}\n")
            if size >= megabytes * 10**6:
                return


def measure(rounds: int, file: str | None, megabytes: int, large_megabytes: int | None, cwd: Path) -> None:
    """Prepare a corpus made of the file's documents, or of the sample corpus, in each way in turn; print medians and memory."""
    if file is not None:
        texts = [text for text in documents(file) if text.strip()]
    else:
        texts = [text for text, _ in sample_corpus.stories(sample_corpus.load_grammar(), 1337, "train", 10_000)]
    corpora = {"corpus.txt": megabytes} | ({"large.txt": large_megabytes} if large_megabytes else {})
    for corpus, n in corpora.items():
        write_corpus(texts, n, cwd / corpus)
    size = (cwd / "corpus.txt").stat().st_size / 1e6
    run(our_script("tokenizer_train.py", {"input": "corpus.txt", "train_bytes": 10**7, "output": "bpe.json"}), cwd)
    tokenizers = {"gpt2": "gpt2", "bpe of 4,096": "bpe.json"}
    try:
        gpt2_tokenizer()
    except ValueError as error:
        notice(f"without gpt2: {error}")
        del tokenizers["gpt2"]
    seconds = {name: {way: [] for way in ways_with(tokenizer)} for name, tokenizer in tokenizers.items()}
    for i in range(rounds):
        for name, tokenizer in tokenizers.items():
            for way, command in ways_with(tokenizer).items():
                done = run(command, cwd)
                seconds[name][way].append(float(done.output.split()[-1]) if way in PEERS else done.seconds)  # a peer prints its own
            notice(f"round {i + 1} of {rounds}, {name}: " + ", ".join(f"{way} {times[-1]:.2f} s" for way, times in seconds[name].items()))
    print_matrix_rate("cpu")
    print(f"{size:.0f} MB on {os.cpu_count()} cores; prepare_data.py is timed as a whole process")
    for name, ways in seconds.items():
        for way, times in ways.items():
            faster = {} if way in PEERS else {peer: [theirs / mine for theirs, mine in zip(ways[peer], times)] for peer in PEERS}
            ratios = "".join(f"; {spread(ratio)} x {peer.split(',')[0]}" for peer, ratio in faster.items())
            print(f"{name:13} {way:27} {spread([size / t for t in times])} MB/s{ratios}")
    for name, tokenizer in tokenizers.items():
        peaks = {n: peak_memory(ways_with(tokenizer, corpus)[REPORTED], cwd) / 1e6 for corpus, n in corpora.items()}
        memory = ", ".join(f"{n} MB of text {peak:.0f} MB" for n, peak in peaks.items())
        print(f"{name:13} peak memory of all processes: {memory}")


if __name__ == "__main__":
    print(PEERS[sys.argv[1]](sys.argv[2], sys.argv[3]))
