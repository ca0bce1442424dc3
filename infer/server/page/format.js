// Format times, durations and errors as text.

/** 75.24 -> "1:15.2"; hours are shown from one hour on. */
export function clock(seconds) {
  const tenths = Math.max(0, Math.floor(seconds * 10 + 1e-6));
  const whole = Math.floor(tenths / 10);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const rest = `${String(whole % 60).padStart(2, "0")}.${tenths % 10}`;
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

/** 0.642 -> "0.64 s", 12.31 -> "12.3 s". */
export function duration(seconds) {
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** 33554432 -> "32 MiB", 1500 -> "1.5 KiB". */
export function size(bytes) {
  const [unit, name] = bytes < 2 ** 20 ? [2 ** 10, "KiB"] : [2 ** 20, "MiB"];
  return `${parseFloat((bytes / unit).toFixed(1))} ${name}`;
}

/** Format a time in the video: 10.542 -> "10.5 s". */
export function moment(seconds) {
  return `${seconds.toFixed(1)} s`;
}

const ERRORS = {
  unauthorized: ["The server rejected the token.", "Enter the correct token under “Settings” and start again."],
  too_many_sessions: ["The server is busy.", "It already generates as many videos as it can. Try again when one of them has ended."],
  not_found: ["The server no longer has this video.", "The part that was generated can still be played here."],
  too_slow: ["This browser or its connection is too slow.", "The video was generated faster than it was received, and the server ended the stream."],
  storage: ["The server's disk is full.", "The video ends here. Start again when space has been freed."],
  shutting_down: ["The server is shutting down.", "Start again when it is running."],
  internal: ["An internal server error occurred.", "The server's log has the details."],
  bad_prompt: ["The prompt was rejected.", ""],
  bad_chunk: ["The chunk was rejected.", ""],
  bad_reference: ["The picture or video cannot be used.", ""],
  too_late: ["The request came too late.", ""],
  bad_message: ["The server could not read a message from this page.", "The page and the server may have different versions; reload the page."],
};

/** Return {title, detail} for the server's `error` message; the detail ends with the message itself. */
export function explain(code, message) {
  const [title, advice] = ERRORS[code] ?? [`The server reported the error “${code}”.`, ""];
  return { title, detail: [advice, sentence(message)].filter(Boolean).join(" ") };
}

/** "the prompt is empty" -> "The prompt is empty." */
export function sentence(text) {
  if (!text) return "";
  const capital = text[0].toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
