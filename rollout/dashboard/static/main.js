// The page: what the live stream says, put where it belongs.

import { Chart } from "./chart.js";
import { Chat } from "./chat.js";
import { Group } from "./group.js";
import { follow } from "./net.js";
import { Rollouts } from "./rollouts.js";
import { Series } from "./series.js";
import { clock, inWords, make, told, visible } from "./text.js";

const by = (id) => document.getElementById(id);
const SPANS = {
  time: [["all", Infinity], ["1 hour", 3600], ["10 minutes", 600], ["2 minutes", 120]],
  step: [["all", Infinity], ["1000 steps", 1000], ["100 steps", 100], ["20 steps", 20]],
};
const MOST_EVENTS = 2000;
const SHOWN_EVENTS = 200;
const DRAW_MS = 150;

const data = new Series();
let events = [];
let cursor = { epoch: "", events: 0 };
let charts = new Map();
let span = Infinity;
let kind = "";
let inspecting = false;
let grew = 0;
let linked = "";
let drawing = false;
let painting = false;

const problem = (text) => { by("problem").textContent = text; by("problem").hidden = !text; };
const group = new Group(problem);
const rollouts = new Rollouts((row) => group.open(row), problem);
const chat = new Chat();

function message(live) {
  if (live.epoch !== cursor.epoch) forget();
  const before = data.next;
  data.add(live.series);
  addEvents(live.events);
  cursor = { epoch: live.epoch, events: live.events?.next ?? 0 };
  present(live.snapshot);
  if (inspecting && data.next > before) grow();
  soon();
}

/** Draw once for all that comes meanwhile: a reader that catches up gets many messages. */
function soon() {
  if (drawing) return;
  drawing = true;
  setTimeout(() => requestAnimationFrame(() => { drawing = false; draw(); }), DRAW_MS);
}

/** What was shown counted rows of something else. */
function forget() {
  data.clear();
  events = [];
  cursor = { epoch: "", events: 0 };
  by("events").replaceChildren();
  for (const chart of charts.values()) chart.root.remove();
  charts = new Map();
}

function present(now) {
  document.title = `${visible(now.title)} \u2013 Slipstream`;
  by("title").textContent = visible(now.title);
  by("model").textContent = visible(now.model ?? "");
  badge(by("state"), now.state, now.tone);
  figures(now.figures ?? []);
  if (kind !== now.x) offerSpans(now.x);
  for (const told of now.charts ?? []) if (!charts.has(told.name)) addChart(told);
  by("no-rollouts").textContent = now.rollouts ?? "";
  by("inspector").hidden = Boolean(now.rollouts);
  if (!now.rollouts && !inspecting) rollouts.reload();
  inspecting = !now.rollouts;
  chat.offer(now.chat ?? "");
}

function badge(element, text, tone) {
  if (element.textContent !== text) element.textContent = text;
  element.className = `badge ${tone ?? ""}`;
  element.hidden = !text;
}

function figures(found) {
  const list = by("figures");
  const known = new Map([...list.children].map((item) => [item.dataset.name, item]));
  for (const figure of found) {
    let item = known.get(figure.name);
    known.delete(figure.name);
    if (!item) {
      item = make("div");
      item.dataset.name = figure.name;
      item.append(make("dt", "", figure.label), make("dd"));
      list.append(item);
    }
    item.className = `figure ${figure.tone ?? ""}`;
    item.title = figure.hint ?? "";
    const [text, unit] = told(figure.value, figure.unit);
    const value = item.lastChild;
    if (value.dataset.said === text + unit) continue;
    value.dataset.said = text + unit;
    value.className = text.length > 12 ? "long" : "";
    value.replaceChildren(text);
    if (unit) value.append(make("span", "unit", unit));
  }
  for (const item of known.values()) item.remove();
}

function offerSpans(x) {
  kind = x;
  span = Infinity;
  by("span").replaceChildren(...SPANS[x].map(([label], i) => {
    const option = make("option", "", label);
    option.value = i;
    return option;
  }));
}

function addChart(told) {
  const marks = () => events.filter((event) => event.kind === "version" && event.x !== null).map((event) => event.x);
  const chart = new Chart(told, data, { marks, kind, speak: (text) => { by("spoken").textContent = text; } });
  charts.set(told.name, chart);
}

/** Have every chart drawn anew, one a frame: all at once would hold the page up. */
function draw() {
  const last = data.x[data.x.length - 1] ?? 0;
  for (const chart of charts.values()) {
    chart.from = last - span;
    chart.dirty = true;
    if (chart.alive && !chart.root.isConnected) place(chart);
  }
  by("no-charts").hidden = by("charts").childElementCount > 0;
  if (!painting) paint();
}

function paint() {
  const next = [...charts.values()].find((chart) => chart.draw());
  painting = Boolean(next);
  if (painting) requestAnimationFrame(paint);
}

/** Put a chart that has values now where the source's order has it. */
function place(chart) {
  const order = [...charts.values()];
  const next = order.slice(order.indexOf(chart) + 1).find((other) => other.root.isConnected);
  by("charts").insertBefore(chart.root, next?.root ?? null);
}

function addEvents(page) {
  const skip = Math.max(0, cursor.events - (page?.first ?? 0));
  const fresh = (page?.events ?? []).slice(skip);
  if (!fresh.length) return;
  events = [...events, ...fresh].slice(-MOST_EVENTS);
  const list = by("events");
  for (const event of fresh.slice(-SHOWN_EVENTS)) list.prepend(eventItem(event));
  while (list.childElementCount > SHOWN_EVENTS) list.lastChild.remove();
  list.hidden = false;
  by("no-events").hidden = true;
}

function eventItem(event) {
  const item = make("li", event.kind);
  const time = make("time", "", clock(event.at));
  time.dateTime = new Date(event.at * 1000).toISOString();
  const took = event.seconds === null || event.seconds === undefined ? "" : ` (${inWords(event.seconds, "s")})`;
  item.append(time, make("span", "kind", event.kind), make("span", "", visible(event.text) + took));
  return item;
}

/** A run that goes on makes rollouts: look again, but not with every step. */
function grow() {
  const now = performance.now();
  if (now - grew < 3000) return;
  grew = now;
  rollouts.grown();
}

function status(word, why) {
  const tone = { live: "good", lost: "bad", connecting: "warn" }[word];
  const text = word === "lost" ? "not connected" : word;
  const link = by("link");
  if (link.textContent !== text) badge(link, text, tone);
  link.title = why;
  if (word === "lost") problem(`Not connected: ${why}. The page tries again by itself.`);
  else if (word === "live" && linked !== "live") problem("");
  linked = word;
}

by("span").addEventListener("change", (event) => {
  span = SPANS[kind][Number(event.target.value)][1];
  draw();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) draw(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
follow({ cursors: () => ({ epoch: cursor.epoch, series: data.next, events: cursor.events }), message, status });
