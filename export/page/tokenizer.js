"use strict";
// Text -> token ids and back. The tables come from the model's tokenizer.json, and the ids are those that it gives.
// (Only of characters that are younger than one of the two programs may one not know that they are letters: Unicode grows.)
// A token's spelling is a string with one character, of code 0 to 255, for each of its bytes in UTF-8.

// GPT-2's words: contractions, letters, digits, other signs, each with the space before it; blanks (Radford et al. 2019)
const WORDS =
  /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const NO_RANK = 2 ** 31 - 1;

function spell(text) {
  let spelling = "";
  for (const byte of new TextEncoder().encode(text)) spelling += String.fromCharCode(byte);
  return spelling;
}

class Tokenizer {
  /**
   * tables: kind (bpe, word, wordpiece, char), tokens (spelling of each id, null for special ones), merges (for bpe: the ids a, b and what
   * they become, flat, in the order of merging), normalizers, unknown_id (or null), longest_word (bytes, wordpiece).
   */
  constructor(tables) {
    Object.assign(this, tables);
    this.ids = new Map(this.tokens.map((spelling, id) => [spelling, id]));
    this.ids.delete(null);
    this.ranks = new Map(); // of pairs of ids
    for (let i = 0; i < this.merges.length; i += 3) this.ranks.set(this.merges[i] * 65536 + this.merges[i + 1], i / 3);
  }

  normalize(text) {
    for (const name of this.normalizers) {
      // sign by sign, as the Rust library does it: a word's last sigma is no exception
      text = name === "NFC" ? text.normalize("NFC") : Array.from(text, (sign) => sign.toLowerCase()).join("");
    }
    return text;
  }

  /** Ids of a text. Special tokens in it are ordinary text. */
  encode(text) {
    text = this.normalize(text);
    if (this.kind === "char") return Array.from(text, (sign) => this.ids.get(spell(sign)) ?? this.unknown_id);
    const ids = [];
    for (const part of this.kind === "wordpiece" ? text.split(/(#)/) : [text]) { // there "#" only marks what stands inside a word
      for (const [word] of part.matchAll(WORDS)) for (const id of this[this.kind](spell(word))) ids.push(id);
    }
    return ids;
  }

  word(spelling) {
    return [this.ids.get(spelling) ?? this.unknown_id];
  }

  /** The longest known parts, from the left (Wu et al. 2016). */
  wordpiece(spelling) {
    const found = [];
    for (let start = 0, end; start < spelling.length; start = end) {
      const prefix = start ? "##" : "";
      for (end = spelling.length; end > start && !this.ids.has(prefix + spelling.slice(start, end)); ) end--;
      if (end === start || spelling.length > this.longest_word) return [this.unknown_id];
      found.push(this.ids.get(prefix + spelling.slice(start, end)));
    }
    return found;
  }

  /** Byte-pair encoding: of all neighbours that can be merged, those that were learned first, the leftmost first (Sennrich et al. 2016). */
  bpe(spelling) {
    const ids = Int32Array.from(spelling, (byte) => this.ids.get(byte));
    const rank = (i) => this.ranks.get(ids[i] * 65536 + ids[i + 1]) ?? NO_RANK;
    const ranks = Int32Array.from(ids, (_, i) => rank(i)); // of each id and the next one
    let length = ids.length;
    for (;;) {
      let best = NO_RANK, at = 0;
      for (let i = 0; i < length - 1; i++) if (ranks[i] < best) best = ranks[(at = i)];
      if (best === NO_RANK) return ids.subarray(0, length);
      ids[at] = this.merges[3 * best + 2];
      ids.copyWithin(at + 1, at + 2, length);
      ranks.copyWithin(at + 1, at + 2, length--);
      ranks[at] = at < length - 1 ? rank(at) : NO_RANK;
      if (at > 0) ranks[at - 1] = rank(at - 1);
    }
  }

  /** What an id stands for, as bytes; none for special tokens. */
  bytes(id) {
    let spelling = this.tokens[id] ?? "";
    if (this.kind === "wordpiece") spelling = spelling.replaceAll("##", "");
    return Uint8Array.from(spelling, (byte) => byte.charCodeAt(0));
  }

  /** How an id is called where it stands alone: its text, its bytes where they are no whole characters, the name of a special token. */
  name(id) {
    if (this.tokens[id] === null) return id === this.eot_id ? "end of text" : id === this.unknown_id ? "unknown" : "unused";
    try {
      return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(this.bytes(id));
    } catch {
      return Array.from(this.bytes(id), (byte) => "\\x" + byte.toString(16).padStart(2, "0")).join("");
    }
  }

  /** A function from one id after the other to the characters that are whole with it; called without an id it gives the rest. */
  decoder() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return (id) => (id === undefined ? decoder.decode() : decoder.decode(this.bytes(id), { stream: true }));
  }

  decode(ids) {
    const step = this.decoder();
    return ids.map(step).join("") + step();
  }
}
