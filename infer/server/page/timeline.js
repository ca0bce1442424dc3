// The timeline: one colored block per chunk, labeled by shot, followed by the planned shots.

import { moment } from "./format.js";

const COLORS = 8;
const MIN_CELL = 16;
const MAX_CELL = 46;
const NUMBERED_CELL = 24;
const MAX_BUTTONS = 400;
const RAIL_PADDING = 8; // sum of left and right, as in player.css
const GAP_CELLS = 2;
const PLANNED_CELLS = 3;

/** Conversion between chunks and seconds of the video. */
export class ChunkTiming {
  /** message: the protocol's `ready`. */
  constructor({ first_chunk, first_chunk_frames, chunk_frames, fps }) {
    this.firstChunk = first_chunk; // the chunks before it are those of a given video
    this._first = first_chunk_frames;
    this._later = chunk_frames;
    this._fps = fps;
  }

  /** Return the time at which `chunk` starts, in seconds. */
  start(chunk) {
    const count = chunk - this.firstChunk;
    return count === 0 ? 0 : (this._first + (count - 1) * this._later) / this._fps;
  }

  /** Return the chunk whose start is nearest to `seconds`. */
  nearest(seconds) {
    const frames = seconds * this._fps;
    const count = frames < this._first / 2 ? 0 : Math.max(1, Math.round((frames - this._first) / this._later) + 1);
    return this.firstChunk + count;
  }

  /** Return the chunk that is shown at `seconds`. */
  at(seconds) {
    const frames = Math.floor(seconds * this._fps + 1e-3);
    return this.firstChunk + (frames < this._first ? 0 : 1 + Math.floor((frames - this._first) / this._later));
  }
}

/** Events: `select` with the chunk, of which {chunk, start, prompt} are used. */
export class Timeline extends EventTarget {
  constructor({ rail, track, labels, chunks, needle }) {
    super();
    this._elements = { rail, track, labels, chunks, needle };
    chunks.addEventListener("click", (event) => this._onClick(event));
    chunks.addEventListener("keydown", (event) => this._onKey(event));
    new ResizeObserver(() => this._measure()).observe(rail);
    this.clear();
  }

  clear() {
    this.timing = null; // a ChunkTiming once the video has begun
    this.chunks = []; // by number, without those of a given video
    this.planned = new Map();
    this._colors = new Map();
    this._playing = -1;
    this._seconds = 0;
    this._selected = -1;
    this._draw();
  }

  /** Begin a video. timing: its ChunkTiming. */
  begin(timing) {
    this.timing = timing;
    this.chunks.length = timing.firstChunk;
  }

  /** Add a `chunk` message and return its chunk: a new one, another part of the latest, or a replacement. */
  put(message) {
    const { chunk, prompt, cut, start, frames, made_in: generationTime } = message;
    const known = this.chunks[chunk];
    if (known && start > known.start + 1e-3) {
      known.frames += frames;
      known.generationTime = generationTime;
      return known;
    }
    // chunks that were generated while the connection was lost
    for (let missed = this.chunks.length; missed < chunk; missed++) {
      const missedStart = this.timing.start(missed);
      this.chunks[missed] = { chunk: missed, prompt, cut: false, start: missedStart, frames: 0, generationTime: 0 };
    }
    this.chunks[chunk] = { chunk, prompt, cut, start, frames, generationTime };
    for (const planned of this.planned.keys()) if (planned <= chunk) this.planned.delete(planned);
    this._draw();
    return this.chunks[chunk];
  }

  /** Remove the chunks from `chunk` on. */
  truncate(chunk) {
    this.chunks.length = Math.min(this.chunks.length, chunk);
    if (this._selected >= chunk) this._selected = -1;
    this._draw();
  }

  /** Show a planned shot. chunk: its first chunk. */
  plan(chunk, prompt) {
    this.planned.set(chunk, prompt);
    this._draw();
  }

  /** Remove the planned shots that start in the chunks `from` to `to`. */
  discardPlans(from = 0, to = Infinity) {
    for (const chunk of this.planned.keys()) if (from <= chunk && chunk <= to) this.planned.delete(chunk);
    this._draw();
  }

  /** Mark a chunk as selected; -1 marks none. */
  select(chunk) {
    this._selected = chunk;
    for (const button of this._elements.chunks.children)
      button.setAttribute("aria-pressed", String(Number(button.dataset.chunk) === chunk));
  }

  /** Move the needle to `seconds`; return the chunk that is playing, or undefined before the first one. */
  showTime(seconds) {
    this._seconds = seconds;
    if (this.chunks.length === this._first) return undefined;
    const index = Math.min(this.timing.at(seconds), this.chunks.length - 1);
    if (index !== this._playing) {
      this._playing = index;
      for (const button of this._elements.chunks.children) this._mark(button);
      this._follow();
    }
    this._moveNeedle();
    return this.chunks[index];
  }

  /** Return the color index of a prompt, 0 to 7; it is constant within a video. */
  colorOf(prompt) {
    if (!this._colors.has(prompt)) this._colors.set(prompt, this._colors.size % COLORS);
    return this._colors.get(prompt);
  }

  /** Number of generated chunks. */
  get count() {
    return this.timing ? this.chunks.length - this.timing.firstChunk : 0;
  }

  // number of the first chunk that has a button
  get _first() {
    return this.chunks.length - Math.min(this.count, MAX_BUTTONS);
  }

  _draw() {
    const { chunks, labels } = this._elements;
    const first = this._first;
    const focused = chunks.contains(document.activeElement) ? document.activeElement.dataset.chunk : null;
    const shots = this._shots(first);
    const buttons = this.chunks.slice(first).map((chunk, i) => this._button(chunk, chunks.children[i]));
    chunks.replaceChildren(...buttons);
    labels.replaceChildren(...shots.map((shot) => this._label(shot)));
    this._drawPlanned();
    this._setTabStop(focused === null ? this._selected : Number(focused));
    if (focused !== null) chunks.querySelector(`[data-chunk="${focused}"]`)?.focus();
    this._measure();
  }

  _shots(first) {
    const shots = [];
    for (const chunk of this.chunks.slice(first)) {
      const shot = shots[shots.length - 1];
      chunk.beginsShot = !shot || chunk.cut || chunk.prompt !== shot.prompt;
      if (chunk.beginsShot) shots.push({ prompt: chunk.prompt, cells: 1 });
      else shot.cells += 1;
    }
    return shots;
  }

  _button(chunk, reused) {
    const button = reused ?? document.createElement("button");
    button.type = "button";
    button.className = `chunk shot-${this.colorOf(chunk.prompt)}${chunk.beginsShot ? " begins" : ""}`;
    button.dataset.chunk = chunk.chunk;
    button.textContent = chunk.chunk;
    button.title = `${moment(chunk.start)}: ${chunk.prompt}`;
    button.setAttribute("aria-label", `Chunk ${chunk.chunk}, ${moment(chunk.start)}, ${chunk.prompt}`);
    button.setAttribute("aria-pressed", String(chunk.chunk === this._selected));
    this._mark(button);
    return button;
  }

  _mark(button) {
    if (Number(button.dataset.chunk) === this._playing) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }

  _label(shot) {
    const label = document.createElement("span");
    label.className = `label shot-${this.colorOf(shot.prompt)}`;
    label.textContent = shot.prompt;
    label.title = shot.prompt;
    label.style.setProperty("--cells", shot.cells);
    return label;
  }

  _drawPlanned() {
    const { chunks, labels } = this._elements;
    chunks.parentElement.querySelector(".planned-row")?.remove();
    this._plannedCells = 0;
    if (!this.planned.size) return;
    const row = document.createElement("ul");
    row.className = "planned-row";
    row.setAttribute("aria-label", "Planned shots");
    let next = this.chunks.length;
    for (const [chunk, prompt] of [...this.planned].sort(([a], [b]) => a - b)) {
      const gap = Math.min(GAP_CELLS, Math.max(0, chunk - next));
      const block = document.createElement("li");
      block.className = `planned shot-${this.colorOf(prompt)}`;
      block.style.setProperty("--cells", PLANNED_CELLS);
      block.style.setProperty("--gap", gap);
      block.textContent = `from ${chunk}`;
      const start = this.timing ? `, ${moment(this.timing.start(chunk))}` : "";
      block.title = `Planned from chunk ${chunk}${start}: ${prompt}`;
      block.setAttribute("aria-label", block.title);
      row.append(block);
      const label = this._label({ prompt, cells: PLANNED_CELLS });
      label.style.setProperty("--gap", gap);
      labels.append(label);
      this._plannedCells += gap + PLANNED_CELLS;
      next = chunk + PLANNED_CELLS;
    }
    chunks.after(row);
  }

  _measure() {
    const { rail, track } = this._elements;
    const cells = this.chunks.length - this._first + this._plannedCells;
    const width = rail.clientWidth - RAIL_PADDING;
    this._cell = Math.min(MAX_CELL, Math.max(MIN_CELL, Math.floor(width / Math.max(1, cells))));
    track.style.setProperty("--cell", `${this._cell}px`);
    track.classList.toggle("numbered", this._cell >= NUMBERED_CELL);
    this._moveNeedle();
    this._follow();
  }

  _moveNeedle() {
    const playing = this.chunks[this._playing];
    this._elements.needle.hidden = !playing;
    if (!playing) return;
    const length = this.timing.start(playing.chunk + 1) - playing.start;
    const fraction = Math.min(1, Math.max(0, (this._seconds - playing.start) / length));
    const x = (playing.chunk - this._first + fraction) * this._cell;
    this._elements.needle.style.transform = `translateX(${x}px)`;
  }

  // Keep the playing chunk visible, unless the pointer or the focus is in the timeline.
  _follow() {
    const { rail } = this._elements;
    if (rail.matches(":hover") || rail.contains(document.activeElement) || this._playing < 0) return;
    const end = (this._playing - this._first + 1) * this._cell + this._plannedCells * this._cell;
    if (rail.scrollWidth > rail.clientWidth) rail.scrollLeft = end - rail.clientWidth * 0.9;
  }

  _onClick(event) {
    const button = event.target.closest("button");
    if (!button) return;
    const chunk = Number(button.dataset.chunk);
    this._setTabStop(chunk);
    this.select(chunk);
    this.dispatchEvent(new CustomEvent("select", { detail: this.chunks[chunk] }));
  }

  _onKey(event) {
    const buttons = [...this._elements.chunks.children];
    const current = buttons.indexOf(document.activeElement);
    const last = buttons.length - 1;
    const target = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: last }[event.key];
    if (target === undefined || !buttons[target]) return;
    event.preventDefault();
    this._setTabStop(Number(buttons[target].dataset.chunk));
    buttons[target].focus();
  }

  // The tab key stops once in the timeline; the arrow keys move within it.
  _setTabStop(chunk) {
    const buttons = [...this._elements.chunks.children];
    const stop = buttons.find((button) => Number(button.dataset.chunk) === chunk) ?? buttons[buttons.length - 1];
    for (const button of buttons) button.tabIndex = button === stop ? 0 : -1;
  }
}
