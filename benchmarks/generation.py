"""benchmark.py generate: tokens per second of texts that grow, by each engine, beside transformers with the same weights and nanoGPT."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from utils import notice

import torch

from benchmarks import nanogpt
from benchmarks.harness import print_matrix_rate, spread, word_tokenizer
from config import GPTConfig
from export.hf_folder import write_hf
from export.onnx_cache import write_onnx_cache
from export.onnx_quantised import write_int8
from export.verify import Source, quiet
from formats.onnx_file import OnnxFile
from formats.tokenizer import TextTokenizer
from generation.engines import Engine
from generation.loading import onnx_engine
from generation.sampling import Sampling
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer
from models import GPT

CONTEXT, NEW = 200, 100  # tokens of the prompt, and behind it
SHAPES = {"nano": GPTConfig.nano(vocab_size=1500), "mini": GPTConfig.mini(vocab_size=4096, block_size=512)}
BATCHES = (1, 16)
PEERS = ("transformers", "nanoGPT")
GREEDY = Sampling(temperature=0.0)

Continue = Callable[[torch.Tensor, int], object]  # ids (B, T), number of tokens to add


def by_engine(engine: Engine, tokenizer: TextTokenizer) -> Continue:
    def write(ids: torch.Tensor, count: int) -> None:
        for _ in Writer(engine, tokenizer, GREEDY).write([Row(row, count) for row in ids.tolist()]):
            pass

    return write


def by_transformers(folder: Path) -> Continue | None:
    """None where transformers is not installed."""
    try:
        import transformers
    except ModuleNotFoundError:
        notice("transformers is not installed, so it isn't measured; run: pip install transformers")
        return None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda ids, count: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)


def by_nanogpt(checkout: Path, config: GPTConfig) -> Continue:
    """nanoGPT with the same layers; its token table is the output layer too."""
    model = nanogpt.make_model(checkout, config)
    return lambda ids, count: model.generate(ids, count, top_k=1)


def sides(config: GPTConfig, checkout: Path | None, folder: Path) -> tuple[dict[str, Continue], GPT]:
    """Name -> what continues texts, all but nanoGPT with the same random weights, and our network."""
    torch.manual_seed(0)
    model, tokenizer = GPT(config).eval(), word_tokenizer(config.vocab_size)
    model.wte.weight.data[tokenizer.eot_id] = 0  # else some texts would end
    source = Source(model, tokenizer, folder / "model.pt", {"train_config": {}, "data": [], "step": 0})
    folder.mkdir()
    with quiet():
        write_onnx_cache(source, folder / "model_cache.onnx")
        write_int8(source, folder / "model.int8.onnx")
        write_hf(source, folder / "hf")
    found = {"torch": by_engine(TorchEngine(model), tokenizer)}
    for side, name in (("onnx", "model_cache.onnx"), ("onnx int8", "model.int8.onnx")):
        found[side] = by_engine(onnx_engine(OnnxFile.read(folder / name)), tokenizer)
    peers = {"transformers": by_transformers(folder / "hf"), "nanoGPT": by_nanogpt(checkout, config) if checkout else None}
    return found | {name: peer for name, peer in peers.items() if peer}, model


def seconds(write: Continue, ids: torch.Tensor, count: int) -> float:
    start = time.perf_counter()
    write(ids, count)
    return time.perf_counter() - start


def read_rate() -> float:
    """Bytes per second at which one product with a matrix larger than the caches reads it."""
    matrix, row = torch.randn(4096, 16384), torch.randn(1, 4096)  # 256 MB
    times = []
    for _ in range(7):
        start = time.perf_counter()
        row @ matrix
        times.append(time.perf_counter() - start)
    return matrix.nbytes / min(times)


def compare(found: dict[str, Continue], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each side, in turn; the reading of the prompts ids (B, T) is left out."""
    rates: dict[str, list[float]] = {side: [] for side in found}
    for i in range(rounds + 1):  # the first warms up
        for side, write in found.items():
            once = seconds(write, ids, 1)
            spent = seconds(write, ids, NEW + 1) - once
            rates[side] += [len(ids) * NEW / spent] if i else []
    return rates


def show(rates: dict[str, list[float]], bound: float) -> None:
    """A line for each side. bound: tokens per second that reading the weights allows."""
    for side, values in rates.items():
        words = [f"{side:14}{spread(values, ',.0f'):>28} tokens/s, {statistics.median(values) / bound:4.0%} of what reading allows"]
        for peer in PEERS:
            if peer in rates and side not in PEERS:
                words.append(f"{spread([ours / theirs for ours, theirs in zip(values, rates[peer])])} x {peer}")
        print(", ".join(words))


def measure(rounds: int, checkout: Path | None, cwd: Path) -> None:
    """Let all sides write in turn, and print medians, ratios and the share of the speed at which weights and cache can be read."""
    print_matrix_rate("cpu")
    bandwidth = read_rate()
    print(f"this machine's memory: {bandwidth / 1e9:.1f} GB/s read by a product; {torch.get_num_threads()} threads")
    for name, shape in SHAPES.items():
        for arch in ("qwen3", "gpt2"):
            config = replace(shape, arch=arch)
            found, model = sides(config, checkout, cwd / f"{name}_{arch}")
            for batch in BATCHES:
                if batch > 1:
                    found.pop("nanoGPT", None)  # it would take minutes
                ids = torch.randint(1, config.vocab_size, (batch, CONTEXT), generator=torch.Generator().manual_seed(1))
                cache = 2 * config.n_layer * config.kv_heads * config.head_dim * (CONTEXT + NEW // 2)
                bound = batch * bandwidth / 4 / (model.num_parameters() + batch * cache)
                print(f"\n{name}, {arch}, batch {batch}: reading float32 weights and cache allows {bound:,.0f} tokens/s")
                show(compare(found, ids, rounds), bound)
