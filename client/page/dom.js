// Elements without innerHTML: text stays text, whoever wrote it.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "hidden" || name === "disabled" || name === "checked") element[name] = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// A description of the schema: `code` and [links](https://...) of its Markdown. A link to a file of
// the repository, which the page does not have, is its text alone.
export function renderText(text) {
  return text.split(/(`[^`]+`|\[[^\]]+\]\([^)\s]+\))/).map((part) => {
    if (/^`.+`$/s.test(part)) return make("code", {}, part.slice(1, -1));
    const link = /^\[([^\]]+)\]\(([^)\s]+)\)$/.exec(part);
    if (!link) return part;
    const [, words, address] = link;
    if (!address.startsWith("https://")) return words;
    return make("a", { href: address, target: "_blank", rel: "noreferrer" }, words);
  });
}

let announcerTimer;

// Tells a screen reader what has changed.
export function announce(words) {
  const announcer = document.getElementById("announcer");
  announcer.textContent = "";
  clearTimeout(announcerTimer);
  // The same words once more are told only where the text was another one in between.
  announcerTimer = setTimeout(() => (announcer.textContent = words), 50);
}

export function isDataUri(value) {
  return typeof value === "string" && /^data:image\//i.test(value);
}

// What the content security policy lets the page show.
export function isShowable(address) {
  return (
    isDataUri(address) ||
    /^(blob:|https:\/\/|http:\/\/(127\.0\.0\.1|localhost)[:/])/i.test(address ?? "")
  );
}
