// The graph of actors: boxes in columns, or stacked on a narrow page; queues between them; the path of the weights below or
// at the side.

const NARROWEST = 150; // of a box in a column
const WIDEST = 232;
const GAP = 92; // between columns, for a queue
const STACK_GAP = 22; // between boxes of one column
const QUEUE_ROOM = 62; // between stacked boxes
const LANE = 24; // at the side of or below the boxes, for the path of the weights
const PORT = 32; // height of a box at which queues arrive and leave

function showGraph(status, trend) {
  const graph = status.graph;
  const place = byId("graph");
  setShown(byId("legend"), Boolean(graph));
  if (!graph) {
    place.replaceChildren();
    setOptional(byId("actors-note"), `No actors yet: the phase is “${status.phase}”.`);
    return;
  }
  const { nodes, queues } = layOut(graph);
  const view = {
    queues,
    trend,
    roles: new Map((status.roles ?? []).map((role) => [role.role, role])),
    limit: status.diagnosis?.role ?? null,
    stalled: graph.stalled?.stage ?? null,
    ...weightsOf(status),
  };
  const columns = columnsOf(nodes);
  const width = place.clientWidth;
  if (width === 0) return;
  const fits = columns.length * (NARROWEST + GAP) - GAP <= width;
  const svg = drawn("svg", { role: "img", "aria-label": graphWords(nodes, view) }, patterns());
  const size = fits ? drawAcross(svg, columns, view, width) : drawDown(svg, columns, view, Math.min(width, 460));
  svg.setAttribute("width", size.width);
  svg.setAttribute("height", size.height);
  place.replaceChildren(svg);
  showLegend(status.window_s);
  const age = graph.restarts ? `, restarted ${counted(graph.restarts, "time")}` : "";
  setOptional(byId("actors-note"), `This graph of ${counted(graph.stages.length, "actor")} has run for ${duration(graph.uptime_s)}${age}.`);
}

function columnsOf(nodes) {
  const columns = [];
  for (const node of nodes) (columns[node.column] ??= []).push(node);
  return columns.filter(Boolean);
}

/** Returns a description of the graph for screen readers; the tables below have all numbers. */
function graphWords(nodes, view) {
  const words = nodes.map((node) => {
    const role = view.roles.get(node.role);
    return `${node.role}, ${counted(node.stages.length, "worker")}${role ? `, ${percent(role.busy)} at work` : ""}`;
  });
  return `Actors: ${words.join("; ")}.${view.limit ? ` ${view.limit} is the bottleneck.` : ""}`;
}

function drawAcross(svg, columns, view, width) {
  const each = Math.min(WIDEST, (width - 2 - GAP * (columns.length - 1)) / columns.length);
  const boxes = new Map();
  let bottom = 0;
  columns.forEach((column, i) => {
    let y = 12;
    for (const node of column) {
      const box = place(svg, node, view, 1 + i * (each + GAP), y, each);
      boxes.set(node, box);
      y += box.height + STACK_GAP;
      bottom = Math.max(bottom, y - STACK_GAP);
    }
  });
  for (const queue of view.queues) {
    const to = boxes.get(queue.to[0]);
    const [x, y] = [to.x - GAP / 2, to.y + PORT];
    for (const node of queue.from) {
      const from = boxes.get(node);
      const [start, high] = [from.x + from.width, from.y + PORT];
      svg.append(wire(`M${start} ${high}H${start + 8}V${y}H${x}`, queue.edge));
    }
    for (const node of queue.to) {
      const end = boxes.get(node);
      svg.append(wire(`M${x} ${y}H${end.x - 10}V${end.y + PORT}H${end.x - 1}`, queue.edge), arrow(end.x - 1, end.y + PORT, "right"));
    }
    drawQueue(svg, queue.edge, view.trend, x, y, GAP - 6, "middle");
  }
  const back = weightsWay(view, boxes, (publisher, reader) => {
    const [from, to] = [publisher.x + publisher.width / 2, reader.x + reader.width / 2];
    const low = bottom + LANE;
    return { d: `M${from} ${publisher.y + publisher.height}V${low}H${to}V${reader.y + reader.height + 7}`, tip: [to, reader.y + reader.height + 1, "up"], at: [(from + to) / 2, low - 5, "middle"] };
  });
  svg.append(...back);
  return { width, height: bottom + (back.length ? LANE + 8 : 6) };
}

function drawDown(svg, columns, view, width) {
  const boxes = new Map();
  const readers = [...view.readers.keys()];
  const lane = readers.length ? LANE : 0;
  let y = 12;
  for (const node of columns.flat()) {
    const box = place(svg, node, view, lane, y, width - lane - 1);
    boxes.set(node, box);
    y += box.height + QUEUE_ROOM;
  }
  for (const queue of view.queues) {
    const to = boxes.get(queue.to[0]);
    const [x, middle] = [to.x + 34, to.y - QUEUE_ROOM / 2];
    queue.from.forEach((node, i) => {
      const from = boxes.get(node);
      const at = x + 8 * (queue.from.length - 1 - i);
      svg.prepend(wire(`M${at} ${from.y + from.height}V${middle}H${x}`, queue.edge)); // behind the boxes that it crosses
    });
    for (const node of queue.to) svg.prepend(wire(`M${x} ${middle}V${boxes.get(node).y - 1}`, queue.edge));
    svg.append(arrow(x, to.y - 1, "down"));
    drawQueue(svg, queue.edge, view.trend, x, middle, 40, "start");
  }
  svg.append(...weightsWay(view, boxes, (publisher, reader) => {
    const [low, high] = [publisher.y + PORT, reader.y + PORT];
    return { d: `M${publisher.x} ${low}H6V${high}H${reader.x - 7}`, tip: [reader.x - 1, high, "right"], at: [16, (low + high) / 2, "upright"] };
  }));
  return { width, height: y - QUEUE_ROOM + 8 };
}

function place(svg, node, view, x, y, width) {
  const { box, height } = drawActor(node, view, x, y, width);
  svg.append(box);
  return { x, y, width, height };
}

/** Returns the paths of the weights from the publisher to each box with a reader. */
function weightsWay(view, boxes, route) {
  const publisher = [...boxes].find(([node]) => node.role === PUBLISHER)?.[1];
  if (!publisher) return [];
  const reading = [...boxes].filter(([node]) => node.stages.some((stage) => view.readers.has(stage.name)));
  return reading.flatMap(([, box]) => {
    const { d, tip, at: [x, y, anchor] } = route(publisher, box);
    const turned = anchor === "upright" ? { transform: `translate(${x} ${y}) rotate(-90)`, class: "weights-words middle" } : { x, y, class: `weights-words ${anchor}` };
    return [drawn("path", { class: "weights", d }), arrow(...tip, "weights-tip"), drawn("text", turned, `weights, version ${view.published}`)];
  });
}

function isFull(edge) {
  return edge.capacity > 0 && edge.depth >= edge.capacity;
}

function wire(d, edge) {
  return drawn("path", { class: isFull(edge) ? "wire wire-full" : edge.depth === 0 ? "wire wire-empty" : "wire", d });
}

function arrow(x, y, towards, kind = "tip") {
  const turn = { right: 0, down: 90, up: -90 }[towards];
  return drawn("path", { class: kind, d: "M-7-4L0 0L-7 4z", transform: `translate(${x} ${y}) rotate(${turn})` });
}

/** Draws a queue: its cells, or a gauge if there are many; its name above and its numbers below, or both next to it. */
function drawQueue(svg, edge, trend, x, y, width, side) {
  const cells = edge.capacity <= 5 ? edge.capacity : 0;
  const [long, high] = [cells ? cells * 10 : Math.min(width, 44), 12];
  const left = x - long / 2;
  const queue = drawn("g", { class: isFull(edge) ? "queue queue-full" : "queue" },
    drawn("rect", { class: "queue-box", x: left, y: y - high / 2, width: long, height: high }));
  const filled = edge.capacity ? Math.min(1, edge.depth / edge.capacity) : 0;
  if (filled > 0) queue.append(drawn("rect", { class: "queue-fill", x: left, y: y - high / 2, width: long * filled, height: high }));
  for (let i = 1; i < cells; i += 1) queue.append(drawn("path", { class: "queue-rule", d: `M${left + i * 10} ${y - high / 2}v${high}` }));
  const flow = trend.flow(edge.name);
  const words = [
    `${edge.depth}/${edge.capacity}${isFull(edge) ? ", full" : ""}`,
    edge.depth > 0 ? `${duration(edge.age_s)} old` : "empty",
    flow === null ? null : perSecond(flow),
  ].filter(Boolean);
  if (side === "middle") {
    queue.append(label(edge.name, x, y - 13, width, "middle quiet-text"));
    words.forEach((text, i) => queue.append(label(text, x, y + 21 + 14 * i, width, "middle")));
  } else {
    queue.append(label(edge.name, x + 36, y - 3, 200, "quiet-text"), label(words.join(", "), x + 36, y + 12, 260));
  }
  svg.append(queue);
}
