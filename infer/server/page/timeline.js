// The shots of a video as a line of coloured blocks, one a chunk, with what is planned behind it.

import { moment } from "./words.js";

const COLORS = 8;
const SMALLEST_CELL = 16;
const LARGEST_CELL = 46;
const NUMBERED_CELL = 24;
const MOST_BUTTONS = 400;
const RAIL_PADDING = 8; // left and right together, as in page.css
const GAP_CELLS = 2;
const PLANNED_CELLS = 3;

/** How chunks divide the time of a video. */
export class ChunkTiming {
  constructor({ first_chunk_frames, chunk_frames, fps }) {
    this._first = first_chunk_frames;
    this._later = chunk_frames;
    this._fps = fps;
  }

  /** Second at which `chunk` begins. */
  start(chunk) {
    return chunk === 0 ? 0 : (this._first + (chunk - 1) * this._later) / this._fps;
  }

  /** The chunk whose beginning is nearest to `seconds`. */
  nearest(seconds) {
    const frames = seconds * this._fps;
    return frames < this._first / 2 ? 0 : Math.max(1, Math.round((frames - this._first) / this._later) + 1);
  }

  /** The chunk that is shown at `seconds`. */
  at(seconds) {
    const frames = Math.floor(seconds * this._fps + 1e-3);
    return frames < this._first ? 0 : 1 + Math.floor((frames - this._first) / this._later);
  }
}

/** Emits `choose` with the chunk {chunk, start, prompt} as `detail`. */
export class Timeline extends EventTarget {
  constructor({ rail, track, labels, chunks, needle }) {
    super();
    this._elements = { rail, track, labels, chunks, needle };
    this.timing = null;
    chunks.addEventListener("click", (event) => this._onClick(event));
    chunks.addEventListener("keydown", (event) => this._onKey(event));
    new ResizeObserver(() => this._measure()).observe(rail);
    this.clear();
  }

  clear() {
    this.made = [];
    this.planned = new Map();
    this._colors = new Map();
    this._playing = -1;
    this._seconds = 0;
    this._chosen = -1;
    this._draw();
  }

  /** Take a `chunk` message: a new chunk, another part of the newest one, or one in the place of an older. */
  put(message) {
    const { chunk, prompt, cut, start, frames, made_in } = message;
    const there = this.made[chunk];
    if (there && start > there.start + 1e-3) {
      there.frames += frames;
      there.madeIn = made_in;
      return there;
    }
    // chunks that were made while the connection was lost
    for (let missed = this.made.length; missed < chunk; missed++)
      this.made[missed] = { chunk: missed, prompt, cut: false, start: this.timing.start(missed), frames: 0, madeIn: 0 };
    this.made[chunk] = { chunk, prompt, cut, start, frames, madeIn: made_in };
    for (const planned of this.planned.keys()) if (planned <= chunk) this.planned.delete(planned);
    this._draw();
    return this.made[chunk];
  }

  /** Forget the chunks from `chunk` on. */
  truncate(chunk) {
    this.made.length = Math.min(this.made.length, chunk);
    if (this._chosen >= chunk) this._chosen = -1;
    this._draw();
  }

  plan(chunk, prompt) {
    this.planned.set(chunk, prompt);
    this._draw();
  }

  forgetPlans(from = 0, to = Infinity) {
    for (const chunk of this.planned.keys()) if (from <= chunk && chunk <= to) this.planned.delete(chunk);
    this._draw();
  }

  choose(chunk) {
    this._chosen = chunk;
    for (const button of this._elements.chunks.children)
      button.setAttribute("aria-pressed", String(Number(button.dataset.chunk) === chunk));
  }

  /** Put the needle at `seconds` and return the chunk that is playing, if it is known. */
  showTime(seconds) {
    this._seconds = seconds;
    if (!this.timing || !this.made.length) return undefined;
    const index = Math.min(this.timing.at(seconds), this.made.length - 1);
    if (index !== this._playing) {
      this._playing = index;
      for (const button of this._elements.chunks.children) this._mark(button);
      this._follow();
    }
    this._moveNeedle();
    return this.made[index];
  }

  /** A number from 0 to 7 that stays with the prompt as long as the video lasts. */
  colorOf(prompt) {
    if (!this._colors.has(prompt)) this._colors.set(prompt, this._colors.size % COLORS);
    return this._colors.get(prompt);
  }

  get _first() {
    return Math.max(0, this.made.length - MOST_BUTTONS);
  }

  _draw() {
    const { chunks, labels } = this._elements;
    const first = this._first;
    const focused = chunks.contains(document.activeElement) ? document.activeElement.dataset.chunk : null;
    const shots = this._shots(first);
    const buttons = this.made.slice(first).map((made, i) => this._button(made, chunks.children[i]));
    chunks.replaceChildren(...buttons);
    labels.replaceChildren(...shots.map((shot) => this._label(shot)));
    this._drawPlanned();
    this._setTabStop(focused === null ? this._chosen : Number(focused));
    if (focused !== null) chunks.querySelector(`[data-chunk="${focused}"]`)?.focus();
    this._measure();
  }

  _shots(first) {
    const shots = [];
    for (const made of this.made.slice(first)) {
      const shot = shots[shots.length - 1];
      const begins = !shot || made.cut || made.prompt !== shot.prompt;
      if (begins) shots.push({ prompt: made.prompt, cells: 1 });
      else shot.cells += 1;
      made.begins = begins;
    }
    return shots;
  }

  _button(made, reused) {
    const button = reused ?? document.createElement("button");
    button.type = "button";
    button.className = `chunk shot-${this.colorOf(made.prompt)}${made.begins ? " begins" : ""}`;
    button.dataset.chunk = made.chunk;
    button.textContent = made.chunk;
    button.title = `${moment(made.start)}: ${made.prompt}`;
    button.setAttribute("aria-label", `Chunk ${made.chunk}, ${moment(made.start)}, ${made.prompt}`);
    button.setAttribute("aria-pressed", String(made.chunk === this._chosen));
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
    let next = this.made.length;
    for (const [chunk, prompt] of [...this.planned].sort(([a], [b]) => a - b)) {
      const gap = Math.min(GAP_CELLS, Math.max(0, chunk - next));
      const block = document.createElement("li");
      block.className = `planned shot-${this.colorOf(prompt)}`;
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
    const cells = this.made.length - this._first + this._plannedCells;
    const room = rail.clientWidth - RAIL_PADDING;
    this._cell = Math.min(LARGEST_CELL, Math.max(SMALLEST_CELL, Math.floor(room / Math.max(1, cells))));
    track.style.setProperty("--cell", `${this._cell}px`);
    track.classList.toggle("numbered", this._cell >= NUMBERED_CELL);
    this._moveNeedle();
    this._follow();
  }

  _moveNeedle() {
    const made = this.made[this._playing];
    this._elements.needle.hidden = !made;
    if (!made) return;
    const length = this.timing.start(made.chunk + 1) - made.start;
    const within = Math.min(1, Math.max(0, (this._seconds - made.start) / length));
    const x = (made.chunk - this._first + within) * this._cell;
    this._elements.needle.style.transform = `translateX(${x}px)`;
  }

  // keep the chunk that plays in sight, unless someone is at work in the line
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
    this.choose(chunk);
    this.dispatchEvent(new CustomEvent("choose", { detail: this.made[chunk] }));
  }

  _onKey(event) {
    const buttons = [...this._elements.chunks.children];
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined || !buttons[to]) return;
    event.preventDefault();
    this._setTabStop(Number(buttons[to].dataset.chunk));
    buttons[to].focus();
  }

  // one stop for the tab key; arrows move within
  _setTabStop(chunk) {
    const buttons = [...this._elements.chunks.children];
    const stop = buttons.find((button) => Number(button.dataset.chunk) === chunk) ?? buttons[buttons.length - 1];
    for (const button of buttons) button.tabIndex = button === stop ? 0 : -1;
  }
}
