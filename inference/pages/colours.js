// What colour a value has.

const mixed = (anchors, place) => {
  const at = Math.min(Math.max(place, 0), 1) * (anchors.length - 1);
  const low = Math.min(Math.floor(at), anchors.length - 2), part = at - low;
  return anchors[low].map((channel, c) => Math.round(channel + part * (anchors[low + 1][c] - channel)));
};
const PAST = [[255, 245, 235], [253, 174, 107], [213, 94, 0], [127, 39, 4]];

function luminance(colour) {
  const [r, g, b] = colour.map((each) => {
    const channel = each / 255;
    return channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Type on a colour: black ("k") or white ("l").
const inkOn = (colour) => (luminance(colour) > 0.179 ? "k" : "l");

// From the 1st to the 99th percentile of what is finite, and of a logarithm what is positive.
function limitsOf(values, logarithmic) {
  const finite = values.filter((each) => Number.isFinite(each) && (!logarithmic || each > 0)).sort();
  if (!finite.length) return null;
  const at = (level) => finite[Math.round(level * (finite.length - 1))];
  let [low, high] = [at(0.01), at(0.99)];
  if (!(high - low > 1e-6 * Math.max(1e-12, Math.abs(high)))) low = logarithmic ? high / 10 : high - 1;
  return [low, high];
}

// Where a value lies between the limits, 0 to 1, or NaN.
function placeBetween(value, limits, logarithmic) {
  if (Number.isNaN(value) || !limits) return NaN;
  if (!logarithmic) return Math.min(Math.max((value - limits[0]) / (limits[1] - limits[0]), 0), 1);
  if (value <= 0) return 0;
  return Math.min(Math.max(Math.log(value / limits[0]) / Math.log(limits[1] / limits[0]), 0), 1);
}

const colourAt = (place) => (Number.isNaN(place) ? D.unknown : mixed(D.anchors, place));
const css = (colour) => `rgb(${colour.join(",")})`;

function drawBar(canvas, anchors) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = css(mixed(anchors, x / (canvas.width - 1)));
    context.fillRect(x, 0, 1, 1);
  }
}
