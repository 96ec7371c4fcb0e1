// The rollout servers: a table, and a banner if none of them is ready. The reasons come from the servers and are untrusted text.

const CONDITIONS = { starting: "has no weights yet", ready: "ready", down: "down", rejected: "gets no prompts" };
const SERVER_COLUMNS = ["server", "condition", "weights", "under way", "tokens/s", "canary", "last hand-over"];

function showServers(status) {
  const servers = status.servers ?? [];
  for (const id of ["servers", "servers-link"]) setShown(byId(id), servers.length > 0);
  byId("servers-rows").replaceChildren(...servers.map((server) => serverRow(server, status)));
  const word = status.plan?.engine === "workers" ? "worker" : "server";
  setText(byId("servers-title"), word === "worker" ? "Workers" : "Rollout servers");
  setText(byId("servers-link"), word === "worker" ? "Workers" : "Servers");
  const ready = servers.filter((server) => server.condition === "ready").length;
  setText(byId("servers-note"), `${ready} of ${counted(servers.length, word)} ready.` + (word === "worker" ? "" : ` Canary: the share of the last change of the weights `
    + "that the server’s log-probabilities show, which is normally about 1."));
  const failed = servers.some((server) => server.condition === "down" || server.condition === "rejected");
  const out = ready === 0 && failed && word === "server";
  setOptional(byId("unsampled"), out ? "\u26a0 No rollout server is ready, so no completions are sampled. "
    + "The run continues when one is; after rollout.outage_s it ends with a checkpoint. The table below has the reasons." : null);
  if (out) document.title = `\u26a0 ${status.run} waits for its rollout servers`;
}

function serverRow(server, status) {
  const [weights, lags] = versionOnServer(server, status);
  const condition = CONDITIONS[server.condition] ?? server.condition;
  const isReady = server.condition === "ready";
  const words = server.why ? `${condition}: ${server.why}` : condition;
  const figures = [weights, figure(server.under_way), figure(server.tokens_per_s), figure(server.canary), duration(server.hand_over_s)];
  return element("tr", { "data-condition": server.condition },
    element("th", { scope: "row" }, server.url),
    element("td", { "data-name": SERVER_COLUMNS[1] }, isReady ? words : `\u26a0 ${words}`),
    ...figures.map((text, i) => element("td", { "data-name": SERVER_COLUMNS[i + 2], class: i === 0 && lags ? "warns" : null }, text)));
}

/**
 * Returns the version on a server with its lag, and true if the server lags by more than is possible while the newest server is
 * handed a version: then it gets no prompts, although it is ready.
 */
function versionOnServer(server, status) {
  if (!isFigure(server.version)) return [NONE, false];
  const newest = status.last_step?.version;
  const lag = isFigure(newest) ? Math.max(0, newest - server.version) : 0;
  const lags = lag > (status.plan?.eta ?? 0) + 1;
  return [lag > 0 ? `${lags ? "\u26a0 " : ""}${server.version}, ${lag} behind` : String(server.version), lags];
}
