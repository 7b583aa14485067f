"""The page of export_model.py --format html in a real browser: it computes what the model computes, and is usable with a keyboard alone."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import export_model
from config import GPTConfig
from export import page
from export.verify import Source
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.run_directory import load_model
from formats.tokenizer import EOT, KINDS, TextTokenizer, gpt2_tokenizer
from models import GPT
from preparation import sample_corpus
from preparation.tokenizer_kinds import make_tokenizer
from tests.browser import Browser, why_no_browser
from tests.conftest import tiny

TEXTS = [text for text, _ in sample_corpus.stories(sample_corpus.load_grammar(), 0, "test", 40)]
ODD = ["", " ", "\n\n  \t", "naïve café 北京 🙂", "x" * 300, EOT, f"a{EOT}b", "<|unk|> <|pad|>", "\r\n", "\ufeff", "\x00\x7f"]
ODD += ["don't we'll I'VE 'tis rock'n'roll's", "a  b   c\u00a0\u3000d\x85e\x1cf", "1234 ½ Ⅷ ৪২", "e\u0301 \u0301 ſ İ ΑΣ Å \u1e9b\u0323"]
ODD += ["👩\u200d👩\u200d👧 🏳️\u200d🌈", "## a##b #", "</script><!--"]
# Unicode grows: of a character that is younger than one of the two programs, only one knows that it is a letter
CHARACTERS = st.characters(max_codepoint=0xFFFF, exclude_categories=("Cs", "Cn")) | st.sampled_from("🙂👍🏽𝒳𐌰𠀀")
SETTINGS = {"max_examples": 12, "deadline": None}


# ---------------------------------------------------------------- models and the browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sample_dir, trained_run) -> dict[str, Path]:
    """Family -> a run directory."""
    import train

    run = tmp_path_factory.mktemp("gpt2")
    assert train.main(tiny(arch="gpt2", data_dir=sample_dir, out_dir=run, max_steps=5)) == 0
    return {"qwen3": trained_run, "gpt2": run}


@pytest.fixture(scope="module")
def pages(tmp_path_factory, runs) -> dict[str, Path]:
    """Family -> a folder with its page, and with a checkpoint of the very weights that the page holds."""
    made = {}
    for family, dtype in (("qwen3", "int8"), ("gpt2", "float16")):
        made[family] = folder = tmp_path_factory.mktemp(family)
        flags = ["--checkpoint", runs[family], "--format", "html", "--html_weights", dtype, "--output", folder]
        assert export_model.main([*map(str, flags)]) == 0
        content = load_checkpoint(runs[family] / "best_model.pt")
        content["model"] = page.rounded(load_model(str(runs[family]))[0], dtype).state_dict()
        save_checkpoint(folder / "best_model.pt", content)
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if reason := why_no_browser():
        pytest.skip(reason)
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def calm(browser):
    """The browser; afterwards: no message in its console, and nothing was asked for but files and the worker."""
    browser.driver.get_log("browser"), browser.driver.get_log("performance")
    yield browser
    assert browser.driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "blob:"))] == []


def random_page(tokenizer: TextTokenizer, dtype: str, folder: Path, scale: float = 0.3, **shape) -> tuple[Path, GPT]:
    """The page of a network with random weights, large enough for logits that differ, and the network with the page's weights."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (scale if weight.dim() == 2 else 0.1) + (weight.dim() == 1))
    path = folder / "page.html"
    path.write_text(page.page_text(Source(model, tokenizer, path, {}), dtype), encoding="utf-8")
    return path, page.rounded(model, dtype)


# ---------------------------------------------------------------- the network


def check_logits(browser, model: GPT) -> None:
    ids = torch.randint(model.config.vocab_size, (1, model.config.block_size), generator=torch.Generator().manual_seed(1))
    got = browser.ask("logits(args[0]).then((rows) => rows.map((row) => Array.from(row)))", ids[0].tolist())
    with torch.inference_mode():
        expected = model(ids)[0][0].numpy()
    np.testing.assert_allclose(np.array(got), expected, atol=1e-3, rtol=0)
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_logits_are_those_of_torch_with_the_same_weights(family, pages, calm):
    calm.open(pages[family] / "best_model.html")
    check_logits(calm, load_model(str(pages[family] / "best_model.pt"))[0])


@pytest.mark.parametrize(
    "shape",
    [
        {"arch": "qwen3", "n_layer": 2, "n_head": 3, "n_kv_head": 1, "n_embd": 42, "n_hidden": 37, "rope_theta": 500.0},
        {"arch": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 30, "bias": False},
        {"arch": "gpt2", "n_layer": 2, "n_head": 1, "n_embd": 33, "n_hidden": 50},
    ],
    ids=["grouped heads", "no biases", "odd widths"],
)
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_logits_of_unusual_shapes(shape, dtype, tmp_path, calm):
    path, model = random_page(make_tokenizer("byte", [], 0), dtype, tmp_path, block_size=40, **shape)
    calm.open(path)
    check_logits(calm, model)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_logits_of_mini(arch, dtype, tmp_path, calm):
    """With weights as a training starts from, four times as large: logits as a trained model has them."""
    tokenizer = make_tokenizer("bpe", TEXTS, 4096)
    path, model = random_page(tokenizer, dtype, tmp_path, scale=0.08, block_size=128, n_layer=6, n_head=6, n_embd=384, arch=arch)
    calm.open(path)
    check_logits(calm, model)


# ---------------------------------------------------------------- the tokenizer

TOKENIZERS = {kind: make_tokenizer(kind, TEXTS, 700) for kind in KINDS if kind != "gpt2"}
TOKENIZERS |= {f"{kind}, normalized": make_tokenizer(kind, TEXTS, 700, lowercase=True, nfc=True) for kind in ("bpe", "word", "char")}
TOKENIZERS["bpe of many scripts"] = make_tokenizer("bpe", [*TEXTS, *ODD], 900)


def load_tokenizer_script(browser, tokenizer: TextTokenizer) -> None:
    source = (page.PARTS / "tokenizer.js").read_text(encoding="utf-8")
    browser.driver.get("about:blank")
    browser.driver.execute_script(f"{source}; window.tokenizer = new Tokenizer(arguments[0]);", page.tokenizer_tables(tokenizer))


def check_ids(browser, tokenizer: TextTokenizer, texts: list[str]) -> None:
    script = (
        "const all = arguments[0].map((text) => Array.from(tokenizer.encode(text))); return [all, all.map((ids) => tokenizer.decode(ids))]"
    )
    ids, decoded = browser.driver.execute_script(script, texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert ids == expected
    assert decoded == [tokenizer.decode(row) for row in expected]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_and_texts_are_those_of_the_tokenizer_file(kind, browser):
    tokenizer = TOKENIZERS[kind]
    load_tokenizer_script(browser, tokenizer)
    check_ids(browser, tokenizer, [*TEXTS, *ODD])

    @given(
        texts=st.lists(
            st.text(CHARACTERS, max_size=60) | st.text(st.sampled_from(" \n\t\u00a0\u3000\x1c\x85a1!'#é"), max_size=30), max_size=8
        )
    )
    @settings(**SETTINGS)
    def any_texts(texts):
        check_ids(browser, tokenizer, texts)

    any_texts()


@given(ids=st.lists(st.integers(0, 899), max_size=12))
@settings(**SETTINGS)
def check_decoding(browser, ids):
    assert browser.driver.execute_script("return tokenizer.decode(arguments[0])", ids) == TOKENIZERS["bpe of many scripts"].decode(ids)


def test_ids_that_spell_no_text_become_the_same_replacement_characters(browser):
    load_tokenizer_script(browser, TOKENIZERS["bpe of many scripts"])
    check_decoding(browser)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_ids_of_48_languages(kind, real_data, browser):
    files = sorted((real_data / "multilingual").glob("udhr_*.txt"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    assert len(texts) >= 47
    tokenizer = gpt2_tokenizer() if kind == "gpt2" else make_tokenizer("bpe", texts, 8000)
    load_tokenizer_script(browser, tokenizer)
    for text in texts:
        check_ids(browser, tokenizer, [text])


# ---------------------------------------------------------------- sampling


def draw(browser, logits: list[float], count: int, **options) -> list[int]:
    source = (page.PARTS / "sampling.js").read_text(encoding="utf-8")
    script = f"""{source}; const [logits, options, count] = arguments, random = seededRandom(options.seed);
        return Array.from({{ length: count }}, () => sample(Float32Array.from(logits), options, random));"""
    return browser.driver.execute_script(script, logits, {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 1} | options, count)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.7, "temperature": 2.0}], ids=str
)
def test_tokens_are_drawn_as_often_as_they_should(options, browser):
    """Against probabilities that are computed here, after the filters in the order of sample_token."""
    logits, count = [0.3, 2.0, -1.0, 1.5, 0.0, -4.0, 1.9], 20_000
    probs = torch.tensor(logits).div(options.get("temperature", 1.0)).softmax(0)
    order = probs.argsort(descending=True)[: options.get("top_k")]
    kept = probs[order]
    before = kept.cumsum(0) - kept
    kept = kept * (before < options.get("top_p", 2.0) * kept.sum())
    expected = torch.zeros(len(logits)).scatter(0, order, kept / kept.sum()).numpy()
    drawn = np.bincount(draw(browser, logits, count, **options), minlength=len(logits)) / count
    assert (drawn[expected == 0] == 0).all()
    assert (np.abs(drawn - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_a_seed_gives_the_same_tokens_again_and_another_one_others(browser):
    logits = [0.1 * i for i in range(50)]
    first, again, other = (draw(browser, logits, 50, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    assert (
        set(draw(browser, logits, 20, temperature=0))
        == {49}
        == set(draw(browser, logits, 20, top_k=1))
        == set(draw(browser, logits, 20, top_p=1e-9))
    )


# ---------------------------------------------------------------- texts


GENERATE = "generate(args[0], args[1], ({ token, notice }) => (window.heard ??= []).push(token ? token.text : notice))"


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("prompt", ["", "One day, the little frog", "The dog and the cat went to the forest and saw a " * 4])
def test_the_same_greedy_text_as_generate(family, prompt, pages, calm, script):
    """Beyond the context, whose newer half is read again, and from a prompt that is longer than the context."""
    run = pages[family]
    expected = script("generate.py", "--checkpoint", run / "best_model.pt", "--prompt", prompt, "--temperature", 0, "--max_new_tokens", 70)
    calm.open(run / "best_model.html")
    calm.driver.execute_script("window.heard = []")
    result = calm.ask(GENERATE, prompt, {"temperature": 0, "max_new_tokens": 70})
    assert prompt + result["text"] + "\n" == expected.stdout
    notices = [text for text in calm.driver.execute_script("return heard") if text.startswith(("The context", "The prompt"))]
    long = len(load_model(str(run))[1].encode(prompt)) > 31
    assert notices == ["The prompt is longer than the model's context: only its last 32 tokens are read."] * long + [
        "The context is full: from here on the model only knows the newer half of it, again and again."
    ]


def test_a_stop_text_ends_a_text_before_it(pages, calm):
    calm.open(pages["qwen3"] / "best_model.html")
    whole = calm.ask(GENERATE, "Once", {"temperature": 0, "max_new_tokens": 40})
    assert whole["reason"] == "length" and whole["tokens"] == 40
    stop = whole["text"][20:27]
    calm.driver.execute_script("window.heard = []")
    result = calm.ask(GENERATE, "Once", {"temperature": 0, "max_new_tokens": 40, "stop": stop})
    cut = whole["text"].index(stop)
    assert result["reason"] == "stop" and result["text"] == whole["text"][:cut]
    assert "".join(calm.driver.execute_script("return heard")) == "Once" + whole["text"][:cut]


def test_the_end_of_text_ends_it(tmp_path, calm):
    """A network whose every feature is alike, and whose table gives the EOT the largest logit."""
    tokenizer = make_tokenizer("byte", [], 0)
    path, model = random_page(tokenizer, "float16", tmp_path, block_size=16, arch="gpt2", n_layer=1, n_head=1, n_embd=4)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[tokenizer.eot_id] = 9.0
    path.write_text(page.page_text(Source(model, tokenizer, path, {}), "float16"), encoding="utf-8")
    calm.open(path)
    result = calm.ask(GENERATE, "Hi", {"max_new_tokens": 5})
    assert (result["text"], result["tokens"], result["reason"]) == ("", 0, "end")


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_text_has_the_bits_per_byte_that_evaluate_gives_it(family, pages, calm, script, tmp_path):
    text = "Once upon a time, naïve Zoë's frog — 3 feet tall! — said: 🙂\n\n" + TEXTS[0]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    run = pages[family]
    script("evaluate.py", "--checkpoint", run / "best_model.pt", "--text", tmp_path / "text.txt", "--output", tmp_path / "out.json")
    expected = json.loads((tmp_path / "out.json").read_text())[str(tmp_path / "text.txt")]["text"]
    calm.open(run / "best_model.html")
    result = calm.ask("score(args[0])", text)
    assert result["tokens"] == expected["tokens"] > 64 and result["bytes"] == expected["bytes"]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("char", TEXTS[0], None),
        ("char", "a☃b", "1 tokens are unknown to the tokenizer"),
        ("bpe, normalized", "A", "the tokenizer changes text before it encodes it"),
    ],
)
def test_no_bits_per_byte_where_they_would_mean_nothing(kind, text, reason, tmp_path, calm):
    path, _ = random_page(TOKENIZERS[kind], "int8", tmp_path, block_size=16, arch="qwen3", n_layer=1, n_head=1, n_embd=4)
    calm.open(path)
    result = calm.ask("score(args[0])", text)
    assert result["without"] == reason and (result["bits_per_byte"] is None) == (reason is not None)


# ---------------------------------------------------------------- the page


def test_writing_can_be_stopped_and_the_page_answers_meanwhile(pages, calm):
    calm.open(pages["qwen3"] / "best_model.html")
    calm.generate(prompt="Once upon a time", max_new_tokens=10**9, temperature=0, seed=3)
    calm.until(lambda: len(calm.all("#write ~ .output .tokens span")) > 30)
    longest = """let last = performance.now(), longest = 0, left = 6; const done = arguments[0];
        (function frame(now) {
            [longest, last] = [Math.max(longest, now - last), now];
            left-- ? requestAnimationFrame(frame) : done(longest);
        })(last);"""
    assert calm.driver.execute_async_script(longest) < 2000  # a page that computes by itself would not draw at all
    calm.find("#write .stop").click()
    calm.until(lambda: calm.idle("write"))
    status = calm.find("#write .status").text
    assert re.search(r"Stopped\. \d+ tokens, \d+ a second, seed 3\.", status)
    before = len(calm.all("#write ~ .output .tokens span"))
    time.sleep(0.1)
    assert len(calm.all("#write ~ .output .tokens span")) == before


def test_a_text_read_token_by_token_with_the_keyboard_alone(pages, calm):
    """Type a text, measure it, Tab into it, move with arrows: the alternatives are the model's five most probable tokens."""
    from selenium.webdriver.common.keys import Keys

    model, tokenizer, *_ = load_model(str(pages["qwen3"] / "best_model.pt"))
    calm.open(pages["qwen3"] / "best_model.html")
    text = "One day, a frog saw"
    calm.find("#text").send_keys(text, Keys.CONTROL, Keys.ENTER)
    calm.until(lambda: calm.find("#totals").is_displayed())
    assert calm.driver.execute_script("return document.querySelector('#read ~ .output .tokens').textContent") == text + "end"
    active = calm.driver.switch_to
    for _ in range(3):  # two buttons, then the text
        active.active_element.send_keys(Keys.TAB)
    active.active_element.send_keys(Keys.ARROW_RIGHT)
    active.active_element.send_keys(Keys.ARROW_RIGHT)
    ids = tokenizer.encode(text)
    with torch.inference_mode():
        probs = model(torch.tensor([[tokenizer.eot_id, *ids]]))[0][0, 2].softmax(0)
    tip = calm.find("#alternatives")
    assert tip.is_displayed()
    top = probs.topk(5)
    shown = [item.text.split() for item in calm.all("#alternatives li")]
    names = [tokenizer.decode([i]) for i in top.indices.tolist()]
    assert [row[0].replace("␣", " ").replace("⏎", "\n") for row in shown] == names
    assert [float(row[-1].removesuffix("%")) for row in shown] == pytest.approx((100 * top.values).tolist(), abs=0.051)
    label = active.active_element.get_attribute("aria-label")
    bits = -probs[ids[2]].log2().item()
    assert label.startswith(f"{tokenizer.decode([ids[2]]).strip()}: {bits:.1f} bits") and names[0].strip() in label
    active.active_element.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()
    active.active_element.send_keys(Keys.END)
    assert active.active_element.text == "end"
    active.active_element.send_keys(Keys.TAB)
    assert active.active_element.get_attribute("role") != "option"  # no trap


def test_every_control_has_a_name_and_the_mouse_shows_alternatives_too(pages, calm):
    from selenium.webdriver.common.action_chains import ActionChains

    calm.open(pages["gpt2"] / "best_model.html")
    calm.generate(prompt="Hello there", max_new_tokens=5, temperature=0)
    calm.until(lambda: calm.idle("write"))
    controls = [one for one in calm.all("button, input, textarea, [role=listbox], [role=option]") if one.is_displayed()]
    assert len(controls) > 15 and all(control.accessible_name for control in controls)
    ActionChains(calm.driver).move_to_element(calm.all("#write ~ .output span i")[1]).perform()
    assert calm.find("#alternatives").is_displayed()
    assert calm.find("#spoken").get_attribute("aria-live") == "polite" and calm.find("#write .status").aria_role == "status"


def test_the_page_could_not_reach_a_network(pages, browser):
    browser.open(pages["gpt2"] / "best_model.html")
    refused = browser.driver.execute_async_script(
        "const done = arguments[0]; fetch('https://example.org').then(() => done('reached'), (error) => done(String(error)))"
    )
    assert "Failed to fetch" in refused
    assert "Content Security Policy" in browser.driver.get_log("browser")[0]["message"]


# ---------------------------------------------------------------- the export


def test_the_file_needs_nothing_beside_it(pages):
    text = (pages["qwen3"] / "best_model.html").read_text(encoding="utf-8")
    assert not re.search(r"""\b(src|href)=|url\(|@import|https?://|importScripts|\{\{""", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_weights_are_rounded_to_the_nearest_step(dtype):
    weight = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    stored, shape, raw = page.round_weight(weight, dtype)
    assert len(raw) == {"int8": 7 * 54, "float16": 7 * 100}[dtype] and stored == dtype
    values = page.stored_values(stored, shape, raw)
    if dtype == "float16":
        assert torch.equal(values, weight.half().float())
    else:
        steps = weight.abs().amax(dim=1, keepdim=True) / 127
        assert ((values - weight).abs() <= steps * 0.5001).all() and torch.equal(values[3], weight[3])
    again = page.stored_values(*page.round_weight(values, dtype))
    assert torch.allclose(again, values, rtol=1e-6, atol=0)
    assert page.round_weight(weight[0], dtype)[0] == "float32"


def test_auto_takes_int8_where_its_cost_is_small(trained_run, tmp_path, capsys, monkeypatch):
    for allowed, dtype in ((0.5, "int8"), (-0.5, "float16")):
        monkeypatch.setitem(page.ALLOWED, 8, allowed)
        assert export_model.main(["--checkpoint", str(trained_run), "--format", "html", "--output", str(tmp_path / dtype)]) == 0
        assert re.search(rf"cost [+-]\d\.\d\d% of bits per byte on [\d,]+ held-out tokens, so they become {dtype}", capsys.readouterr().err)
        assert f'data-dtype="{dtype}"' in (tmp_path / dtype / "best_model.html").read_text()


def test_without_validation_data_auto_takes_float16(trained_run, tmp_path, capsys):
    content = load_checkpoint(trained_run / "best_model.pt")
    content["train_config"]["data_dir"] = (str(tmp_path / "gone"),)
    save_checkpoint(tmp_path / "best_model.pt", content)
    assert export_model.main(["--checkpoint", str(tmp_path / "best_model.pt"), "--format", "html"]) == 0
    assert "float16, since what int8 costs can't be measured: " in capsys.readouterr().err
    assert 'data-dtype="float16"' in (tmp_path / "best_model.html").read_text()


def test_what_is_written_is_read_back(trained_run, tmp_path, monkeypatch, capsys):
    whole = page.page_text
    monkeypatch.setattr(page, "page_text", lambda *args: re.sub("(>.{400})A", r"\1B", whole(*args), count=3))
    assert export_model.main(["--checkpoint", str(trained_run), "--format", "html", "--output", str(tmp_path)]) == 1
    assert "does not read back as it was written; the new best_model.html was deleted" in capsys.readouterr().err
    assert not (tmp_path / "best_model.html").exists()


def test_mistakes_are_one_sentence(trained_run, tmp_path, mistake):
    content = load_checkpoint(trained_run / "best_model.pt")
    values = json.loads(content["tokenizer"])
    values["normalizer"] = {"type": "NFKC"}
    save_checkpoint(tmp_path / "foreign.pt", content | {"tokenizer": json.dumps(values)})
    assert "the page knows the tokenizers that prepare_data.py makes" in mistake(
        "export_model.py", "--checkpoint", "foreign.pt", "--format", "html", cwd=tmp_path
    )
    content["model"]["wte.weight"][0, 0] = 1e5
    save_checkpoint(tmp_path / "large.pt", content)
    flags = ["--checkpoint", "large.pt", "--format", "html", "--html_weights", "float16"]
    assert "beyond 65,504" in mistake("export_model.py", *flags, cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.pt", "large.pt"]
