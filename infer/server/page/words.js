// What the page says: times, numbers and errors in words.

/** 75.24 -> "1:15.2"; hours appear when there are any. */
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

/** 10.542 -> "10.5 s": a moment of the video. */
export function moment(seconds) {
  return `${seconds.toFixed(1)} s`;
}

const ERRORS = {
  unauthorized: ["The server refused the token.", "Write the right one under “Before the start” and start again."],
  too_many_sessions: ["The server is busy.", "It streams as many videos as it may. Try again when one has ended."],
  not_found: ["The server does not know this video any more.", "What was made until now can still be watched here."],
  too_slow: ["This browser or its connection was too slow.", "It did not take the video as fast as it was made, and the server ended the stream."],
  storage: ["The server's disk is full.", "The video ends here. Go on when there is room again."],
  shutting_down: ["The server is shutting down.", "Start again when it is back."],
  internal: ["The server made a mistake.", "Its log says more."],
  bad_prompt: ["The prompt was not accepted.", ""],
  bad_chunk: ["The chunk was not accepted.", ""],
  too_late: ["That was too late.", ""],
  bad_message: ["The server did not understand this page.", "They may be of different versions; reload the page."],
};

/** An `error` message of the server -> {title, detail}; the server's own words come last. */
export function explain(code, message) {
  const [title, advice] = ERRORS[code] ?? [`The server reported “${code}”.`, ""];
  return { title, detail: [advice, sentence(message)].filter(Boolean).join(" ") };
}

/** "the prompt is empty" -> "The prompt is empty." */
export function sentence(text) {
  if (!text) return "";
  const capital = text[0].toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
