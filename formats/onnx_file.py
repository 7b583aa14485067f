"""ONNX files of language models: what they take and give, their configuration and tokenizer, and onnxruntime to run them.

Our own hold two texts, `config` (config.json as transformers has it) and `tokenizer` (a tokenizer.json). Beside others, such as Optimum's,
lie files of these names.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from utils import describe, is_full_memory, threads_for

from config import GPTConfig
from formats.huggingface import config_from_hf
from formats.schemas import HFConfig, check, read_file
from formats.tokenizer import TextTokenizer

ENDING = ".onnx"
PLAIN, CACHED = {"input_ids"}, {"input_ids", "attention_mask", "position_ids"}  # inputs; with a cache also its keys and values
PAST, PRESENT = "past_key_values", "present"
TEXTS = ("config", "tokenizer")
AGAIN = "export it again with export_model.py"


@dataclass(frozen=True)
class OnnxFile:
    """path: where it is. config: shape of the network. tokenizer: its own. texts: `config` and `tokenizer` as they are in it or beside it.
    cached: whether it keeps keys and values, or takes token ids only. producer: what wrote it, as it says."""

    path: Path
    config: GPTConfig
    tokenizer: TextTokenizer
    texts: dict[str, str]
    cached: bool
    producer: str

    @classmethod
    def read(cls, path: Path) -> "OnnxFile":
        """Raises ValueError for a file that is damaged, no language model, or without configuration and tokenizer; FileNotFoundError."""
        proto = read_proto(path)
        inside = {prop.key: prop.value for prop in proto.metadata_props}
        inputs, outputs = ({value.name for value in values} for values in (proto.graph.input, proto.graph.output))
        cached = {name for name in inputs if name.startswith(f"{PAST}.")}
        if inputs - cached != (CACHED if cached else PLAIN) or "logits" not in outputs:
            names = f"{', '.join(sorted(inputs - cached)[:5])} -> {', '.join(sorted(outputs)[:2])}"
            raise ValueError(f"{path} can't be used: it computes {names}, not input_ids -> logits; {AGAIN}")
        try:
            texts = {name: inside[name] if name in inside else read_file(path.with_name(f"{name}.json")).decode() for name in TEXTS}
            config = config_from_hf(check(texts["config"].encode(), HFConfig, "its configuration", AGAIN))
            tokenizer = TextTokenizer(texts["tokenizer"], "its tokenizer")
        except FileNotFoundError as error:
            missing = Path(error.filename)
            raise ValueError(f"{path} holds no {missing.stem}, and beside it is no {missing.name}; {AGAIN}") from None
        except ValueError as error:
            raise ValueError(f"{path} can't be used: {describe(error)[:300]}") from None
        if tokenizer.vocab_size != config.vocab_size or len(cached) not in (0, 2 * config.n_layer):
            raise ValueError(f"{path} can't be used: its graph, configuration and tokenizer are of different models; {AGAIN}")
        return cls(path, config, tokenizer, texts, bool(cached), proto.producer_name)

    def session(self, model: bytes | None = None, threads: int | None = None):
        """An onnxruntime.InferenceSession of the file, or of a graph made from it. threads: by default what suits its size.
        Raises ValueError where onnxruntime can't run it.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or threads_for(self.path.stat().st_size)
        options.log_severity_level = 4  # warnings are of what it cleans up, and errors are raised too
        with self.running():
            return onnxruntime.InferenceSession(model or str(self.path), options, providers=["CPUExecutionProvider"])

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Context in which onnxruntime computes: what it can't becomes a ValueError that names the file."""
        try:
            yield
        except Exception as error:  # onnxruntime's own kinds, and RuntimeError
            if is_full_memory(error):
                raise
            import onnxruntime

            raise ValueError(f"{self.path} can't be run by onnxruntime {onnxruntime.__version__}: {describe(error)[:200]}") from None


def read_proto(path: Path):
    """An ONNX file as onnx.ModelProto. Raises ValueError for one that is damaged, and where the packages are missing; FileNotFoundError."""
    try:
        import onnx
        import onnxruntime  # noqa: F401 - what reads a file also runs it
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} needs {error.name}, which is not installed; run: pip install onnx onnxruntime") from None
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; write one with export_model.py")
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf's own kinds
        raise ValueError(f"{path} is damaged or no ONNX file ({describe(error)[:120]}); {AGAIN}") from None
    graph = proto.graph
    names = chain.from_iterable((node.name, node.op_type, *node.input, *node.output) for node in graph.node)
    values = (value.name for value in (*graph.input, *graph.output, *graph.initializer))
    texts = chain.from_iterable((prop.key, prop.value) for prop in proto.metadata_props)
    if any(isinstance(text, bytes) for text in chain(names, values, texts, [proto.producer_name])):
        raise ValueError(f"{path} is damaged: it has names that are not UTF-8; {AGAIN}")
    return proto
