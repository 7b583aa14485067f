"use strict";
// What computes, apart from the page, so that the page never waits. A message {call, name, args} asks for one of `tasks` below; the answer
// is {call, result} or {call, error}. Before it come {call, token} for each token of a text that grows, and {call, notice}.

let network, tokenizer, stopped, wake;

// Between two tokens the worker looks for messages, such as a stop. A message to itself comes back sooner than any timer.
const { port1, port2 } = new MessageChannel();
port1.onmessage = () => wake();
const pause = () => new Promise((resolve) => {
  wake = resolve;
  port2.postMessage(null);
});

/** What the page shows of a token. before: the logits that predicted it, null where nothing did. */
function describe(id, text, before) {
  const { bits, p, top } = before ? judge(before, id) : { bits: null, p: null, top: [] };
  return { id, text, name: tokenizer.name(id), bits, p, top: top.map((best) => ({ name: tokenizer.name(best.id), ...best })) };
}

/** Passes tokens on as soon as no stop text can begin in them. */
class Outlet {
  constructor(stop, emit) {
    Object.assign(this, { stop, emit, held: [] });
  }

  /** Whether the stop text is complete with this token; then what stands before it was passed on. */
  push(token) {
    this.held.push(token);
    const text = this.held.map((one) => one.text).join(""), found = this.stop ? text.indexOf(this.stop) : -1;
    let keep = 0;
    for (let n = 1; n < this.stop.length; n++) if (text.endsWith(this.stop.slice(0, n))) keep = n;
    this.release(found < 0 ? text.length - keep : found, found >= 0);
    return found >= 0;
  }

  /** Pass on so many characters, in whole tokens, or with a part of the last one. */
  release(length, in_part = false) {
    while (this.held.length && (this.held[0].text.length <= length || (in_part && length > 0))) {
      const token = this.held.shift();
      length -= token.text.length;
      this.emit({ token: length < 0 ? { ...token, text: token.text.slice(0, length) } : token });
    }
  }
}

const tasks = {
  /** Once, at first. tensors: [{name, dtype, shape, base64}]. */
  load({ config, tables, tensors }) {
    const float16 = float16Values();
    network = new Network(config, Object.fromEntries(tensors.map((one) => [one.name, readTensor(one, one.base64, float16)])));
    tokenizer = new Tokenizer(tables);
  },

  encode: ({ text }) => tokenizer.encode(text),

  decode: ({ ids }) => tokenizer.decode(ids),

  /** Logits behind each of the ids, read from a fresh beginning: a Float32Array (V) for each. */
  logits({ ids }) {
    network.reset();
    return ids.map((id) => (network.read(id), network.predict().slice()));
  },

  /** Continue a prompt. Gives {text, reason: end, stop, length or stopped, tokens, seconds}. */
  async generate({ prompt, max_new_tokens, stop, seed, ...options }, emit) {
    const whole = [tokenizer.eot_id, ...tokenizer.encode(prompt)], block = network.config.block_size, written = [];
    const cut = whole.length > block, decode = tokenizer.decoder(), step = tokenizer.decoder(), random = seededRandom(seed);
    const outlet = new Outlet(stop, emit);
    let ids = whole.slice(-block), reason = "length", full = false;
    if (cut) emit({ notice: `The prompt is longer than the model's context: only its last ${block} tokens are read.` });
    network.reset();
    for (let i = 0; i < ids.length && !stopped; i++) {
      if (i || cut) emit({ token: { ...describe(ids[i], decode(ids[i]), i ? network.predict() : null), given: true } });
      network.read(ids[i]);
      await pause();
    }
    const start = performance.now();
    while (!stopped && reason === "length" && written.length < max_new_tokens) {
      const logits = network.predict(), id = sample(logits, options, random), ended = id === tokenizer.eot_id;
      if (!ended) written.push(id);
      if (outlet.push(describe(id, ended ? step() : step(id), logits))) reason = "stop";
      else if (ended) reason = "end";
      ids.push(id);
      let next = [id];
      if (network.length === block) { // no room: the newer half is read again, since positions can't be moved
        if (!full) emit({ notice: "The context is full: from here on the model only knows the newer half of it, again and again." });
        full = true;
        next = ids = ids.slice(-Math.max(1, block >> 1));
        network.reset();
      }
      for (const one of reason === "length" ? next : []) {
        network.read(one);
        await pause();
        if (stopped) break;
      }
    }
    if (reason !== "stop") outlet.release(Infinity);
    const text = tokenizer.decode(written), end = stop ? text.indexOf(stop) : -1;
    const result = { text: end < 0 ? text : text.slice(0, end), reason: stopped ? "stopped" : reason, tokens: written.length };
    return { ...result, seconds: (performance.now() - start) / 1000 };
  },

  /** How well a text is predicted: each token and its end once, in windows of block_size, as evaluate.py does it. */
  async score({ text }, emit) {
    const ids = [...tokenizer.encode(text), tokenizer.eot_id], decode = tokenizer.decoder();
    let nats = 0, tokens = 0;
    for (let last = tokenizer.eot_id; tokens < ids.length && !stopped; last = ids[tokens++]) {
      if (tokens % network.config.block_size === 0) network.reset();
      network.read(last);
      const token = describe(ids[tokens], decode(ids[tokens]), network.predict());
      nats += token.bits * Math.LN2;
      emit({ token });
      await pause();
    }
    const bytes = spell(tokenizer.normalize(text)).length, unknown = ids.filter((id) => id === tokenizer.unknown_id).length;
    const without = tokenizer.loss_reason ?? (unknown ? `${unknown} tokens are unknown to the tokenizer` : null);
    const bits_per_byte = without || tokens < ids.length || !bytes ? null : nats / Math.LN2 / bytes;
    return { tokens, bytes, loss: nats / tokens, bits_per_byte, without, whole: tokens === ids.length };
  },
};

let before = Promise.resolve(); // tasks run one after the other; only a stop doesn't wait
onmessage = ({ data: { call, name, args } }) => {
  if (name === "stop") return (stopped = true);
  before = before.then(async () => {
    stopped = false;
    try {
      postMessage({ call, result: await tasks[name](args, (message) => postMessage({ call, ...message })) });
    } catch (error) {
      postMessage({ call, error: String(error) });
    }
  });
};
