// The form: the prompt, how and when it replaces the current one, and the settings of the next video.

import { $ } from "./elements.js";

const TOKEN_KEY = "longvideo.token";
const SETTINGS = ["seed", "steps", "seconds"];

/** Events: `submit`, without detail. */
export class Composer extends EventTarget {
  /** timeline: converts start times to chunks. */
  constructor(timeline) {
    super();
    this._timeline = timeline;
    this._state = { isLive: false, isEnded: false };
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.dispatchEvent(new CustomEvent("submit"));
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!$("send").disabled) $("composer").requestSubmit();
    });
    $("prompt").addEventListener("input", () => this.showProblem(""));
    $("start-time").addEventListener("input", () => this._showStartChunk());
  }

  /** Return the prompt with single spaces, or "" for an empty one, after showing the problem. */
  readPrompt() {
    const prompt = $("prompt").value.trim().replace(/\s+/g, " ");
    this.showProblem(prompt ? "" : "Describe the video.");
    if (!prompt) $("prompt").focus();
    return prompt;
  }

  /** The negative prompt as a field of the protocol's messages; none where the model runs without guidance. */
  get negative() {
    return $("negative-field").hidden ? {} : { negative_prompt: $("negative-prompt").value.trim() };
  }

  /** The mode of a prompt change: "cut", "keep" or "recache". */
  get mode() {
    return document.querySelector("input[name=mode]:checked").value;
  }

  /** The chunk nearest to the start time, or null for the next chunk. */
  get startChunk() {
    const text = $("start-time").value;
    return text !== "" && this._timeline.timing ? this._timeline.timing.nearest(Number(text)) : null;
  }

  /** The settings that are filled in, as fields of the protocol's `start` message. */
  get settings() {
    const filled = SETTINGS.filter((id) => $(id).value !== "");
    return Object.fromEntries(filled.map((id) => [id, Number($(id).value)]));
  }

  /** Return the token, or "" where the server needs none, and store it for this tab. */
  readToken() {
    const token = $("token-field").hidden ? "" : $("token").value.trim();
    if (token) sessionStorage.setItem(TOKEN_KEY, token);
    return token;
  }

  /** Fill in the token that this tab used before. */
  restoreToken() {
    if (!$("token-field").hidden && !$("token").value) $("token").value = sessionStorage.getItem(TOKEN_KEY) ?? "";
  }

  /** Discard a token that the server rejected, and ask for another one. The settings must be enabled. */
  rejectToken() {
    sessionStorage.removeItem(TOKEN_KEY);
    $("token-field").hidden = false;
    $("token").focus();
  }

  /** Show what is wrong with the prompt; "" removes the message. */
  showProblem(text) {
    $("prompt-problem").textContent = text;
    $("prompt-problem").hidden = !text;
    if (text) $("prompt").setAttribute("aria-invalid", "true");
    else $("prompt").removeAttribute("aria-invalid");
  }

  /** Prepare the form for the next prompt. */
  clearStartTime() {
    $("start-time").value = "";
    this._showStartChunk();
    $("prompt").select();
  }

  /** Show the controls that fit the state of the page. */
  update({ isLive, isEnded, canSend }) {
    this._state = { isLive, isEnded };
    $("send").disabled = !canSend;
    for (const element of document.querySelectorAll(".live-only")) element.hidden = !isLive;
    for (const element of document.querySelectorAll(".start-only")) element.hidden = isLive;
    this._labelSend();
  }

  _showStartChunk() {
    $("start-chunk").textContent = this.startChunk === null ? "" : `chunk ${this.startChunk}`;
    this._labelSend();
  }

  _labelSend() {
    const { isLive, isEnded } = this._state;
    const isScheduled = $("start-time").value !== "";
    const change = isScheduled ? "Schedule" : "Apply";
    $("send").textContent = isLive ? change : isEnded ? "Start again" : "Start";
    $("prompt-label").textContent = isLive ? "Next prompt" : "Prompt";
  }
}
