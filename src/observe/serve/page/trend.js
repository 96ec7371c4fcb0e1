// Changes between polls: the flow on edges, and the time shares of each worker. Times are by the graph's clock, so that neither
// a slow network nor a wrong clock of the browser matters.

class Trend {
  constructor() {
    this.key = null;
    this.moments = [];
  }

  /** Adds a status. Another incarnation resets the trend. */
  add(status) {
    const graph = status.graph;
    const key = graph ? `${status.incarnation_started}/${graph.incarnation}` : null;
    if (key !== this.key || !graph || graph.uptime_s < (this.latest()?.at ?? 0)) this.moments = [];
    this.key = key;
    if (!graph) return;
    this.moments.push({
      at: graph.uptime_s,
      edges: new Map(graph.edges.map((edge) => [edge.name, edge.items])),
      stages: new Map(graph.stages.map((stage) => [stage.name, stage])),
    });
    const horizon = graph.uptime_s - (status.window_s || 60);
    while (this.moments.length > 2 && this.moments[1].at <= horizon) this.moments.shift();
  }

  latest() {
    return this.moments[this.moments.length - 1];
  }

  /** Returns the items per second on an edge; null until two polls include it. */
  flow(edge) {
    const [first, last] = [this.moments[0], this.latest()];
    if (!first || last.at - first.at < 0.5 || !first.edges.has(edge)) return null;
    return Math.max(0, last.edges.get(edge) - first.edges.get(edge)) / (last.at - first.at);
  }

  /** Returns the time shares of a worker since the window began, or since it started; null without any time. */
  shares(name) {
    const before = this.moments.length > 1 ? this.moments[0].stages.get(name) : null;
    const now = this.latest()?.stages.get(name);
    if (!now) return null;
    const spent = (part) => Math.max(0, now[part] - (before ? before[part] : 0));
    const shares = { busy: spent("busy_s"), idle: spent("idle_s"), blocked: spent("blocked_s"), admission: spent("admission_s") };
    const total = Object.values(shares).reduce((sum, value) => sum + value, 0);
    if (total <= 0) return null;
    return Object.fromEntries(Object.entries(shares).map(([part, value]) => [part, value / total]));
  }
}
