// The model of every size in one file, as matrix-vector products; and what the page computes from its lists.
//
// docs/web.md describes the file. Chunk j of a size holds the channels low to high; a model of size m is the first
// `count` chunks. Nothing here touches the page, so that Node can import it too.

export const FORMAT = "fmrl_dist web export";
export const FORMAT_VERSION = 1;
const LAYER_NORM_EPS = 1e-5;
const TIMED_RUNS = 64; // of each size; browsers round their clocks, so only a mean means something
const COUNTED_RUNS = 0.75; // the fastest; the others had to wait
const FIRST_RUNS = 8; // before the code is compiled; then at least as many count
const WARM_UP_MS = 25; // for each size, unless so many runs take longer

export class DamagedExportError extends Error {}

// Reading

/** The model of a manifest (model.json) and its file (model.bin, an ArrayBuffer), checked against its hashes. */
export async function readModel(manifest, buffer) {
  if (manifest.format !== FORMAT || manifest.format_version !== FORMAT_VERSION) {
    throw new DamagedExportError(`model.json is of another format (version ${manifest.format_version})`);
  }
  const chunks = [];
  let low = 0;
  for (const section of manifest.sections) {
    const bytes = new Uint8Array(buffer).subarray(section.offset, section.offset + section.bytes);
    if ((await sha256(bytes)) !== section.sha256) {
      throw new DamagedExportError(`the part of model.bin for size ${section.size} is not what its sha256 says`);
    }
    const tensors = {};
    for (const [name, entry] of Object.entries(section.tensors)) {
      tensors[name] = readTensor(buffer, section.offset + entry.offset, entry);
    }
    for (const name of Object.keys(tensors)) {
      const scales = tensors[`${name}.scale`];
      if (scales && name !== "items") tensors[name] = scaled(tensors[name], scales);
    }
    chunks.push({ low, high: section.size, tensors });
    low = section.size;
  }
  return {
    chunks,
    sizes: manifest.sizes,
    depth: manifest.depth,
    numItems: manifest.num_items,
    maxLength: manifest.max_length,
    normalize: manifest.normalize,
    popular: manifest.popular,
    inputNorm: manifest.input_norm,
    outputNorm: manifest.output_norm,
    inverseNorms: new Map(),
  };
}

/** Numbers of a tensor. Item vectors stay int8, if they are; float16 becomes float32. */
function readTensor(buffer, offset, { dtype, shape }) {
  const length = shape.reduce((product, n) => product * n, 1);
  if (dtype === "float32") return new Float32Array(buffer, offset, length);
  if (dtype === "float16") return Float32Array.from(new Uint16Array(buffer, offset, length), fromHalf);
  if (dtype === "int8") return new Int8Array(buffer, offset, length);
  throw new DamagedExportError(`model.json has numbers of type ${dtype}`);
}

/** A matrix of int8 rows times their scales. */
function scaled(values, scales) {
  const width = values.length / scales.length;
  return Float32Array.from(values, (value, i) => value * scales[Math.floor(i / width)]);
}

/** The number that 16 bits of IEEE 754 stand for. */
export function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

// One event

/** Number of chunks of a trained size. */
export function chunkCount(model, size) {
  return model.sizes.indexOf(size) + 1;
}

/** State before the first event: real and imaginary part for each block. */
export function initialState(model, count) {
  return new Float32Array(model.depth * 2 * model.sizes[count - 1]);
}

/** An item's vector, or, for row -1, the start position's, which serves the empty history. */
export function itemVector(model, count, row) {
  const x = new Float32Array(model.sizes[count - 1]);
  const factor = model.chunks[0].tensors["items.scale"]?.[row] ?? 1;
  for (let j = 0; j < count; j++) {
    const { low, high, tensors } = model.chunks[j];
    const from = row < 0 ? 0 : row * (high - low);
    const values = row < 0 ? tensors.start : tensors.items;
    for (let c = low; c < high; c++) x[c] = values[from + c - low] * factor;
  }
  return x;
}

/** One event: the state after it and the output z, from the state before it and the event's vector. */
export function step(model, count, state, vector) {
  const width = model.sizes[count - 1];
  const next = new Float32Array(state.length);
  let x = model.inputNorm ? layerNorm(model, count, "input_norm", vector) : Float32Array.from(vector);
  for (let k = 0; k < model.depth; k++) {
    const block = `blocks.${k}`;
    const re = next.subarray(2 * k * width, (2 * k + 1) * width);
    const im = next.subarray((2 * k + 1) * width, (2 * k + 2) * width);
    const normed = layerNorm(model, count, `${block}.lru_norm`, x);
    const drivenRe = linear(model, count, `${block}.b.re`, normed);
    const drivenIm = linear(model, count, `${block}.b.im`, normed);
    for (let j = 0; j < count; j++) {
      const { low, high, tensors } = model.chunks[j];
      const decayRe = tensors[`${block}.decay.re`];
      const decayIm = tensors[`${block}.decay.im`];
      const gamma = tensors[`${block}.gamma`];
      for (let c = low; c < high; c++) {
        const i = c - low;
        const oldRe = state[2 * k * width + c];
        const oldIm = state[(2 * k + 1) * width + c];
        re[c] = decayRe[i] * oldRe - decayIm[i] * oldIm + gamma[i] * drivenRe[c];
        im[c] = decayRe[i] * oldIm + decayIm[i] * oldRe + gamma[i] * drivenIm[c];
      }
    }
    const readRe = linear(model, count, `${block}.c.re`, re);
    const readIm = linear(model, count, `${block}.c.im`, im);
    for (let c = 0; c < width; c++) x[c] += readRe[c] - readIm[c];
    const h = layerNorm(model, count, `${block}.ffn_norm`, x);
    const gate = linear(model, count, `${block}.gate`, h);
    const hidden = linear(model, count, `${block}.w_1`, h);
    for (let c = 0; c < width; c++) hidden[c] *= gate[c] / (1 + Math.exp(-gate[c]));
    const out = linear(model, count, `${block}.w_2`, hidden);
    for (let c = 0; c < width; c++) x[c] += out[c];
  }
  if (model.outputNorm) x = layerNorm(model, count, "output_norm", x);
  return { state: next, z: x };
}

/** A nested weight times x, plus its bias if it has one: chunk j of the result reads the inputs up to its own end. */
function linear(model, count, name, x) {
  const y = new Float32Array(x.length);
  for (let j = 0; j < count; j++) {
    const { low, high, tensors } = model.chunks[j];
    const weight = tensors[`${name}.weight`];
    const bias = tensors[`${name}.bias`];
    for (let r = low, at = 0; r < high; r++) {
      let sum = 0;
      for (let c = 0; c < high; c++, at++) sum += weight[at] * x[c];
      y[r] = bias ? sum + bias[r - low] : sum;
    }
  }
  return y;
}

/** Layer-norm of each chunk by itself. */
function layerNorm(model, count, name, x) {
  const y = new Float32Array(x.length);
  for (let j = 0; j < count; j++) {
    const { low, high, tensors } = model.chunks[j];
    const weight = tensors[`${name}.weight`];
    const bias = tensors[`${name}.bias`];
    let mean = 0;
    let variance = 0;
    for (let c = low; c < high; c++) mean += x[c] / (high - low);
    for (let c = low; c < high; c++) variance += (x[c] - mean) ** 2 / (high - low);
    const inverse = 1 / Math.sqrt(variance + LAYER_NORM_EPS);
    for (let c = low; c < high; c++) y[c] = (x[c] - mean) * inverse * weight[c - low] + bias[c - low];
  }
  return y;
}

// Lists

/** Scores of all items for an output z. */
export function scoreItems(model, count, z) {
  const scores = new Float32Array(model.numItems);
  for (let j = 0; j < count; j++) {
    const { low, high, tensors } = model.chunks[j];
    const part = z.subarray(low, high);
    const { items } = tensors;
    for (let row = 0, at = 0; row < scores.length; row++) {
      let sum = 0;
      for (let c = 0; c < part.length; c++, at++) sum += items[at] * part[c];
      scores[row] += sum;
    }
  }
  const scales = model.chunks[0].tensors["items.scale"];
  if (scales) for (let row = 0; row < scores.length; row++) scores[row] *= scales[row];
  if (model.normalize) {
    const inverse = inverseNorms(model, count);
    const ofOutput = inverseNorm(z);
    for (let row = 0; row < scores.length; row++) scores[row] *= inverse[row] * ofOutput;
  }
  return scores;
}

/** One over a vector's length, with which products become cosines. */
function inverseNorm(vector) {
  return 1 / Math.max(Math.hypot(...vector), 2 ** -126);
}

/** That of each item's vector at a size. */
function inverseNorms(model, count) {
  if (!model.inverseNorms.has(count)) {
    const inverse = new Float32Array(model.numItems);
    for (let row = 0; row < model.numItems; row++) {
      inverse[row] = inverseNorm(itemVector(model, count, row));
    }
    model.inverseNorms.set(count, inverse);
  }
  return model.inverseNorms.get(count);
}

/** The k best rows without the excluded ones (a Set), best first; of equal scores the lower row comes first. */
export function topK(scores, k, excluded) {
  const rows = [];
  const best = [];
  for (let row = 0; row < scores.length; row++) {
    const score = scores[row];
    if ((rows.length === k && !(score > best[k - 1])) || excluded.has(row)) continue;
    let place = rows.length === k ? k - 1 : rows.length;
    for (; place > 0 && best[place - 1] < score; place--) {
      rows[place] = rows[place - 1];
      best[place] = best[place - 1];
    }
    rows[place] = row;
    best[place] = score;
  }
  return { rows, scores: best };
}

/** Where each row of a list stands in a reference list: places up (+) or down (-), or null where it is not there. */
export function compareLists(rows, reference) {
  const moves = rows.map((row, place) => (reference.includes(row) ? reference.indexOf(row) - place : null));
  return {
    moves,
    common: moves.filter((move) => move !== null).length,
    up: moves.filter((move) => move > 0).length,
    down: moves.filter((move) => move !== null && move < 0).length,
  };
}

/** Text as it is compared: without accents and capitals. */
export function foldText(text) {
  return text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
}

/** Rows whose folded names hold all words of a query; those that begin with it, then with its words, come first. */
export function searchItems(folded, query, limit) {
  const whole = foldText(query).trim();
  const words = whole.split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const found = [[], [], []];
  for (let row = 0; row < folded.length && found[0].length < limit; row++) {
    const name = folded[row];
    if (!words.every((word) => name.includes(word))) continue;
    const group = name.startsWith(whole) ? 0 : words.every((word) => ` ${name}`.includes(` ${word}`)) ? 1 : 2;
    if (found[group].length < limit) found[group].push(row);
  }
  return found.flat().slice(0, limit);
}

// The model as the page asks it

/** Recommends in this browser. It keeps the states along the last history of each size: a further event is one step. */
export class LocalModel {
  /** Items go by their rows; names are what they are searched by and shown as. */
  constructor(model, names = []) {
    this.model = model;
    this.names = names;
    this.folded = names.map(foldText);
    this.known = new Map(); // size → {rows, states}, states[i] before event i
    this.clocks = new Map(); // size → ms of the last runs
  }

  /** The k best rows after a history of rows, without those in it; ms is what one event takes at this size. */
  async recommend(history, k, size) {
    const { model } = this;
    const count = chunkCount(model, size);
    const rows = history.slice(-model.maxLength);
    if (!rows.length && model.popular) {
      return { rows: model.popular.rows.slice(0, k), scores: model.popular.shares.slice(0, k), ms: this.meanTime(size) };
    }
    const state = this.stateBeforeLast(count, size, rows);
    const excluded = new Set(history);
    const started = performance.now();
    const vector = itemVector(model, count, rows.length ? rows[rows.length - 1] : -1);
    const { z } = step(model, count, state, vector);
    const best = topK(scoreItems(model, count, z), k, excluded);
    return { ...best, ms: this.meanTime(size, performance.now() - started) };
  }

  name(row) {
    return this.names[row];
  }

  async search(query, limit) {
    return searchItems(this.folded, query, limit);
  }

  /** State after all events but the last, from what is known of the history's beginning. */
  stateBeforeLast(count, size, rows) {
    const known = this.known.get(size) ?? { rows: [], states: [initialState(this.model, count)] };
    let same = 0;
    while (same < Math.min(known.states.length, rows.length) - 1 && known.rows[same] === rows[same]) same++;
    const states = known.states.slice(0, same + 1);
    for (let i = same; i < rows.length - 1; i++) {
      states.push(step(this.model, count, states[i], itemVector(this.model, count, rows[i])).state);
    }
    this.known.set(size, { rows: rows.slice(), states });
    return states[Math.max(rows.length - 1, 0)];
  }

  meanTime(size, ...runs) {
    const clock = [...(this.clocks.get(size) ?? []), ...runs].slice(-TIMED_RUNS);
    this.clocks.set(size, clock);
    const counted = [...clock].sort((a, b) => a - b).slice(0, Math.ceil(COUNTED_RUNS * clock.length));
    return counted.reduce((sum, time) => sum + time, 0) / counted.length;
  }

  /** Run a size until its time is known. */
  async warmUp(size) {
    const started = performance.now();
    const isEnough = (run) => run >= 2 * FIRST_RUNS && performance.now() - started > WARM_UP_MS;
    for (let run = 0; run < FIRST_RUNS + TIMED_RUNS && !isEnough(run); run++) {
      if (run === FIRST_RUNS) this.clocks.delete(size);
      await this.recommend([0], 10, size);
    }
    return this.recommend([0], 10, size);
  }
}

// SHA-256

/** In hexadecimal digits; browsers have it only on https and localhost, so there is a plain one as well. */
export async function sha256(bytes) {
  const digest = globalThis.crypto?.subtle ? await crypto.subtle.digest("SHA-256", bytes) : plainSha256(bytes);
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** FIPS 180-4, as an ArrayBuffer of 32 bytes. */
export function plainSha256(bytes) {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((prime) => n % prime)) primes.push(n);
  const fraction = (x) => Math.floor((x - Math.floor(x)) * 2 ** 32) | 0;
  const constants = primes.map((prime) => fraction(Math.cbrt(prime)));
  const hash = Int32Array.from(primes.slice(0, 8), (prime) => fraction(Math.sqrt(prime)));
  const padded = new Uint8Array(((bytes.length + 72) >> 6) << 6);
  padded.set(bytes);
  padded[bytes.length] = 128;
  const view = new DataView(padded.buffer);
  view.setUint32(padded.length - 8, Math.floor(bytes.length / 2 ** 29));
  view.setUint32(padded.length - 4, bytes.length << 3);
  const rotate = (x, n) => (x >>> n) | (x << (32 - n));
  const words = new Int32Array(64);
  for (let at = 0; at < padded.length; at += 64) {
    for (let i = 0; i < 16; i++) words[i] = view.getInt32(at + 4 * i);
    for (let i = 16; i < 64; i++) {
      const a = words[i - 15];
      const b = words[i - 2];
      const first = rotate(a, 7) ^ rotate(a, 18) ^ (a >>> 3);
      const second = rotate(b, 17) ^ rotate(b, 19) ^ (b >>> 10);
      words[i] = words[i - 16] + first + words[i - 7] + second;
    }
    let [a, b, c, d, e, f, g, h] = hash;
    for (let i = 0; i < 64; i++) {
      const choice = (e & f) ^ (~e & g);
      const majority = (a & b) ^ (a & c) ^ (b & c);
      const first = (h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + choice + constants[i] + words[i]) | 0;
      const second = ((rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + majority) | 0;
      [a, b, c, d, e, f, g, h] = [(first + second) | 0, a, b, c, (d + first) | 0, e, f, g];
    }
    [a, b, c, d, e, f, g, h].forEach((value, i) => (hash[i] += value));
  }
  const digest = new DataView(new ArrayBuffer(32));
  hash.forEach((value, i) => digest.setInt32(4 * i, value));
  return digest.buffer;
}
