// Checks of the page on a real node while it trains.

import assert from "node:assert/strict";
import { assertAccessible, assertNoOverflow, says } from "./visit.mjs";

const LONG = 180_000;

async function status(url) {
  const token = process.env.PRECEPTOR_TOKEN;
  const answer = await fetch(new URL("status", url), { headers: token ? { authorization: `Bearer ${token}` } : {} });
  assert.equal(answer.status, 200, "/status answers");
  return answer.json();
}

function plainly(text) {
  return new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
}

export const REAL_CHECKS = {
  "the page shows the run and follows it": async (visit) => {
    const { run, plan, program } = await status(visit.url);
    const page = await visit.open(visit.url);
    await says(page, "#run", plainly(run));
    await says(page, "#plan", plainly(plan.algorithm));
    await says(page, "#program", plainly(program));
    await says(page, "#connection", /^live$/);
    const before = await says(page, "#step", /step [\d,]+ of/);
    await page.waitForFunction((words) => document.getElementById("step").innerText.replaceAll("\u00a0", " ") !== words, before, { timeout: LONG });
  },
  "the bottleneck is shown": async (visit) => {
    const page = await visit.open(visit.url);
    await says(page, "#headline", /being measured|nothing to measure|%/);
    await says(page, "#headline", /%/, LONG);
    // The bottleneck may change between two polls, but hardly three times in a row.
    for (let left = 2; ; left -= 1) {
      const { diagnosis } = await status(visit.url);
      try {
        await says(page, "#headline", plainly(diagnosis.headline.split(":")[0]));
        for (const { key } of diagnosis.settings) await says(page, "#settings", plainly(key));
        break;
      } catch (error) {
        if (left === 0) throw error;
      }
    }
    await says(page, "#actors-note", /This graph of \d+ actors/);
    const { graph } = await status(visit.url);
    const drawing = await page.locator("#graph").innerText();
    for (const role of new Set(graph.stages.filter(({ state }) => state !== "ended").map((stage) => stage.role))) assert.match(drawing, plainly(role));
  },
  "rollout servers are shown if the run has any": async (visit) => {
    const { servers } = await status(visit.url);
    const page = await visit.open(visit.url);
    await says(page, "#connection", /^live$/);
    assert.equal(await page.locator("#servers").isVisible(), servers.length > 0);
    for (const { url } of servers) await says(page, "#servers-rows", plainly(url));
  },
  "curves and samples are shown": async (visit) => {
    const page = await visit.open(visit.url);
    await page.waitForFunction(() => document.querySelectorAll(".chart .line").length >= 5, null, { timeout: LONG });
    await page.waitForFunction(() => document.querySelectorAll(".completion").length >= 2, null, { timeout: LONG });
  },
  "the page is accessible and fits a phone": async (visit) => {
    for (const colorScheme of ["light", "dark"]) {
      const page = await visit.open(visit.url, { colorScheme, viewport: { width: 360, height: 740 } });
      await says(page, "#actors-note", /This graph/, LONG);
      await assertNoOverflow(page);
      await assertAccessible(page, colorScheme);
    }
  },
};
