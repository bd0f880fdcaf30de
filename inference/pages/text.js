// The text: rows that are made as they come into view, and the token that is looked at.

const ROW = 27, AROUND = 6; // height of a row in pixels; rows made beyond what is seen
const S = { a: 0, b: 0, show: "a", q: Object.keys(D.quantities)[0], log: false, limit: NaN, find: "", at: 0, pin: -1 };
const V = { values: null, large: false, limits: null, rows: [], rowOf: null, hits: [], isHit: null, past: new Map() };
const box = by("text"), rowsBox = by("rows");
const drawn = new Map(); // rows in the document, by number

const series = () => D.series[S.show === "b" ? S.b : S.a];

function layOut() {
  const style = getComputedStyle(by("legend").querySelector(".t"));
  pen.font = `15px ${style.fontFamily}`;
  widths.clear();
  const frame = getComputedStyle(box);
  const room = box.clientWidth - parseFloat(frame.paddingLeft) - parseFloat(frame.paddingRight) - 6;
  V.rows = rowsFor(Math.max(room, 80));
  V.rowOf = new Uint32Array(N);
  for (let r = V.rows.length - 1; r >= 0; r--) for (const [token] of V.rows[r]) V.rowOf[token] = r;
  rowsBox.style.height = `${V.rows.length * ROW}px`;
}

function nameOf(i) {
  const parts = [quoted(i), `${D.quantities[S.q]} ${shown(V.values[i])}`];
  if (series().outlined[i]) parts.push(D.outlined);
  const margin = valueAt(series(), "margin", i);
  if (!(margin > 0)) parts.push(Number.isNaN(margin) ? "margin not known" : "not feasible");
  if (i === S.pin) parts.push("pinned");
  if (V.past.has(i)) parts.push(`${percents(V.past.get(i))} of the attention of the pinned token`);
  return parts.join(", ");
}

const starts = new Set(D.starts);

function drawPiece([token, from, to]) {
  const span = document.createElement("span");
  const classes = ["t"], value = V.values[token];
  const margin = valueAt(series(), "margin", token);
  let colour = null;
  if (S.pin >= 0 && token !== S.pin) {
    const percent = V.past.get(token);
    if (percent !== undefined) colour = mixed(PAST, Math.sqrt(percent / 100));
  } else if (kept(token)) colour = colourAt(placeBetween(value, V.limits, S.log));
  if (colour) {
    classes.push(inkOn(colour));
    span.style.backgroundColor = css(colour);
    if (S.pin < 0 && Number.isNaN(value)) classes.push("u");
    if (S.pin < 0 && margin <= 0) classes.push("x");
  } else classes.push("f");
  if (series().outlined[token]) classes.push("s");
  if (from === 0 && starts.has(token)) classes.push("w");
  if (V.isHit?.[token]) classes.push("h");
  if (token === S.pin) classes.push("p");
  else if (token === S.at) classes.push("c");
  span.className = classes.join(" ");
  span.dataset.token = token;
  if (from === 0) {
    span.id = `t${token}`;
    span.setAttribute("role", "option");
    span.setAttribute("aria-setsize", N);
    span.setAttribute("aria-posinset", token + 1);
    span.setAttribute("aria-selected", token === S.pin);
    span.setAttribute("aria-label", nameOf(token));
  } else span.setAttribute("role", "presentation");
  for (const [part, isMark] of partsOfToken(token).slice(from, to)) {
    if (isMark) {
      const mark = document.createElement("i");
      mark.textContent = part;
      span.append(mark);
    } else span.append(part);
  }
  return span;
}

function drawRow(number) {
  const row = document.createElement("div");
  row.className = "row";
  row.setAttribute("role", "presentation");
  row.style.top = `${number * ROW}px`;
  row.append(...V.rows[number].map(drawPiece));
  return row;
}

// Make the rows that are seen, or all of them for a printer, and drop the others.
function drawRows({ afresh = false, all = false } = {}) {
  const first = all ? 0 : Math.max(0, Math.floor(box.scrollTop / ROW) - AROUND);
  const last = all ? V.rows.length : Math.min(V.rows.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + AROUND);
  for (const [number, row] of drawn) {
    if (afresh || number < first || number >= last) {
      row.remove();
      drawn.delete(number);
    }
  }
  let before = null; // in the order of the text, which is that of reading and printing
  for (let number = first; number < last; number++) {
    let row = drawn.get(number);
    if (!row) {
      row = drawRow(number);
      drawn.set(number, row);
      if (before) before.after(row);
      else rowsBox.prepend(row);
    }
    before = row;
  }
  if (by(`t${S.at}`)) box.setAttribute("aria-activedescendant", `t${S.at}`);
  else box.removeAttribute("aria-activedescendant");
}

// Mark the token that is looked at.
function drawCursor() {
  for (const each of rowsBox.querySelectorAll(".c")) each.classList.remove("c");
  if (S.at !== S.pin) for (const each of rowsBox.querySelectorAll(`[data-token="${S.at}"]`)) each.classList.add("c");
}

function reveal(i) {
  const top = V.rowOf[i] * ROW, height = box.clientHeight - 12;
  if (top < box.scrollTop) box.scrollTop = Math.max(0, top - ROW);
  else if (top + ROW > box.scrollTop + height) box.scrollTop = top + 2 * ROW - height;
}

const informative = new Uint8Array(N);
for (let i = 0; i < N; i++) informative[i] = placeOf(i).position >= 2;

// What is shown of a stage: its values, or what those of the second stage leave of them.
function shownOf(stage) {
  const values = valuesOf(stage, S.q);
  if (S.show !== "d") return values;
  const second = valuesOf(D.series[S.b], S.q);
  return values.map((value, i) => value - second[i]);
}

// Values of what is shown, their limits, what is found and the past of the pinned token.
function compute() {
  V.values = shownOf(series());
  V.large = D.large.includes(S.q);
  // The first two positions of a window have margin 1, whatever the model is.
  V.limits = limitsOf(V.values.filter((_, i) => informative[i]), S.log) ?? limitsOf(V.values, S.log);
  V.past = new Map(S.pin < 0 ? [] : pastOf(series(), 1, S.pin).map((each) => [each.token, each.percent]));
}

function findText() {
  V.hits = [];
  V.isHit = null;
  const wanted = S.find.toLowerCase();
  if (!wanted) return;
  const from = new Int32Array(N + 1);
  const pieces = [];
  for (let i = 0, length = 0; i < N; i++) {
    const token = tokenText(i).toLowerCase();
    pieces.push(token);
    length += token.length;
    from[i + 1] = length;
  }
  const text = pieces.join("");
  V.isHit = new Uint8Array(N);
  let token = 0;
  for (let place = text.indexOf(wanted); place >= 0; place = text.indexOf(wanted, place + wanted.length)) {
    while (from[token + 1] <= place) token++;
    V.hits.push(token);
    for (let i = token; i < N && from[i] < place + wanted.length; i++) V.isHit[i] = 1;
  }
}

// The first of ascending places beyond i, or before it; around the ends of the text.
function nextOf(places, i, forwards) {
  if (!places.length) return i;
  if (forwards) return places.find((each) => each > i) ?? places[0];
  return places.findLast((each) => each < i) ?? places.at(-1);
}

// Tokens that the limit leaves: all where there is none, and otherwise none without a value.
const kept = (i) => Number.isNaN(S.limit) || (V.large ? V.values[i] >= S.limit : V.values[i] <= S.limit);
const countKept = () => V.values.reduce((count, _, i) => count + kept(i), 0);
