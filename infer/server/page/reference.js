// The picture or video that the next video starts from: chosen, dropped or pasted, with a preview.

import { $ } from "./elements.js";
import { size } from "./format.js";
import { upload } from "./upload.js";

const PREVIEW_END_SECONDS = 0.1;

export class ReferenceField {
  constructor() {
    this.file = null;
    this._limits = null; // {bytes, seconds} of a server that takes references
    this._isLocked = false;
    this._url = null; // of the preview
    this._uploading = null; // AbortController of the upload
    $("reference-choose").addEventListener("click", () => $("reference-file").click());
    $("reference-file").addEventListener("change", () => this._choose([...$("reference-file").files]));
    $("reference-remove").addEventListener("click", () => {
      this.clear();
      $("reference-choose").focus();
    });
    $("reference-picture").addEventListener("error", () => this._showPreview(null));
    $("reference-video").addEventListener("error", () => this._showPreview(null));
    $("reference-video").addEventListener("loadedmetadata", () => this._onVideo());
    document.addEventListener("paste", (event) => this._onPaste(event));
    this._acceptDrops();
  }

  /** Show the field if the server takes references. description: answer of GET /v1/server. */
  configure({ takes_references, max_upload_bytes, max_footage_seconds }) {
    this._limits = takes_references ? { bytes: max_upload_bytes, seconds: max_footage_seconds } : null;
    $("reference-field").hidden = !takes_references;
    if (!takes_references) return;
    const limits = `at most ${size(max_upload_bytes)} and ${max_footage_seconds} s`;
    $("reference-help").textContent = `Choose, drop or paste a file, ${limits}. A video is continued from its end.`;
  }

  /** Accept files, or not while a video is generated. */
  update({ isLocked }) {
    this._isLocked = isLocked;
    $("reference-choose").disabled = $("reference-remove").disabled = isLocked;
  }

  /** Show what is wrong with the file; "" removes the message. */
  showProblem(text) {
    $("reference-problem").textContent = text;
    $("reference-problem").hidden = !text;
  }

  /** Remove the file and its preview. */
  clear() {
    this.file = null;
    $("reference-file").value = "";
    this.showProblem("");
    this._showPreview(null);
    this._showChosen();
  }

  /** Upload the file and return its id. Throws as `upload` does, an AbortError after `cancelUpload`. */
  async upload(token) {
    this.showProblem("");
    this._uploading = new AbortController();
    try {
      return await upload(this.file, { token, signal: this._uploading.signal });
    } finally {
      this._uploading = null;
    }
  }

  /** Cancel the upload; return whether there is one. */
  cancelUpload() {
    this._uploading?.abort();
    return this._uploading !== null;
  }

  get _isOpen() {
    return this._limits !== null && !this._isLocked;
  }

  _choose(files) {
    if (!files.length || !this._isOpen) return;
    const problem = this._problemOf(files);
    if (problem) {
      this.showProblem(problem);
      return;
    }
    this.clear();
    this.file = files[0];
    this._showChosen();
    this._showPreview($(this.file.type.startsWith("video/") ? "reference-video" : "reference-picture"));
  }

  // Browsers guess types from names, so only those that are clearly wrong are refused; the server reads the content.
  _problemOf(files) {
    if (files.length > 1) return "A video starts from one file; choose one.";
    const [{ name, type, size: bytes }] = files;
    if (type && !/^(image|video)\//.test(type)) return `${name} is neither a picture nor a video.`;
    if (bytes > this._limits.bytes) return `${name} has ${size(bytes)}; the server takes at most ${size(this._limits.bytes)}.`;
    return "";
  }

  _showChosen() {
    const { file } = this;
    $("reference-chosen").hidden = $("reference-remove").hidden = !file;
    $("reference-help").hidden = Boolean(file);
    $("reference-name").textContent = file ? `${file.name}, ${size(file.size)}` : "";
    $("reference-choose").textContent = file ? "Choose another file" : "Start from a picture or video";
  }

  // A file that the browser cannot show has no preview; the server may still read it.
  _showPreview(element) {
    if (this._url) URL.revokeObjectURL(this._url);
    this._url = element && URL.createObjectURL(this.file);
    for (const one of [$("reference-picture"), $("reference-video")]) {
      one.hidden = one !== element;
      if (one === element) one.src = this._url;
      else if (one.hasAttribute("src")) one.removeAttribute("src");
    }
  }

  _onVideo() {
    const { duration } = $("reference-video");
    if (duration > this._limits.seconds) {
      const { name } = this.file;
      this.clear();
      this.showProblem(`${name} has ${duration.toFixed(1)} s; the server takes at most ${this._limits.seconds} s.`);
    } else $("reference-video").currentTime = Math.max(0, duration - PREVIEW_END_SECONDS);
  }

  // Text that is copied together with a picture of it, as from a table, is text.
  _onPaste(event) {
    const { files, types } = event.clipboardData;
    if (!files.length || types.includes("text/plain") || !this._isOpen) return;
    event.preventDefault();
    this._choose([...files]);
  }

  // A file that is dropped anywhere else would replace the page, and with it the video.
  _acceptDrops() {
    const accept = (isOver) => (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      event.dataTransfer.dropEffect = this._isOpen ? "copy" : "none";
      document.body.classList.toggle("dropping", isOver && this._isOpen);
      if (event.type === "drop") this._choose([...event.dataTransfer.files]);
    };
    document.addEventListener("dragover", accept(true));
    document.addEventListener("drop", accept(false));
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) document.body.classList.remove("dropping");
    });
  }
}
