// A small bar plot of how long each chunk took, drawn by hand as SVG.

import { duration } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const MOST_BARS = 60;
const HEIGHT = 60;
const BAR = 5;

export class Plot {
  constructor(svg) {
    this._svg = svg;
    this.clear();
  }

  clear() {
    this._bars = [];
    this._draw();
  }

  /** `madeIn` and `playsFor` are seconds. A part grows its chunk. */
  add(chunk, madeIn, playsFor) {
    if (this._bars[this._bars.length - 1]?.chunk === chunk) this._bars.pop();
    this._bars.push({ chunk, madeIn, playsFor });
    if (this._bars.length > MOST_BARS) this._bars.shift();
    this._draw();
  }

  _draw() {
    const bars = this._bars;
    const width = MOST_BARS * BAR;
    this._svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!bars.length) {
      this._svg.replaceChildren();
      this._svg.setAttribute("aria-label", "No chunk made yet");
      return;
    }
    const last = bars[bars.length - 1];
    const top = 1.1 * Math.max(...bars.map((bar) => Math.max(bar.madeIn, bar.playsFor)));
    const y = (seconds) => HEIGHT * (1 - seconds / top);
    const shapes = bars.map((bar, i) => {
      return shape("rect", { class: "bar", x: i * BAR, y: y(bar.madeIn), width: BAR - 1, height: HEIGHT - y(bar.madeIn) });
    });
    const level = y(last.playsFor);
    shapes.push(shape("line", { class: "real-time", x1: 0, x2: width, y1: level, y2: level }));
    this._svg.replaceChildren(...shapes);
    const label = `The last chunk took ${duration(last.madeIn)} and plays for ${duration(last.playsFor)}`;
    this._svg.setAttribute("aria-label", label);
  }
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
