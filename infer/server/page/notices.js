// Notices above the video: errors, warnings and hints, with buttons for what can be done.

import { button } from "./elements.js";

export class Notices {
  constructor(container) {
    this._container = container;
    this._warnings = new Set();
  }

  /**
   * Show a notice; it replaces the notice with the same `key`.
   * kind: "error", "warning" or "info". actions: pairs of a button's text and its click handler.
   */
  show(key, { kind, title, detail = "", actions = [] }) {
    const notice = document.createElement("div");
    notice.className = `notice ${kind}`;
    notice.dataset.key = key;
    notice.setAttribute("role", kind === "error" ? "alert" : "status");
    const text = document.createElement("p");
    const strong = document.createElement("strong");
    strong.textContent = title;
    text.append(strong, detail && ` ${detail}`);
    notice.append(text);
    for (const [label, onClick] of actions) notice.append(button(label, "button", onClick));
    const close = button("Close", "quiet", () => this.drop(key));
    close.setAttribute("aria-label", `Close: ${title}`);
    notice.append(close);
    const previous = this._find(key);
    if (previous) previous.replaceWith(notice);
    else this._container.append(notice);
  }

  /** Show a warning of the server after those that are shown already. detail: one or more sentences. */
  warn(detail) {
    this._warnings.add(detail);
    this.show("warning", { kind: "warning", title: "Warning:", detail: [...this._warnings].join(" ") });
  }

  /** Remove the notice with this key, if there is one. */
  drop(key) {
    if (key === "warning") this._warnings.clear();
    this._find(key)?.remove();
  }

  clear() {
    this._warnings.clear();
    this._container.replaceChildren();
  }

  _find(key) {
    return [...this._container.children].find((notice) => notice.dataset.key === key);
  }
}
