// The panel of the selected chunk, from which the video can be continued in another way.

import { $ } from "./elements.js";
import { moment } from "./format.js";

/** Events: `branch` with {chunk, prompt}; the prompt is null to continue with that of the chunk. */
export class BranchPanel extends EventTarget {
  constructor(timeline, composer) {
    super();
    this._timeline = timeline;
    this._chunk = null;
    $("branch-same").addEventListener("click", () => this._branch(null));
    $("branch-new").addEventListener("click", () => {
      const prompt = composer.readPrompt();
      if (prompt) this._branch(prompt);
    });
    $("branch-close").addEventListener("click", () => this.close());
  }

  /** Show a chunk {chunk, start, prompt}. isBuffered: whether the player still has it. */
  open(chunk, { isBuffered, isLive }) {
    this._chunk = chunk;
    const position = `Chunk ${chunk.chunk}, from ${moment(chunk.start)}`;
    const effect = isLive
      ? "Continuing from here replaces this chunk and all later ones."
      : "This video has ended.";
    $("branch-text").textContent = `${position}${isBuffered ? "" : " (no longer buffered by the browser)"}. ${effect}`;
    $("branch").hidden = false;
    $("branch").scrollIntoView({ block: "nearest" });
  }

  /** Deselect the chunk and return the focus to it. */
  close() {
    const chunk = this._chunk?.chunk;
    this.clear();
    this._timeline.select(-1);
    document.querySelector(`#chunks [data-chunk="${chunk}"]`)?.focus();
  }

  clear() {
    this._chunk = null;
    $("branch").hidden = true;
  }

  /** Show the controls that fit the state of the page. */
  update({ isLive, isLost }) {
    $("branch-same").hidden = $("branch-new").hidden = !isLive;
    $("branch-same").disabled = $("branch-new").disabled = isLost;
  }

  _branch(prompt) {
    const chunk = this._chunk;
    this.close();
    this.dispatchEvent(new CustomEvent("branch", { detail: { chunk, prompt } }));
  }
}
