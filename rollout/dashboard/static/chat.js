// A chat on the weights that serve now.

import { CHAT, eventsOf, reason, request } from "./net.js";
import { cutText, inWords, make, visible } from "./text.js";

const MOST_SHOWN = 100000;

export class Chat {
  constructor() {
    this.model = "";
    this.messages = [];
    this.talk = document.getElementById("talk");
    this.form = document.getElementById("say");
    this.stop = document.getElementById("stop");
    this.asked = null;
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.#send(); });
    this.form.elements.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    this.stop.addEventListener("click", () => this.asked?.abort());
    document.getElementById("forget").addEventListener("click", () => this.#forget());
  }

  /** Show the box where there is a model to talk to. */
  offer(model) {
    this.model = model;
    document.getElementById("chat").hidden = !model;
  }

  #forget() {
    this.asked?.abort();
    this.messages = [];
    this.talk.replaceChildren();
  }

  async #send() {
    const text = this.form.elements.text.value;
    if (!text.trim() || this.asked) return;
    this.form.elements.text.value = "";
    this.#turn("user", "you").body.append(cutText(text));
    const history = this.messages;
    history.push({ role: "user", content: text });
    const turn = this.#turn("assistant", this.model);
    this.asked = new AbortController();
    this.stop.disabled = false;
    try {
      const reply = await this.#stream(history, turn, this.asked.signal);
      history.push({ role: "assistant", content: reply });
    } catch (error) {
      // The question goes with its answer, so that another one may follow.
      history.pop();
      if (error.name === "AbortError") turn.who.textContent += ", stopped";
      else {
        turn.root.classList.add("failed");
        turn.body.append(document.createTextNode(`${turn.body.textContent ? "\n" : ""}${visible(error.message)}`));
      }
    } finally {
      this.asked = null;
      this.stop.disabled = true;
      turn.root.scrollIntoView({ block: "nearest" });
    }
  }

  async #stream(messages, turn, signal) {
    const body = { model: this.model, messages, stream: true, stream_options: { include_usage: true } };
    // A field that is left empty has the server's default.
    for (const name of ["temperature", "max_tokens"]) {
      const { value } = this.form.elements[name];
      if (value !== "") body[name] = Number(value);
    }
    const began = performance.now();
    const headers = { "Content-Type": "application/json" };
    const reply = await request(CHAT, { method: "POST", headers, body: JSON.stringify(body), signal });
    if (!reply.ok) throw new Error(await reason(reply));
    let text = "";
    let first = 0;
    for await (const event of eventsOf(reply)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta ?? {};
      const piece = (delta.reasoning_content ?? "") + (delta.content ?? "");
      if (piece) {
        first ||= performance.now();
        this.#append(turn, piece, text.length);
        text += delta.content ?? "";
      }
      if (event.usage) this.#speed(turn, event.usage.completion_tokens, performance.now() - (first || began));
    }
    return text;
  }

  #append(turn, piece, length) {
    const low = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 40;
    if (length < MOST_SHOWN) turn.body.append(document.createTextNode(visible(piece)));
    if (low) this.talk.scrollTop = this.talk.scrollHeight;
  }

  #speed(turn, tokens, ms) {
    turn.who.textContent += `, ${tokens} tokens`;
    if (tokens > 1) turn.who.textContent += `, ${inWords(((tokens - 1) * 1000) / Math.max(1, ms), "tokens/s")}`;
  }

  #turn(role, name) {
    const root = make("div", `turn ${role}`);
    const who = make("span", "who", visible(name));
    const body = make("div", "text");
    body.dir = "auto";
    root.append(who, body);
    this.talk.append(root);
    this.talk.scrollTop = this.talk.scrollHeight;
    return { root, who, body };
  }
}
