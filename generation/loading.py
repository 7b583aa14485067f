"""What `--checkpoint NAME` means, as what computes: a network that predicts, an engine that continues texts."""

from pathlib import Path

from utils import notice

from formats.onnx_file import ENDING, OnnxFile
from formats.run_directory import find_checkpoint, load_model
from formats.tokenizer import TextTokenizer
from generation.engines import Engine
from generation.onnx_engine import CachedEngine, OnnxNetwork, RecomputingEngine
from generation.shared_cache import SharedEngine, can_share
from generation.torch_engine import TorchEngine
from models import GPT

Network = GPT | OnnxNetwork


def read_onnx(path: Path) -> OnnxFile:
    """An ONNX file, told in a line. Raises ValueError."""
    file = OnnxFile.read(path)
    notice(f"{path}, in onnxruntime on the CPU{'' if file.cached else '; without a cache, so each token reads the whole text again'}")
    return file


def onnx_engine(file: OnnxFile) -> Engine:
    """The fastest engine for an ONNX file. Raises ValueError."""
    return SharedEngine(file) if can_share(file) else (CachedEngine if file.cached else RecomputingEngine)(file)


def load_network(name: str, device: str = "cpu") -> tuple[Network, TextTokenizer, Path, dict]:
    """As formats.run_directory.load_model, for ONNX files too, which run on the CPU whatever the device; their content is empty."""
    path = find_checkpoint(name)
    if path.suffix != ENDING:
        return load_model(str(path), device)
    file = read_onnx(path)
    return OnnxNetwork(file), file.tokenizer, path, {}


def engine_of(network: Network) -> Engine:
    """What continues texts as this network does."""
    return TorchEngine(network) if isinstance(network, GPT) else onnx_engine(network.file)


def load_engine(name: str, device: str = "cpu") -> tuple[Engine, TextTokenizer, Path]:
    """What `--checkpoint NAME` means: an engine, the tokenizer, the file or HF folder. Raises FileNotFoundError, ValueError."""
    network, tokenizer, path, _ = load_network(name, device)
    return engine_of(network), tokenizer, path
