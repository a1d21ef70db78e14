// What came from a model or a file, made fit to be seen: as text only, nothing of it invisible.

// Controls but tab and newline, direction marks, zero-width spaces, line separators, tags: what
// hides or reorders the rest. Joiners stay: scripts and emoji need them.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;

/** The text with a visible sign in place of every character that has none. */
export function visible(text) {
  return String(text).replace(HIDDEN, (found) => {
    const code = found.codePointAt(0);
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    if (code === 127) return "\u2421";
    return `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
}

/** A token: as `visible`, and its line breaks and tabs have a sign, too. */
export function visibleToken(text) {
  return visible(text).replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5\t");
}

/** An element with a class and a text; never markup. */
export function make(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== "") made.textContent = text;
  return made;
}

/** A block of text that is cut if it is long, with a button for the rest of it, part by part. */
export function cutText(text, most = 4000) {
  const whole = make("div");
  const shown = make("p", "text");
  shown.dir = "auto";
  whole.append(shown);
  let end = 0;
  const more = make("button", "more");
  more.type = "button";
  const grow = (by) => {
    let next = Math.min(text.length, end + by);
    // Not between the halves of a character.
    if (next < text.length && (text.charCodeAt(next - 1) & 0xfc00) === 0xd800) next += 1;
    shown.append(document.createTextNode(visible(text.slice(end, next))));
    end = next;
    const left = text.length - end;
    more.textContent = `Show more (${whole_number(left)} characters left)`;
    more.hidden = left === 0;
  };
  more.addEventListener("click", () => grow(20000));
  grow(most);
  if (!more.hidden) whole.append(more);
  return whole;
}

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function whole_number(value) {
  return grouped.format(value);
}

/** A number in few digits. */
export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return value.toExponential(2);
  if (size >= 1000) return grouped.format(value);
  if (size >= 100 || Number.isInteger(value)) return String(Math.round(value * 10) / 10);
  if (size >= 1) return String(Math.round(value * 100) / 100);
  if (size >= 0.001 || size === 0) return String(Number(value.toPrecision(3)));
  return value.toExponential(1);
}

/** A value as it travels, and the word behind it: a number, a name such as "NaN", or null. */
export function told(value, unit = "") {
  if (value === null || value === undefined) return ["\u2013", ""];
  if (typeof value !== "number") return [visible(value), ""];
  if (unit === "share") return [`${short(Math.round(value * 1000) / 10)}%`, ""];
  if (unit === "s" && value > 0 && value < 0.1) return [short(value * 1000), "ms"];
  if (unit === "s" && value >= 120) return [`${short(value / 60)}`, "min"];
  return [short(value), unit];
}

/** The same, in one string. */
export function inWords(value, unit = "") {
  const [text, word] = told(value, unit);
  return word ? `${text} ${word}` : text;
}

/** A moment of today as a time, any other with its day. at: Unix seconds. */
export function clock(at) {
  const date = new Date(at * 1000);
  const time = date.toLocaleTimeString("en-GB");
  return date.toDateString() === new Date().toDateString()
    ? time : `${date.getMonth() + 1}/${date.getDate()} ${time.slice(0, 5)}`;
}
