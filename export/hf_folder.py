"""A folder for `transformers`, and for all that reads its GPT-2 and Qwen3 (vLLM, llama.cpp)."""

from pathlib import Path

from utils import write_json, write_text

import numpy as np
import torch

from export.verify import Format, LoadedModel
from formats.huggingface import hf_config, to_hf
from formats.tokenizer import EOT, PADDING, UNKNOWN, TextTokenizer
from models import GPT


def tokenizer_config(tokenizer: TextTokenizer, block_size: int) -> dict:
    """tokenizer_config.json: what transformers can't know from tokenizer.json."""
    names = {"unk_token": UNKNOWN, "pad_token": PADDING}
    there = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # known to transformers 4 and 5; what v5 itself would write v4 doesn't know
        "eos_token": EOT,
        "bos_token": EOT,
        "model_max_length": block_size,
    } | {name: token for name, token in names.items() if token in there}


def write(model: GPT, tokenizer: TextTokenizer, path: Path) -> LoadedModel:
    """Configuration, tokenizer and safetensors. Raises ValueError where transformers isn't installed to read them back."""
    from safetensors.torch import save_file

    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError("format hf is checked with transformers, which is not installed; run: pip install transformers") from None
    path.mkdir()
    write_json(path / "config.json", hf_config(model.config, tokenizer.eot_id))
    write_json(path / "tokenizer_config.json", tokenizer_config(tokenizer, model.config.block_size))
    write_json(path / "generation_config.json", {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id})
    write_text(path / "tokenizer.json", tokenizer.json)
    save_file(to_hf(model.config, model.state_dict()), path / "model.safetensors", metadata={"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> np.ndarray:
        return reference(torch.from_numpy(ids)).logits.numpy()

    return logits


HF = Format("hf", "hf", write)
