// The numbers of the graph as tables, for exact values and for screen readers.

function showTables(status, trend) {
  const graph = status.graph;
  const details = byId("actors-table");
  setShown(details, Boolean(graph));
  if (!graph || !details.open) return;
  const { readers } = weightsOf(status);
  const actors = graph.stages.map((stage) => {
    const shares = trend.shares(stage.name);
    const reader = readers.get(stage.name);
    return [stage.name, `${stateWords(stage.state)}, ${duration(stage.since_s)}`, percent(shares?.busy), percent(shares?.idle),
      percent(shares?.blocked), percent(shares?.admission), figure(stage.items_out), reader ? `${reader.version}, lag ${reader.lag}` : NONE];
  });
  const queues = graph.edges.map((edge) => [edge.name, `${edge.depth} of ${edge.capacity}`, figure(edge.high_water),
    edge.depth > 0 ? duration(edge.age_s) : NONE, perSecond(trend.flow(edge.name)), figure(edge.items),
    edge.items > 0 ? duration(edge.waited_s / edge.items) : NONE, figure(edge.refused)]);
  byId("actors-tables").replaceChildren(
    table("Actors", ["actor", "now", "at work", "for input", "for room", "for admission", "items out", "weights"], actors),
    table("Queues", ["queue", "items", "most so far", "oldest", "flow", "items so far", "mean wait", "refused"], queues));
}
