"""Speculative decoding changes no text and no probability, whatever guesses."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from config import GPTConfig
from generation.sampling import Sampling, process
from generation.speculative import ModelDraft, NgramDraft, SpeculativeWriter
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer
from models import GPT

BLOCK, VOCABULARY, EOT = 20, 31, 4
TOKENIZER = SimpleNamespace(eot_id=EOT, vocab_size=VOCABULARY, never_drawn=[2])


def engine(arch: str, seed: int, block_size: int = BLOCK, near: GPT | None = None) -> TorchEngine:
    """A random network; with `near`, one that is not far from another, as a draft should be."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=16, arch=arch)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3, mean=0.05)
        if near is not None:
            parameter.data = near.get_parameter(name).data + 0.1 * parameter.data
    return TorchEngine(model)


def texts(writer: Writer, prompts: list[list[int]], limit: int) -> list[Row]:
    rows = [Row(prompt, limit, seed=i) for i, prompt in enumerate(prompts)]
    for _ in writer.write(rows):
        pass
    return rows


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.3, top_k=9, min_p=0.02, repetition_penalty=1.2)], ids=str)
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_texts_are_those_without_a_draft(arch, sampling):
    """Token for token, far beyond the contexts of both models, with a draft that is near, one that knows nothing, one that is the model
    itself, and look-up."""
    target = engine(arch, 1)
    prompts = [[EOT, *range(5, 5 + BLOCK - 1)], [EOT, 6, 7, 8, 6, 7, 8, 6]]
    expected = texts(Writer(target, TOKENIZER, sampling, top=2), prompts, 2 * BLOCK + 5)
    drafts = {
        "near": ModelDraft(engine(arch, 2, near=target.model)),
        "far": ModelDraft(engine(arch, 3, block_size=BLOCK // 2 + 1)),
        "itself": ModelDraft(TorchEngine(target.model)),
        "ngram": NgramDraft(),
    }
    share = {}
    for (name, draft), count in itertools.product(drafts.items(), (1, 30)):
        rows = texts(SpeculativeWriter(target, TOKENIZER, sampling, 2, draft, count), prompts, 2 * BLOCK + 5)
        for row, other in zip(rows, expected, strict=True):
            assert (row.ids, row.finish) == (other.ids, other.finish)
            assert row.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4) and len(row.top) == len(other.top)
        share[name] = sum(row.accepted for row in rows) / sum(row.guessed for row in rows)
    assert share["itself"] == 1 and share["far"] < share["near"]


class Table:
    """An engine that looks its logits up by the last token: (V, V)."""

    def __init__(self, logits: torch.Tensor):
        self.logits, self.config = logits, SimpleNamespace(block_size=50, vocab_size=len(logits))

    def prefill(self, ids, lengths=None):
        return self.logits[ids[:, -1]]

    def step(self, ids):
        return self.logits[ids]

    def keep(self, length):
        pass

    def select(self, rows):
        pass


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(1.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.3)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_texts_follow_the_exact_probabilities(kind, sampling):
    """The joint distribution of three tokens, of which the first ones are guessed; and with it how many guesses can hold."""
    generator, vocabulary, n = torch.Generator().manual_seed(5), 4, 600
    logits = 1.5 * torch.randn(vocabulary, vocabulary, generator=generator)
    tokenizer = SimpleNamespace(eot_id=-1, vocab_size=vocabulary, never_drawn=[])
    draft = NgramDraft() if kind == "ngram" else ModelDraft(Table(logits + 1.5 * torch.randn(vocabulary, vocabulary, generator=generator)))
    writer, prompt = SpeculativeWriter(Table(logits), tokenizer, sampling, None, draft, 2), [0, 1, 0, 2, 0, 1]
    rows = [Row(prompt, 3, seed) for seed in range(n)]
    for _ in writer.write(rows):
        pass
    expected = {}
    for text in itertools.product(range(vocabulary), repeat=3):
        probability, ids = 1.0, [*prompt]
        for token in text:
            probability *= process(logits[ids[-1:]], [ids], sampling).softmax(dim=-1)[0, token].item()
            ids.append(token)
        expected[text] = probability
    counts = dict.fromkeys(expected, 0)
    for row in rows:
        counts[tuple(row.drawn)] += 1
    likely = [text for text in expected if n * expected[text] >= 5]
    assert not any(counts[text] for text in expected if expected[text] == 0)
    seen, wanted = [counts[text] for text in likely], [n * expected[text] for text in likely]
    seen, wanted = [*seen, n - sum(seen) + 1e-9], [*wanted, n - sum(wanted) + 1e-9]
    assert chisquare(seen, wanted, sum_check=False).pvalue > 1e-3
    assert 0 < sum(row.accepted for row in rows) < sum(row.guessed for row in rows)


def test_look_up_guesses_what_followed_the_longest_match():
    row = Row([1, 2, 3, 9, 8, 2, 3, 5, 7, 1, 2, 3], 5)
    assert NgramDraft().guess(row, 3, None) == [9, 8, 2]  # 1 2 3, not the newer 2 3
    assert NgramDraft().guess(Row([2, 3, 9, 2, 3, 5, 2, 3], 5), 2, None) == [5, 2]  # the newest of two
    assert NgramDraft().guess(Row([1, 2, 3], 5), 3, None) == []


def test_a_draft_with_another_tokenizer_is_refused(mistake, trained_run, tmp_path):
    from formats.checkpoint import load_checkpoint, save_checkpoint
    from preparation.tokenizer_kinds import byte_tokenizer

    content = load_checkpoint(trained_run / "best_model.pt")
    tokenizer = byte_tokenizer()
    content["tokenizer"] = tokenizer.json
    content["model_config"] |= {"vocab_size": tokenizer.vocab_size}
    content["model"]["wte.weight"] = content["model"]["wte.weight"][: tokenizer.vocab_size].clone()
    save_checkpoint(tmp_path / "other.pt", content)
    said = mistake("generate.py", "--checkpoint", trained_run, "--prompt", "x", "--draft", "other.pt", cwd=tmp_path)
    assert "the draft other.pt has another tokenizer than the model" in said
    assert "no checkpoint at nowhere" in mistake(
        "generate.py", "--checkpoint", trained_run, "--prompt", "x", "--draft", "nowhere", cwd=tmp_path
    )
