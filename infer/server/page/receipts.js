// The list of receipts: when a change of prompt was taken, and when it is seen.

import { moment } from "./words.js";

const MOST_ENTRIES = 30;

/** Emits `showing` with the receipt when its moment is reached. */
export class Receipts extends EventTarget {
  constructor(list, empty) {
    super();
    this._list = list;
    this._empty = empty;
    this.clear();
  }

  clear() {
    this._entries = [];
    this._list.replaceChildren();
    this._empty.hidden = false;
  }

  /** Write down a `receipt` whose prompt has the colour number `color`. */
  add(receipt, color) {
    const { action, prompt, mode, accepted_at, effective_at, effective_seconds } = receipt;
    // a branch drops what was begun behind it, and a later word for the same chunk replaces the earlier one
    for (const entry of this._entries) {
      const other = entry.receipt.effective_at;
      const isDropped = action === "seek" && effective_at <= other && other <= accepted_at;
      if (isDropped || other === effective_at) setState(entry, "replaced");
    }
    this._entries = this._entries.filter((entry) => entry.state !== "replaced");
    const item = document.createElement("li");
    const name = action === "seek" ? "branch" : mode;
    const when = `accepted at chunk ${accepted_at}, shown from chunk ${effective_at} (${moment(effective_seconds)})`;
    item.append(
      part(`swatch shot-${color}`, ""),
      part("log-prompt", prompt),
      part("log-times", `${name}: ${when}`),
      part("log-state", ""),
    );
    const entry = { receipt, item, state: "", reached: false };
    setState(entry, "waiting");
    this._entries.push(entry);
    this._list.prepend(item);
    while (this._list.children.length > MOST_ENTRIES) this._list.lastElementChild.remove();
    this._empty.hidden = true;
  }

  /** The player is at `seconds`, and the chunks before `made` are there. */
  reach(seconds, made) {
    const past = this._entries.filter(({ receipt }) => receipt.effective_at < made && receipt.effective_seconds <= seconds + 1e-3);
    const now = past.reduce((latest, entry) => (latest && latest.receipt.effective_at > entry.receipt.effective_at ? latest : entry), null);
    for (const entry of this._entries) {
      if (entry !== now && entry.reached) setState(entry, "shown");
      if (entry !== now) continue;
      setState(entry, "now showing");
      if (!entry.reached) this.dispatchEvent(new CustomEvent("showing", { detail: entry.receipt }));
      entry.reached = true;
    }
  }
}

function setState(entry, state) {
  if (entry.state === state) return;
  entry.state = state;
  entry.item.className = { "now showing": "now", replaced: "replaced" }[state] ?? "";
  entry.item.querySelector(".log-state").textContent = state;
}

function part(className, words) {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = words;
  return element;
}
