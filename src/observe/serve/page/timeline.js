// Timeline of the last seconds: a bar for each piece of work, on the graph's clock. A few workers have a lane each; many are
// drawn on top of each other, and the darkness shows how many were at work.

const LONGEST_S = 60;
const LANE_HEIGHT = 7;
const ROW_HEIGHT = 12;

function showTimeline(graph) {
  const spans = graph?.timeline ?? [];
  const workers = new Map();
  for (const stage of graph?.stages ?? []) {
    if (!spans.some((span) => span.stage === stage.name)) continue;
    if (!workers.has(stage.role)) workers.set(stage.role, []);
    workers.get(stage.role).push(stage.name);
  }
  setShown(byId("timeline-part"), workers.size > 0);
  const place = byId("timeline");
  if (workers.size === 0 || place.clientWidth === 0) return;
  const window = Math.min(LONGEST_S, Math.max(1, graph.uptime_s - Math.min(...spans.map((span) => span.start_s))));
  const recent = spans.filter((span) => span.end_s > graph.uptime_s - window);
  place.replaceChildren(drawTimeline(workers, recent, graph.uptime_s, window, place.clientWidth));
  setText(byId("timeline-title"), `The last ${duration(window)}`);
}

function drawTimeline(workers, spans, now, window, width) {
  const names = 12 + Math.min(100, Math.max(...[...workers.keys()].map((role) => textWidth(role))));
  const across = (time) => Math.max(names, names + (width - names) * (1 - (now - time) / window));
  const svg = drawn("svg", { role: "img", "aria-label": timelineWords(workers, spans, window) });
  let y = 0;
  for (const [role, lanes] of workers) {
    const apart = lanes.length > 1 && lanes.length <= MOST_WORKERS;
    const height = apart ? LANE_HEIGHT * lanes.length : ROW_HEIGHT;
    svg.append(label(role, 0, y + height / 2 + 6, names - 8));
    for (const span of spans.filter((each) => lanes.includes(each.stage))) {
      svg.append(drawSpan(span, across, y + 2 + (apart ? LANE_HEIGHT * lanes.indexOf(span.stage) : 0), apart ? LANE_HEIGHT - 1 : height, lanes.length));
    }
    y += height + 5;
    svg.append(drawn("path", { class: "rule", d: `M${names} ${y - 1.5}H${width}` }));
  }
  svg.append(label(`${duration(window)} ago`, names, y + 12, 90, "quiet-text"), label("now", width, y + 12, 40, "end quiet-text"));
  svg.setAttribute("width", width);
  svg.setAttribute("height", y + 18);
  return svg;
}

function drawSpan(span, across, y, height, workers) {
  const left = across(span.start_s);
  const words = `${span.stage}, group ${span.seq}, weights ${span.version}, ${duration(span.end_s - span.start_s)}`;
  const opacity = workers > MOST_WORKERS ? Math.max(0.1, 1.5 / workers) : span.version % 2 ? 0.5 : 1;
  return drawn("rect", { class: "span", x: left, y, width: Math.max(1, across(span.end_s) - left - 0.5), height, "fill-opacity": opacity },
    drawn("title", {}, words));
}

function timelineWords(workers, spans, window) {
  const counts = [...workers].map(([role, names]) =>
    `${role} ${counted(spans.filter((span) => names.includes(span.stage)).length, "piece")} of work`);
  return `In the last ${duration(window)}: ${counts.join(", ")}.`;
}
