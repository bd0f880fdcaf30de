// What is said of one token, the table of all of them, and the CSV file.

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function pastList(title, past) {
  const items = past.map(({ token, percent }) => {
    const button = element("button", { type: "button", "data-goto": token }, quoted(token, 20));
    const back = S.subject - token;
    return element("li", {}, element("span", {}, percents(percent)), button, element("span", {}, `${back} back`));
  });
  return [element("h3", {}, title), items.length ? element("ol", {}, ...items) : element("p", {}, "none")];
}

function stageTable(i) {
  const names = Object.keys(D.quantities).filter((name) => D.series.some((each) => each.values[name]));
  const head = element("tr", {}, element("th", { scope: "col" }, "stage"));
  for (const name of names) head.append(element("th", { scope: "col", title: D.quantities[name] }, D.short[name]));
  const body = element("tbody", {});
  for (const each of D.series) {
    const row = element("tr", each === series() ? { class: "shown" } : {});
    const head = element("th", { scope: "row" }, each.name);
    if (each.outlined[i]) head.append(" ", element("span", { role: "img", "aria-label": D.outlined, title: D.outlined, class: "mark" }, "\u25a2"));
    row.append(head);
    for (const name of names) row.append(element("td", { "data-value": name }, shown(valueAt(each, name, i))));
    body.append(row);
  }
  const table = element("table", {}, element("thead", {}, head), body);
  return element("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Values by stage" }, table);
}

function runValues(i) {
  const list = element("dl", {});
  const labels = Object.keys(D.runs);
  for (const label of labels) {
    for (const name of Object.keys(D.quantities).filter((each) => D.runs[label][each])) {
      const said = labels.length > 1 ? `${label}: ${D.quantities[name]}` : D.quantities[name];
      list.append(element("dt", {}, said), element("dd", { "data-value": name }, shown(valueOf(whole(D.runs[label][name], i), D.runs[label][name].least))));
    }
  }
  return list;
}

// Say what is known of token i.
function showDetails(i) {
  S.subject = i;
  const place = placeOf(i), found = by("details");
  const title = `${quoted(i)}${i === S.pin ? ", pinned" : ""}`;
  const facts = element("dl", {});
  const fact = (name, value) => facts.append(element("dt", {}, name), element("dd", {}, value));
  fact("token", `${place.index} of ${D.inText ? "the text" : "those shown"}`);
  fact(D.part, `${place.window}, position ${place.position}`);
  if (S.show === "d") fact("difference", shown(V.values[i]));
  if (S.pin >= 0 && i !== S.pin) {
    const percent = V.past.get(i);
    fact("attention", percent === undefined ? `not among the ${V.past.size} that the pinned token attends to most` : `${percents(percent)} of that of the pinned token`);
  }
  found.replaceChildren(element("h2", {}, title), facts, runValues(i), stageTable(i));
  if (series().past) {
    if (ranks.length) {
      found.append(...pastList(`Past tokens that make the covariance (${series().name})`, pastOf(series(), 0, i)));
      found.append(...pastList(`Past tokens by attention (${series().name})`, pastOf(series(), 1, i)));
    } else found.append(element("p", {}, "The text has too many tokens and stages for their past tokens to be on this page."));
  }
}

// Columns of the table and of the CSV file: name, and what a token has there.
function columnsShown() {
  const columns = [
    ["index", (i) => String(placeOf(i).index)],
    ["token", null],
    [D.part, (i) => String(placeOf(i).window)],
    ["position", (i) => String(placeOf(i).position)],
  ];
  const chosen = S.show === "a" ? [D.series[S.a]] : S.show === "b" ? [D.series[S.b]] : [D.series[S.a], D.series[S.b]];
  for (const each of chosen) {
    for (const [name, title] of Object.entries(D.quantities)) {
      if (columnOf(each, name)) columns.push([`${each.name} ${title}`, (i) => valueAt(each, name, i)]);
    }
    columns.push([`${each.name} outlined`, (i) => String(each.outlined[i])]);
  }
  if (S.show === "d") columns.push([`difference of ${D.quantities[S.q]}`, (i) => V.values[i]]);
  return columns;
}

const ROWS = 100;

// The table from a token on; of the rows of one view, since of all they would take seconds.
function showTable(from) {
  if (!by("table-box").open) return;
  const columns = columnsShown(), body = element("tbody", {});
  let i = Math.max(0, Math.min(from, N - 1));
  S.firstRow = i;
  for (let made = 0; i < N && made < ROWS; i++) {
    if (!kept(i)) continue;
    const row = element("tr", {});
    for (const [name, cell] of columns) {
      if (!cell) {
        row.append(element("th", { scope: "row" }, quoted(i)));
      } else {
        const value = cell(i);
        row.append(element("td", {}, typeof value === "string" ? value : shown(value)));
      }
    }
    body.append(row);
    made++;
  }
  S.pastRows = i;
  const head = element("tr", {}, ...columns.map(([name]) => element("th", { scope: "col" }, name)));
  const caption = element("caption", {}, `Tokens ${S.firstRow + 1} to ${i} of ${N.toLocaleString("en")}`);
  by("table").replaceChildren(element("table", {}, caption, element("thead", {}, head), body));
  by("rows-before").disabled = S.firstRow === 0;
  by("rows-next").disabled = i >= N;
}

function csvCell(text) {
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csvOfShown() {
  const columns = columnsShown(), lines = [columns.map(([name]) => csvCell(name)).join(",")];
  const plain = (value) => (typeof value === "string" ? value : Number.isNaN(value) ? "nan" : Number.isFinite(value) ? String(Number(value.toPrecision(3))) : value > 0 ? "inf" : "-inf");
  for (let i = 0; i < N; i++) {
    if (kept(i)) lines.push(columns.map(([, cell]) => csvCell(cell ? plain(cell(i)) : tokenText(i))).join(","));
  }
  return `${lines.join("\n")}\n`;
}

function saveCsv() {
  const link = element("a", { download: "margins.csv" });
  const file = URL.createObjectURL(new Blob([csvOfShown()], { type: "text/csv;charset=utf-8" }));
  link.href = file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(file), 10000);
}
