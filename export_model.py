"""Checkpoint -> files that run elsewhere. Each is loaded back and compared with the model before it gets its name.

    python export_model.py --format onnx torchscript
    python export_model.py --checkpoint checkpoints/stories --format hf --output ./exported

onnx         best_model.onnx: one file, input_ids (batch, length) int64 -> logits (batch, length, vocabulary) float32, any batch and length
torchscript  best_model.ts.pt: the same function for torch.jit.load, in Python or C++ without this repository
hf           hf/: a folder for transformers (AutoModelForCausalLM, AutoTokenizer) and all that reads its GPT-2 and Qwen3
"""

from utils import needs_packages, notice, read_command_line, run_script

with needs_packages():
    import contextlib
    import io
    import json
    import logging
    import os
    import shutil
    import warnings
    from collections.abc import Callable, Iterable
    from dataclasses import dataclass
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor, nn

    from formats.checkpoint import load_model
    from formats.huggingface import hf_config, to_hf
    from formats.tokenizer import EOT, PADDING, UNKNOWN, TextTokenizer
    from models import GPT
    from utils import fsync_directory

TOLERANCE = 1e-4  # largest difference of a logit that still counts as the same model


@dataclass(frozen=True)
class Arguments:
    """Flags of export_model.py."""

    format: tuple[str, ...]
    """onnx, torchscript, hf."""
    checkpoint: str = "./checkpoints"
    """A .pt file, a run directory (its best model), or the name of one under ./checkpoints."""
    output: str | None = None
    """Directory for the files. Default: beside the checkpoint."""

    def __post_init__(self):
        check_formats(self.format)


class LogitsOnly(nn.Module):
    """The network as a function of token ids alone."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[0]


def write_torchscript(model: GPT, tokenizer: TextTokenizer, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated in favour of torch.export, and tracing asks to mind the length
        traced = torch.jit.trace(LogitsOnly(model), example_ids(model, 2, model.config.block_size // 2 + 1), check_trace=False)
        torch.jit.save(traced, str(path))
        loaded = torch.jit.load(str(path))

    def run(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return loaded(torch.from_numpy(ids)).numpy()

    return run


def write_onnx(model: GPT, tokenizer: TextTokenizer, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    length = torch.export.Dim("length", max=model.config.block_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its own steps
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LogitsOnly(model),
            (example_ids(model, 2, max(2, model.config.block_size // 2)),),
            str(path),
            dynamo=True,
            external_data=False,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": {0: torch.export.Dim("batch"), 1: length}},
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda ids: session.run(["logits"], {"input_ids": ids})[0]


def write_hf(model: GPT, tokenizer: TextTokenizer, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A transformers folder. Raises ValueError where transformers isn't installed to read it back."""
    from safetensors.torch import save_file

    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError("format hf is checked with transformers, which is not installed; run: pip install transformers") from None
    path.mkdir(exist_ok=True)
    config = hf_config(model.config, tokenizer.eot_id)
    # the class's name that transformers 4 and 5 both know; v5 itself would write one that v4 doesn't
    of_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOT,
        "bos_token": EOT,
        "model_max_length": model.config.block_size,
    }
    there = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    of_tokenizer |= {name: token for name, token in (("unk_token", UNKNOWN), ("pad_token", PADDING)) if token in there}
    of_generation = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    for name, content in (("config", config), ("tokenizer_config", of_tokenizer), ("generation_config", of_generation)):
        (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (path / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    save_file(to_hf(model.config, model.state_dict()), path / "model.safetensors", metadata={"format": "pt"})
    twin = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()

    def run(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return twin(torch.from_numpy(ids)).logits.numpy()

    return run


# format -> name of the file (a beginning "." stands for the checkpoint's name), what writes it and returns the loaded function
FORMATS: dict[str, tuple[str, Callable]] = {
    "onnx": (".onnx", write_onnx),
    "torchscript": (".ts.pt", write_torchscript),
    "hf": ("hf", write_hf),
}


def check_formats(formats: Iterable[str]) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"unknown format {', '.join(unknown)}; take {', '.join(FORMATS)}")


def example_ids(model: GPT, batch: int, length: int) -> Tensor:
    """Random token ids (batch, length) int64."""
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def largest_difference(model: GPT, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """Largest difference of any logit between the model and what was exported, at several shapes; infinite where shapes differ."""
    worst, block = 0.0, model.config.block_size
    for batch, length in ((1, 1), (3, min(17, block)), (1, block)):
        ids = example_ids(model, batch, length)
        expected, got = model(ids)[0].numpy(), run(ids.numpy())
        difference = np.abs(expected - got).max() if expected.shape == got.shape else np.inf
        worst = max(worst, float(difference) if np.isfinite(difference) else np.inf)
    return worst


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def export(checkpoint: str | Path, formats: Iterable[str], output: Path | None) -> bool:
    """Write the formats beside the checkpoint or into `output`; True if all of them compute what the model computes."""
    model, tokenizer, path, _ = load_model(str(checkpoint))
    output = output or path.parent
    output.mkdir(parents=True, exist_ok=True)
    good = True
    for name in dict.fromkeys(formats):
        file_name, write = FORMATS[name]
        target = output / (path.stem + file_name if file_name.startswith(".") else file_name)
        temporary = target.with_name(target.name + ".tmp")
        remove(temporary)
        try:
            difference = largest_difference(model, write(model, tokenizer, temporary))
            if difference <= TOLERANCE:
                if target.is_dir():
                    remove(target)  # a folder can't be renamed over another
                os.replace(temporary, target)
                fsync_directory(output)
                print(f"{target}: largest difference of a logit {difference:.1e}")
            else:
                notice(f"error: {name}: logits differ by up to {difference:.1e} (allowed {TOLERANCE}); the file was deleted")
                good = False
        finally:
            remove(temporary)
    return good


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, aliases={"model_path": "checkpoint"})
    return 0 if export(args.checkpoint, args.format, Path(args.output) if args.output else None) else 1


if __name__ == "__main__":
    run_script(main)
