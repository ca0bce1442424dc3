// The list of prompt changes: the chunk that accepted each one, and the chunk that shows it first.

import { moment } from "./format.js";

const MAX_ENTRIES = 30;

/** Events: `showing` with the receipt when the player reaches its chunk. */
export class Receipts extends EventTarget {
  /** list: the element that holds the entries. empty: the hint that is shown while the list is empty. */
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

  /** Add a `receipt` of the protocol. color: index of its prompt's color. */
  add(receipt, color) {
    const { action, prompt, mode, accepted_at, effective_at, effective_seconds } = receipt;
    // a branch drops the changes after it, and a later change of the same chunk replaces the earlier one
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
      span(`swatch shot-${color}`, ""),
      span("log-prompt", prompt),
      span("log-times", `${name}: ${when}`),
      span("log-state", ""),
    );
    const entry = { receipt, item, state: "", isReached: false };
    setState(entry, "waiting");
    this._entries.push(entry);
    this._list.prepend(item);
    while (this._list.children.length > MAX_ENTRIES) this._list.lastElementChild.remove();
    this._empty.hidden = true;
  }

  /** Update the states. seconds: position of the player. numChunks: number of chunks that are generated. */
  reach(seconds, numChunks) {
    const past = this._entries.filter(
      ({ receipt }) => receipt.effective_at < numChunks && receipt.effective_seconds <= seconds + 1e-3,
    );
    const isLater = (entry, other) => entry.receipt.effective_at >= other.receipt.effective_at;
    const current = past.reduce((latest, entry) => (latest === null || isLater(entry, latest) ? entry : latest), null);
    for (const entry of this._entries) {
      if (entry !== current && entry.isReached) setState(entry, "shown");
      if (entry !== current) continue;
      setState(entry, "now showing");
      if (!entry.isReached) this.dispatchEvent(new CustomEvent("showing", { detail: entry.receipt }));
      entry.isReached = true;
    }
  }
}

function setState(entry, state) {
  if (entry.state === state) return;
  entry.state = state;
  entry.item.className = { "now showing": "now", replaced: "replaced" }[state] ?? "";
  entry.item.querySelector(".log-state").textContent = state;
}

function span(className, text) {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = text;
  return element;
}
