// Notices above the video: what went wrong or will, and what can be done.

export class Notices {
  constructor(container) {
    this._container = container;
  }

  /** Show a notice in the place of one with the same `key`. kind: "error", "warning" or "info"; actions: [words, call]. */
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
    for (const [words, call] of actions) notice.append(button(words, "button", call));
    const close = button("Close", "quiet", () => this.drop(key));
    close.setAttribute("aria-label", `Close: ${title}`);
    notice.append(close);
    const old = this._find(key);
    if (old) old.replaceWith(notice);
    else this._container.append(notice);
  }

  drop(key) {
    this._find(key)?.remove();
  }

  clear() {
    this._container.replaceChildren();
  }

  _find(key) {
    return [...this._container.children].find((notice) => notice.dataset.key === key);
  }
}

function button(words, className, call) {
  const element = document.createElement("button");
  element.type = "button";
  element.className = className;
  element.textContent = words;
  element.addEventListener("click", call);
  return element;
}
