// One video over the WebSocket /v1/stream (docs/server.md), which survives lost connections.

const PROTOCOL = "longvideo.v1";
const BACKOFF_SECONDS = [0.5, 1, 2, 4, 8];
const MOST_ATTEMPTS = 30;
// nothing is changed by these, and the stream goes on
const HARMLESS = new Set(["bad_message", "bad_prompt", "bad_chunk", "too_late"]);

/**
 * Events, each with the protocol's message as `detail`: `ready`, `chunk`, `receipt`, `state`, `warning`, `end`, `error`
 * (with `fatal`), and of its own: `data` ({bytes, chunk}; chunk null for the initialisation segment), `lost`
 * ({attempt, seconds}), `retrying`, and `closed` ({reached}) when a connection that never was or is not wanted is over.
 */
export class Stream extends EventTarget {
  constructor(url, { token = "", leadSeconds = 4 } = {}) {
    super();
    this.session = null;
    this._url = url;
    this._token = token;
    this._leadSeconds = leadSeconds;
    this._socket = null;
    this._over = false;
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

  /** Try to reconnect now instead of when the waiting is over. */
  retry() {
    if (this._over || this._socket) return;
    clearTimeout(this._timer);
    this._emit("retrying", { attempt: this._attempt });
    this._connect();
  }

  /** Leave, and do not come back. */
  close() {
    this._over = true;
    clearTimeout(this._timer);
    this._socket?.close();
  }

  _connect() {
    const protocols = this._token ? [PROTOCOL, `bearer.${this._token}`] : [PROTOCOL];
    let socket;
    try {
      socket = new WebSocket(this._url, protocols);
    } catch (error) {
      // a token with characters that a subprotocol cannot hold
      if (!(error instanceof DOMException)) throw error;
      this._over = true;
      this._emit("error", { code: "unauthorized", message: "it holds a character that no token can have", fatal: true });
      return;
    }
    socket.binaryType = "arraybuffer";
    this._socket = socket;
    this._announced = this._awaited = null;
    let opened = false;
    socket.onopen = () => {
      opened = true;
      const first = this.session
        ? { type: "continue", session: this.session, lead_seconds: this._leadSeconds }
        : this._start;
      socket.send(JSON.stringify(first));
    };
    socket.onmessage = (event) => {
      if (this._over) return;
      if (typeof event.data === "string") this._receive(JSON.parse(event.data));
      else if (!this._isStale) this._emit("data", { bytes: event.data, chunk: this._announced });
    };
    socket.onclose = () => {
      this._socket = null;
      if (this._over) return;
      if (this.session && this._attempt < MOST_ATTEMPTS) this._waitAndReconnect();
      else {
        this._over = true;
        this._emit("closed", { reached: opened });
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
    if (message.type === "end") this._over = true;
    if (message.type === "error") {
      // the old connection may still hold the session's place until the server has noticed that it is gone
      if (this.session && this._attempt && message.code === "too_many_sessions") return;
      // a server that restarts comes back, and with it the video
      if (this.session && message.code === "shutting_down") return;
      message.fatal = !HARMLESS.has(message.code) || !this.session;
      if (message.fatal) this._over = true;
    }
    this._emit(message.type, message);
    if (this._over) this._socket?.close();
  }

  // After a branch, a chunk of before may still be under way.
  get _isStale() {
    return this._announced !== null && this._awaited !== null;
  }

  _emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
