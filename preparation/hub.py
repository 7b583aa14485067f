"""Where documents come from: datasets of the Hugging Face hub, or in its format, streamed. Doesn't import torch."""

import hashlib
import itertools
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils import describe

from preparation.sources import COMPRESSED, FILE_KINDS, Format, Source, likely_meant

HUB_SECONDS = 6  # how long the hub may take to answer


class HubSplit(Source):
    """One split of a `datasets` dataset, streamed. rows: its rows, a mapping of columns each."""

    streamed = True

    def __init__(self, name: str, split: str, rows: Iterable[dict], form: Format):
        super().__init__(f"{name}:{split}", form)
        self.rows = rows
        self.read: dict = {}  # bytes and sha256 of the text, once the whole split was read

    def __iter__(self) -> Iterator[str]:
        digest, size, rows = hashlib.sha256(), 0, iter(self.rows)
        for number in itertools.count(1):
            try:
                row = next(rows, None)
            except Exception as error:  # datasets passes on the errors of many libraries, which name neither dataset nor row
                reason = f"{type(error).__name__}: {describe(error)[:200]}"
                raise ValueError(f"{self.name} can't be read behind row {number - 1} ({reason}); get it again") from None
            if row is None:
                break
            text = self.text_of(row, f"row {number}")
            digest.update(text.encode())
            size += len(text.encode())
            yield text
        self.read = {"bytes": size, "sha256": digest.hexdigest()}

    def describe(self) -> dict:
        return {"name": self.name} | self.read


def hub_answers() -> bool:
    """Whether the hub can be reached, decided within seconds: `datasets` itself would try for half a minute."""
    answered = threading.Event()
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # any answer will do
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name may hang beyond the timeout
    thread.start()
    thread.join(HUB_SECONDS)
    return answered.is_set()


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: the hub's are NAME or OWNER/NAME, and don't end as text files do."""
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or Path(name).suffix.lower() in {*FILE_KINDS, *COMPRESSED}


def open_dataset(name: str, config: str | None, form: Format) -> dict[str, HubSplit]:
    """The splits of a hub dataset or a local dataset folder, streamed. Raises ValueError, FileNotFoundError if it can't be had."""
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file, no dataset; pass --input {name}")
    if not path.exists() and is_path(name):
        advice = likely_meant(path) or "; give a file, a dataset folder or the name of a dataset on the hub"
        raise FileNotFoundError(f"no dataset at {name}{advice}")
    if not path.exists() and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when datasets is imported; what was downloaded before can still be had
    import datasets

    try:
        splits = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:  # datasets passes on the errors of many libraries
        reason = f"{type(error).__name__}: {describe(error)[:200]}"
        advice = likely_meant(path) or "; without network use --sample, or --input with your own files"
        raise ValueError(f"the dataset {name!r} can't be had ({reason}){advice}") from None
    if "train" not in splits:
        raise ValueError(f"the dataset {name!r} has no train split, only {', '.join(splits)}; download it and use --input")
    return {split: HubSplit(name, split, rows, form) for split, rows in splits.items()}
