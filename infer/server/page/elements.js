// Elements of index.html.

/** Return the element with this id. */
export const $ = (id) => document.getElementById(id);

/** Return a new button with a text and a click handler. */
export function button(text, className, onClick) {
  const element = document.createElement("button");
  element.type = "button";
  element.className = className;
  element.textContent = text;
  element.addEventListener("click", onClick);
  return element;
}
