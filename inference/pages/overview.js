// The overview: every stage along the text in colour, and the shown values as a line.

const overview = by("overview"), canvas = overview.querySelector("canvas");
const LANE = 11, LINE = 64, GAP = 6;

// The value of each column of pixels that is looked for, small or large; NaN where none is known.
function foremost(values, columns) {
  const found = new Float64Array(columns).fill(NaN);
  for (let i = 0; i < values.length; i++) {
    const column = Math.min(columns - 1, Math.floor((i * columns) / N));
    const first = V.large ? found[column] >= values[i] : found[column] <= values[i];
    if (!first && !Number.isNaN(values[i])) found[column] = values[i];
  }
  return found;
}

const labelRoom = () => Math.min(130, Math.round(overview.clientWidth * 0.28));

function drawOverview() {
  const width = overview.clientWidth, ratio = window.devicePixelRatio || 1;
  const height = D.series.length * LANE + GAP + LINE;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d"), style = getComputedStyle(document.body);
  const ink = style.color, left = labelRoom(), room = Math.max(1, Math.floor(width - left));
  context.scale(ratio, ratio);
  context.font = `10px ${style.fontFamily}`;
  context.textBaseline = "middle";
  const columns = Math.min(room, N), lanes = D.series.map((each) => foremost(shownOf(each), columns));
  lanes.forEach((lane, number) => {
    const chosen = D.series[number] === series();
    context.font = `${chosen ? "bold " : ""}10px ${style.fontFamily}`;
    context.fillStyle = ink;
    context.save();
    context.beginPath();
    context.rect(0, number * LANE, left - 6, LANE);
    context.clip();
    context.fillText(D.series[number].name, 0, number * LANE + LANE / 2 + 0.5);
    context.restore();
    for (let x = 0; x < columns; x++) {
      context.fillStyle = css(colourAt(placeBetween(lane[x], V.limits, S.log)));
      const from = left + Math.floor((x * room) / columns), to = left + Math.floor(((x + 1) * room) / columns);
      context.fillRect(from, number * LANE, to - from, LANE - 1);
    }
  });
  const line = foremost(V.values, columns), top = D.series.length * LANE + GAP;
  const place = (value) => top + LINE - 4 - (LINE - 8) * placeBetween(value, V.limits, S.log);
  context.strokeStyle = style.getPropertyValue("--line");
  context.strokeRect(left + 0.5, top + 0.5, room - 1, LINE - 1);
  context.strokeStyle = ink;
  context.beginPath();
  let joined = false;
  for (let x = 0; x < columns; x++) {
    const y = place(line[x]), at = left + ((x + 0.5) * room) / columns;
    if (Number.isNaN(y)) joined = false;
    else {
      if (joined) context.lineTo(at, y);
      else context.moveTo(at, y);
      joined = true;
    }
  }
  context.stroke();
  context.font = `10px ${style.fontFamily}`;
  context.fillStyle = ink;
  if (V.limits) {
    context.fillText(shown(V.limits[1]), 0, top + 6);
    context.fillText(shown(V.limits[0]), 0, top + LINE - 6);
  }
  if (V.limits && S.limit >= V.limits[0] && S.limit <= V.limits[1]) {
    context.strokeStyle = style.getPropertyValue("--support");
    context.setLineDash([4, 3]);
    context.beginPath();
    context.moveTo(left, place(S.limit));
    context.lineTo(left + room, place(S.limit));
    context.stroke();
  }
  drawHere();
}

function drawHere() {
  const left = labelRoom(), room = overview.clientWidth - left;
  by("here").style.left = `${left + ((S.at + 0.5) / N) * room - 1}px`;
  overview.setAttribute("aria-valuemax", N - 1);
  overview.setAttribute("aria-valuenow", S.at);
  overview.setAttribute("aria-valuetext", `${whereOf(S.at)}, ${quoted(S.at)}, ${shown(V.values[S.at])}`);
}

// The token and the lane under a point of the overview, -1 where there is none.
function overviewAt(event) {
  const frame = overview.getBoundingClientRect(), left = labelRoom();
  const part = (event.clientX - frame.left - left) / (frame.width - left);
  const lane = Math.floor((event.clientY - frame.top) / LANE);
  return { token: part < 0 ? -1 : Math.min(N - 1, Math.floor(part * N)), lane: lane < D.series.length ? lane : -1 };
}
