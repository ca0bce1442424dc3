// A bar plot of the generation time of each chunk, drawn as SVG.

import { duration } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const MAX_BARS = 60;
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

  /** Add a chunk, or replace its bar if it is the last one. generationTime, playbackTime: seconds. */
  add(chunk, generationTime, playbackTime) {
    if (this._bars[this._bars.length - 1]?.chunk === chunk) this._bars.pop();
    this._bars.push({ chunk, generationTime, playbackTime });
    if (this._bars.length > MAX_BARS) this._bars.shift();
    this._draw();
  }

  _draw() {
    const bars = this._bars;
    const width = MAX_BARS * BAR;
    this._svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!bars.length) {
      this._svg.replaceChildren();
      this._svg.setAttribute("aria-label", "No chunk generated yet");
      return;
    }
    const last = bars[bars.length - 1];
    const top = 1.1 * Math.max(...bars.map((bar) => Math.max(bar.generationTime, bar.playbackTime)));
    const y = (seconds) => HEIGHT * (1 - seconds / top);
    const shapes = bars.map((bar, i) => {
      const barTop = y(bar.generationTime);
      return shape("rect", { class: "bar", x: i * BAR, y: barTop, width: BAR - 1, height: HEIGHT - barTop });
    });
    const level = y(last.playbackTime);
    shapes.push(shape("line", { class: "real-time", x1: 0, x2: width, y1: level, y2: level }));
    this._svg.replaceChildren(...shapes);
    const times = [duration(last.generationTime), duration(last.playbackTime)];
    this._svg.setAttribute("aria-label", `The last chunk was generated in ${times[0]} and plays for ${times[1]}`);
  }
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
