"use strict";
// The page itself: what is typed goes to the worker, what it answers is shown. Scripts may use `model` below as the page does.

const $ = (selector, within = document) => within.querySelector(selector);

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** The model in its worker. Each method gives a promise of what the task of this name in worker.js gives; `on` hears what comes before. */
const model = (() => {
  const worker = new Worker(URL.createObjectURL(new Blob([$("#worker").textContent], { type: "text/javascript" })));
  const open = new Map();
  let calls = 0;
  worker.onerror = () => ($("#details").textContent = "This browser doesn't let the page compute; try another one.");
  worker.onmessage = ({ data }) => {
    const { on, resolve, reject } = open.get(data.call);
    if (!("result" in data) && !("error" in data)) return on(data);
    open.delete(data.call);
    return "error" in data ? reject(new Error(data.error)) : resolve(data.result);
  };
  const ask = (name, args, on = () => {}) => new Promise((resolve, reject) => {
    open.set(++calls, { on, resolve, reject });
    worker.postMessage({ call: calls, name, args });
  });
  const { config, tables, details } = JSON.parse($("#model").textContent);
  const stored = [...document.querySelectorAll(".weights")];
  const tensors = stored.map(({ dataset, textContent }) => ({ ...dataset, shape: dataset.shape.split(" ").map(Number), base64: textContent }));
  const ready = ask("load", { config, tables, tensors });
  stored.forEach((one) => one.remove()); // the worker has them
  return {
    config, tables, details, ready,
    encode: (text) => ask("encode", { text }),
    decode: (ids) => ask("decode", { ids }),
    logits: (ids) => ask("logits", { ids }),
    score: (text, on) => ask("score", { text }, on),
    generate: (prompt, options = {}, on) =>
      ask("generate", { prompt, temperature: 0.8, top_k: null, top_p: null, max_new_tokens: 300, seed: 0, stop: "", ...options }, on),
    stop: () => worker.postMessage({ name: "stop" }),
  };
})();
window.model = model;

const percent = (p) => (p < 0.0005 ? "< 0.1%" : `${(100 * p).toFixed(1)}%`);
const seen = (name) => name.replace(/^ | $/g, "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
const said = (name) => name.replaceAll("\n", " new line ").trim() || "space";

/** A text that grows token by token, and the tokens' alternatives, by mouse, touch and keyboard. One stop of the Tab key; arrows move in it. */
class TokenView {
  constructor(output) {
    [this.output, this.box] = [output, $(".tokens", output)];
    const token = ({ target }) => target.closest("[role=option]");
    this.box.before($("#scale").content.cloneNode(true));
    this.box.addEventListener("focusin", (event) => this.choose(token(event)));
    this.box.addEventListener("focusout", hideAlternatives);
    this.box.addEventListener("mouseover", (event) => token(event) && showAlternatives(token(event)));
    this.box.addEventListener("mouseout", () => (this.box.contains(document.activeElement) ? showAlternatives(this.chosen) : hideAlternatives()));
    this.box.addEventListener("keydown", (event) => this.move(event));
  }

  clear() {
    this.box.replaceChildren();
    [this.output.hidden, this.chosen] = [true, null];
  }

  add(token) {
    const { id, text, name, bits, p, given, top } = token, end = id === model.tables.eot_id;
    const [, blanks, ink] = text.trim() ? /^(\s*)(.*)$/s.exec(text) : ["", "", end ? "end" : text]; // a blank alone carries the colour itself
    const made = element("span", { tabIndex: -1, token, className: given ? "given" : end ? "end" : "" }, blanks, element("i", { textContent: ink }));
    made.role = "option";
    made.style.setProperty("--surprise", Math.min(1, (bits ?? 0) / 12).toFixed(3));
    made.classList.toggle("line", text.includes("\n"));
    const expected = top.map((best) => `${said(best.name)} ${percent(best.p)}`).join(", ");
    made.ariaLabel = bits === null ? said(name) : `${said(name)}: ${bits.toFixed(1)} bits, ${percent(p)}. Expected: ${expected}`;
    this.box.append(made);
    if (!this.chosen) this.choose(made, false);
    this.output.hidden = false;
  }

  choose(made, show = true) {
    if (this.chosen) this.chosen.tabIndex = -1;
    made.tabIndex = 0;
    this.chosen = made;
    if (show) showAlternatives(made);
  }

  move(event) {
    const all = this.box.children, here = this.chosen, index = [...all].indexOf(here);
    const line = (sign) => { // the nearest token of the line above or below
      const far = (one) => Math.abs(one.offsetLeft - here.offsetLeft) + 1000 * Math.abs(one.offsetTop - here.offsetTop);
      return [...all].filter((one) => sign * (one.offsetTop - here.offsetTop) > 0).sort((a, b) => far(a) - far(b))[0];
    };
    const targets = { ArrowRight: () => all[index + 1], ArrowLeft: () => all[index - 1], ArrowUp: () => line(-1), ArrowDown: () => line(1) };
    const target = { ...targets, Home: () => all[0], End: () => all[all.length - 1], Escape: hideAlternatives }[event.key];
    if (!target) return;
    event.preventDefault();
    target()?.focus();
  }
}

function showAlternatives(of) {
  const { token } = of, tip = $("#alternatives");
  const rows = token.top.map((best) => {
    const row = element("li", { className: best.id === token.id ? "same" : "" }, element("b", { textContent: seen(best.name) }), element("i"), percent(best.p));
    row.style.setProperty("--p", best.p);
    return row;
  });
  const figures = token.bits === null ? "the first token that was read" : `${percent(token.p)} · ${token.bits.toFixed(1)} bits`;
  tip.replaceChildren(element("p", {}, element("b", { textContent: seen(token.name) }), figures), element("ol", {}, ...rows));
  tip.hidden = false;
  const { left, right, top, bottom } = $("i", of).getBoundingClientRect();
  const room = document.documentElement.clientWidth - tip.offsetWidth - 12;
  const below = bottom + 8 + tip.offsetHeight < innerHeight || top < tip.offsetHeight + 8;
  tip.style.left = `${Math.max(12, Math.min((left + right - tip.offsetWidth) / 2, room)) + scrollX}px`;
  tip.style.top = `${(below ? bottom + 8 : top - tip.offsetHeight - 8) + scrollY}px`;
}

function hideAlternatives() {
  $("#alternatives").hidden = true;
}

/** Connects a form's buttons with a task of the model. run(hear): asks for it, and gives the sentence to end with. */
function connect(form, run) {
  const view = new TokenView($(".output", form.parentElement)), status = $(".status", form), stop = $(".stop", form);
  let current = Promise.resolve(), waiting = [];
  const flush = () => waiting.splice(0).forEach((token) => view.add(token)); // once for each picture that the screen shows
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    model.stop();
    await current;
    view.clear();
    const hear = ({ token, notice }) => {
      if (notice) status.textContent = notice;
      else if (waiting.push(token) === 1) requestAnimationFrame(flush);
    };
    stop.ariaDisabled = "false";
    status.textContent = form.dataset.doing;
    current = run(hear).then((sentence) => (status.textContent = sentence), (error) => (status.textContent = error.message));
    await current;
    flush();
    stop.ariaDisabled = "true";
  });
  stop.addEventListener("click", () => model.stop());
}

connect($("#write"), async (hear) => {
  const number = (name) => ($(`#${name}`).value === "" ? null : Number($(`#${name}`).value));
  const options = Object.fromEntries(["temperature", "top_k", "top_p", "max_new_tokens", "seed"].map((name) => [name, number(name)]));
  options.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  options.stop = $("#stop_text").value.replaceAll("\\n", "\n");
  const notices = [];
  const keep = (message) => (message.notice && notices.push(message.notice), hear(message));
  const { text, reason, tokens, seconds } = await model.generate($("#prompt").value, options, keep);
  $("#spoken").textContent = text;
  const why = { end: "The text has ended.", stop: "Stopped before the stop text.", length: "That is the length you asked for.", stopped: "Stopped." };
  return [...notices, why[reason], `${tokens} tokens, ${(tokens / seconds).toFixed(0)} a second, seed ${options.seed}.`].join(" ");
});

connect($("#read"), async (hear) => {
  $("#totals").hidden = true;
  const { tokens, bytes, loss, bits_per_byte, without, whole } = await model.score($("#text").value, hear);
  if (!tokens) return "Stopped.";
  const figures = { "bits per byte": bits_per_byte?.toFixed(3) ?? "–", "loss, nats per token": loss.toFixed(3), tokens, bytes };
  $("#totals").replaceChildren(...Object.entries(figures).map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
  $("#totals").hidden = false;
  return without ? `No bits per byte: ${without}.` : whole ? "" : "Stopped: the figures are those of the beginning.";
});

for (const box of document.querySelectorAll("textarea")) {
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) box.form.requestSubmit();
  });
}
document.addEventListener("keydown", (event) => event.key === "Escape" && hideAlternatives());
$("#details").textContent = model.details;
model.ready.catch((error) => ($("#details").textContent = `The model can't be loaded: ${error.message}`));
