"use strict";
// The network of models.py, a token at a time with the keys and values of those before: families gpt2 and qwen3.
// Letters in comments: C n_embd, D head_dim, V vocabulary. Numbers are rounded to float32 wherever they are stored.

/** Base64 -> bytes (Uint8Array). */
function fromBase64(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

/** All 65,536 values of float16 (IEEE 754) as float32. */
function float16Values() {
  return Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : (sign * 2 ** -14 * fraction) / 1024;
  });
}

/**
 * One tensor of the file: a vector as Float32Array; a matrix as {values, scales}, whose rows are to be multiplied by their scale (null: by
 * nothing). int8 stays int8, since reading fewer bytes is faster; there the scales stand before the values, all little-endian as CPUs are.
 */
function readTensor({ dtype, shape }, base64, float16) {
  const { buffer } = fromBase64(base64);
  if (dtype === "float32") return new Float32Array(buffer);
  if (dtype === "int8") return { values: new Int8Array(buffer, 4 * shape[0]), scales: new Float32Array(buffer, 0, shape[0]) };
  const stored = new Uint16Array(buffer), values = new Float32Array(stored.length);
  for (let i = 0; i < values.length; i++) values[i] = float16[stored[i]];
  return { values, scales: null };
}

/** out = a row of a matrix. */
function takeRow(out, { values, scales }, row) {
  for (let i = 0, at = row * out.length; i < out.length; i++) out[i] = values[at + i] * (scales ? scales[row] : 1);
}

/** out = matrix x + bias, where the matrix has a row for each value of out. Four sums, since one would wait for itself. */
function linear(out, { values, scales }, bias, x) {
  const columns = x.length, even = columns - (columns % 4);
  for (let row = 0, at = 0; row < out.length; row++, at += columns) {
    let a = 0, b = 0, c = 0, d = 0, i = 0;
    for (; i < even; i += 4) {
      a += values[at + i] * x[i];
      b += values[at + i + 1] * x[i + 1];
      c += values[at + i + 2] * x[i + 2];
      d += values[at + i + 3] * x[i + 3];
    }
    for (; i < columns; i++) a += values[at + i] * x[i];
    out[row] = (a + b + c + d) * (scales ? scales[row] : 1) + (bias ? bias[row] : 0);
  }
}

/** LayerNorm (Ba et al. 2016). */
function layerNorm(out, x, weight, bias) {
  let mean = 0, variance = 0;
  for (let i = 0; i < x.length; i++) mean += x[i] / x.length;
  for (let i = 0; i < x.length; i++) variance += (x[i] - mean) ** 2 / x.length;
  const scale = 1 / Math.sqrt(variance + 1e-5);
  for (let i = 0; i < x.length; i++) out[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
}

/** RMSNorm (Zhang and Sennrich 2019). */
function rmsNorm(out, x, weight) {
  let square = 0;
  for (let i = 0; i < x.length; i++) square += (x[i] * x[i]) / x.length;
  const scale = 1 / Math.sqrt(square + 1e-6);
  for (let i = 0; i < x.length; i++) out[i] = x[i] * scale * weight[i];
}

/** Rotary positions (Su et al. 2021): rotate the pairs (x[i], x[i + D/2]) of a head by their position's angles. */
function rotate(x, cos, sin) {
  const half = x.length / 2;
  for (let i = 0; i < half; i++) {
    const a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

class Network {
  /** config: the fields of GPTConfig. weights: GPT's parameter names -> what `readTensor` gives. */
  constructor(config, weights) {
    Object.assign(this, { config, weights, length: 0 });
    const { arch, n_layer, n_embd, kv_heads, head_dim, block_size, mlp_width, vocab_size } = config;
    const wide = (size) => new Float32Array(size);
    const layer = () => ({ keys: wide(block_size * kv_heads * head_dim), values: wide(block_size * kv_heads * head_dim) });
    this.cache = Array.from({ length: n_layer }, layer);
    this.qkv = wide(n_embd + 2 * kv_heads * head_dim);
    [this.x, this.h, this.mixed, this.features] = [0, 1, 2, 3].map(() => wide(n_embd));
    [this.inner, this.scores, this.logits] = [wide(mlp_width * (arch === "qwen3" ? 2 : 1)), wide(block_size), wide(vocab_size)];
    this.middle = this.inner.subarray(0, mlp_width);
    [this.cos, this.sin] = [wide(head_dim / 2), wide(head_dim / 2)];
  }

  /** Forget everything that was read. */
  reset() {
    this.length = 0;
  }

  linear(out, name, x) {
    linear(out, this.weights[`${name}.weight`], this.weights[`${name}.bias`], x);
  }

  norm(out, name, x) {
    const rule = this.config.arch === "qwen3" ? rmsNorm : layerNorm;
    rule(out, x, this.weights[`${name}.weight`], this.weights[`${name}.bias`]);
  }

  /** Read a token behind those before; afterwards `features` (C) is what the output layer reads. */
  read(id) {
    const { config, weights, x, h, inner, middle, length: position } = this, rotary = config.arch === "qwen3";
    if (position >= config.block_size) throw new Error(`more than block_size=${config.block_size} tokens`);
    takeRow(x, weights["wte.weight"], id);
    if (rotary) this.turn(position);
    else {
      takeRow(h, weights["wpe.weight"], position);
      add(x, h);
    }
    this.length++;
    for (let layer = 0; layer < config.n_layer; layer++) {
      const block = `h.${layer}`;
      this.norm(h, `${block}.ln_1`, x);
      this.attend(layer, h);
      this.linear(h, `${block}.attn.c_proj`, this.mixed);
      add(x, h);
      this.norm(h, `${block}.ln_2`, x);
      this.linear(inner, `${block}.mlp.c_fc`, h);
      for (let i = 0; i < middle.length; i++) {
        const gate = inner[i];
        if (rotary) middle[i] = (gate / (1 + Math.exp(-gate))) * inner[i + middle.length]; // SwiGLU: gate and up are stacked
        else middle[i] = 0.5 * gate * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (gate + 0.044715 * gate ** 3))); // GELU
      }
      this.linear(h, `${block}.mlp.c_proj`, middle);
      add(x, h);
    }
    this.norm(this.features, "ln_f", x);
  }

  /** The angles of a position, rounded to float32 at every step as in models.py. */
  turn(position) {
    const round = Math.fround, { head_dim: D, theta } = this.config;
    for (let i = 0; i < D / 2; i++) {
      const angle = round(position / round(theta ** round((2 * i) / D)));
      this.cos[i] = Math.cos(angle);
      this.sin[i] = Math.sin(angle);
    }
  }

  /** Causal attention of the newest token, h (C), over all that were read -> `mixed` (C), heads side by side. */
  attend(layer, h) {
    const { config, qkv, mixed, scores, length } = this, { n_embd: C, n_head, kv_heads, head_dim: D } = config;
    const { keys, values } = this.cache[layer], width = kv_heads * D, group = n_head / kv_heads;
    this.linear(qkv, `h.${layer}.attn.c_attn`, h);
    if (config.arch === "qwen3") {
      for (let head = 0; head < n_head + kv_heads; head++) { // the queries' heads, then the keys'
        const part = qkv.subarray(head * D, head * D + D);
        this.norm(part, `h.${layer}.attn.${head < n_head ? "q" : "k"}_norm`, part);
        rotate(part, this.cos, this.sin);
      }
    }
    keys.set(qkv.subarray(C, C + width), (length - 1) * width);
    values.set(qkv.subarray(C + width), (length - 1) * width);
    mixed.fill(0);
    for (let head = 0; head < n_head; head++) {
      const start = head * D, shared = Math.floor(head / group) * D; // where this head's keys and values stand
      let highest = -Infinity, total = 0;
      for (let t = 0, at = shared; t < length; t++, at += width) {
        let product = 0;
        for (let i = 0; i < D; i++) product += qkv[start + i] * keys[at + i];
        scores[t] = product / Math.sqrt(D);
        highest = Math.max(highest, scores[t]);
      }
      for (let t = 0; t < length; t++) total += scores[t] = Math.exp(scores[t] - highest);
      for (let t = 0, at = shared; t < length; t++, at += width) {
        const share = scores[t] / total;
        for (let i = 0; i < D; i++) mixed[start + i] += share * values[at + i];
      }
    }
  }

  /** Logits (V) of the token that follows. The array is used again by the next call. */
  predict() {
    linear(this.logits, this.weights["wte.weight"], null, this.features);
    return this.logits;
  }
}
