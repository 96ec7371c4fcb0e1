// Creation of elements. Text is only inserted as text nodes, so that the policy's output is never parsed as markup.

const SVG = "http://www.w3.org/2000/svg";

function byId(id) {
  return document.getElementById(id);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function element(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), attributes, children);
}

const ruler = document.createElement("canvas").getContext("2d");

function textWidth(text, font = "12px") {
  ruler.font = `${font} ${getComputedStyle(document.documentElement).fontFamily}`;
  return ruler.measureText(text).width;
}

/** Returns SVG text, truncated to `width`; truncated text is complete in a tooltip. */
function label(text, x, y, width, kind = "") {
  const font = kind.includes("actor-role") ? "650 14px" : kind.includes("strong-text") ? "600 12px" : "12px";
  let shown = text;
  while (shown.length > 1 && textWidth(shown, font) > width) shown = `${shown.slice(0, Math.min(shown.length - 2, 200))}…`;
  return drawn("text", { x, y, class: kind }, shown === text ? null : drawn("title", {}, text), shown);
}

/** Changes the text only if it differs, so that selections and the scroll position are kept. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setShown(node, shown) {
  if (node.hidden === shown) node.hidden = !shown;
}

/** Fills `node` with `text`, or hides it if there is none. */
function setOptional(node, text) {
  setText(node, text || "");
  setShown(node, Boolean(text));
}

function table(caption, head, rows) {
  return element("table", {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...head.map((cell) => element("th", { scope: "col" }, cell)))),
    element("tbody", {}, ...rows.map(([first, ...rest]) =>
      element("tr", {}, element("th", { scope: "row" }, first), ...rest.map((cell) => element("td", {}, cell))))));
}

/** Calls `act` when the width of `node` changes. Changes of its height, for example by `act`, are ignored. */
function onWidth(node, act) {
  let last = node.clientWidth;
  new ResizeObserver(() => {
    if (node.clientWidth === last) return;
    last = node.clientWidth;
    act();
  }).observe(node);
}

/** Reads from storage. If storage is forbidden, full or absent, nothing is stored. */
function remembered(storage, key) {
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

function remember(storage, key, value) {
  try {
    if (value === null) window[storage].removeItem(key);
    else window[storage].setItem(key, value);
  } catch {
    // The page works without storage.
  }
}
