// Download the video with the token in a header, which a plain link cannot send.

const SAVING_MILLISECONDS = 60000; // time for the browser to begin to save the file

/** Fetch what a link refers to and save it. Throws TypeError where the server cannot be reached or refuses. */
export async function downloadWithToken(link, token) {
  const answer = await fetch(link.href, { headers: { Authorization: `Bearer ${token}` } });
  if (!answer.ok) throw new TypeError(`the server answered with status ${answer.status}`);
  const copy = document.createElement("a");
  copy.href = URL.createObjectURL(await answer.blob());
  copy.download = link.download;
  copy.click();
  setTimeout(() => URL.revokeObjectURL(copy.href), SAVING_MILLISECONDS);
}
