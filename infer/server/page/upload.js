// Upload the picture or video that a video starts from.

/** The server refused a file. status: that of the answer. */
export class UploadError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * Upload a file and return its id for the protocol's `start`. signal: cancels it, which throws an AbortError.
 * Throws UploadError where the server refuses the file, and TypeError where it cannot be reached.
 */
export async function upload(file, { token, signal }) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch("v1/references", { method: "POST", body: file, headers, signal });
  if (!answer.ok) throw new UploadError(await reason(answer), answer.status);
  return (await answer.json()).id;
}

// a proxy in front of the server may refuse a file with a page of its own
async function reason(answer) {
  const isJson = answer.headers.get("Content-Type") === "application/json";
  return isJson ? (await answer.json()).error.message : `the server answered with status ${answer.status}`;
}
