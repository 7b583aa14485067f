"""A folder for `transformers`, and for all that reads its GPT-2 and Qwen3 (vLLM, llama.cpp)."""

from pathlib import Path

from safetensors.torch import save

from export.companions import prompting_tokenizer, without_eot
from export.model_card import model_card
from export.verify import Loaded, Source
from formats.huggingface import hf_config, to_hf
from formats.outputs import write_atomically, write_json, write_text
from formats.tokenizer import EOT, PADDING, UNKNOWN


def write_hf(source: Source, path: Path) -> Loaded:
    """Configuration, tokenizer, safetensors and a model card; read back by transformers."""
    import transformers

    model, tokenizer = source.model, source.tokenizer
    path.mkdir()
    known = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    special = {"eos_token": EOT, "bos_token": EOT, "unk_token": UNKNOWN, "pad_token": PADDING}
    # this class is known to transformers 4 and 5; what 5 itself would write 4 doesn't know
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
    write_json(path / "tokenizer_config.json", about | {name: token for name, token in special.items() if token in known})
    write_text(path / "tokenizer.json", prompting_tokenizer(tokenizer))
    write_json(path / "config.json", hf_config(model.config, tokenizer.eot_id))
    write_json(path / "generation_config.json", {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id})
    write_text(path / "README.md", model_card(source))
    weights = save(to_hf(model.config, model.state_dict()), metadata={"format": "pt"})
    write_atomically(path / "model.safetensors", lambda file: file.write(weights))
    transformers.utils.logging.disable_progress_bar()
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    return Loaded(lambda ids: reference(ids).logits, encode=lambda text: without_eot(theirs(text)["input_ids"], tokenizer.eot_id))
