// Tokens as they are drawn: every character can be seen, and none moves its neighbours.

const MARKS = { "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\u0000": "\u2400", "\u007f": "\u2421" };
const HIDDEN = /[\p{C}\p{Zl}\p{Zp}\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0]/u;
const COMBINING = /^\p{M}/u;
const graphemes = new Intl.Segmenter(undefined, { granularity: "grapheme" });

// Joins of an emoji are no marks: they are part of what is seen.
const joins = (character) => character === "\u200d" || character === "\ufe0f";

// The text of a token in parts: what is drawn, and whether a mark stands for it.
function drawnParts(text) {
  if (text === "") return [["\u2508", true]]; // goes on with the character of the token before
  const parts = [];
  for (const { segment } of graphemes.segment(text)) {
    const characters = [...segment];
    if (characters.length > 1 && !characters.some((each) => HIDDEN.test(each) && !joins(each))) {
      parts.push([COMBINING.test(segment) ? "\u25cc" + segment : segment, false]);
      continue;
    }
    for (const each of characters) {
      if (MARKS[each]) parts.push([MARKS[each], true]);
      else if (HIDDEN.test(each) || (joins(each) && characters.length === 1)) {
        const point = each.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
        parts.push([`<${point}>`, true]);
      } else parts.push([COMBINING.test(each) ? "\u25cc" + each : each, false]);
    }
  }
  return parts;
}

const partsOf = D.symbols.map(() => null);

function partsOfToken(i) {
  const symbol = whole(D.tokens, i);
  return (partsOf[symbol] ??= drawnParts(D.symbols[symbol]));
}

// A token in words, for names and cells; a long one is cut, which the number of characters says.
function quoted(i, most = 40) {
  const text = tokenText(i);
  if (text === "") return "(goes on with the character before)";
  const drawn = partsOfToken(i).slice(0, most).map(([part]) => part).join("");
  return partsOfToken(i).length > most ? `\u201c${drawn}\u2026\u201d (${text.length} characters)` : `\u201c${drawn}\u201d`;
}

const pen = document.createElement("canvas").getContext("2d");
const widths = new Map();

function widthOf(part) {
  let width = widths.get(part);
  if (width === undefined) {
    width = pen.measureText(part).width;
    widths.set(part, width);
  }
  return width;
}

// Rows of a text: each is pieces [token, first part, part after the last], as wide as the room.
// They break after spaces, at the ends of lines, where the text does not go on, and where they must.
function rowsFor(room) {
  const rows = [];
  let row = [], used = 0, wordRow = 0, wordWidth = 0; // pieces and width since the last space
  const end = () => {
    if (row.length) rows.push(row);
    row = [];
    used = wordRow = wordWidth = 0;
  };
  const breaks = new Set(D.breaks);
  for (let i = 0; i < N; i++) {
    if (breaks.has(i)) end();
    const parts = partsOfToken(i), text = tokenText(i);
    let from = 0, width = 0;
    if (text[0] === " " && text.trim()) { // a word with the space before it
      wordRow = row.length;
      wordWidth = 0;
    }
    for (let to = 0; to < parts.length; to++) {
      const next = widthOf(parts[to][0]);
      if (used + width + next > room && used + width > 0) {
        if (from === 0 && wordRow > 0 && wordWidth + width + next <= room) { // the word goes down
          const word = row.splice(wordRow), kept = wordWidth;
          end();
          row = word;
          used = wordWidth = kept;
        } else {
          if (to > from) row.push([i, from, to]);
          end();
          from = to;
          width = 0;
        }
      }
      width += next;
    }
    row.push([i, from, parts.length]);
    used += width;
    wordWidth += width;
    const last = text.at(-1);
    if (last === "\n") end();
    else if (last === " " || last === "\t") {
      wordRow = row.length;
      wordWidth = 0;
    }
  }
  end();
  return rows;
}
