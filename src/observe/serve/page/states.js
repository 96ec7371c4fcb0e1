// The states of actors and their time shares, as words, marks and patterns. No information is conveyed by colour alone.

const STATES = {
  busy: { words: "at work", many: "at work", mark: "M5 .5a4.5 4.5 0 1 0 .01 0z" },
  input: { words: "waits for input", many: "wait for input", mark: "M5 1a4 4 0 1 0 .01 0z" },
  output: { words: "waits for room", many: "wait for room", mark: "M1 1h8v8h-8z" },
  admission: { words: "waits for admission", many: "wait for admission", mark: "M5 0l5 9.5h-10z" },
  starting: { words: "is starting", many: "are starting", mark: "M1 5h8M5 1v8" },
  ended: { words: "has ended", many: "have ended", mark: "M1.5 1.5l7 7M8.5 1.5l-7 7" },
};

/** Time shares in stacking order, each with its state. */
const SHARES = [["busy", "busy"], ["blocked", "output"], ["admission", "admission"], ["idle", "input"]];

function stateWords(state) {
  return STATES[state]?.words ?? state;
}

function stateMark(state, x, y) {
  return drawn("path", { class: `mark mark-${state}`, d: STATES[state]?.mark ?? STATES.starting.mark, transform: `translate(${x} ${y})` });
}

function shareBar(shares, x, y, width, height) {
  const bar = drawn("g", {}, drawn("rect", { class: "share-none", x, y, width, height }));
  let left = x;
  for (const [part, state] of SHARES) {
    const length = width * Math.min(1, Math.max(0, shares?.[part] ?? 0));
    if (length > 0.3) bar.append(drawn("rect", { class: `share-${state}`, x: left, y, width: length, height }));
    left += length;
  }
  return bar;
}

/** Returns hatching and dots, which distinguish the shares without colour. */
function patterns() {
  const plate = (state) => drawn("rect", { class: `pattern-${state}`, width: 6, height: 6 });
  return drawn("defs", {},
    drawn("pattern", { id: "pattern-output", width: 6, height: 6, patternUnits: "userSpaceOnUse" },
      plate("output"), drawn("path", { class: "pattern-stroke", d: "M-1 7l8-8M-1 1l2-2M5 7l2-2" })),
    drawn("pattern", { id: "pattern-admission", width: 6, height: 6, patternUnits: "userSpaceOnUse" },
      plate("admission"), drawn("path", { class: "pattern-stroke", d: "M3 1v4M1 3h4" })));
}

function showLegend(window) {
  const legend = byId("legend");
  setShown(legend, true);
  const words = `Bars: shares of the last ${duration(window)}.`;
  if (legend.dataset.words === words) return;
  legend.dataset.words = words;
  const entry = (state) => element("span", { class: "legend-entry" },
    drawn("svg", { width: 28, height: 12, "aria-hidden": true },
      stateMark(state, 1, 1), drawn("rect", { class: `share-${state}`, x: 16, y: 1, width: 11, height: 10 })),
    stateWords(state));
  legend.replaceChildren(...["busy", "output", "admission", "input"].map(entry), element("span", {}, words));
}
