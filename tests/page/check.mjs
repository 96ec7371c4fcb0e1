// Checks the live page in headless Chromium, as a user would see it.
//
//   cd tests/page && npm ci && node check.mjs          all checks, on simulated nodes (node.mjs)
//   node check.mjs URL                                 the checks for a real node, while it trains
//   node check.mjs … --screenshots DIR                 also writes screenshots; --only WORD selects checks by name
//
// CHROMIUM is the path of the browser (/usr/bin/chromium), PRECEPTOR_TOKEN the token of a real node that requires one.

import { chromium } from "playwright-core";
import { mkdirSync } from "node:fs";
import { parseArgs } from "node:util";
import { CHECKS } from "./checks.mjs";
import { REAL_CHECKS } from "./real.mjs";
import { Visit } from "./visit.mjs";
import { SCENARIOS, startNode } from "./node.mjs";

const { values: options, positionals: [url] } = parseArgs({
  allowPositionals: true,
  options: { screenshots: { type: "string" }, only: { type: "string", default: "" } },
});

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});

let failed = 0;
for (const [name, check] of Object.entries(url ? REAL_CHECKS : CHECKS)) {
  if (!name.includes(options.only)) continue;
  const visits = new Visit(browser, url);
  try {
    await check(visits);
    await visits.assertClean();
    console.log(`ok      ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}\n        ${String(error.message).replaceAll("\n", "\n        ")}`);
  } finally {
    await visits.end();
  }
}
if (options.screenshots) await takeScreenshots(options.screenshots);
await browser.close();
console.log(failed ? `${failed} failed` : "all passed");
process.exitCode = failed ? 1 : 0;

async function takeScreenshots(folder) {
  mkdirSync(folder, { recursive: true });
  const sizes = { desktop: { width: 1280, height: 900 }, phone: { width: 360, height: 740 } };
  for (const scenario of url ? ["real"] : Object.keys(SCENARIOS)) {
    const node = url ? { url, stop: () => {} } : await startNode(SCENARIOS[scenario]);
    for (const [size, viewport] of Object.entries(sizes)) {
      for (const colorScheme of ["light", "dark"]) {
        const visit = new Visit(browser, url);
        const page = await visit.open(node.url, { viewport, colorScheme });
        await page.waitForTimeout(2600);
        await page.screenshot({ path: `${folder}/${scenario}-${size}-${colorScheme}.png`, fullPage: true });
        await visit.end();
      }
    }
    await node.stop();
  }
}
