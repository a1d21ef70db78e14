// One group: its prompt, and its samples side by side, each token coloured by what is known of it.

import { getJson } from "./net.js";
import { cutText, inWords, make, short, visibleToken, whole_number } from "./text.js";

const FIRST = 200;
const MORE = 1000;
const PART = 100;

/** A moment for the page to draw and to answer. */
const breathe = () => new Promise((done) => { setTimeout(done); });

// Where a colour ends: a logprob of 0 has none, and so has an entropy of 0.
const LOGPROB = [-0.1, -0.5, -1, -2, -4, -7];
const ENTROPY = [0.1, 0.5, 1, 1.5, 2.5, 4];
const VERSIONS = 6;

const MODES = {
  none: { label: "nothing" },
  logprobs: { label: "logprob", unit: "nats", bounds: LOGPROB, over: (value, bound) => value < bound },
  entropies: { label: "entropy", unit: "nats", bounds: ENTROPY, over: (value, bound) => value > bound },
  versions: { label: "weight version" },
};

export class Group {
  /** problem: called with a sentence, or "". */
  constructor(problem) {
    this.problem = problem;
    this.root = document.getElementById("group");
    this.mode = "logprobs";
    this.asked = new AbortController();
  }

  /** Show the group of a row. */
  async open({ group, sample }) {
    this.asked.abort();
    this.asked = new AbortController();
    const { signal } = this.asked;
    try {
      const found = await getJson(`rollouts/${encodeURIComponent(group)}`, {}, signal);
      if (!signal.aborted) await this.#show(found, sample, signal);
      this.problem("");
    } catch (error) {
      if (!signal.aborted) this.problem(`The group did not come: ${error.message}`);
    }
  }

  async #show(found, chosen, signal) {
    this.found = found;
    this.versions = [...new Set(found.samples.flatMap((sample) => sample.tokens?.versions ?? []))];
    const head = make("p", "facts");
    head.append("Step ", make("b", "", String(found.step)), ", group ", make("b", "", found.group),
      `, ${whole_number(found.samples.length)} samples`);
    const prompt = make("div", "box prompt");
    prompt.tabIndex = 0;
    prompt.setAttribute("role", "region");
    prompt.setAttribute("aria-label", "Prompt");
    prompt.append(make("h3", "", "Prompt"), cutText(found.prompt));
    this.scale = make("ul", "scale");
    this.samples = make("div", "samples");
    const parts = [head, prompt];
    if (found.answer) {
      const answer = make("div", "box");
      answer.append(make("h3", "", "Answer of the task"), cutText(found.answer));
      parts.push(answer);
    }
    this.root.replaceChildren(...parts, this.#modes(), this.scale, this.samples);
    this.#legend();
    this.panes = [];
    const inOrder = [...found.samples].sort((a, b) => (b.sample === chosen) - (a.sample === chosen));
    for (const sample of inOrder) {
      const pane = new Pane(sample, this, sample.sample === chosen);
      this.panes.push(pane);
      this.samples.append(pane.root);
      await breathe();
      if (signal.aborted) return;
    }
  }

  #modes() {
    const known = (name) => this.found.samples.some((sample) => sample.tokens?.[name]);
    const offered = Object.keys(MODES).filter((name) => name === "none" || known(name));
    if (!offered.includes(this.mode)) this.mode = offered[1] ?? "none";
    const field = make("fieldset", "modes");
    field.append(make("legend", "", "Colour tokens by"));
    for (const name of offered) {
      const label = make("label");
      const input = make("input");
      input.type = "radio";
      input.name = "mode";
      input.value = name;
      input.checked = name === this.mode;
      label.append(input, MODES[name].label);
      field.append(label);
    }
    field.addEventListener("change", (event) => {
      this.mode = event.target.value;
      this.#legend();
      this.#recolour(this.mode);
    });
    return field;
  }

  async #recolour(mode) {
    for (const pane of this.panes) {
      pane.colour();
      await breathe();
      if (this.mode !== mode) return;
    }
  }

  #legend() {
    const mode = MODES[this.mode];
    const items = [];
    if (mode.bounds) {
      const sign = mode.bounds[0] < 0 ? "<" : ">";
      items.push(make("li", "", `${sign === "<" ? "\u2265" : "\u2264"} ${mode.bounds[0]}`));
      for (const [i, bound] of mode.bounds.entries()) items.push(make("li", `s${i + 1}`, `${sign} ${bound}`));
      items.push(make("li", "unknown", "not known"), make("span", "quiet", mode.unit));
    } else if (this.mode === "versions") {
      for (const [i, version] of this.versions.slice(0, 24).entries()) items.push(make("li", `v${i % VERSIONS}`, `version ${version}`));
    }
    this.scale.replaceChildren(...items);
    this.scale.hidden = items.length === 0;
  }

  /** The class that a token is coloured by. */
  tint(tokens, index) {
    const mode = MODES[this.mode];
    const value = tokens[this.mode]?.[index];
    if (this.mode === "none" || !tokens[this.mode]) return "";
    if (this.mode === "versions") return `v${this.versions.indexOf(value) % VERSIONS}`;
    if (value === null || value === undefined) return "unknown";
    const level = mode.bounds.filter((bound) => mode.over(value, bound)).length;
    return level ? `s${level}` : "";
  }
}

/** One sample: its facts, its tokens, and what is known of the one that is pointed at. */
class Pane {
  constructor(sample, group, chosen) {
    this.sample = sample;
    this.group = group;
    this.tokens = sample.tokens;
    this.spans = [];
    this.at = -1;
    this.root = make("article", chosen ? "box sample chosen" : "box sample");
    const facts = make("p", "facts");
    facts.append(`#${sample.sample}  reward `, make("b", "", inWords(sample.reward)), `, ${whole_number(sample.length)} tokens`);
    if (sample.finish) facts.append(`, ${sample.finish}`);
    this.root.append(facts);
    if (sample.note) this.root.append(make("p", "facts", sample.note));
    if (this.tokens?.texts?.length) this.#withTokens(); else this.root.append(cutText(sample.text));
  }

  #withTokens() {
    this.body = make("p", "tokens");
    this.body.dir = "auto";
    this.body.tabIndex = 0;
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", `Tokens of sample ${this.sample.sample}; arrow keys go through them`);
    this.readout = make("p", "readout", "Point at a token for its figures.");
    this.readout.setAttribute("aria-live", "polite");
    this.more = make("button", "more");
    this.more.type = "button";
    this.more.addEventListener("click", () => this.#grow(MORE));
    this.root.append(this.body, this.more, this.readout);
    this.#grow(FIRST);
    this.body.addEventListener("pointerover", (event) => {
      const index = this.spans.indexOf(event.target);
      if (index >= 0) this.#point(index);
    });
    this.body.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Show so many more tokens, some at a time. */
  async #grow(by) {
    const all = this.tokens.texts.length;
    const end = Math.min(all, this.spans.length + by);
    this.more.hidden = end === all;
    this.more.textContent = `Show more (${whole_number(all - end)} tokens left)`;
    this.more.disabled = true;
    while (this.spans.length < end) {
      const part = document.createDocumentFragment();
      for (let i = this.spans.length, to = Math.min(end, i + PART); i < to; i += 1) {
        const span = make("span", this.group.tint(this.tokens, i), visibleToken(this.tokens.texts[i]));
        this.spans.push(span);
        part.append(span);
      }
      this.body.append(part);
      if (this.spans.length < end) await breathe();
    }
    this.more.disabled = false;
  }

  /** Colour anew, by the group's mode. */
  colour() {
    for (const [i, span] of this.spans.entries()) span.className = this.group.tint(this.tokens, i) + (i === this.at ? " cur" : "");
  }

  #key(event) {
    const by = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    this.#point(Math.max(0, Math.min(this.spans.length - 1, this.at + by)));
    this.spans[this.at].scrollIntoView({ block: "nearest" });
  }

  #point(index) {
    this.spans[this.at]?.classList.remove("cur");
    this.at = index;
    this.spans[index].classList.add("cur");
    const said = [`token ${index + 1} ${JSON.stringify(visibleToken(this.tokens.texts[index]).replace(/\s*\n/g, ""))}`];
    for (const name of ["logprobs", "entropies", "versions"]) {
      const list = this.tokens[name];
      if (!list) continue;
      const value = list[index] ?? null;
      said.push(`${MODES[name].label} ${value === null ? "not known" : typeof value === "number" ? short(value) : value}`);
    }
    this.readout.textContent = said.join("  ");
  }
}
