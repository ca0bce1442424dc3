// Play fragmented MP4 while it arrives: a MediaSource, one SourceBuffer, and a queue of operations on it.

const HISTORY_SECONDS = 600;
const HISTORY_WHEN_FULL_SECONDS = 10;
// smaller gaps come from rounding: between segments, and between the start of a video and its first frame
const MIN_GAP_SECONDS = 0.1;

const Source = window.ManagedMediaSource ?? window.MediaSource;

/** Return whether this browser can play `mime` segment by segment. */
export function canPlay(mime) {
  return Boolean(Source) && Source.isTypeSupported(mime);
}

/** Events: `first-frame` with {seconds} since `startedAt`, `needs-click`, and `broken` with {message}. */
export class Player extends EventTarget {
  /** startedAt: value of performance.now() at the start of the video. */
  constructor(video, mime, { startedAt }) {
    super();
    this._video = video;
    this._mime = mime;
    this._jobs = [];
    this._buffer = null;
    this._ending = false;
    this._closed = false;
    this._jumpTo = null;
    this.paused = false;
    this._source = new Source();
    this._url = URL.createObjectURL(this._source);
    this._source.addEventListener("sourceopen", () => this._open(), { once: true });
    video.disableRemotePlayback = true;
    video.src = this._url;
    this._onTime = () => this._work();
    video.addEventListener("timeupdate", this._onTime);
    video.addEventListener("waiting", this._onTime);
    this._onError = () => this._break(video.error?.message || "the browser could not decode the video");
    video.addEventListener("error", this._onError);
    this._timeFirstFrame(startedAt);
  }

  /** Append an initialization segment or a media segment. */
  append(bytes) {
    this._jobs.push({ append: bytes });
    this._work();
  }

  /** Remove everything from `seconds` on, and play what is appended there next. */
  replaceFrom(seconds) {
    this._ending = false;
    this._jobs.push({ remove: [seconds, Infinity] }, { jump: seconds });
    this._work();
  }

  /** End the video at the end of the buffer: no more segments follow. */
  end() {
    this._ending = true;
    this._work();
  }

  pause() {
    this.paused = true;
    this._video.pause();
  }

  play() {
    this.paused = false;
    this._play();
  }

  /** Seek to `seconds` if they are still buffered; return whether they are. */
  show(seconds) {
    if (!this._isBuffered(seconds)) return false;
    this._video.currentTime = seconds + 0.001;
    return true;
  }

  /** Seek to `leadSeconds` before the latest frame. */
  goLive(leadSeconds) {
    this._video.currentTime = Math.max(this._video.currentTime, this.bufferedEnd - leadSeconds);
    this.play();
  }

  get time() {
    return this._video.currentTime;
  }

  get bufferedEnd() {
    const ranges = this._video.buffered;
    return ranges.length ? ranges.end(ranges.length - 1) : 0;
  }

  /** Whether the first segment of a branch has yet to arrive. */
  get isJumping() {
    return this._jumpTo !== null || this._jobs.some((job) => job.jump !== undefined);
  }

  /** Seconds that can be played from the current position without a gap. */
  get ahead() {
    const { buffered, currentTime } = this._video;
    for (let i = 0; i < buffered.length; i++) {
      if (buffered.start(i) - MIN_GAP_SECONDS <= currentTime && currentTime <= buffered.end(i))
        return buffered.end(i) - currentTime;
    }
    return 0;
  }

  close() {
    this._closed = true;
    this._jobs = [];
    this._video.removeEventListener("timeupdate", this._onTime);
    this._video.removeEventListener("waiting", this._onTime);
    this._video.removeEventListener("error", this._onError);
    this._video.removeAttribute("src");
    this._video.load();
    URL.revokeObjectURL(this._url);
  }

  _open() {
    if (this._closed) return;
    this._buffer = this._source.addSourceBuffer(this._mime);
    this._buffer.mode = "segments";
    this._buffer.addEventListener("updateend", () => this._work());
    this._buffer.addEventListener("error", () => this._break("the browser could not read a segment"));
    this._work();
  }

  _work() {
    if (this._closed) return;
    this._skipGap();
    if (!this._buffer || this._buffer.updating || this._source.readyState === "closed") return;
    const job = this._jobs[0];
    if (!job) return this._finishOrTrim();
    if (job.jump !== undefined) {
      this._jobs.shift();
      this._jumpTo = job.jump;
      return this._work();
    }
    if (job.remove) {
      this._jobs.shift();
      const [from, to] = job.remove;
      if (this._video.buffered.length && from < this.bufferedEnd) this._buffer.remove(Math.max(0, from), to);
      else this._work();
      return;
    }
    try {
      this._buffer.appendBuffer(job.append);
      this._jobs.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      this._freeSpace();
    }
  }

  // The segment stays first in the queue. It is retried at the next `updateend` (of this removal) or `timeupdate`.
  _freeSpace() {
    const start = this._video.buffered.length ? this._video.buffered.start(0) : 0;
    const until = this._video.currentTime - HISTORY_WHEN_FULL_SECONDS;
    if (until > start) this._buffer.remove(0, until);
  }

  _finishOrTrim() {
    if (this._ending && this._source.readyState === "open") {
      this._source.endOfStream();
      return;
    }
    const { buffered, currentTime } = this._video;
    if (!this._ending && buffered.length && currentTime - buffered.start(0) > HISTORY_SECONDS * 1.2)
      this._buffer.remove(0, currentTime - HISTORY_SECONDS);
  }

  // After a jump, and where segments were dropped, the player would wait at the gap without end.
  _skipGap() {
    const video = this._video;
    if (this._jumpTo !== null && this._isBuffered(this._jumpTo)) {
      video.currentTime = this._jumpTo + 0.001;
      this._jumpTo = null;
      this._play();
      return;
    }
    if (this._jumpTo !== null || video.seeking) return;
    const { buffered, currentTime } = video;
    if (this.ahead <= 0.01) {
      for (let i = 0; i < buffered.length; i++) {
        if (buffered.start(i) > currentTime) {
          video.currentTime = buffered.start(i) + 0.001;
          break;
        }
      }
    }
    if (!this.paused && video.paused && !video.ended && buffered.length) this._play();
  }

  _isBuffered(seconds) {
    const { buffered } = this._video;
    for (let i = 0; i < buffered.length; i++) {
      if (buffered.start(i) - MIN_GAP_SECONDS <= seconds && seconds < buffered.end(i)) return true;
    }
    return false;
  }

  _play() {
    if (this.paused) return;
    // rejected where the browser requires a click, or when another call interrupted this one
    this._video.play().catch((error) => {
      if (error.name === "NotAllowedError") this._emit("needs-click", {});
    });
  }

  _timeFirstFrame(startedAt) {
    const done = (now) => {
      if (!this._closed) this._emit("first-frame", { seconds: (now - startedAt) / 1000 });
    };
    if (this._video.requestVideoFrameCallback) this._video.requestVideoFrameCallback((now) => done(now));
    else this._video.addEventListener("loadeddata", () => done(performance.now()), { once: true });
  }

  _break(message) {
    if (!this._closed) this._emit("broken", { message });
  }

  _emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
