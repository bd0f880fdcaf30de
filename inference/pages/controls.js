// Controls, keys and the address: each changes the state S, and what depends on it is drawn again.

const several = D.series.length > 1;
for (const each of document.querySelectorAll(".several")) each.hidden = !several;
const choices = (entries) => entries.map(([value, name]) => element("option", { value }, name));
const stages = D.series.map((each, number) => [number, each.name]);
by("a").append(...choices(stages));
by("b").append(...choices(stages));
by("q").append(...choices(Object.entries(D.quantities)));
by("count").textContent = `${N.toLocaleString("en")} tokens`;
by("outlined").textContent = D.outlined;
drawBar(by("bar"), D.anchors);
drawBar(by("past-bar"), PAST);

// Values of both signs have no logarithm; but margins that are not positive are hatched anyhow.
function hasLogarithm() {
  const signed = S.show === "d" || S.q === "increase";
  return !signed && V.values.some((each) => each > 0);
}

function drawControls() {
  for (const name of ["a", "b", "q"]) by(name).value = S[name];
  document.querySelector(`[name="show"][value="${S.show}"]`).checked = true;
  document.querySelector(`[name="scale"][value="${S.log ? "log" : "linear"}"]`).checked = true;
  document.querySelector('[name="scale"][value="log"]').disabled = !hasLogarithm();
  if (Number(by("limit").value) !== S.limit) by("limit").value = Number.isNaN(S.limit) ? "" : S.limit;
  if (by("find").value !== S.find) by("find").value = S.find;
  const side = V.large ? "At least" : "At most";
  by("side").textContent = side;
  const said = [];
  if (!Number.isNaN(S.limit)) said.push(`${countKept().toLocaleString("en")} of ${N.toLocaleString("en")} tokens ${side.toLowerCase()} ${shown(S.limit)}`);
  if (S.find) said.push(V.hits.length === 1 ? "1 match" : `${V.hits.length.toLocaleString("en")} matches`);
  by("said").textContent = said.join("; ");
  by("low").textContent = V.limits ? shown(V.limits[0]) : "";
  by("high").textContent = V.limits ? shown(V.limits[1]) : "";
  const of = S.show === "d" ? `${D.series[S.a].name} \u2212 ${D.series[S.b].name}` : series().name;
  by("of").textContent = `${D.quantities[S.q]}, ${of}`;
  const minus = S.show === "d" ? `, of each stage \u2212 ${D.series[S.b].name}` : "";
  by("lanes").textContent = `The ${V.large ? "largest" : "smallest"} value of each stretch of the text, in the same colours${minus}`;
  by("bar").setAttribute("aria-label", "From small values, dark, to large ones, light");
  by("past-legend").hidden = S.pin < 0 || !series().past;
  const margins = valuesOf(series(), "margin");
  document.querySelector(".has-x").hidden = !margins.some((each) => each <= 0);
  document.querySelector(".has-u").hidden = !V.values.some(Number.isNaN);
  for (const name of ["find-before", "find-next"]) by(name).disabled = !V.hits.length;
  for (const name of ["support-before", "support-next"]) by(name).disabled = !series().support.length;
}

const ADDRESS = ["a", "b", "show", "q", "log", "limit", "find", "at", "pin"];
// The second stage is at first that of another run, where there is one.
const other = D.series.findIndex((each) => each.run !== D.series[0].run);
const START = { ...S, b: other > 0 ? other : Math.min(1, D.series.length - 1) };
let written = 0;

function writeAddress() {
  clearTimeout(written);
  written = setTimeout(() => { // browsers refuse an address that changes many times a second
    const said = new URLSearchParams();
    for (const name of ADDRESS) if (!Object.is(S[name], START[name])) said.set(name, S[name]);
    if (`#${said}` !== (location.hash || "#")) history.replaceState(null, "", `#${said}`);
  }, 200);
}

// An address may say anything: what makes no sense is left as it is at the start.
function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  const within = (name, least, end) => {
    const value = Number(said.get(name) ?? NaN);
    return Number.isInteger(value) && value >= least && value < end ? value : START[name];
  };
  Object.assign(S, START);
  for (const name of ["a", "b"]) S[name] = within(name, 0, D.series.length);
  for (const name of ["at", "pin"]) S[name] = within(name, name === "pin" ? -1 : 0, N);
  if (several && ["a", "b", "d"].includes(said.get("show"))) S.show = said.get("show");
  if (Object.hasOwn(D.quantities, said.get("q") ?? "")) S.q = said.get("q");
  S.log = said.get("log") === "true";
  if (said.has("limit")) S.limit = Number(said.get("limit"));
  S.find = said.get("find") ?? "";
}

// Draw everything again.
function update() {
  compute();
  if (S.log && !hasLogarithm()) {
    S.log = false;
    compute();
  }
  drawControls();
  drawRows({ afresh: true });
  showDetails(S.at);
  drawOverview();
  showTable(S.firstRow ?? S.at);
  writeAddress();
}

// Look at another token.
function go(i, { quietly = false, afresh = false } = {}) {
  S.at = Math.max(0, Math.min(N - 1, i));
  if (!quietly) reveal(S.at);
  drawRows({ afresh });
  drawCursor();
  showDetails(S.at);
  drawHere();
  writeAddress();
}

function pin(i) {
  S.pin = i;
  if (i >= 0) S.at = i;
  compute();
  drawControls();
  go(S.at, { quietly: true, afresh: true });
}

// The token of a row next to the horizontal place of token i in its own row.
function inRow(i, step) {
  const row = V.rowOf[i] + step;
  if (row < 0) return 0;
  if (row >= V.rows.length) return N - 1;
  const left = (number, until) => {
    let width = 0;
    for (const [token, from, to] of V.rows[number]) {
      const parts = partsOfToken(token).slice(from, to);
      const end = width + parts.reduce((sum, [part]) => sum + widthOf(part), 0);
      if (until(token, width, end)) return { token, width };
      width = end;
    }
    return { token: V.rows[number].at(-1)[0], width };
  };
  const here = left(V.rowOf[i], (token) => token === i).width;
  return left(row, (_, from, end) => end > here + 1).token;
}

function onKey(event) {
  if (event.altKey || event.metaKey) return;
  const screen = Math.max(1, Math.floor(box.clientHeight / ROW) - 1), row = V.rows[V.rowOf[S.at]];
  const keys = {
    ArrowLeft: () => go(S.at - 1),
    ArrowRight: () => go(S.at + 1),
    ArrowUp: () => go(inRow(S.at, -1)),
    ArrowDown: () => go(inRow(S.at, 1)),
    PageUp: () => go(inRow(S.at, -screen)),
    PageDown: () => go(inRow(S.at, screen)),
    Home: () => go(event.ctrlKey ? 0 : row[0][0]),
    End: () => go(event.ctrlKey ? N - 1 : row.at(-1)[0]),
    Enter: () => pin(S.pin === S.at ? -1 : S.at),
    " ": () => pin(S.pin === S.at ? -1 : S.at),
    Escape: () => pin(-1),
    n: () => go(nextOf(series().support, S.at, true)),
    p: () => go(nextOf(series().support, S.at, false)),
    "/": () => by("find").focus(),
  };
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || (event.ctrlKey && !["Home", "End"].includes(event.key))) return;
  event.preventDefault();
  act();
}

const tokenUnder = (event) => {
  const token = event.target.closest?.("#rows [data-token]")?.dataset.token;
  return token === undefined ? -1 : Number(token);
};

box.addEventListener("keydown", onKey);
box.addEventListener("scroll", () => drawRows());
box.addEventListener("pointermove", (event) => {
  const token = event.pointerType === "touch" ? -1 : tokenUnder(event);
  if (token >= 0 && token !== S.subject) showDetails(token);
});
box.addEventListener("pointerleave", () => S.subject !== S.at && showDetails(S.at));
box.addEventListener("click", (event) => {
  const token = tokenUnder(event);
  if (token >= 0) pin(token === S.pin ? -1 : token);
});
by("details").addEventListener("click", (event) => {
  const there = event.target.closest("[data-goto]");
  if (there) {
    go(Number(there.dataset.goto));
    box.focus({ preventScroll: true });
  }
});

by("controls").addEventListener("submit", (event) => event.preventDefault());
for (const name of ["a", "b"]) by(name).addEventListener("change", (event) => {
  S[name] = Number(event.target.value);
  update();
});
by("q").addEventListener("change", (event) => {
  S.q = event.target.value;
  update();
});
by("controls").addEventListener("change", (event) => {
  if (event.target.name === "show") S.show = event.target.value;
  else if (event.target.name === "scale") S.log = event.target.value === "log";
  else return;
  update();
});
by("limit").addEventListener("input", (event) => {
  S.limit = event.target.value === "" ? NaN : event.target.valueAsNumber;
  update();
});
const toHit = (forwards) => V.hits.length && go(nextOf(V.hits, S.at, forwards));
by("find").addEventListener("input", (event) => {
  S.find = event.target.value;
  findText();
  if (V.hits.length && !V.hits.includes(S.at)) S.at = V.hits.find((each) => each >= S.at) ?? V.hits[0];
  reveal(S.at);
  update();
});
by("find").addEventListener("keydown", (event) => {
  if (event.key === "Enter") toHit(!event.shiftKey);
  if (event.key === "Escape") box.focus();
});
by("find-before").addEventListener("click", () => toHit(false));
by("find-next").addEventListener("click", () => toHit(true));
by("support-before").addEventListener("click", () => go(nextOf(series().support, S.at, false)));
by("support-next").addEventListener("click", () => go(nextOf(series().support, S.at, true)));
by("csv").addEventListener("click", saveCsv);

by("table-box").addEventListener("toggle", () => showTable(S.at));
by("rows-next").addEventListener("click", () => showTable(S.pastRows));
by("rows-before").addEventListener("click", () => {
  let from = S.firstRow;
  for (let left = ROWS; from > 0 && left > 0;) if (kept(--from)) left--;
  showTable(from);
});

overview.addEventListener("click", (event) => {
  const { token, lane } = overviewAt(event);
  if (lane >= 0) {
    S[S.show === "b" ? "b" : "a"] = lane;
    update();
  }
  if (token >= 0) go(token);
});
overview.addEventListener("keydown", (event) => {
  const step = Math.max(1, Math.round(N / 100));
  const to = {
    ArrowLeft: S.at - step, ArrowDown: S.at - step, ArrowRight: S.at + step, ArrowUp: S.at + step,
    PageDown: S.at - 10 * step, PageUp: S.at + 10 * step, Home: 0, End: N - 1,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  go(to);
});

function onResize() {
  layOut();
  reveal(S.at);
  drawRows({ afresh: true });
  drawOverview();
}
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return drawRows(); // a keyboard on a small screen changes heights alone
  width = window.innerWidth;
  onResize();
});
window.addEventListener("hashchange", () => {
  readAddress();
  findText();
  update();
  reveal(S.at);
  drawRows();
});
window.addEventListener("beforeprint", () => drawRows({ afresh: true, all: true }));
window.addEventListener("afterprint", () => drawRows({ afresh: true }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawOverview);

readAddress();
layOut();
findText();
update();
reveal(S.at);
drawRows();
document.documentElement.dataset.ready = Math.round(performance.now());
