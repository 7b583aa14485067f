"""tokenizer.json and config.json for whoever runs an exported file: inside it where its format has room for them, and beside it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, processors

from export.verify import Source
from formats.export_record import add_record, check_exports
from formats.huggingface import hf_config
from formats.outputs import write_text
from formats.run_directory import written_names
from formats.schemas import read_file
from formats.tokenizer import EOT, TextTokenizer

NOTHING = re.compile(r'("post_processor"\s*:\s*)null')  # only the setting itself: a vocabulary's values are numbers


def prompting_tokenizer(tokenizer: TextTokenizer) -> str:
    """The text of a tokenizer.json that puts the EOT in front of a text by itself, as Llama's does with its BOS.

    Every training text began behind an EOT, so a prompt has to as well. Otherwise the file is what it was.
    """
    reader = Tokenizer.from_str(tokenizer.json)
    if reader.encode("a").ids[:1] == [tokenizer.eot_id]:
        return tokenizer.json
    pair = f"{EOT}:0 $A:0 {EOT}:1 $B:1"
    template = processors.TemplateProcessing(single=f"{EOT}:0 $A:0", pair=pair, special_tokens=[(EOT, tokenizer.eot_id)])
    text, found = NOTHING.subn(lambda match: match[1] + template.__getstate__().decode(), tokenizer.json, count=1)
    if not found:
        former = [reader.post_processor] if reader.post_processor else []
        reader.post_processor = processors.Sequence([*former, template])
        text = reader.to_str()
    return text


def encoder(text: str, eot_id: int) -> Callable[[str], list[int]]:
    """What a tokenizer.json gives a text, behind the EOT that it has to put in front of it."""
    reader = Tokenizer.from_str(text)
    return lambda prompt: without_eot(reader.encode(prompt).ids, eot_id)


def without_eot(ids: list[int], eot_id: int) -> list[int]:
    """The ids behind the EOT at their beginning. Raises ValueError where none is."""
    if ids[:1] != [eot_id]:
        raise ValueError(f"the tokenizer puts no {EOT} in front of a text")
    return ids[1:]


def properties(source: Source) -> dict[str, str]:
    """What lies inside a file: `tokenizer`, the text of a tokenizer.json, and `config`, that of a config.json as transformers has it."""
    config = hf_config(source.model.config, source.tokenizer.eot_id)
    return {"tokenizer": prompting_tokenizer(source.tokenizer), "config": json.dumps(config, indent=2) + "\n"}


def companions(source: Source, output: Path, overwrite: bool) -> dict[str, str]:
    """Name -> text of what is to lie beside an exported file and doesn't yet. None beside a run's own files, whose names these are.

    Raises ValueError where something else stands there.
    """
    if written_names(output):
        return {}
    texts = {f"{name}.json": text for name, text in properties(source).items()}
    missing = {name: text for name, text in texts.items() if not _holds(output / name, text)}
    check_exports(output, missing, source.path, overwrite)
    return missing


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and read_file(path) == text.encode()


def write_companions(output: Path, texts: dict[str, str], checkpoint: str) -> None:
    """Write files beside an export, each first recorded as ours. Raises OSError."""
    for name, text in texts.items():
        add_record(output, name, {"format": Path(name).stem, "checkpoint": checkpoint})
        write_text(output / name, text)
