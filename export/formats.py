"""The table of formats: a new one is one entry here and one module beside this one, which is imported only where it writes."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

from utils import notice

from export.verify import Loaded, Source, Writer

ALL = "all"


@dataclass(frozen=True)
class Format:
    """One way to write a model.

    file: what the file or folder is called; {} stands for the checkpoint's name without its ending. writer: where its Writer stands,
    as module:name. help: what it is and for whom, in a line. packages: what writes or checks it, beside torch, as pip calls them.
    beside: whether tokenizer.json and config.json are to lie beside it; other formats hold all of that.
    exact: whether it must compute what the model computes, or the `reference` that its writer names; else numbers are rounded, and
    `export.quality` measures at what cost.
    fits: where a function (Source) -> str | None stands that says why a model can't have this format, None where it can.
    """

    file: str
    writer: str
    help: str
    packages: tuple[str, ...] = ()
    beside: bool = False
    exact: bool = True
    fits: str | None = None

    def write(self, source: Source, path: Path) -> Loaded:
        """Write a file or folder of this name and load it back with its own runtime."""
        writer: Writer = resolve_name(self.writer)
        return writer(source, path)

    def why_not(self, source: Source) -> str | None:
        """Why this model can't be written so; None where it can."""
        return None if self.fits is None else resolve_name(self.fits)(source)

    def missing(self) -> list[str]:
        """The packages that aren't installed."""
        return [package for package in self.packages if not find_spec(package.replace("-", "_"))]


ONNX = ("onnx", "onnxscript", "onnxruntime")  # onnxscript and its parts make and round graphs
GGUF_FITS = "export.gguf_file:why_not"
FORMATS = {
    "onnx": Format("{}.onnx", "export.graphs:write_onnx", "one file for onnxruntime and other runtimes", ONNX, beside=True),
    "onnx_cache": Format(
        "{}_cache.onnx",
        "export.onnx_cache:write_onnx_cache",
        "the same with a cache of keys and values, to write texts fast",
        ("onnx", "onnxruntime"),
        beside=True,
    ),
    "onnx_int8": Format("{}.int8.onnx", "export.onnx_quantised:write_int8", "onnx_cache in 8 bits", ONNX, beside=True, exact=False),
    "onnx_int4": Format("{}.int4.onnx", "export.onnx_quantised:write_int4", "onnx_cache in 4 bits", ONNX, beside=True, exact=False),
    "pt": Format("{}.slim.pt", "export.slim:write_slim", "a checkpoint of weights only, for all scripts here"),
    "torchscript": Format("{}.ts.pt", "export.graphs:write_torchscript", "one file for torch.jit.load, in Python or C++", beside=True),
    "torch_export": Format("{}.pt2", "export.graphs:write_torch_export", "one file for torch.export.load", beside=True),
    "html": Format(
        "{}.html", "export.page:write_html", "a page to talk to, for any browser, without a network", fits="export.page:why_not_html"
    ),
    "gguf": Format("{}.gguf", "export.gguf_file:write_gguf", "one file for llama.cpp and what is built on it", ("gguf",), fits=GGUF_FITS),
    "gguf_q8_0": Format("{}.q8_0.gguf", "export.gguf_file:write_q8_0", "the same in 8 bits", ("gguf",), exact=False, fits=GGUF_FITS),
    "gguf_q4_0": Format("{}.q4_0.gguf", "export.gguf_file:write_q4_0", "the same in 4 bits", ("gguf",), exact=False, fits=GGUF_FITS),
    "hf": Format("hf", "export.hf_folder:write_hf", "a folder for transformers, and what reads its GPT-2 and Qwen3", ("transformers",)),
}


def table() -> str:
    """The formats for --help, one a line: name, file, what it is for."""
    rows = [f"    {name:12} {format.file.format('best_model'):22} {format.help}" for name, format in FORMATS.items()]
    return "\n".join(["Formats:", "", *rows])


def chosen(names: Iterable[str]) -> list[str]:
    """The formats that --format names, `all` being those whose packages are installed.

    Raises ValueError for a name that is no format, or whose packages are missing; train.py asks before it trains.
    """
    names = list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in FORMATS and name != ALL]:
        raise ValueError(f"unknown format {', '.join(unknown)}; take {', '.join(FORMATS)} or {ALL}")
    for name in names:
        if name != ALL and (missing := FORMATS[name].missing()):
            raise ValueError(f"format {name} needs packages that are not installed; run: pip install {' '.join(missing)}")
    return [name for name, format in FORMATS.items() if not format.missing()] if ALL in names else names


def fitting(names: Collection[str], source: Source) -> list[str]:
    """Those of the chosen formats that this model can have. Raises ValueError for one that it can't; of `all` those are told."""
    fit = []
    for name, format in FORMATS.items() if ALL in names else ((name, FORMATS[name]) for name in names):
        packages = format.missing()
        reason = f"run: pip install {' '.join(packages)}" if packages else format.why_not(source)
        if reason is None:
            fit.append(name)
        elif name in names:
            raise ValueError(f"format {name}: {reason}")
        else:
            notice(f"{name} is left out: {reason}")
    return fit


def target_names(names: Iterable[str], checkpoint: str) -> dict[str, str]:
    """Format -> what its file or folder is called. checkpoint: the name of what is exported, e.g. best_model.pt."""
    return {name: FORMATS[name].file.format(Path(checkpoint).stem.removesuffix(".slim")) for name in names}
