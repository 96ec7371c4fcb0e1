// A simulated node: it serves the page with made-up figures in the format of the real API.
//
//   node node.mjs [SCENARIO] [PORT]      SCENARIO: a key of SCENARIOS below

import { createServer } from "node:http";
import { readFileSync, readdirSync } from "node:fs";
import { fileURLToPath } from "node:url";

const PAGE = new URL("../../src/observe/serve/page/", import.meta.url);

/** The page's scripts, in the order in which the node concatenates them. */
export const SCRIPTS = [
  "format.js", "dom.js", "client.js", "theme.js", "trend.js", "header.js", "diagnosis.js", "layout.js", "states.js",
  "actor.js", "graph.js", "timeline.js", "tables.js", "servers.js", "chart.js", "curves.js", "completion.js", "samples.js", "page.js",
];

export const POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
  + "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HOSTILE = [
  "<img src=x onerror=\"document.title='owned'\"><script>window.owned = true</" + "script> <b>bold</b>",
  "</style></script><svg onload=\"window.owned = true\"> & &amp; \u202egnp.txt \u0000\u0007",
  "a".repeat(3000),
  "https://example.org/" + "path/".repeat(80) + " javascript:alert(1)",
];

/** Scenarios, each as its differences from a run that trains without problems. */
export const SCENARIOS = {
  training: {},
  starting: { starting: true },
  unmeasured: { unmeasured: true },
  stalled: { stalled: true },
  hostile: { hostile: true, servers: ["ready", "down", "rejected"] },
  many: { rollouts: 64, labelers: 12, controller: true, faulty: true },
  preference: { mode: "preference", algorithm: "online_dpo" },
  distilled: { mode: "distilled", algorithm: "ppo", rollouts: 3, labelers: 2, step: 4021, steps: 20000, faulty: true, winRate: true },
  left: { left: true },
  served: { servers: ["ready", "behind", "starting", "down", "rejected"] },
  unsampled: { servers: ["down", "rejected"] },
};

/** Returns the page as one document, assembled as by the node. */
export function document() {
  const read = (name) => readFileSync(new URL(name, PAGE), "utf8");
  const there = readdirSync(fileURLToPath(PAGE)).filter((name) => name.endsWith(".js")).sort();
  if (there.join() !== [...SCRIPTS].sort().join()) throw new Error(`SCRIPTS does not name the page's scripts: ${there}`);
  const script = SCRIPTS.map(read).join("\n");
  return read("index.html")
    .replace("<!--style-->", () => `<style>\n${read("style.css")}</style>`)
    .replace("<!--script-->", () => `<script>\n${script}</script>`);
}

/** Starts a simulated node. The returned `world` is its scenario, which a test may change. */
export async function startNode(scenario = {}, port = 0) {
  const world = {
    run: "quickstart", mode: "direct", algorithm: "rloo", steps: 20, step: 7, rollouts: 1, labelers: 1,
    token: null, broken: false, delay_ms: 0, began: Date.now() / 1000, uptime: 812.4, ...scenario,
  };
  const html = document();
  const asked = []; // every request, in order
  const load = { now: 0, most: 0 }; // concurrent requests for data: now, and at most
  const server = createServer((request, response) => {
    const path = request.url.split("?")[0];
    asked.push({ path, at: Date.now() });
    const send = (code, type, body) => response.writeHead(code, { "content-type": type, "content-security-policy": POLICY }).end(body);
    if (path === "/") return send(200, "text/html; charset=utf-8", html);
    if (world.broken) return send(500, "text/plain", "no\n");
    if (world.token && request.headers.authorization !== `Bearer ${world.token}`) return send(401, "text/plain", "a token\n");
    const answer = { "/status": status, "/history": history, "/samples": samples }[path];
    if (!answer) return send(404, "text/plain", "no such page\n");
    load.most = Math.max(load.most, ++load.now);
    response.on("close", () => (load.now -= 1));
    setTimeout(() => send(200, "application/json", JSON.stringify(answer(world))), world.delay_ms);
  });
  await new Promise((resolve, reject) => server.once("error", reject).listen(port, "127.0.0.1", resolve));
  const stop = () => new Promise((resolve) => {
    server.close(resolve);
    server.closeAllConnections();
  });
  return { world, asked, load, stop, port: server.address().port, url: `http://127.0.0.1:${server.address().port}/` };
}

function uptime(world) {
  return world.uptime + Date.now() / 1000 - world.began;
}

function status(world) {
  const graph = world.starting ? null : graphOf(world);
  const limited = !world.starting && !world.unmeasured;
  return {
    run: world.run,
    program: "preceptor 0.1.0",
    phase: world.starting ? "loading models and data" : "training",
    incarnation_started: world.began - world.uptime,
    plan: { mode: world.mode, algorithm: world.algorithm, steps: world.steps, batch_groups: 4, group_size: 4, eta: 1 },
    last_step: world.starting || world.step === 0 ? null : {
      ...Object.fromEntries(COLUMNS.map((name, i) => [name, row(world, world.step)[i]])), version: world.step,
    },
    weights: world.starting ? null : Array.from({ length: world.rollouts }, (_, i) => ({
      reader: `rollout-${i}`, version: world.step - (i % 3 === 1 ? 1 : 0), fingerprint: 123 + i, lag: i % 3 === 1 ? 1 : 0, fingerprint_matches: true,
    })),
    ledger: { trained: world.step * 4, admitted: graph ? 3 : 0, generated: graph ? 1 : 0, labeled: 0, rewarded: graph ? 2 : 0 },
    graph,
    window_s: 60,
    roles: graph ? ROLES.map(([role, busy, idle, blocked, admission]) => ({
      role, workers: graph.stages.filter((stage) => stage.role === role).length, busy, idle, blocked, admission, items_per_s: 0.63,
    })) : [],
    rates: { generated_tokens_per_s: graph ? 412 : 0, trained_tokens_per_s: graph ? 400.1 : 0, completions_per_s: graph ? 12.9 : 0 },
    diagnosis: limited ? {
      role: "label", share: 0.97, gain: 2.4, next: "learn",
      headline: "label is the bottleneck: its worker is at work 97 % of the time, and no other actor more than 40 %",
      detail: "rollout waits for space in its output queue 61 % of the time; reward waits for input 98 %; learn waits for input 60 %",
      settings: [
        { key: "labeler.workers", now: String(world.labelers), try: String(2 * world.labelers), why: "another labeler judges concurrently" },
        { key: "labeler.threads", now: "1", try: "2", why: "each question is answered by two cores; both must be free" },
      ],
    } : null,
    checkpoint: world.starting ? null : { age_s: 35.2, took_s: 0.4, bytes: 1234567890 },
    servers: (world.servers ?? []).map((kind, i) => server(world, kind, i)),
    faults: world.faulty ? { restarts: 2, nonfinite_steps: 1, masked_groups: 14, disk_errors: 0 } : { restarts: 0, nonfinite_steps: 0, masked_groups: 0, disk_errors: 0 },
    memory: { resident_bytes: 4261000000, device: [] },
    controller: world.controller ? [{ knob: "rollout", value: 24, low: 1, high: 32, last_move: "-8: rollout waits for room" }] : null,
  };
}

/** Returns a rollout server that is ready, ready with old weights (`behind`), `starting`, `down` or `rejected`. */
function server(world, kind, i) {
  const why = {
    down: "cannot be reached: connection refused",
    rejected: `it reports version ${world.step}, but its log-probabilities changed by 0.02 ± 0.04 of what they should have since version ${world.step - 1}`,
  }[kind] ?? "";
  const samples = kind === "ready" || kind === "behind";
  return {
    url: `http://10.0.0.${i + 1}:8000`, condition: kind === "behind" ? "ready" : kind, why: world.hostile ? HOSTILE.join(" ") : why,
    version: kind === "starting" ? null : kind === "behind" ? world.step - (world.behind ?? 1) : world.step,
    under_way: samples ? 96 : 0, completions: kind === "starting" ? 0 : 12840, tokens: kind === "starting" ? 0 : 3081600,
    tokens_per_s: samples ? 8412.4 : 0, canary: kind === "starting" ? null : 0.98, hand_over_s: kind === "starting" ? null : 3.2,
  };
}

// Roles with their time shares: at work, waiting for input, for room, for admission.
const ROLES = [
  ["prompts", 0.01, 0, 0.39, 0.6], ["rollout", 0.35, 0.04, 0.61, 0], ["label", 0.97, 0.03, 0, 0],
  ["reward", 0.02, 0.98, 0, 0], ["learn", 0.4, 0.6, 0, 0],
];

function graphOf(world) {
  const up = uptime(world);
  const stage = (name, role, state, since_s) => {
    const [, busy, idle, blocked, admission] = ROLES.find(([each]) => each === role) ?? [role, 0, 0, 1, 0];
    return {
      name, role, state, since_s, note: "", items_in: Math.floor(up / 20), items_out: Math.floor(up / 20),
      busy_s: busy * up, idle_s: idle * up, blocked_s: blocked * up, admission_s: admission * up, last_beat_s: 0.2,
    };
  };
  const many = (count, name, role, states) => Array.from({ length: count }, (_, i) => stage(`${name}-${i}`, role, states[i % states.length], 0.4 + (i % 7)));
  const rollouts = many(world.rollouts, "rollout", "rollout", ["output", "busy", "output", "input"]);
  const labelers = many(world.labelers, "label", "label", ["busy"]);
  const left = world.left ? [stage("left-generated", "left", "output", 3), stage("left-labeled", "left", "ended", 9)] : [];
  if (world.hostile) labelers[0].note = "asks http://judge.example/v1 again in 4 s: <b>503</b> " + "x".repeat(90);
  if (world.stalled) labelers[0].since_s = 130;
  const edge = (name, from, to, depth, capacity, age_s) => ({
    name, from, to, depth, capacity, items: Math.floor(up * 40), refused: 0, send_blocked_s: 0.61 * up, recv_blocked_s: 0.1 * up,
    high_water: capacity, age_s, waited_s: 2.1 * up,
  });
  const names = (stages) => stages.map((each) => each.name);
  const stages = [stage("prompts", "prompts", "admission", 4.1), ...left, ...rollouts, ...labelers, stage("reward", "reward", "input", 3.2), stage("learn", "learn", "input", 0.7)];
  return {
    incarnation: 0, uptime_s: up, restarts: world.faulty ? 2 : 0,
    stages: world.reversed ? stages.reverse() : stages, // the page must use the edges, not the order
    edges: [
      edge("prompts", ["prompts"], names(rollouts), 1, 1, 0.4),
      edge("groups", [...names(left).slice(0, 1), ...names(rollouts)], names(labelers), world.rollouts > 8 ? 128 : 4, world.rollouts > 8 ? 128 : 4, 11.3),
      edge("labeled", [...names(left).slice(1), ...names(labelers)], ["reward"], 0, 4, 0),
      edge("rewarded", ["reward"], ["learn"], 2, 8, 6.4),
    ],
    stalled: world.stalled ? { stage: "label-0", state: "busy", for_s: 130 } : null,
    timeline: timeline(world, up, rollouts, labelers),
  };
}

function timeline(world, up, rollouts, labelers) {
  const spans = [];
  const fill = (stages, long, pause, end) => stages.forEach((stage, lane) => {
    for (let at = up - 58 + lane * 0.7, i = 0; at + long < end; at += long + pause, i += 1) {
      spans.push({ stage: stage.name ?? stage, seq: i * stages.length + lane, version: Math.floor((58 + at - up) / 15) + world.step - 3, start_s: at, end_s: at + long });
    }
  });
  fill(rollouts.slice(0, 8), 2.1, 3.9, up);
  fill(labelers.slice(0, 8), 5.8, 0.2, up);
  fill(["reward"], 0.1, 5.9, up);
  fill(["learn"], 2.4, 12.6, up);
  return spans;
}

export const COLUMNS = ["step", "time/run_seconds", "score/mean", "reward/mean", "kl/mean", "entropy/mean", "length/mean", "gradient/norm",
  "loss/policy", "learning_rate", "staleness/mean", "staleness/max", "ratio/effective", "ratio/clipped", "time/step_seconds",
  "rate/generated_tokens", "rate/trained_tokens", "judge/mean", "win_rate", "repetition/mean", "preference/margin", "preference/accuracy"];

function row(world, step) {
  const noise = (seed) => Math.sin(step * 12.9898 + seed * 78.233) * 0.5 + Math.sin(step * 4.1 + seed) * 0.5;
  const done = 1 - Math.exp((-3 * step) / world.steps);
  const pairs = world.mode === "preference";
  return [
    step, step * 5.9, pairs ? null : 24 + 80 * done + 9 * noise(1), pairs ? null : 2 * done - 0.5 + 0.25 * noise(2), 9 * done + 0.9 * noise(3),
    2.65 - 2.2 * done + 0.1 * noise(4), 24.9 + 6 * done + 2 * noise(5), 60 + 30 * noise(6) ** 2 + 8 * noise(7), -0.02 + 0.01 * noise(8),
    2e-5 * Math.min(1, step / 2), step < 2 ? 0 : 0.8 + 0.2 * noise(9), step < 2 ? 0 : 1, 0.9 + 0.05 * noise(10), 0.05 + 0.02 * noise(11), 5.9 + noise(12),
    420 + 30 * noise(13), 401 + 25 * noise(14), world.mode === "distilled" ? 6 + 2 * done + 0.4 * noise(15) : null,
    world.winRate && step % 100 === 0 ? 0.5 + 0.3 * done + 0.02 * noise(16) : null,
    0.1 + 0.02 * noise(17), pairs ? 2 * done + 0.2 * noise(18) : null, pairs ? 0.5 + 0.3 * done + 0.03 * noise(19) : null,
  ];
}

function history(world) {
  const last = world.starting ? 0 : world.step;
  const each = Math.max(1, Math.ceil(last / 600));
  const rows = [];
  for (let step = last; step >= 1; step -= each) rows.unshift(row(world, step));
  if (world.winRate) for (const one of rows) if (one[0] % 35 === 21) one[18] = 0.5 + 0.3 * (one[0] / world.steps);
  return { columns: COLUMNS, rows };
}

const POST = "We adopted a second rabbit so that the first would not be lonely. They have not looked at each other for a month. Last night I heard thumping "
  + "and found them on either side of the door, knocking in turn. The vet says that this is how it starts.";
const ANSWERS = [
  "Two rabbits ignored each other for a month and now knock on either side of a door, which the vet calls a good sign.",
  "We adopted a second rabbit so that the first would not be lonely. They have not looked at each other for a month.",
  "The post has a clear and concise summary of the story, but it could be more engaging and polished. The post could also be rephrased to make it",
  "Rabbits.",
];

function samples(world) {
  if (world.starting) return [];
  const count = Math.min(24, world.step * 4);
  return Array.from({ length: count }, (_, i) => {
    const group = world.step * 4 - 1 - i;
    const pairs = world.mode === "preference";
    return {
      step: Math.floor(group / 4) + 1, group, row: group % 100, prompt: (world.hostile ? `${HOSTILE[group % 4]} ` : "") + (group % 3 ? POST : `${POST} `.repeat(4)),
      labeler: pairs ? "pairwise" : "likelihood", reward_model: world.mode === "distilled" ? 12 : null, masked: world.faulty && i === 2 ? "a judge failed" : false,
      completions: ANSWERS.map((text, k) => completion(world, group, world.hostile ? HOSTILE[k] : text, k, pairs)),
    };
  });
}

function completion(world, group, text, k, pairs) {
  const size = ((group * 7 + k * 5) % 19) / 10 - 0.8;
  const failed = k === 3 && group % 5 === 0;
  const label = pairs ? null : 4.1 + size;
  return {
    text, finish: k === 2 ? "length" : k === 1 ? "stop" : "eos", tokens: 24 + k, versions: [world.step - 1, world.step],
    verdict: pairs ? null : failed ? { abstention: "the answers 1 and 2 have 0.0004 of the probability together" } : { label },
    preferences: pairs ? [0, 1, 2, 3].filter((other) => other !== k).map((other) => failed || (other === 3 && group % 5 === 0)
      ? { with: other, better: null, flipped: null, refused: { failure: "the judge answered 503" } }
      : { with: other, better: other > k ? 0.8 - 0.07 * other : 1 - (0.8 - 0.07 * k), flipped: k + other === 3, refused: null }) : [],
    score: pairs || failed ? null : world.mode === "distilled" ? size * 2 : label, reward: pairs || failed ? null : size,
  };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [scenario = "training", port = "9465"] = process.argv.slice(2);
  const node = await startNode(SCENARIOS[scenario], Number(port));
  setInterval(() => (node.world.step = Math.min(node.world.steps, node.world.step + 1)), 4000);
  console.log(node.url);
}
