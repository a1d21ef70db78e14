// The list of rollouts: of however many there are, only the rows in sight exist.

import { getJson } from "./net.js";
import { inWords, make, visible, whole_number } from "./text.js";

const ROW = 36;
const PAGE = 100;
const KEPT_PAGES = 60;
// Browsers place nothing below some tens of millions of pixels.
const MOST_ROWS = 500000;

export class Rollouts {
  /** open: called with a row that was chosen. problem: called with a sentence, or "". */
  constructor(open, problem) {
    this.open = open;
    this.problem = problem;
    this.list = document.getElementById("list");
    this.form = document.getElementById("filter");
    this.count = document.getElementById("count");
    this.space = make("div", "space");
    this.list.append(this.space);
    this.pages = new Map();
    this.total = 0;
    this.near = 0;
    this.chosen = null;
    this.asked = new AbortController();
    this.drawn = new Map();
    // Asked for elsewhere, it would have the browser lay the page out at once.
    this.top = 0;
    this.list.addEventListener("scroll", () => { this.top = this.list.scrollTop; this.#later(); }, { passive: true });
    this.list.addEventListener("keydown", (event) => this.#key(event));
    this.list.addEventListener("click", (event) => this.#click(event));
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.reload(); });
    this.form.addEventListener("input", () => this.#soon());
    document.getElementById("refresh").addEventListener("click", () => this.reload());
    new ResizeObserver(() => this.#later()).observe(this.list);
  }

  /** Ask anew, from the top. */
  reload() {
    this.asked.abort();
    this.asked = new AbortController();
    this.pages.clear();
    this.near = 0;
    if (this.top) this.list.scrollTop = 0;
    this.#get(0);
  }

  /** There are more rollouts: shown at once to a reader who is at the top. */
  grown() {
    if (this.top === 0 && this.near === 0) this.reload();
  }

  #soon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { if (this.form.reportValidity()) this.reload(); }, 250);
  }

  #query() {
    return Object.fromEntries(new FormData(this.form));
  }

  async #get(page) {
    if (this.pages.has(page)) return;
    const { signal } = this.asked;
    this.pages.set(page, null);
    try {
      const found = await getJson("rollouts", { ...this.#query(), offset: page * PAGE, limit: PAGE }, signal);
      if (signal.aborted) return;
      this.pages.set(page, found.rows);
      this.#forget(page);
      this.total = Math.min(found.total, MOST_ROWS);
      this.count.textContent = `${whole_number(found.total)} rollouts`;
      this.space.style.height = `${this.total * ROW}px`;
      this.problem("");
      this.#later();
    } catch (error) {
      if (signal.aborted) return;
      this.pages.delete(page);
      this.problem(`The rollouts did not come: ${error.message}`);
    }
  }

  /** Keep the pages that are near. */
  #forget(page) {
    if (this.pages.size <= KEPT_PAGES) return;
    for (const other of this.pages.keys()) if (Math.abs(other - page) > KEPT_PAGES / 3) this.pages.delete(other);
  }

  #later() {
    this.frame ??= requestAnimationFrame(() => { this.frame = null; this.#draw(); });
  }

  #draw() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4);
    const end = Math.min(this.total, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 4);
    for (const [index, row] of this.drawn) {
      if (index < first || index >= end) { row.remove(); this.drawn.delete(index); }
    }
    for (let index = first; index < end; index += 1) this.#row(index);
    if (end > first) {
      this.#get(Math.floor(first / PAGE));
      this.#get(Math.floor((end - 1) / PAGE));
    }
    this.list.setAttribute("aria-activedescendant", this.drawn.has(this.near) ? `row-${this.near}` : "");
  }

  #row(index) {
    const found = this.pages.get(Math.floor(index / PAGE))?.[index % PAGE] ?? null;
    let row = this.drawn.get(index);
    if (!row) {
      row = make("div", "row");
      row.id = `row-${index}`;
      row.setAttribute("role", "option");
      row.setAttribute("aria-posinset", index + 1);
      row.style.top = `${index * ROW}px`;
      this.drawn.set(index, row);
      this.space.append(row);
    }
    if (row.rollout !== found || !row.firstChild) this.#fill(row, found);
    row.setAttribute("aria-setsize", this.total);
    row.classList.toggle("near", index === this.near);
    row.setAttribute("aria-selected", found !== null && this.chosen === `${found.group}/${found.sample}`);
  }

  #fill(row, found) {
    row.rollout = found;
    if (!found) {
      row.replaceChildren(make("span", "", "\u2026"));
      return;
    }
    const text = make("span", "reply", visible(found.head).replace(/\s+/g, " "));
    text.dir = "auto";
    const cells = [found.step, visible(found.group), found.sample, inWords(found.reward), whole_number(found.length)];
    row.replaceChildren(...cells.map((cell) => make("span", "", String(cell))), text);
  }

  #key(event) {
    const rows = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: rows, PageUp: -rows, Home: -this.total, End: this.total }[event.key];
    if (by !== undefined) {
      event.preventDefault();
      this.near = Math.max(0, Math.min(this.total - 1, this.near + by));
      const top = this.near * ROW;
      if (top < this.list.scrollTop) this.list.scrollTop = top;
      else if (top + ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + ROW - this.list.clientHeight;
      this.#later();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#choose(this.near);
    }
  }

  #click(event) {
    const row = event.target.closest(".row");
    if (row) this.#choose(Number(row.id.slice(4)));
  }

  #choose(index) {
    const found = this.pages.get(Math.floor(index / PAGE))?.[index % PAGE];
    if (!found) return;
    this.near = index;
    this.chosen = `${found.group}/${found.sample}`;
    this.#later();
    this.open(found);
  }
}
