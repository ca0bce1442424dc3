// The controller of the page: one video at a time, from the form to the player.

import { BranchPanel } from "./branch.js";
import { Composer } from "./composer.js";
import { downloadWithToken } from "./download.js";
import { $ } from "./elements.js";
import { explain, moment, sentence } from "./format.js";
import { Notices } from "./notices.js";
import { canPlay, Player } from "./player.js";
import { Receipts } from "./receipts.js";
import { ReferenceField } from "./reference.js";
import { Server } from "./server.js";
import { Statistics } from "./statistics.js";
import { Stream } from "./stream.js";
import { ChunkTiming, Timeline } from "./timeline.js";
import { UploadError } from "./upload.js";

const UNAUTHORIZED = 401;
const LEAD_SECONDS = 4;
const TICK_MILLISECONDS = 250;
// distance from the latest frames at which the button that jumps to them appears
const JUMP_SECONDS = 3 * LEAD_SECONDS;
const IDLE_TEXT = $("stage-text").textContent;
const TIMELINE_HINT = $("timeline-hint").textContent;

class Page {
  constructor() {
    this.notices = new Notices($("notices"));
    this.statistics = new Statistics();
    this.receipts = new Receipts($("log"), $("log-empty"));
    this.timeline = new Timeline({
      rail: $("rail"),
      track: $("track"),
      labels: $("shot-labels"),
      chunks: $("chunks"),
      needle: $("needle"),
    });
    this.composer = new Composer(this.timeline);
    this.reference = new ReferenceField();
    this.branchPanel = new BranchPanel(this.timeline, this.composer);
    this.server = new Server(this.notices);
    this.stream = null;
    this.player = null;
    this.reportedTime = -1;
    this.setState("idle", "Loading");
    this.listen();
    this.server.connect();
    setInterval(() => this.tick(), TICK_MILLISECONDS);
  }

  listen() {
    this.server.addEventListener("ready", () => this.onServerReady());
    this.server.addEventListener("unreachable", () => this.onServerUnreachable());
    this.composer.addEventListener("submit", () => this.submit());
    this.timeline.addEventListener("select", (event) => this.selectChunk(event.detail));
    this.branchPanel.addEventListener("branch", (event) => this.branch(event.detail));
    this.receipts.addEventListener("showing", (event) => this.showStatus(`Now showing: ${event.detail.prompt}`));
    $("pause").addEventListener("click", () => this.togglePause());
    $("stop").addEventListener("click", () => this.stop());
    $("live").addEventListener("click", () => this.player?.goLive(LEAD_SECONDS));
    $("fullscreen").addEventListener("click", () => $("video").requestFullscreen?.());
    $("download").addEventListener("click", (event) => this.download(event));
  }

  // states: idle, connecting, playing, paused, lost, ended

  get isLive() {
    return ["playing", "paused", "lost"].includes(this.state);
  }

  setState(state, text) {
    this.state = state;
    document.body.dataset.state = state;
    this.showStatus(text);
    const isBusy = this.isLive || state === "connecting";
    const isLost = state === "lost";
    $("settings-fields").disabled = isBusy;
    this.reference.update({ isLocked: isBusy });
    $("pause").disabled = !this.isLive || isLost;
    $("pause").textContent = state === "paused" ? "Resume" : "Pause";
    $("stop").disabled = !isBusy;
    const canSend = state !== "connecting" && !isLost && this.server.description !== null;
    this.composer.update({ isLive: this.isLive, isEnded: state === "ended", canSend });
    this.branchPanel.update({ isLive: this.isLive, isLost });
  }

  showStatus(text) {
    $("status").textContent = text;
  }

  showStageText(text) {
    $("stage-text").textContent = text;
    $("stage-text").hidden = !text;
  }

  onServerReady() {
    this.composer.restoreToken();
    this.reference.configure(this.server.description);
    if (this.state === "idle") this.setState("idle", "Ready");
  }

  onServerUnreachable() {
    if (this.state === "idle") this.showStatus("Server unreachable");
  }

  // actions of the user

  submit() {
    const prompt = this.composer.readPrompt();
    if (!prompt) return;
    if (!this.isLive) return this.start(prompt);
    this.notices.drop("warning");
    const { mode, startChunk, negative } = this.composer;
    if (startChunk === null) this.stream.send({ type: "set_prompt", prompt, mode, ...negative });
    else this.stream.send({ type: "add_shot", prompt, mode, chunk: startChunk, ...negative });
    this.composer.clearStartTime();
  }

  async start(prompt) {
    this.notices.clear();
    this.token = this.composer.readToken();
    const fields = { prompt, ...this.composer.negative, ...this.composer.settings };
    if (this.reference.file) {
      fields.input_reference = await this.upload();
      if (fields.input_reference === null) return;
    }
    this.discardVideo();
    this.startedAt = performance.now();
    const url = new URL("v1/stream", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.stream = new Stream(url.href, { token: this.token, leadSeconds: LEAD_SECONDS });
    this.follow(this.stream);
    this.setState("connecting", "Starting");
    this.showStageText("Generating the first chunk …");
    this.stream.start(fields);
  }

  /** Upload the chosen file and return its id; return null, after showing the problem, where that fails. */
  async upload() {
    this.setState("connecting", "Uploading");
    try {
      return await this.reference.upload(this.token);
    } catch (error) {
      const isCanceled = error.name === "AbortError";
      this.setState(this.player ? "ended" : "idle", isCanceled ? "Stopped" : "Not started");
      if (!isCanceled) this.onUploadError(error);
      return null;
    }
  }

  togglePause() {
    const isPaused = this.state !== "paused";
    this.stream.send({ type: isPaused ? "pause" : "resume" });
    if (isPaused) this.player?.pause();
    else this.player?.play();
    this.setState(isPaused ? "paused" : "playing", isPaused ? "Paused" : "Playing");
  }

  stop() {
    if (this.reference.cancelUpload()) return;
    if (this.stream.send({ type: "stop" })) {
      $("stop").disabled = true;
      this.showStatus("Stopping");
    } else this.finish("Stopped");
  }

  selectChunk(chunk) {
    this.branchPanel.open(chunk, { isBuffered: this.player?.show(chunk.start), isLive: this.isLive });
  }

  branch({ chunk, prompt }) {
    const change = prompt === null ? {} : { prompt, mode: this.composer.mode, ...this.composer.negative };
    this.stream.send({ type: "seek", chunk: chunk.chunk, ...change });
    if (this.state === "paused") this.togglePause();
    this.showStatus(`Branching at chunk ${chunk.chunk}`);
  }

  async download(event) {
    if (!this.token) return;
    event.preventDefault();
    try {
      await downloadWithToken($("download"), this.token);
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      const detail = sentence(error.message);
      this.notices.show("download", { kind: "error", title: "The video could not be downloaded.", detail });
    }
  }

  // messages of the server

  follow(stream) {
    const on = (name, handler) =>
      stream.addEventListener(name, (event) => {
        if (stream === this.stream) handler(event.detail);
      });
    on("ready", (message) => this.onReady(message));
    on("chunk", (message) => this.onChunk(message));
    on("data", ({ bytes }) => this.player?.append(bytes));
    on("receipt", (message) => this.onReceipt(message));
    on("state", ({ state }) => this.onStreamState(state));
    on("warning", ({ message }) => this.notices.warn(sentence(message)));
    on("end", ({ seconds }) => this.finish(`Finished, ${moment(seconds)}`));
    on("error", (message) => this.onError(message));
    on("lost", ({ seconds }) => this.onLost(seconds));
    on("retrying", () => this.showLost("Reconnecting."));
    on("closed", ({ isOpened }) => this.onClosed(isOpened));
  }

  onReady(message) {
    this.notices.drop("lost");
    if (message.continued) {
      this.onReconnected();
      return;
    }
    if (!canPlay(message.mime)) {
      this.stream.send({ type: "stop" });
      const detail = `It cannot play ${message.mime} as a stream. Use another browser.`;
      this.fail("This browser cannot play the video.", detail);
      return;
    }
    $("seed").value = String(message.seed);
    this.timeline.begin(new ChunkTiming(message));
    const given = message.first_chunk ? ` The chunks before ${message.first_chunk} are your video.` : "";
    $("timeline-hint").textContent = TIMELINE_HINT + given;
    this.player = this.buildPlayer(message.mime);
    $("download").href = `v1/streams/${encodeURIComponent(message.session)}/content`;
    $("download").download = `longvideo-${message.session}.mp4`;
    $("download").hidden = false;
    this.setState("playing", "Generating the first chunk");
    $("prompt").select();
  }

  onReconnected() {
    if (this.player.paused) {
      this.stream.send({ type: "pause" });
      this.setState("paused", "Reconnected, paused");
    } else this.setState("playing", "Reconnected");
  }

  buildPlayer(mime) {
    const player = new Player($("video"), mime, { startedAt: this.startedAt });
    player.addEventListener("first-frame", ({ detail }) => this.onFirstFrame(detail.seconds));
    player.addEventListener("needs-click", () => this.onNeedsClick());
    player.addEventListener("broken", ({ detail }) => this.fail("The video cannot be played.", sentence(detail.message)));
    return player;
  }

  onFirstFrame(seconds) {
    this.statistics.showFirstFrame(seconds);
    $("fullscreen").disabled = !$("video").requestFullscreen;
    this.showStageText("");
    if (this.state === "playing") this.showStatus("Playing");
  }

  onNeedsClick() {
    const play = () => {
      this.notices.drop("click");
      this.player.play();
    };
    const title = "The browser needs a click before it plays the video.";
    this.notices.show("click", { kind: "info", title, actions: [["Play", play]] });
  }

  onChunk(message) {
    const chunk = this.timeline.put(message);
    $("timeline").hidden = false;
    this.statistics.showChunk(message, chunk, { count: this.timeline.count, fps: this.server.description.fps });
  }

  onReceipt(receipt) {
    const { action, effective_at, effective_seconds } = receipt;
    if (!["set_prompt", "add_shot", "seek"].includes(action)) return;
    // a branch without a prompt continues with the prompt of its chunk
    const prompt = receipt.prompt ?? this.timeline.chunks[effective_at]?.prompt ?? "";
    if (action === "seek") {
      // shots after the chunk that was being generated stay planned
      this.timeline.discardPlans(effective_at, receipt.accepted_at);
      this.timeline.truncate(effective_at);
      this.player.replaceFrom(effective_seconds);
    }
    this.timeline.plan(effective_at, prompt);
    this.receipts.add({ ...receipt, prompt }, this.timeline.colorOf(prompt));
    this.showStatus(`Accepted, shown from chunk ${effective_at} (${moment(effective_seconds)})`);
  }

  onStreamState(state) {
    if (!this.isLive || state === this.state) return;
    this.setState(state, state === "paused" ? "Paused" : "Playing");
  }

  onError({ code, message, fatal }) {
    const { title, detail } = explain(code, message);
    if (code === "bad_prompt") this.composer.showProblem(`${title} ${detail}`);
    if (!fatal) {
      if (code !== "bad_prompt") this.notices.show("error", { kind: "warning", title, detail });
      return;
    }
    this.fail(title, detail);
    if (code === "unauthorized") this.composer.rejectToken();
  }

  onUploadError(error) {
    if (error instanceof UploadError && error.status === UNAUTHORIZED) {
      this.notices.show("error", { kind: "error", ...explain("unauthorized", error.message) });
      this.composer.rejectToken();
    } else if (error instanceof UploadError) {
      this.reference.showProblem(sentence(error.message));
      $("reference-choose").focus();
    } else if (error instanceof TypeError) {
      const detail = "Is longvideo serve still running?";
      this.notices.show("error", { kind: "error", title: "The server cannot be reached.", detail });
    } else throw error;
  }

  onLost(seconds) {
    this.setState("lost", "Connection lost");
    this.showLost(`Reconnecting in ${seconds} s. The buffered part of the video keeps playing.`);
  }

  showLost(detail) {
    const actions = [
      ["Reconnect now", () => this.stream.retry()],
      ["Stop", () => this.finish("Stopped")],
    ];
    this.notices.show("lost", { kind: "warning", title: "The connection is lost.", detail, actions });
  }

  onClosed(isOpened) {
    if (this.isLive) {
      this.fail("The connection could not be restored.", "The part that was generated can still be played here.");
    } else if (isOpened) {
      this.fail("The server closed the connection.", "Its log may have the reason.");
    } else {
      const { needs_token } = this.server.description;
      const hint = needs_token ? "It is not running, or it rejected the token." : "Is longvideo serve still running?";
      this.fail("The server cannot be reached.", hint);
    }
  }

  // the end of a video

  fail(title, detail) {
    this.finish("Stopped");
    this.notices.show("error", { kind: "error", title, detail });
  }

  /** Close the stream; the buffered part of the video can still be played. */
  finish(text) {
    this.notices.drop("lost");
    this.stream?.close();
    this.player?.end();
    if (this.player) this.player.play();
    else this.showStageText(IDLE_TEXT);
    this.timeline.discardPlans();
    this.setState(this.player ? "ended" : "idle", text);
  }

  /** Remove the previous video from the page. */
  discardVideo() {
    this.stream?.close();
    this.player?.close();
    this.stream = this.player = null;
    this.branchPanel.clear();
    this.timeline.clear();
    this.receipts.clear();
    this.statistics.clear();
    this.reportedTime = -1;
    $("timeline").hidden = $("showing").hidden = $("download").hidden = true;
  }

  // playback

  tick() {
    if (!this.player) return;
    const { time, bufferedEnd } = this.player;
    this.statistics.showPlayback(this.player);
    $("live").hidden = !(this.isLive && bufferedEnd - time > JUMP_SECONDS);
    this.showPrompt(this.timeline.showTime(time));
    if (!this.player.isJumping) this.receipts.reach(time, this.timeline.chunks.length);
    if (this.isLive && time !== this.reportedTime && this.stream.send({ type: "played", seconds: time })) {
      this.reportedTime = time;
    }
  }

  showPrompt(chunk) {
    $("showing").hidden = !chunk;
    if (!chunk) return;
    $("showing-text").textContent = chunk.prompt;
    $("showing").className = `showing shot-${this.timeline.colorOf(chunk.prompt)}`;
  }
}

new Page();
