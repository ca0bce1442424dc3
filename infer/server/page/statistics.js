// Statistics of the video: speed, buffer, generated and dropped parts, and the plot of the time per chunk.

import { $ } from "./elements.js";
import { clock, duration } from "./format.js";
import { Plot } from "./plot.js";

const FIELDS = ["stat-fps", "stat-first", "stat-ahead", "stat-chunk", "stat-chunks", "stat-dropped"];

export class Statistics {
  constructor() {
    this._plot = new Plot($("plot"));
  }

  clear() {
    this._plot.clear();
    for (const id of FIELDS) $(id).textContent = "–";
    $("stat-note").hidden = true;
    $("played").textContent = $("generated").textContent = clock(0);
  }

  /** seconds: time from the start of the video to its first frame on the screen. */
  showFirstFrame(seconds) {
    $("stat-first").textContent = duration(seconds);
  }

  /**
   * Show a new part of a chunk.
   * message: the protocol's `chunk`. chunk: the chunk on the timeline. count: number of chunks. fps: playback speed.
   */
  showChunk(message, chunk, { count, fps }) {
    this._plot.add(chunk.chunk, chunk.generationTime, chunk.frames / fps);
    $("stat-fps").textContent = message.fps.toFixed(1);
    $("stat-note").hidden = count === 1 || message.fps >= fps;
    $("stat-chunk").textContent = duration(chunk.generationTime);
    $("stat-chunks").textContent = String(count);
    $("stat-dropped").textContent = String(message.dropped);
    $("stat-dropped").classList.toggle("bad", message.dropped > 0);
    $("generated").textContent = clock(message.start + message.frames / fps);
  }

  /** time: position of the player, in seconds. ahead: seconds that can be played without a gap. */
  showPlayback({ time, ahead }) {
    $("played").textContent = clock(time);
    $("stat-ahead").textContent = `${ahead.toFixed(1)} s`;
  }
}
