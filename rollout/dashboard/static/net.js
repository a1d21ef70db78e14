// Requests to the server that this page came from. The key goes in a header, never in a URL.

const API = new URL("../api/", import.meta.url);
export const CHAT = new URL("../../v1/chat/completions", import.meta.url);
const STORED = "slipstream-key";
let asking = null;

/** Headers with the key; null for a key that no header can hold. */
function keyed(more = {}) {
  const headers = new Headers(more);
  const key = sessionStorage.getItem(STORED);
  try {
    if (key) headers.set("Authorization", `Bearer ${key}`);
  } catch {
    return null;
  }
  return headers;
}

/** What a refused request says. */
export async function reason(reply) {
  const text = await reply.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300) || `status ${reply.status}`;
  }
}

/** fetch with the key, which is asked for where it is missing or wrong. */
export async function request(url, options = {}) {
  for (;;) {
    const headers = keyed(options.headers);
    const reply = headers && await fetch(url, { ...options, headers, cache: "no-store", credentials: "omit" });
    if (reply && reply.status !== 401) return reply;
    await askKey();
  }
}

/** The JSON of a path below /dashboard/api/. Throws an Error with the server's words. */
export async function getJson(path, query = {}, signal = undefined) {
  const url = new URL(path, API);
  for (const [name, value] of Object.entries(query)) if (value !== "" && value !== null) url.searchParams.set(name, value);
  const reply = await request(url, { signal });
  if (!reply.ok) throw new Error(await reason(reply));
  return reply.json();
}

/** Show the dialog until a key was given; once for all who wait. */
function askKey() {
  asking ??= new Promise((done) => {
    const dialog = document.getElementById("ask");
    const field = document.getElementById("key");
    document.getElementById("wrong").hidden = !sessionStorage.getItem(STORED);
    // Escape would leave a page that shows nothing.
    const stay = (event) => event.preventDefault();
    dialog.addEventListener("cancel", stay);
    dialog.addEventListener("close", () => {
      dialog.removeEventListener("cancel", stay);
      sessionStorage.setItem(STORED, field.value);
      field.value = "";
      asking = null;
      done();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** The events of a streamed reply, decoded, until it ends. touch: called with every piece. */
export async function* eventsOf(reply, touch = () => {}) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    touch();
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const frame = held.slice(0, end);
      held = held.slice(end + 2);
      const data = frame.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

const SILENT_MS = 15000;
const LONGEST_MS = 10000;

/**
 * Follow the live stream for good. cursors(): what to ask for, read anew at every connection, so
 * that what was missed while the browser slept comes first. message, status: called with each
 * message, and with ("live" | "connecting" | "lost", why).
 */
export async function follow({ cursors, message, status }) {
  let wait = 500;
  let wake = () => {};
  let abort = new AbortController();
  let heard = performance.now();
  const silent = () => performance.now() - heard > SILENT_MS;
  const nudge = () => {
    if (document.hidden) return;
    if (silent()) abort.abort();
    wake();
  };
  document.addEventListener("visibilitychange", nudge);
  window.addEventListener("online", nudge);
  window.addEventListener("pageshow", nudge);
  setInterval(() => { if (silent()) abort.abort(); }, 3000);
  for (;;) {
    abort = new AbortController();
    let why = "the connection ended";
    try {
      const url = new URL("live", API);
      for (const [name, value] of Object.entries(cursors())) url.searchParams.set(name, value);
      heard = performance.now();
      const reply = await request(url, { signal: abort.signal });
      heard = performance.now();
      if (!reply.ok) throw new Error(await reason(reply));
      for await (const event of eventsOf(reply, () => { heard = performance.now(); })) {
        if (event.error) throw new Error(event.error.message);
        message(event);
        status("live", "");
        wait = 500;
      }
    } catch (error) {
      if (error.name !== "AbortError") why = error.message;
    }
    status("lost", why);
    await new Promise((done) => { wake = done; setTimeout(done, wait); });
    wait = Math.min(LONGEST_MS, wait * 2);
    status("connecting", why);
  }
}
