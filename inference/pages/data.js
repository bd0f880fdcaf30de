// The data of the page: what `page.py` wrote, read number by number where it is asked for.

const by = (id) => document.getElementById(id);

function fail(message) {
  by("failed").hidden = false;
  by("failed").textContent = message;
}

// Whatever goes wrong is said: a page that stays silent looks like one without numbers.
const failed = (error) => fail(`The script of this page has failed (${error}), and what it shows may be wrong: reload it, or try another browser.`);
window.addEventListener("error", (event) => failed(event.error ?? event.message));
window.addEventListener("unhandledrejection", (event) => failed(event.reason));

async function inflate(text) {
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

if (typeof DecompressionStream === "undefined") {
  fail("This browser is too old for this page: use one of 2023 or later.");
  return;
}
const D = JSON.parse(by("data").textContent);
const N = D.count;
const [bytes, ...ranks] = await Promise.all(D.blobs.map(inflate));

// Whole number i of a column: its bytes lie in planes of N, the lowest first.
function whole(column, i) {
  let found = 0;
  for (let plane = column.planes - 1; plane >= 0; plane--) {
    found = found * 256 + bytes[column.at + plane * N + i];
  }
  return found;
}

const powers = Array.from({ length: 309 }, (_, exponent) => Number(`1e${exponent}`));

// The value of a code, as `numbers.py` explains.
function valueOf(code, least) {
  if (code < 4) return [NaN, -Infinity, Infinity, 0][code];
  const half = Math.floor((code - 4) / 2);
  const exponent = Math.floor(half / 900) + least - 2;
  const mantissa = (half % 900) + 100;
  // Division and product of exact numbers: the nearest double, which is shown in three digits.
  const size = exponent < 0 ? mantissa / powers[-exponent] : mantissa * powers[exponent];
  return code % 2 ? -size : size;
}

const tokenText = (i) => D.symbols[whole(D.tokens, i)];

// Index, window and position go up by one within each piece.
const [begins, indices, windows, positions] = D.pieces;

function pieceOf(i) {
  let low = 0, high = begins.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (begins[middle] <= i) low = middle;
    else high = middle - 1;
  }
  return low;
}

function placeOf(i) {
  const piece = pieceOf(i), step = i - begins[piece];
  return { index: indices[piece] + step, window: windows[piece], position: positions[piece] + step };
}

// Where a token is, in words: of sequences from here and there, a number in the text means nothing.
function whereOf(i) {
  const place = placeOf(i);
  return D.inText ? `token ${place.index}` : `sequence ${place.window}, position ${place.position}`;
}

const columnOf = (series, quantity) => series.values[quantity] ?? D.runs[series.run]?.[quantity];

function valueAt(series, quantity, i) {
  const column = columnOf(series, quantity);
  return column ? valueOf(whole(column, i), column.least) : NaN;
}

const unknown = new Float64Array(N).fill(NaN);

function valuesOf(series, quantity) {
  const column = columnOf(series, quantity);
  if (!column) return unknown;
  if (!column.values) {
    column.values = new Float64Array(N);
    for (let i = 0; i < N; i++) column.values[i] = valueOf(whole(column, i), column.least);
  }
  return column.values;
}

for (const series of D.series) {
  series.outlined = new Uint8Array(N);
  for (const i of series.support) series.outlined[i] = 1;
  series.name = D.series.every((each) => each.run === series.run)
    ? series.stage : `${series.run}: ${series.stage}`;
}
const withPast = D.series.filter((each) => each.past);

// Past tokens of token i that count most, by covariance (0) or attention (1): where, and percents.
function pastOf(series, kind, i) {
  const order = withPast.indexOf(series), stride = (D.wide + 1) * N, found = [];
  if (order < 0) return found;
  for (const rank of ranks) {
    const at = (2 * order + kind) * stride + i;
    const behind = rank[at] + (D.wide > 1 ? 256 * rank[at + N] : 0);
    if (behind) found.push({ token: i - behind, percent: rank[at + D.wide * N] });
  }
  return found;
}

// Three digits, as they are stored.
function shown(value) {
  if (Number.isNaN(value)) return "\u2013";
  if (!Number.isFinite(value)) return value > 0 ? "\u221e" : "\u2212\u221e";
  return String(Number(value.toPrecision(3))).replace("-", "\u2212");
}

const percents = (percent) => (percent ? `${percent} %` : "< 1 %");
