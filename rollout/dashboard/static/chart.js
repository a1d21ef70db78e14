// A chart on a canvas: lines or stacked areas over time or steps, with a legend that tells values.

import { clock, inWords, make, short } from "./text.js";
import { nearest } from "./series.js";

const LEFT = 30;
const BOTTOM = 20;
const TOP = 8;
const COLOURS = 8;
const TICKS = 4;
const MOST_LINES = 12;

/** A step of 1, 2, 2.5 or 5 times a power of ten, of which about `count` fill the range. */
function niceStep(range, count) {
  const raw = range / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
}

export class Chart {
  /** told: as the source describes it. data: the series. marks(): events to draw. speak: says a
   * text to those who listen. */
  constructor(told, data, { marks, kind, speak }) {
    this.told = told;
    this.data = data;
    this.marks = marks;
    this.kind = kind;
    this.speak = speak;
    this.from = -Infinity;
    this.at = -1;
    this.dirty = true;
    this.seen = false;
    this.drawn = false;
    this.left = LEFT;
    this.root = make("figure", "chart");
    this.canvas = document.createElement("canvas");
    this.legend = make("ul", "legend");
    this.values = [];
    this.#build();
  }

  #build() {
    const title = make("h3", "", this.told.title);
    this.root.append(title);
    if (this.told.hint) this.root.append(make("p", "hint quiet", this.told.hint));
    for (const [i, line] of this.told.lines.entries()) {
      const item = make("li");
      const value = make("span");
      item.append(make("span", `swatch k${i % COLOURS}`), document.createTextNode(`${line.label} `), value);
      this.values.push([line, value, item]);
      this.legend.append(item);
    }
    this.when = make("li", "at");
    this.legend.append(this.when);
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.root.append(this.legend, this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#move(-1));
    this.canvas.addEventListener("blur", () => this.#move(-1));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => { this.dirty = true; this.draw(); }).observe(this.canvas);
    new IntersectionObserver((entries) => {
      this.seen = entries[entries.length - 1].isIntersecting;
      this.draw();
    }, { rootMargin: "400px" }).observe(this.canvas);
  }

  /** Whether any of its lines has a value. */
  get alive() {
    return this.told.lines.some((line) => this.data.has(line.name));
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const { low, high } = this.#range();
    const share = (event.clientX - box.left - this.left) / Math.max(1, box.width - this.left - 8);
    this.#move(nearest(this.data.x, low + share * (high - low)));
  }

  #key(event) {
    const last = this.data.x.length - 1;
    const now = this.at < 0 ? last : this.at;
    const by = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: now - by, ArrowRight: now + by, Home: this.#first(), End: last, Escape: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#move(to < 0 ? to === -1 && event.key === "Escape" ? -1 : 0 : Math.min(last, to));
    if (this.at >= 0) this.speak(`${this.told.title}, ${this.#moment(this.at)}: ${this.#say(this.at)}`);
  }

  #move(to) {
    if (to === this.at) return;
    this.at = to;
    this.dirty = true;
    this.draw();
  }

  #moment(index) {
    const x = this.data.x[index];
    return this.kind === "time" ? clock(x) : `step ${short(x)}`;
  }

  #say(index) {
    return this.told.lines.map((line) => {
      const value = this.data.column(line.name)[index];
      return `${line.label} ${inWords(Number.isNaN(value) ? null : value, this.told.unit)}`;
    }).join(", ");
  }

  #first() {
    const x = this.data.x;
    let low = 0;
    let high = x.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (x[middle] < this.from) low = middle + 1; else high = middle;
    }
    return low;
  }

  #range() {
    const x = this.data.x;
    const low = x[this.#first()] ?? 0;
    const high = x[x.length - 1] ?? 1;
    return high > low ? { low, high } : { low: low - 0.5, high: low + 0.5 };
  }

  /** Draw if anything changed and somebody can see it; whether it was drawn. */
  draw() {
    if (!this.dirty || document.hidden) return false;
    // Out of sight it is drawn once, and again when it comes into sight.
    if (!this.seen && this.drawn) return false;
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    if (!width || !height) return false;
    this.dirty = false;
    this.drawn = true;
    const scale = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    const pen = this.canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.#paint(pen, width, height);
    this.#tell();
    return true;
  }

  #tell() {
    const index = this.at >= 0 ? this.at : this.data.x.length - 1;
    for (const [line, value, item] of this.values) {
      const found = this.data.column(line.name)[index];
      value.textContent = inWords(found === undefined || Number.isNaN(found) ? null : found, this.told.unit);
      item.hidden = !this.data.has(line.name);
    }
    this.when.textContent = this.at >= 0 ? this.#moment(index) : "";
    const label = `${this.told.title}. ${index >= 0 ? this.#say(index) : "no values"}. Arrow keys go through the values.`;
    if (this.canvas.getAttribute("aria-label") !== label) this.canvas.setAttribute("aria-label", label);
  }

  #paint(pen, width, height) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const first = this.#first();
    const { low, high } = this.#range();
    const lines = this.told.lines.map((line) => this.data.column(line.name));
    const tops = this.told.stacked ? this.#stack(lines, first) : lines;
    const [bottom, top] = this.#bounds(tops, first);
    const ticks = this.#ticks(pen, bottom, top);
    this.left = Math.max(LEFT, ...ticks.map(([, label]) => pen.measureText(label).width + 10));
    const toX = (x) => this.left + ((x - low) / (high - low)) * (width - this.left - 8);
    const toY = (y) => height - BOTTOM - ((y - bottom) / (top - bottom)) * (height - BOTTOM - TOP);
    this.#axes(pen, { width, height, low, high, ticks, toX, toY, ink: colour("--quiet"), grid: colour("--faint") });
    this.#events(pen, { height, low, high, toX, ink: colour("--accent") });
    pen.save();
    pen.beginPath();
    pen.rect(this.left, 0, width - this.left, height - BOTTOM + 1);
    pen.clip();
    for (let i = tops.length - 1; i >= 0; i -= 1) {
      pen.strokeStyle = pen.fillStyle = colour(`--c${i % COLOURS}`);
      this.#line(pen, tops[i], { first, toX, toY, base: this.told.stacked ? (i ? tops[i - 1] : null) : undefined });
    }
    pen.restore();
    if (this.at >= first) {
      pen.strokeStyle = colour("--quiet");
      pen.beginPath();
      pen.moveTo(toX(this.data.x[this.at]), TOP);
      pen.lineTo(toX(this.data.x[this.at]), height - BOTTOM);
      pen.stroke();
    }
  }

  /** Each line with those before it added; a gap counts as nothing where another line has a value. */
  #stack(lines, first) {
    const count = this.data.x.length;
    const sums = lines.map(() => new Array(count).fill(NaN));
    for (let k = first; k < count; k += 1) {
      let sum = NaN;
      for (const line of lines) if (line[k] === line[k] && line[k] !== undefined) sum = 0;
      for (const [i, line] of lines.entries()) {
        if (line[k] === line[k] && line[k] !== undefined) sum += line[k];
        sums[i][k] = sum;
      }
    }
    return sums;
  }

  #bounds(lines, first) {
    let low = Infinity;
    let high = -Infinity;
    for (const line of lines) {
      for (let i = first; i < line.length; i += 1) {
        if (line[i] < low) low = line[i];
        if (line[i] > high) high = line[i];
      }
    }
    if (low > high) return [0, 1];
    // From 0, unless all is far from it.
    if (low >= 0 && (low < high * 0.6 || this.told.stacked || this.told.unit === "share")) low = 0;
    if (this.told.unit === "share" && high <= 1 && high > 0.3) high = 1;
    if (high === low) return low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
    return [low, high + (this.told.unit === "share" ? 0 : (high - low) * 0.06)];
  }

  /** Values on the y axis, and how they are written. */
  #ticks(pen, bottom, top) {
    pen.font = "12px system-ui, sans-serif";
    const step = niceStep(top - bottom, TICKS);
    const found = [];
    for (let i = Math.ceil(bottom / step); i * step <= top + step * 1e-6; i += 1) {
      const y = Number((i * step).toPrecision(12));
      found.push([y, this.told.unit === "share" ? `${short(Number((y * 100).toPrecision(12)))}%` : tickText(y, step)]);
    }
    return found;
  }

  #axes(pen, { width, height, low, high, ticks, toX, toY, ink, grid }) {
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const [y, label] of ticks) {
      pen.strokeStyle = grid;
      pen.beginPath();
      pen.moveTo(this.left, Math.round(toY(y)) + 0.5);
      pen.lineTo(width - 4, Math.round(toY(y)) + 0.5);
      pen.stroke();
      pen.fillStyle = ink;
      pen.fillText(label, this.left - 6, toY(y));
    }
    pen.textBaseline = "alphabetic";
    for (const [share, align] of [[0, "left"], [0.5, "center"], [1, "right"]]) {
      const x = low + share * (high - low);
      pen.textAlign = align;
      if (this.data.x.length) pen.fillText(this.kind === "time" ? clock(x) : short(Math.round(x)), toX(x), height - 5);
    }
  }

  /** Marks of new weights: lines if they are few, else ticks at the bottom. */
  #events(pen, { height, low, high, toX, ink }) {
    const places = [];
    for (const x of this.marks()) {
      const at = Math.round(toX(x)) + 0.5;
      if (x >= low && x <= high && !(at - places[places.length - 1] < 3)) places.push(at);
    }
    const few = places.length <= MOST_LINES;
    pen.strokeStyle = ink;
    pen.lineWidth = 1;
    if (few) pen.setLineDash([2, 3]);
    pen.beginPath();
    for (const at of places) {
      pen.moveTo(at, few ? TOP : height - BOTTOM - 7);
      pen.lineTo(at, height - BOTTOM);
    }
    pen.stroke();
    pen.setLineDash([]);
  }

  /** One line, thinned to the pixels: of the rows on one pixel the least and the greatest. */
  #line(pen, line, { first, toX, toY, base }) {
    const x = this.data.x;
    const runs = [];
    let run = [];
    let pixel = null;
    const flush = () => { if (pixel) run.push(...pixel.points()); pixel = null; };
    for (let i = first; i < line.length; i += 1) {
      const y = line[i];
      if (!(y === y)) { flush(); if (run.length) runs.push(run); run = []; continue; }
      const at = Math.round(toX(x[i]));
      if (!pixel || pixel.at !== at) { flush(); pixel = new Pixel(at); }
      pixel.add(toX(x[i]), toY(y), base ? toY(base[i]) : toY(0));
    }
    flush();
    if (run.length) runs.push(run);
    for (const points of runs) {
      if (base !== undefined) this.#area(pen, points);
      pen.lineWidth = 1.8;
      pen.lineJoin = "bevel";
      pen.beginPath();
      for (const [px, py] of points) pen.lineTo(px, py);
      pen.stroke();
      // A value between two gaps is a dot.
      if (points.length === 1) { pen.beginPath(); pen.arc(points[0][0], points[0][1], 2.5, 0, 7); pen.fill(); }
    }
  }

  #area(pen, points) {
    pen.globalAlpha = 0.35;
    pen.beginPath();
    for (const [px, py] of points) pen.lineTo(px, py);
    for (let i = points.length - 1; i >= 0; i -= 1) pen.lineTo(points[i][0], points[i][2]);
    pen.closePath();
    pen.fill();
    pen.globalAlpha = 1;
  }
}

/** The points of a line on one pixel. */
class Pixel {
  constructor(at) {
    this.at = at;
    this.least = null;
    this.greatest = null;
  }

  add(x, y, base) {
    const point = [x, y, base];
    if (!this.least || y < this.least[1]) this.least = point;
    if (!this.greatest || y >= this.greatest[1]) this.greatest = point;
  }

  points() {
    if (this.least === this.greatest) return [this.least];
    return this.least[0] <= this.greatest[0] ? [this.least, this.greatest] : [this.greatest, this.least];
  }
}

/** A value on an axis, with as many digits as tell it from the next one. */
function tickText(value, step) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6) return `${short(value / 1e6)}M`;
  if (size >= 1e4) return `${short(value / 1e3)}k`;
  if (size < 0.001) return value.toExponential(1);
  const digits = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
  const text = value.toFixed(Math.min(8, digits + 1));
  return size >= 1000 ? short(value) : String(Number(text));
}
