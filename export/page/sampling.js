"use strict";
// From logits to a token, as sample_token of models.py does it, but for the random numbers: the same seed draws other ones than torch's.

/** Random numbers in [0, 1), always the same for a seed: a counter, mixed well (Steele et al. 2014, "Fast splittable ... generators"). */
function seededRandom(seed) {
  let state = seed | 0;
  return () => {
    state = (state + 0x9e3779b9) | 0;
    let z = Math.imul(state ^ (state >>> 16), 0x85ebca6b);
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35);
    return ((z ^ (z >>> 16)) >>> 0) / 2 ** 32;
  };
}

/** Draw from logits (V). top_k, top_p: null for all tokens. Temperature 0 takes the most probable token. */
function sample(logits, { temperature, top_k, top_p }, random) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  if (temperature < 1e-6) return best;
  const weights = new Float64Array(logits.length);
  for (let id = 0; id < logits.length; id++) weights[id] = Math.exp((logits[id] - logits[best]) / temperature);
  let ids = Uint32Array.from(weights.keys());
  const sum = () => {
    let total = 0;
    for (const id of ids) total += weights[id];
    return total;
  };
  if (top_k || top_p) ids.sort((a, b) => weights[b] - weights[a]);
  if (top_k) ids = ids.subarray(0, top_k);
  if (top_p) {
    const enough = top_p * sum();
    let before = 0, kept = 0;
    while (kept < ids.length && before < enough) before += weights[ids[kept++]];
    ids = ids.subarray(0, kept);
  }
  let rest = random() * sum();
  for (const id of ids) if ((rest -= weights[id]) < 0) return id;
  return ids[ids.length - 1];
}

/** How a model's prediction (logits) met a token: its probability p, how many bits of surprise that is, and the five most probable ids. */
function judge(logits, id) {
  const top = [];
  for (let i = 0; i < logits.length; i++) {
    if (top.length === 5 && logits[i] <= logits[top[4]]) continue;
    let place = top.length;
    while (place > 0 && logits[i] > logits[top[place - 1]]) place--;
    top.splice(place, 0, i);
    top.length = Math.min(top.length, 5);
  }
  let total = 0;
  for (let i = 0; i < logits.length; i++) total += Math.exp(logits[i] - logits[top[0]]);
  const nats = (i) => Math.log(total) + logits[top[0]] - logits[i];
  return { bits: nats(id) / Math.LN2, p: Math.exp(-nats(id)), top: top.map((i) => ({ id: i, p: Math.exp(-nats(i)) })) };
}
