// One box of the graph, with the actors of one role.

const PAD = 10;
const MOST_WORKERS = 6; // more are folded into cells
const CELL = 12;

/** Returns the contents of a box, before layout. */
function actorWords(node, view) {
  const role = view.roles.get(node.role);
  const { before, after } = neighbours(node, view.queues);
  const waits = role ? [
    [role.idle, "input", before ? `waits on ${before}` : "waits for input"],
    [role.blocked, "output", after ? `waits on ${after}` : "waits for room"],
    [role.admission, "admission", `waits on ${PUBLISHER}`],
  ] : [];
  return {
    role,
    waits: waits.filter(([share]) => share >= 0.05).sort((a, b) => b[0] - a[0]).slice(0, 2),
    folded: node.stages.length > MOST_WORKERS,
    limits: view.limit === node.role,
    stalled: node.stages.some((stage) => stage.name === view.stalled),
  };
}

function actorHeight(node, view, width) {
  const words = actorWords(node, view);
  const head = 58 + 15 * words.waits.length;
  if (!words.folded) return head + 6 + node.stages.reduce((sum, stage) => sum + workerHeight(stage, node, view), 0);
  const rows = Math.ceil(node.stages.length / cellsAcross(width));
  const lines = foldedLines(node, view).length;
  return head + 8 + rows * CELL + lines * 15 + 6;
}

function workerHeight(stage, node, view) {
  return 36 + (stage.note ? 14 : 0) + (view.readers.has(stage.name) ? 14 : 0) + (node.stages.length > 1 ? 6 : 0);
}

function cellsAcross(width) {
  return Math.max(1, Math.floor((width - 2 * PAD + 2) / CELL));
}

function drawActor(node, view, x, y, width) {
  const words = actorWords(node, view);
  const height = actorHeight(node, view, width);
  const box = drawn("g", { class: `actor${words.limits ? " actor-limits" : ""}${words.stalled ? " actor-stalled" : ""}` },
    drawn("rect", { class: "actor-box", x, y, width, height, rx: 3 }),
    label(node.role, x + PAD, y + 19, width - 2 * PAD - 34, "actor-role"),
    node.stages.length > 1 ? label(`× ${node.stages.length}`, x + width - PAD, y + 19, 40, "end quiet-text") : null);
  if (words.stalled || words.limits) box.append(tag(words.stalled ? "stalled" : "bottleneck", x + width - PAD, y, words.stalled));
  box.append(shareBar(words.role, x + PAD, y + 27, width - 2 * PAD, 9));
  box.append(label(words.role ? `${percent(words.role.busy)} at work` : "not measured yet", x + PAD, y + 50, width - (words.role ? 70 : 2 * PAD), "strong-text"));
  if (words.role?.items_per_s > 0) box.append(label(perSecond(words.role.items_per_s), x + width - PAD, y + 50, 60, "end quiet-text"));
  let line = y + 50;
  for (const [share, state, text] of words.waits) {
    line += 15;
    box.append(drawn("rect", { class: `share-${state}`, x: x + PAD, y: line - 8, width: 8, height: 8 }),
      label(`${percent(share)} ${text}`, x + PAD + 13, line, width - 2 * PAD - 13));
  }
  line += 8;
  box.append(drawn("path", { class: "rule", d: `M${x} ${line}h${width}` }));
  if (words.folded) drawFolded(box, node, view, x, line + 8, width);
  else drawWorkers(box, node, view, x, line, width);
  return { box, height };
}

function drawWorkers(box, node, view, x, top, width) {
  let y = top;
  for (const stage of node.stages) {
    let line = y + 16;
    const suffix = node.stages.length > 1 || stage.name !== node.role ? stage.name : "now";
    box.append(stateMark(stage.state, x + PAD, line - 9.5),
      label(suffix, x + PAD + 15, line, width - 2 * PAD - 60, "strong-text"),
      label(duration(stage.since_s), x + width - PAD, line, 60, "end quiet-text"),
      label(stateWords(stage.state), x + PAD + 15, (line += 14), width - 2 * PAD - 15));
    const reader = view.readers.get(stage.name);
    if (reader) box.append(label(readerWords(reader), x + PAD + 15, (line += 14), width - 2 * PAD - 15, "quiet-text"));
    if (stage.note) box.append(label(stage.note, x + PAD + 15, (line += 14), width - 2 * PAD - 15, "quiet-text"));
    if (node.stages.length > 1) box.append(shareBar(view.trend.shares(stage.name), x + PAD + 15, line + 5, width - 2 * PAD - 15, 4));
    y += workerHeight(stage, node, view);
  }
}

function readerWords(reader) {
  const wrong = reader.fingerprint_matches === false ? ", not the published weights" : "";
  return `weights ${reader.version}, lag ${reader.lag}${wrong}`;
}

/** Draws many workers: a mark for each, and the number of workers in each state. */
function drawFolded(box, node, view, x, top, width) {
  const across = cellsAcross(width);
  node.stages.forEach((stage, i) => {
    const mark = stateMark(stage.state, x + PAD + (i % across) * CELL, top + Math.floor(i / across) * CELL);
    mark.append(drawn("title", {}, `${stage.name} ${stateWords(stage.state)}, ${duration(stage.since_s)}`));
    box.append(mark);
  });
  let line = top + Math.ceil(node.stages.length / across) * CELL + 2;
  for (const text of foldedLines(node, view)) box.append(label(text, x + PAD, (line += 15) - 3, width - 2 * PAD));
}

function foldedLines(node, view) {
  const lines = Object.keys(STATES)
    .map((state) => [node.stages.filter((stage) => stage.state === state).length, state])
    .filter(([count]) => count > 0)
    .map(([count, state]) => `${count} ${count === 1 ? STATES[state].words : STATES[state].many}`);
  const readers = node.stages.map((stage) => view.readers.get(stage.name)).filter(Boolean);
  if (readers.length) lines.push(`weights ${range(readers.map((r) => r.version))}, lag ${range(readers.map((r) => r.lag))}`);
  return lines;
}

/** Returns a tag on the upper edge of a box that ends at `right`. */
function tag(text, right, y, alarming) {
  const width = textWidth(text, "650 11px") + 12;
  return drawn("g", { class: alarming ? "tag tag-alarm" : "tag" },
    drawn("rect", { class: "plate", x: right - width, y: y - 11, width, height: 15, rx: 2 }),
    drawn("text", { class: "on-plate", x: right - width + 6, y }, text));
}
