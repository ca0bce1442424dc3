// One video over the WebSocket /v1/stream (protocol: docs/server.md), across lost connections.

const PROTOCOL = "longvideo.v1";
const BACKOFF_SECONDS = [0.5, 1, 2, 4, 8];
const MAX_ATTEMPTS = 30;
// errors that change nothing; the stream continues
const NONFATAL = new Set(["bad_message", "bad_prompt", "bad_chunk", "too_late"]);

/**
 * Events with the protocol's message as `detail`: `ready` (plus `continued`), `chunk`, `receipt`, `state`, `warning`,
 * `end`, and `error` (plus `fatal`). Events of its own: `data` ({bytes, chunk}; chunk is null for the initialization
 * segment), `lost` ({attempt, seconds} until the next attempt), `retrying`, and `closed` ({isOpened}) when the
 * connection ended before the stream began, or after the last attempt.
 */
export class Stream extends EventTarget {
  /** token: "" where the server needs none. leadSeconds: the protocol's `lead_seconds`. */
  constructor(url, { token, leadSeconds }) {
    super();
    this.session = null;
    this._url = url;
    this._token = token;
    this._leadSeconds = leadSeconds;
    this._socket = null;
    this._isOver = false;
    this._attempt = 0;
    this._timer = 0;
    this._announced = null;
    this._awaited = null;
  }

  start(fields) {
    this._start = { type: "start", ...fields, lead_seconds: this._leadSeconds };
    this._connect();
  }

  send(message) {
    if (this._socket?.readyState !== WebSocket.OPEN || !this.session) return false;
    this._socket.send(JSON.stringify(message));
    return true;
  }

  /** Reconnect now instead of after the delay. */
  retry() {
    if (this._isOver || this._socket) return;
    clearTimeout(this._timer);
    this._emit("retrying", { attempt: this._attempt });
    this._connect();
  }

  /** Close the connection and do not reconnect. */
  close() {
    this._isOver = true;
    clearTimeout(this._timer);
    this._socket?.close();
  }

  _connect() {
    const protocols = this._token ? [PROTOCOL, `bearer.${this._token}`] : [PROTOCOL];
    let socket;
    try {
      socket = new WebSocket(this._url, protocols);
    } catch (error) {
      // the token has a character that a subprotocol cannot contain
      if (!(error instanceof DOMException)) throw error;
      this._isOver = true;
      this._emit("error", { code: "unauthorized", message: "the token contains a character that is not allowed", fatal: true });
      return;
    }
    socket.binaryType = "arraybuffer";
    this._socket = socket;
    this._announced = this._awaited = null;
    let isOpened = false;
    socket.onopen = () => {
      isOpened = true;
      const first = this.session
        ? { type: "continue", session: this.session, lead_seconds: this._leadSeconds }
        : this._start;
      socket.send(JSON.stringify(first));
    };
    socket.onmessage = (event) => {
      if (this._isOver) return;
      if (typeof event.data === "string") this._receive(JSON.parse(event.data));
      else if (!this._isStale) this._emit("data", { bytes: event.data, chunk: this._announced });
    };
    socket.onclose = () => {
      this._socket = null;
      if (this._isOver) return;
      if (this.session && this._attempt < MAX_ATTEMPTS) this._waitAndReconnect();
      else {
        this._isOver = true;
        this._emit("closed", { isOpened });
      }
    };
  }

  _waitAndReconnect() {
    const seconds = BACKOFF_SECONDS[Math.min(this._attempt, BACKOFF_SECONDS.length - 1)];
    this._attempt += 1;
    this._emit("lost", { attempt: this._attempt, seconds });
    this._timer = setTimeout(() => this.retry(), seconds * 1000);
  }

  _receive(message) {
    if (message.type === "ready") {
      message.continued = this.session !== null;
      this.session = message.session;
      this._attempt = 0;
    }
    if (message.type === "receipt" && message.action === "seek") this._awaited = message.effective_at;
    if (message.type === "chunk") {
      this._announced = message;
      if (message.chunk === this._awaited) this._awaited = null;
      if (this._isStale) return;
    }
    if (message.type === "end") this._isOver = true;
    if (message.type === "error") {
      // the server may not have detected yet that the previous connection of this session is lost
      if (this.session && this._attempt && message.code === "too_many_sessions") return;
      // a restarted server continues the video
      if (this.session && message.code === "shutting_down") return;
      message.fatal = !NONFATAL.has(message.code) || !this.session;
      if (message.fatal) this._isOver = true;
    }
    this._emit(message.type, message);
    if (this._isOver) this._socket?.close();
  }

  // After a branch, a chunk from before it may still arrive.
  get _isStale() {
    return this._announced !== null && this._awaited !== null;
  }

  _emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
