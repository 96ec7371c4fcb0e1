// Layout of stages and edges in columns, without drawing.

/** The role whose workers publish the weights that others read. */
const PUBLISHER = "learn";

/**
 * Nodes are the stages of one role between the same edges; a queue is an edge. `column` counts from the sources;
 * a source is placed directly before the stage that it feeds.
 */
function layOut(graph) {
  const nodes = gatherNodes(graph).filter((node) => !isSpent(node, graph.edges));
  const queues = graph.edges.map((edge) => ({
    edge,
    from: nodes.filter((node) => node.out.includes(edge.name)),
    to: nodes.filter((node) => node.into.includes(edge.name)),
  }));
  assignColumns(nodes, queues);
  return { nodes, queues: queues.filter((queue) => queue.from.length && queue.to.length) };
}

function gatherNodes(graph) {
  const nodes = new Map();
  for (const stage of graph.stages) {
    const into = graph.edges.filter((edge) => edge.to.includes(stage.name)).map((edge) => edge.name);
    const out = graph.edges.filter((edge) => edge.from.includes(stage.name)).map((edge) => edge.name);
    const key = JSON.stringify([stage.role, into, out]);
    if (!nodes.has(key)) nodes.set(key, { role: stage.role, stages: [], into, out, column: 0 });
    nodes.get(key).stages.push(stage);
  }
  return [...nodes.values()];
}

/** Returns whether a source has ended and shares its edges with others: it only delivered the groups kept by a restart. */
function isSpent(node, edges) {
  const shared = (name) => edges.find((edge) => edge.name === name).from.length > node.stages.length;
  return node.into.length === 0 && node.out.length > 0 && node.out.every(shared)
    && node.stages.every((stage) => stage.state === "ended");
}

function assignColumns(nodes, queues) {
  // The longest path from a source; the number of rounds bounds cycles.
  for (let round = 0; round < nodes.length; round += 1) {
    for (const queue of queues) {
      const least = Math.max(-1, ...queue.from.map((node) => node.column)) + 1;
      for (const node of queue.to) node.column = Math.min(nodes.length - 1, Math.max(node.column, least));
    }
  }
  for (const node of nodes.filter((each) => each.into.length === 0)) {
    const fed = queues.filter((queue) => queue.from.includes(node)).flatMap((queue) => queue.to);
    if (fed.length) node.column = Math.max(0, Math.min(...fed.map((each) => each.column)) - 1);
  }
}

/** Returns the neighbours that a node waits on: its inputs' senders, and its outputs' receivers. */
function neighbours(node, queues) {
  const names = (nodes) => [...new Set(nodes.map((each) => each.role))].join(", ");
  return {
    before: names(queues.filter((queue) => queue.to.includes(node)).flatMap((queue) => queue.from)),
    after: names(queues.filter((queue) => queue.from.includes(node)).flatMap((queue) => queue.to)),
  };
}

/** Returns the readers of the weights by stage name, and the newest published version. */
function weightsOf(status) {
  const readers = new Map((status.weights ?? []).map((reader) => [reader.reader, reader]));
  const published = Math.max(-1, ...[...readers.values()].map((reader) => reader.version + reader.lag));
  return { readers, published };
}
