// The page: one video at a time, from the form to the player.

import { Notices } from "./notices.js";
import { canPlay, Player } from "./player.js";
import { Plot } from "./plot.js";
import { Receipts } from "./receipts.js";
import { Stream } from "./stream.js";
import { ChunkTiming, Timeline } from "./timeline.js";
import { clock, duration, explain, moment, sentence } from "./words.js";

const LEAD_SECONDS = 4;
const TICK_MILLISECONDS = 250;
const SERVER_RETRY_MILLISECONDS = 3000;
const TOKEN_KEY = "longvideo.token";
// further behind than this, the way to the newest frames is offered
const BEHIND_SECONDS = 3 * LEAD_SECONDS;

const $ = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.notices = new Notices($("notices"));
    this.plot = new Plot($("plot"));
    this.receipts = new Receipts($("log"), $("log-empty"));
    this.timeline = new Timeline({
      rail: $("rail"),
      track: $("track"),
      labels: $("shot-labels"),
      chunks: $("chunks"),
      needle: $("needle"),
    });
    this.server = null;
    this.stream = null;
    this.player = null;
    this.chosen = null;
    this.lastPlayed = -1;
    this.setState("idle", "Loading");
    this.listen();
    this.askServer();
    setInterval(() => this.tick(), TICK_MILLISECONDS);
  }

  // ---- states: idle, connecting, playing, paused, lost, ended ----

  get isLive() {
    return ["playing", "paused", "lost"].includes(this.state);
  }

  setState(state, words) {
    this.state = state;
    document.body.dataset.state = state;
    $("status").textContent = words;
    const busy = this.isLive || state === "connecting";
    $("settings-fields").disabled = busy;
    $("pause").disabled = !this.isLive || state === "lost";
    $("pause").textContent = state === "paused" ? "Resume" : "Pause";
    $("stop").disabled = !busy;
    $("send").disabled = state === "connecting" || state === "lost" || !this.server;
    for (const element of document.querySelectorAll(".live-only")) element.hidden = !this.isLive;
    this.nameSend();
    this.showBranch();
  }

  nameSend() {
    const later = $("when").value !== "";
    $("send").textContent = this.isLive ? (later ? "Schedule" : "Show next") : this.state === "ended" ? "Start again" : "Start";
    $("prompt-label").textContent = this.isLive ? "Next prompt" : "Prompt";
  }

  stageText(words) {
    $("stage-text").textContent = words;
    $("stage-text").hidden = !words;
  }

  // ---- the server ----

  async askServer() {
    try {
      const answer = await fetch("v1/server", { cache: "no-store" });
      if (!answer.ok) throw new TypeError(`the server answered ${answer.status}`);
      this.server = await answer.json();
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error;
      this.notices.show("server", {
        kind: "error",
        title: "The server cannot be reached.",
        detail: "This page keeps trying. Is longvideo serve still running?",
      });
      if (this.state === "idle") $("status").textContent = "No server";
      setTimeout(() => this.askServer(), SERVER_RETRY_MILLISECONDS);
      return;
    }
    this.notices.drop("server");
    this.showServer();
    if (this.state === "idle") this.setState("idle", "Ready");
  }

  showServer() {
    const { model, width, height, fps, steps, needs_token, max_seconds, examples } = this.server;
    $("model").textContent = `${model} · ${width} × ${height} · ${fps} frames a second`;
    $("stage").style.setProperty("--ratio", `${width} / ${height}`);
    $("steps").placeholder = String(steps);
    if (max_seconds) {
      $("seconds").max = String(max_seconds);
      $("seconds-help").textContent = `Empty: until you stop it, at most ${clock(max_seconds).replace(/\.0$/, "")}.`;
    }
    $("token-field").hidden = !needs_token;
    if (needs_token && !$("token").value) $("token").value = sessionStorage.getItem(TOKEN_KEY) ?? "";
    const list = (examples ?? []).map((prompt) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.className = "example";
      button.textContent = prompt;
      button.addEventListener("click", () => {
        $("prompt").value = prompt;
        $("prompt").focus();
      });
      item.append(button);
      return item;
    });
    $("example-list").replaceChildren(...list);
    $("examples").hidden = !list.length;
  }

  // ---- what people do ----

  listen() {
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!$("send").disabled) $("composer").requestSubmit();
    });
    $("prompt").addEventListener("input", () => this.promptProblem(""));
    $("when").addEventListener("input", () => this.showWhen());
    $("pause").addEventListener("click", () => this.togglePause());
    $("stop").addEventListener("click", () => this.stop());
    $("live").addEventListener("click", () => this.player?.goLive(LEAD_SECONDS));
    $("fullscreen").addEventListener("click", () => $("video").requestFullscreen?.());
    $("download").addEventListener("click", (event) => this.download(event));
    this.timeline.addEventListener("choose", (event) => this.chooseChunk(event.detail));
    $("branch-same").addEventListener("click", () => this.branch(this.chosen.prompt));
    $("branch-new").addEventListener("click", () => {
      const prompt = this.readPrompt();
      if (prompt) this.branch(prompt);
    });
    $("branch-close").addEventListener("click", () => this.leaveChunk());
    this.receipts.addEventListener("showing", (event) => {
      $("status").textContent = `Now showing: ${event.detail.prompt}`;
    });
  }

  promptProblem(words) {
    $("prompt-problem").textContent = words;
    $("prompt-problem").hidden = !words;
    if (words) $("prompt").setAttribute("aria-invalid", "true");
    else $("prompt").removeAttribute("aria-invalid");
  }

  readPrompt() {
    const prompt = $("prompt").value.trim().replace(/\s+/g, " ");
    this.promptProblem(prompt ? "" : "Write what the video shall show.");
    if (!prompt) $("prompt").focus();
    return prompt;
  }

  submit() {
    const prompt = this.readPrompt();
    if (!prompt) return;
    if (!this.isLive) return this.start(prompt);
    const mode = document.querySelector("input[name=mode]:checked").value;
    const when = $("when").value;
    this.notices.drop("warning");
    if (when === "") this.stream.send({ type: "set_prompt", prompt, mode });
    else this.stream.send({ type: "add_shot", prompt, mode, chunk: this.timeline.timing.nearest(Number(when)) });
    $("when").value = "";
    this.showWhen();
    $("prompt").select();
  }

  showWhen() {
    const when = $("when").value;
    const timing = this.timeline.timing;
    $("when-chunk").textContent = when !== "" && timing ? `chunk ${timing.nearest(Number(when))}` : "";
    this.nameSend();
  }

  start(prompt) {
    this.leave();
    this.notices.clear();
    const token = $("token-field").hidden ? "" : $("token").value.trim();
    if (token) sessionStorage.setItem(TOKEN_KEY, token);
    this.token = token;
    this.startedAt = performance.now();
    this.resetNumbers();
    const fields = { prompt };
    for (const id of ["seed", "steps", "seconds"]) if ($(id).value !== "") fields[id] = Number($(id).value);
    const url = new URL("v1/stream", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.stream = new Stream(url.href, { token, leadSeconds: LEAD_SECONDS });
    this.follow(this.stream);
    this.setState("connecting", "Starting");
    this.stageText("Making the first chunk …");
    this.stream.start(fields);
  }

  togglePause() {
    const pausing = this.state !== "paused";
    this.stream.send({ type: pausing ? "pause" : "resume" });
    if (pausing) this.player?.pause();
    else this.player?.play();
    this.setState(pausing ? "paused" : "playing", pausing ? "Paused" : "Playing");
  }

  stop() {
    if (this.stream.send({ type: "stop" })) {
      $("stop").disabled = true;
      $("status").textContent = "Stopping";
    } else this.finish("Stopped");
  }

  chooseChunk(chunk) {
    this.chosen = chunk;
    const inSight = this.player?.show(chunk.start);
    $("branch-text").textContent =
      `Chunk ${chunk.chunk}, from ${moment(chunk.start)}${inSight ? "" : " (no longer in this browser's memory)"}. ` +
      (this.isLive ? "Going on from here drops it and what was made after it." : "This video is finished.");
    this.showBranch();
    if (!$("branch").hidden) $("branch").scrollIntoView({ block: "nearest" });
  }

  leaveChunk() {
    const chunk = this.chosen?.chunk;
    this.chosen = null;
    this.timeline.choose(-1);
    this.showBranch();
    document.querySelector(`#chunks [data-chunk="${chunk}"]`)?.focus();
  }

  showBranch() {
    $("branch").hidden = !this.chosen;
    $("branch-same").hidden = $("branch-new").hidden = !this.isLive;
    $("branch-same").disabled = $("branch-new").disabled = this.state === "lost";
  }

  branch(prompt) {
    const mode = document.querySelector("input[name=mode]:checked").value;
    const { chunk } = this.chosen;
    this.stream.send({ type: "seek", chunk, ...(prompt === this.chosen.prompt ? {} : { prompt, mode }) });
    if (this.state === "paused") this.togglePause();
    this.leaveChunk();
    $("status").textContent = `Branching at chunk ${chunk}`;
  }

  async download(event) {
    if (!this.token) return;
    event.preventDefault();
    try {
      const answer = await fetch($("download").href, { headers: { Authorization: `Bearer ${this.token}` } });
      if (!answer.ok) throw new TypeError(`the server answered ${answer.status}`);
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await answer.blob());
      link.download = $("download").download;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      this.notices.show("download", { kind: "error", title: "The video could not be loaded.", detail: sentence(error.message) });
    }
  }

  // ---- what the server says ----

  follow(stream) {
    const on = (name, call) =>
      stream.addEventListener(name, (event) => {
        if (stream === this.stream) call(event.detail);
      });
    on("ready", (message) => this.onReady(message));
    on("chunk", (message) => this.onChunk(message));
    on("data", ({ bytes }) => this.player?.append(bytes));
    on("receipt", (message) => this.onReceipt(message));
    on("state", ({ state }) => this.onServerState(state));
    on("warning", ({ message }) => this.notices.show("warning", { kind: "warning", title: "A warning.", detail: sentence(message) }));
    on("end", (message) => this.onEnd(message));
    on("error", (message) => this.onError(message));
    on("lost", (lost) => this.onLost(lost));
    on("retrying", () => this.showLost("Trying to reach it again."));
    on("closed", ({ reached }) => this.onClosed(reached));
  }

  onReady(message) {
    this.notices.drop("lost");
    if (message.continued) {
      this.setState("playing", "Connected again");
      this.player.play();
      return;
    }
    if (!canPlay(message.mime)) {
      this.stream.send({ type: "stop" });
      this.fail("This browser cannot play the video.", `It does not support ${message.mime} piece by piece. Another browser may.`);
      return;
    }
    $("seed").value = String(message.seed);
    this.timeline.timing = new ChunkTiming(message);
    this.player = new Player($("video"), message.mime, { startedAt: this.startedAt });
    this.player.addEventListener("first-frame", ({ detail }) => this.onFirstFrame(detail.seconds));
    this.player.addEventListener("needs-click", () => this.onNeedsClick());
    this.player.addEventListener("broken", ({ detail }) => this.fail("The video cannot be played.", sentence(detail.message)));
    $("download").href = `v1/streams/${encodeURIComponent(message.session)}/content`;
    $("download").download = `longvideo-${message.session}.mp4`;
    $("download").hidden = false;
    this.setState("playing", "Making the first chunk");
    $("prompt").select();
  }

  onFirstFrame(seconds) {
    $("n-first").textContent = duration(seconds);
    $("fullscreen").disabled = !$("video").requestFullscreen;
    this.stageText("");
    if (this.state === "playing") $("status").textContent = "Playing";
  }

  onNeedsClick() {
    this.notices.show("click", {
      kind: "info",
      title: "The browser waits for a click before it plays.",
      actions: [["Play", () => { this.notices.drop("click"); this.player.play(); }]],
    });
  }

  onChunk(message) {
    const made = this.timeline.put(message);
    $("line").hidden = false;
    this.plot.add(made.chunk, made.madeIn, made.frames / this.server.fps);
    $("n-fps").textContent = message.fps.toFixed(1);
    $("n-note").hidden = made.chunk === 0 || message.fps >= this.server.fps;
    $("n-chunk").textContent = duration(made.madeIn);
    $("n-chunks").textContent = String(this.timeline.made.length);
    $("n-dropped").textContent = String(message.dropped);
    $("n-dropped").classList.toggle("bad", message.dropped > 0);
    $("made").textContent = clock(message.start + message.frames / this.server.fps);
  }

  onReceipt(receipt) {
    const { action, effective_at, effective_seconds } = receipt;
    if (!["set_prompt", "add_shot", "seek"].includes(action)) return;
    // a branch without a prompt goes on with that of its chunk
    const prompt = receipt.prompt ?? this.timeline.made[effective_at]?.prompt ?? "";
    if (action === "seek") {
      // shots that were not begun stay planned
      this.timeline.forgetPlans(effective_at, receipt.accepted_at);
      this.timeline.truncate(effective_at);
      this.player.replaceFrom(effective_seconds);
    }
    this.timeline.plan(effective_at, prompt);
    this.receipts.add({ ...receipt, prompt }, this.timeline.colorOf(prompt));
    $("status").textContent = `Accepted, shown from chunk ${effective_at} (${moment(effective_seconds)})`;
  }

  onServerState(state) {
    if (!this.isLive || state === this.state) return;
    this.setState(state, state === "paused" ? "Paused" : "Playing");
  }

  onEnd({ seconds }) {
    this.finish(`Finished, ${moment(seconds)}`);
  }

  onError({ code, message, fatal }) {
    const { title, detail } = explain(code, message);
    if (code === "bad_prompt") this.promptProblem(`${title} ${detail}`);
    if (!fatal) {
      if (code !== "bad_prompt") this.notices.show("error", { kind: "warning", title, detail });
      return;
    }
    if (code === "unauthorized") {
      sessionStorage.removeItem(TOKEN_KEY);
      $("token-field").hidden = false;
    }
    this.fail(title, detail);
    if (code === "unauthorized") $("token").focus();
  }

  onLost({ seconds }) {
    this.setState("lost", "Connection lost");
    this.showLost(`The next try is in ${seconds} s; what is loaded goes on playing.`);
  }

  showLost(detail) {
    this.notices.show("lost", {
      kind: "warning",
      title: "The connection is lost.",
      detail,
      actions: [["Try now", () => this.stream.retry()], ["Give up", () => this.finish("Stopped")]],
    });
  }

  onClosed(reached) {
    if (this.isLive) return this.fail("The connection could not be restored.", "What was made until now can still be watched here.");
    if (reached) return this.fail("The server ended the connection.", "Its log may say why.");
    const hint = this.server.needs_token ? "Either it is down, or it refused the token." : "Is longvideo serve still running?";
    this.fail("The server cannot be reached.", hint);
  }

  // ---- the end ----

  fail(title, detail) {
    this.finish("Stopped");
    this.notices.show("error", { kind: "error", title, detail });
  }

  /** Let go of the stream; what is loaded can still be watched. */
  finish(words) {
    this.notices.drop("lost");
    this.stream?.close();
    this.player?.end();
    if (this.player) this.player.play();
    else this.stageText("Say what to see. The video plays while it is made.");
    this.timeline.forgetPlans();
    this.setState(this.player ? "ended" : "idle", words);
  }

  /** Let go of the last video. */
  leave() {
    this.stream?.close();
    this.player?.close();
    this.stream = this.player = this.chosen = null;
    this.timeline.clear();
    this.receipts.clear();
    this.plot.clear();
    this.lastPlayed = -1;
    $("line").hidden = $("showing").hidden = $("download").hidden = true;
  }

  resetNumbers() {
    for (const id of ["n-fps", "n-first", "n-ahead", "n-chunk", "n-chunks", "n-dropped"]) $(id).textContent = "–";
    $("n-note").hidden = true;
    $("played").textContent = $("made").textContent = clock(0);
  }

  tick() {
    if (!this.player) return;
    const { time, ahead, bufferedEnd } = this.player;
    $("played").textContent = clock(time);
    $("n-ahead").textContent = `${ahead.toFixed(1)} s`;
    $("live").hidden = !(this.isLive && bufferedEnd - time > BEHIND_SECONDS);
    const shown = this.timeline.showTime(time);
    $("showing").hidden = !shown;
    if (shown) {
      $("showing-text").textContent = shown.prompt;
      $("showing").className = `showing shot-${this.timeline.colorOf(shown.prompt)}`;
    }
    if (!this.player.isJumping) this.receipts.reach(time, this.timeline.made.length);
    if (this.isLive && time !== this.lastPlayed && this.stream.send({ type: "played", seconds: time })) this.lastPlayed = time;
  }
}

new Page();
