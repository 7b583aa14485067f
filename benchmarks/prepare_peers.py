"""What benchmark.py sets against prepare_data.py: a bare loop of tiktoken, and the way of `datasets.map`. Doesn't import torch."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from formats.data_directory import DTYPE
from formats.tokenizer import EOT
from preparation.sources import Format, TextFile
from preparation.tokenizer_kinds import make_tokenizer


def write_corpus(texts: list[str], megabytes: int, path: Path) -> None:
    """A text file of that size: the texts again and again, each time with another number before them, so that no two are equal."""
    size = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(itertools.cycle(texts)):
            size += file.write(f"{number} {text}\n{EOT}\n")
            if size >= megabytes * 10**6:
                return


def documents(path: str) -> Iterator[str]:
    return iter(TextFile(Path(path), Format(EOT)))


def bare_loop(path: str, tokenizer: str) -> float:
    """Seconds of encode_ordinary, document by document in one thread; reading, hashing and writing not counted."""
    texts, encoding = list(documents(path)), make_tokenizer(tokenizer, (), 0).twin
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
            from formats.tokenizer import TextTokenizer

            state["encoding"] = TextTokenizer(json).twin
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


if __name__ == "__main__":
    print({"bare_loop": bare_loop, "map_way": map_way}[sys.argv[1]](sys.argv[2], sys.argv[3]))
