"""Every engine behind the one protocol: what it computes with its memory is what the network computes from the whole text."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import GPTConfig
from generation.engines import Engine
from generation.sampling import Sampling
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer
from models import GPT

BLOCK, VOCABULARY = 16, 61
SHAPES = {
    "gpt2": {"arch": "gpt2"},
    "qwen3": {"arch": "qwen3", "n_kv_head": 2},
    "explicit softmax": {"arch": "qwen3", "flash": False},
}
ENGINES = {"torch": TorchEngine}  # name -> what makes an engine of a model


def make(shape: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=VOCABULARY, n_layer=2, n_head=4, n_embd=32, **SHAPES[shape])).eval()
    for parameter in model.parameters():  # far enough from the start that tokens matter
        torch.nn.init.normal_(parameter, std=0.2, mean=0.02)
    return model


MODELS = {shape: make(shape) for shape in SHAPES}


@pytest.fixture(scope="module", params=[(engine, shape) for engine in ENGINES for shape in SHAPES], ids="-".join)
def pair(request) -> tuple[Engine, GPT]:
    name, shape = request.param
    return ENGINES[name](MODELS[shape]), MODELS[shape]


@torch.inference_mode()
def uncached(model: GPT, text: list[int], count: int = 1) -> torch.Tensor:
    """Logits (count, V) behind the last `count` tokens of a text."""
    return model(torch.tensor([text]))[0][0, -count:]


def padded(texts: list[list[int]], filling: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, texts))
    return torch.tensor([text + [filling] * (longest - len(text)) for text in texts]), torch.tensor([*map(len, texts)])


def check(logits: torch.Tensor, model: GPT, texts: list[list[int]], count: int) -> None:
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    for got, text in zip(logits, texts, strict=True):
        torch.testing.assert_close(got, uncached(model, text, count), atol=2e-5, rtol=1e-4)


TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_logits_are_those_of_the_whole_text(pair, data):
    """Rows of any lengths; then steps of one or more tokens, rows left out, doubled and in another order."""
    engine, model = pair
    texts = data.draw(st.lists(TOKENS, min_size=1, max_size=4))
    ids, lengths = padded(texts)
    check(engine.prefill(ids, lengths)[:, None], model, texts, 1)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            rows = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=4))
            engine.select(torch.tensor(rows))
            texts = [texts[row] for row in rows]
        count = data.draw(st.integers(1, 3))
        if max(map(len, texts)) + count > BLOCK:
            with pytest.raises(ValueError, match="block_size"):
                engine.step(torch.zeros(len(texts), count, dtype=torch.int64))
            break
        new = data.draw(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=count, max_size=count), min_size=1, max_size=4))
        new = [new[i % len(new)] for i in range(len(texts))]
        texts = [text + more for text, more in zip(texts, new)]
        check(engine.step(torch.tensor(new)), model, texts, count)


def test_what_is_forgotten_leaves_no_trace(pair):
    engine, model = pair
    text = list(range(3, 15))
    engine.prefill(torch.tensor([text]))
    engine.keep(5)
    check(engine.step(torch.tensor([[40, 41]])), model, [[*text[:5], 40, 41]], 2)
    with pytest.raises(ValueError):
        engine.keep(8)  # more than was read
    engine.prefill(*padded([[1, 2, 3], [4]]))
    with pytest.raises(ValueError):
        engine.keep(1)  # rows of different lengths


def test_a_full_context_fits_and_one_token_more_does_not(pair):
    engine, model = pair
    text = list(range(BLOCK))
    check(engine.prefill(torch.tensor([text]))[:, None], model, [text], 1)
    with pytest.raises(ValueError, match="block_size"):
        engine.step(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="block_size"):
        engine.prefill(torch.tensor([[*text, 1]]))


EOT = 5
TOKENIZER = SimpleNamespace(eot_id=EOT, vocab_size=VOCABULARY, never_drawn=[])


def by_hand(model: GPT, prompt: list[int], limit: int) -> list[int]:
    """The greedy text without any memory: everything is computed again for each token."""
    ids, context = [*prompt], [*prompt]
    for _ in range(limit):
        token = uncached(model, context).argmax().item()
        ids, context = [*ids, token], [*context, token]
        if token == EOT:
            break
        if len(context) > BLOCK:
            context = context[-(BLOCK // 2) :]
    return ids


def test_greedy_text_equals_the_uncached_one_token_for_token(pair):
    """For one text and for several of different lengths, which end at different times; far beyond block_size."""
    engine, model = pair
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (1, BLOCK, 7, 7, BLOCK - 1, 2)]
    prompts.append(prompts[2])
    expected = [by_hand(model, prompt, limit) for limit, prompt in enumerate(prompts, 3 * BLOCK)]
    writer = Writer(engine, TOKENIZER, Sampling(0.0))
    for numbers in ([0], [1], [2], [*range(len(prompts))]):
        rows = [Row(prompts[i], 3 * BLOCK + i) for i in numbers]
        for row in writer.write(rows):
            assert row.finish == ("eot" if row.ids[-1] == EOT else "length" if row.number == row.limit else None)
        assert [row.ids for row in rows] == [expected[i] for i in numbers]


def test_a_text_depends_on_its_seed_alone(pair):
    engine, _ = pair
    prompts = [[3], [*range(BLOCK)], [8, 9], [8, 9], [8, 9]]

    def write(numbers: list[int]) -> dict[int, list[int]]:
        rows = [Row(prompts[i], 2 * BLOCK, seed=100 + i) for i in numbers]
        [*Writer(engine, TOKENIZER, Sampling(1.0, top_p=0.95)).write(rows)]
        return {i: row.ids for i, row in zip(numbers, rows)}

    together = write([0, 1, 2, 3, 4])
    assert together == {i: write([i])[i] for i in range(5)} == write([4, 2]) | write([3, 1, 0])
    assert together[2] != together[3] != together[4]
