// The top of the page: the run, its progress, the connection to the node, and current numbers.

const LAST_PHASE = "writing the last checkpoint";

function showHeader(status, rows) {
  const plan = status.plan;
  const step = status.last_step?.step ?? 0;
  setText(byId("run"), status.run);
  setOptional(byId("phase"), status.phase);
  setText(byId("program"), status.program);
  setText(byId("plan"), plan ? planWords(plan) : "");
  setShown(byId("progress"), Boolean(plan));
  document.title = plan ? `${step}/${plan.steps} ${status.run}` : status.run;
  if (!plan) return;
  setText(byId("step"), `step ${figure(step)} of ${figure(plan.steps)}`);
  setText(byId("remaining"), remainingWords(status, rows, step));
  const track = byId("track");
  track.setAttribute("aria-valuemax", plan.steps);
  track.setAttribute("aria-valuenow", step);
  byId("track-fill").style.width = `${Math.min(100, (100 * step) / Math.max(1, plan.steps))}%`;
}

function planWords(plan) {
  const parts = [`${plan.mode} mode`, plan.algorithm, `η${SPACE}=${SPACE}${plan.eta}`];
  if (plan.batch_groups) parts.push(`${plan.batch_groups} groups of ${plan.group_size} per step`);
  return parts.join(" · ");
}

function remainingWords(status, rows, step) {
  const left = status.plan.steps - step;
  if (left <= 0) return "· all steps done";
  const each = secondsPerStep(rows);
  return each === null ? "" : `· ${duration(left * each)} left · ${duration(each)} per step`;
}

/** Returns the mean over the last twenty steps of the history; null before the second step. */
function secondsPerStep(rows) {
  const seen = rows.filter((row) => isFigure(row.step) && isFigure(row["time/run_seconds"])).slice(-21);
  const [first, last] = [seen[0], seen[seen.length - 1]];
  if (!first || last.step <= first.step) return null;
  const each = (last["time/run_seconds"] - first["time/run_seconds"]) / (last.step - first.step);
  return each > 0 ? each : null;
}

function showVitals(status) {
  const [faults, warns] = faultWords(status.faults);
  const vitals = [
    ...(warns ? [["faults", faults, true]] : []),
    ["generated", tokens(status.rates?.generated_tokens_per_s)],
    ["trained", tokens(status.rates?.trained_tokens_per_s)],
    ["completions", perSecond(status.rates?.completions_per_s)],
    ["groups in progress", wayWords(status.ledger)],
    ["memory", byteCount(status.memory?.resident_bytes)],
    ...(status.memory?.device ?? []).map((device, i) => [`device ${device.device ?? i}`, deviceWords(device)]),
    ["checkpoint", checkpointWords(status.checkpoint)],
    ["node up since", clockTime(status.incarnation_started * 1000)],
    ...(warns ? [] : [["faults", faults]]),
  ];
  byId("vitals").replaceChildren(...vitals.map(([name, words, warns]) =>
    element("div", { "data-warns": Boolean(warns) }, element("dt", {}, name), element("dd", {}, words))));
}

function tokens(rate) {
  return isFigure(rate) ? `${figure(rate)}${SPACE}tokens/s` : NONE;
}

function wayWords(ledger) {
  if (!ledger) return NONE;
  const places = ["admitted", "generated", "labeled", "rewarded"].filter((place) => ledger[place] > 0);
  return places.length ? places.map((place) => `${ledger[place]}${SPACE}${place}`).join(", ") : "none";
}

function deviceWords(device) {
  const { used_bytes: used, free_bytes: free } = device;
  return isFigure(used) && isFigure(free) ? `${byteCount(used)} of ${byteCount(used + free)}` : byteCount(used);
}

function checkpointWords(checkpoint) {
  if (!checkpoint) return "none yet";
  return `${duration(checkpoint.age_s)} ago, ${byteCount(checkpoint.bytes)} in ${duration(checkpoint.took_s)}`;
}

/** Returns a list of faults as text, and true if there are any. */
function faultWords(faults) {
  const names = [
    ["restarts", "restart", "restarts"],
    ["nonfinite_steps", "step not finite", "steps not finite"],
    ["masked_groups", "masked group", "masked groups"],
    ["disk_errors", "disk error", "disk errors"],
  ];
  const words = names.filter(([key]) => faults?.[key] > 0).map(([key, one, many]) => counted(faults[key], one, many));
  return words.length ? [`\u26a0 ${words.join(", ")}`, true] : ["none", false];
}

/** Shows the state of the connection: live, lost, token or asking. */
function showConnection(state, words) {
  const connection = byId("connection");
  connection.dataset.state = state;
  setText(connection, words);
}

/** Shows that the node has not answered since `since` (null: never); `last` is its last status. */
function showLost(since, reason, last) {
  const at = since === null ? null : clockTime(since);
  showConnection("lost", at ? `no answer since ${at}` : "no answer");
  const sentences = [at ? `The node has not answered since ${at}.` : "The node does not answer."];
  if (last && (last.phase === LAST_PHASE || last.last_step?.step >= last.plan?.steps)) {
    sentences.push("It was at the end of its run, so it has probably finished.");
  }
  sentences.push(`The page keeps asking (${reason}).${at ? " The values below are from its last answer." : ""}`);
  setOptional(byId("lost"), sentences.join(" "));
  if (last) document.title = `\u26a0 ${last.run} does not answer`;
}

function showStalled(stalled, run) {
  setOptional(byId("stalled"), stalled
    ? `\u26a0 No progress for ${duration(stalled.for_s)}: the run is blocked in ${stalled.stage} (${stateWords(stalled.state)}).`
    : null);
  if (stalled) document.title = `\u26a0 ${run} is stalled`;
}

/** Shows the judges that the run waits for, each with the cause. */
function showWaiting(judges, run) {
  const sentences = judges.map(({ url, seconds, why, refuses }) =>
    `\u26a0 The run waits for the judge at ${url}, which has not answered for ${duration(seconds)}: ${why}. ` +
    (refuses ? "It refuses requests, which needs manual action; the run continues once it answers." : "The run continues once it answers."));
  setOptional(byId("waiting"), sentences.length ? sentences.join(" ") : null);
  if (sentences.length) document.title = `\u26a0 ${run} waits for its judge`;
}

const BOUNDS = {
  kl: "the KL divergence from the initial policy is above guard.max_kl",
  entropy: "the policy's entropy is below guard.min_entropy",
  masked: "the share of masked groups is above guard.max_masked",
};

/** Shows the exceeded bounds of [guard], and the reasons for masked groups. */
function showUnhealthy(health) {
  const exceeded = health?.exceeded ?? [];
  if (exceeded.length === 0) return setOptional(byId("unhealthy"), null);
  const reasons = exceeded.includes("masked")
    ? (health.masked ?? []).slice(0, 3).map(({ why, groups }) => `${counted(groups, "group", "groups")}: ${why}`) : [];
  setOptional(byId("unhealthy"), `\u26a0 ${[exceeded.map((name) => BOUNDS[name] ?? name).join("; "), ...reasons].join(". ")}.`);
}
