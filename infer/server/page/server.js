// The server's description (GET /v1/server) and the parts of the page that show it.

import { $, button } from "./elements.js";
import { clock } from "./format.js";

const RETRY_MILLISECONDS = 3000;

/** Events: `ready` when the description has arrived, `unreachable` after each failed attempt. */
export class Server extends EventTarget {
  constructor(notices) {
    super();
    this._notices = notices;
    this.description = null;
  }

  /** Fetch the description, and retry until the server answers. */
  async connect() {
    try {
      const answer = await fetch("v1/server", { cache: "no-store" });
      if (!answer.ok) throw new TypeError(`the server answered with status ${answer.status}`);
      this.description = await answer.json();
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error;
      this._notices.show("server", {
        kind: "error",
        title: "The server cannot be reached.",
        detail: "The page keeps trying. Is longvideo serve still running?",
      });
      this.dispatchEvent(new CustomEvent("unreachable"));
      setTimeout(() => this.connect(), RETRY_MILLISECONDS);
      return;
    }
    this._notices.drop("server");
    this._show();
    this.dispatchEvent(new CustomEvent("ready"));
  }

  _show() {
    const { model, width, height, fps, steps, guidance, decoder, adapters, needs_token, max_seconds, examples } = this.description;
    $("model").textContent = `${model} · ${width} × ${height} · ${fps} frames per second`;
    $("model").title = [`decoded by ${decoder}`, ...adapters.map((one) => `adapter ${one}`)].join(", ");
    $("stage").style.setProperty("--ratio", `${width} / ${height}`);
    $("steps").placeholder = String(steps);
    $("seconds").max = String(max_seconds);
    const limit = clock(max_seconds).replace(/\.0$/, "");
    $("seconds-help").textContent = `Leave the length empty to generate until you stop, at most ${limit}.`;
    $("token-field").hidden = !needs_token;
    $("negative-field").hidden = guidance === 1;
    const items = examples.map((prompt) => example(prompt));
    $("example-list").replaceChildren(...items);
    $("examples").hidden = !items.length;
  }
}

function example(prompt) {
  const item = document.createElement("li");
  const fill = () => {
    $("prompt").value = prompt;
    $("prompt").focus();
  };
  item.append(button(prompt, "example", fill));
  return item;
}
