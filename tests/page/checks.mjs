// Checks of the page, on simulated nodes.

import assert from "node:assert/strict";
import { SCENARIOS, document as wholePage } from "./node.mjs";
import { assertAccessible, assertNoOverflow, says, tabOrder } from "./visit.mjs";

const PHONE = { viewport: { width: 360, height: 740 } };
const REFUSED = /ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET|ERR_INCOMPLETE/;

const count = (node, path) => node.asked.filter((one) => one.path === path).length;
const cards = (page, selector) => page.locator(selector).allInnerTexts();

/** Returns the text of each row, with the name of each cell, which a phone shows instead of the table's head. */
const namedCells = (rows) => rows.map((row) => [...row.children].map((cell) =>
  `${cell.dataset.name ? `${cell.dataset.name}: ` : ""}${cell.textContent}`).join(", "));

export const CHECKS = {
  "the page is one document of at most 88 KiB": async () => {
    const page = wholePage();
    assert.doesNotMatch(page, /<!--(style|script)-->/, "a placeholder is left");
    assert.equal(page.match(/<(style|script)>/g).length, 2, "one style and one script");
    assert.doesNotMatch(page, /<(link|script|img|iframe)[^>]+(href|src)="(?!data:)/, "something is loaded from elsewhere");
    assert.doesNotMatch(page, /innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(/, "text could be read as markup");
    assert.ok(Buffer.byteLength(page) <= 88 * 1024, `it has ${Buffer.byteLength(page)} bytes`);
  },

  "it renders every scenario, on a desktop and on a phone": async (visit) => {
    for (const scenario of Object.keys(SCENARIOS)) {
      const node = await visit.node(SCENARIOS[scenario]);
      for (const options of [{}, PHONE]) {
        const page = await visit.open(node.url, options);
        await says(page, "#run", /quickstart/);
        await says(page, "#connection", /^live$/);
        await page.waitForTimeout(300);
        await assertNoOverflow(page);
        await visit.assertClean();
        await page.close();
      }
    }
  },

  "the header shows run, phase, progress and time left": async (visit) => {
    const page = await visit.open((await visit.node()).url);
    await says(page, "#phase", /^training$/);
    await says(page, "#plan", /direct mode · rloo · η = 1/);
    await says(page, "#progress", /step 7 of 20 · 77 s left/);
    assert.equal(await page.getAttribute("#track", "aria-valuenow"), "7");
    await says(page, "#vitals", /412 tokens\/s[^]*faults\nnone/);
    assert.match(await page.title(), /7\/20 quickstart/);
  },

  "faults are shown": async (visit) => {
    const page = await visit.open((await visit.node(SCENARIOS.many)).url);
    await says(page, "#vitals", /2 restarts, 1 step not finite, 14 masked groups/);
    await says(page, "#controller", /rollout 24 of 1 to 32; last change -8/);
  },

  "the bottleneck is described, with the setting that relieves it": async (visit) => {
    const page = await visit.open((await visit.node()).url);
    await says(page, "#headline", /label is the bottleneck: its worker is at work 97 % of the time/);
    await says(page, "#detail", /reward waits for input 98 %/);
    await says(page, "#gain", /up to 2.4 times as fast; then learn would be the bottleneck/);
    await says(page, "#settings-rows tr", /labeler\.workers\s+1\s+2\s+another labeler judges concurrently/);
    await says(page, "#settings", /--resume --set labeler\.workers=2/);
    assert.match(await page.textContent("#announcer"), /label is the bottleneck/, "it is announced to screen readers");
    assert.equal(await page.getAttribute("#announcer", "aria-live"), "polite");
  },

  "the page states that the bottleneck is not known yet": async (visit) => {
    const page = await visit.open((await visit.node(SCENARIOS.unmeasured)).url);
    await says(page, "#headline", /being measured/);
    const starting = await visit.open((await visit.node(SCENARIOS.starting)).url);
    await says(starting, "#headline", /loading models and data/);
    await says(starting, "#actors-note", /No actors yet/);
    assert.equal(await starting.locator("#settings").isVisible(), false);
  },

  "a stall is shown, with the blocking stage": async (visit) => {
    const node = await visit.node();
    const page = await visit.open(node.url);
    await says(page, "#headline", /label is the bottleneck/);
    assert.equal(await page.locator("#stalled").isVisible(), false);
    node.world.stalled = true;
    await says(page, "#stalled", /No progress for 2 min: the run is blocked in label-0 \(at work\)/);
    await says(page, "#graph", /stalled/);
    assert.match(await page.title(), /is stalled/);
    node.world.stalled = false;
    await page.locator("#stalled").waitFor({ state: "hidden" });
  },

  "rollout servers are shown, and one that is not ready stands out": async (visit) => {
    const without = await visit.open((await visit.node()).url);
    await says(without, "#step", /step 7 of/);
    for (const hidden of ["#servers", "#servers-link", "#unsampled"]) assert.equal(await without.locator(hidden).isVisible(), false, `${hidden} is hidden without servers`);
    const node = await visit.node(SCENARIOS.served);
    for (const options of [{}, { viewport: { width: 700, height: 740 } }, PHONE]) {
      const page = await visit.open(node.url, options);
      await says(page, "#servers-note", /^2 of 5 servers ready\. Canary: /);
      const rows = (await page.locator("#servers-rows tr").evaluateAll(namedCells)).map((row) => row.replaceAll("\u00a0", " "));
      assert.equal(rows[0], "http://10.0.0.1:8000, condition: ready, weights: 7, under way: 96, tokens/s: 8,412, canary: 0.980, last hand-over: 3.2 s");
      assert.match(rows[1], /weights: 6, 1 behind, under way: 96/);
      assert.equal(rows[2], "http://10.0.0.3:8000, condition: ⚠ has no weights yet, weights: –, under way: 0, tokens/s: 0, canary: –, last hand-over: –");
      assert.match(rows[3], /condition: ⚠ down: cannot be reached: connection refused, /);
      assert.match(rows[4], /condition: ⚠ gets no prompts: it reports version 7, but its log-probabilities changed by 0\.02/);
      const colours = await page.locator("#servers-rows tr").evaluateAll((all) => all.map((row) => getComputedStyle(row).backgroundColor));
      assert.equal(colours[0], colours[1]);
      assert.equal(new Set(colours).size, 3, `ready, starting and failed servers differ: ${colours}`);
      assert.equal(await page.locator("#unsampled").isVisible(), false, "some servers are ready");
      await assertNoOverflow(page);
      await page.close();
    }
    const page = await visit.open(node.url);
    await page.click("#servers-link");
    assert.equal(await page.evaluate(() => location.hash), "#servers");
    node.world.behind = 3;
    await says(page, "#servers-rows tr:nth-child(2)", /⚠ 4, 3 behind/);
    node.world.servers = ["ready"];
    await says(page, "#servers-note", /^1 of 1 server ready/);
    node.world.servers = [];
    await page.locator("#servers").waitFor({ state: "hidden" });
    for (const colorScheme of ["light", "dark"]) {
      const looked = await visit.open((await visit.node(SCENARIOS.unsampled)).url, { colorScheme });
      await says(looked, "#unsampled", /No rollout server is ready, so no completions are sampled/);
      assert.match(await looked.title(), /waits for its rollout servers/);
      await assertAccessible(looked, colorScheme);
      const mixed = await visit.open((await visit.node(SCENARIOS.served)).url, { colorScheme, ...PHONE });
      await says(mixed, "#servers-note", /2 of 5/);
      await assertAccessible(mixed, colorScheme);
    }
  },

  "the graph shows busy and waiting actors, queues and weights": async (visit) => {
    for (const options of [{}, PHONE]) {
      const page = await visit.open((await visit.node({ reversed: true })).url, options);
      const graph = await says(page, "#graph", /rollout[^]*61 % waits on label/);
      assert.match(graph, /98 % waits on label/);
      assert.match(graph, /60 % waits on learn/);
      assert.match(graph, /bottleneck/);
      assert.match(graph, /weights 7, lag 0/);
      assert.match(graph, /weights, version 7/);
      assert.match(graph, /4\/4, full/);
      assert.match(graph, /11 s old/);
      await says(page, "#graph", /\b(39|40)(\.\d+)?\/s/);
      assert.equal(await page.locator("#graph .actor").count(), 5);
      assert.equal(await page.locator("#graph .queue").count(), 4);
      const places = await page.locator("#graph .actor-box").evaluateAll((boxes) => new Set(boxes.map((box) => Math.round(box.getBoundingClientRect().x))).size);
      assert.equal(places, options === PHONE ? 1 : 5, "a column for each role, or one column on a phone");
      const order = await page.locator("#graph .actor-role").evaluateAll((roles) => roles.map((role) => [role.textContent, role.getBoundingClientRect()]).sort((a, b) => a[1].x - b[1].x || a[1].y - b[1].y).map(([role]) => role));
      assert.deepEqual(order, ["prompts", "rollout", "label", "reward", "learn"]);
      assert.ok(await page.locator("#timeline .span").count() > 10, "the timeline has spans");
      assert.match((await page.getAttribute("#graph svg", "aria-label")).replaceAll("\u00a0", " "), /label, 1 worker, 97 % at work[^]*label is the bottleneck/);
      await page.close();
    }
  },

  "many workers are folded, and tables list all of them": async (visit) => {
    const page = await visit.open((await visit.node(SCENARIOS.many)).url);
    const graph = await says(page, "#graph", /× 64/);
    assert.match(graph, /32 wait for room/);
    assert.match(graph, /weights 6–7, lag 0–1/);
    assert.equal(await page.locator("#graph .actor").count(), 5);
    assert.ok((await page.locator("#graph svg").boundingBox()).height < 400, "the drawing stays small");
    await page.click("#actors-table summary");
    await says(page, "#actors-tables", /rollout-63/);
  },

  "every drawing is fitted to the window when its size changes": async (visit) => {
    const page = await visit.open((await visit.node()).url);
    await says(page, "#sample-list .group", /Step 7/);
    const height = () => page.locator("#graph svg").evaluate((svg) => svg.getBoundingClientRect().height);
    const across = await height();
    await page.setViewportSize({ width: 360, height: 740 });
    await page.waitForTimeout(200); // less than the time to the next poll
    await assertNoOverflow(page);
    assert.ok((await height()) > 2 * across, "actors are stacked on a narrow page");
  },

  "a legend explains marks and patterns": async (visit) => {
    const page = await visit.open((await visit.node()).url);
    await says(page, "#legend", /at work\s+waits for room\s+waits for admission\s+waits for input\s+Bars: shares of the last 60 s/);
    assert.equal(await page.locator("#legend .mark").count(), 4);
  },

  "figures follow the node, with no more requests than needed": async (visit) => {
    const node = await visit.node();
    const page = await visit.open(node.url);
    await says(page, "#step", /step 7 of/);
    await page.waitForTimeout(6500);
    assert.ok(count(node, "/status") >= 3 && count(node, "/status") <= 5, `${count(node, "/status")} requests for the status in 7 s`);
    assert.deepEqual([count(node, "/history"), count(node, "/samples")], [1, 1], "history and samples are requested once per step");
    node.world.step = 9;
    await says(page, "#step", /step 9 of/);
    await says(page, "#sample-list .group", /Step 9, group 35/);
    await says(page, "#graph", /weights, version 9/);
    assert.equal(count(node, "/history"), 2);
    assert.equal(await page.getAttribute(".plot", "aria-valuemax"), "9");
  },

  "requests never overlap, and time out": async (visit) => {
    const node = await visit.node({ delay_ms: 2600 });
    const page = await visit.open(node.url);
    await says(page, "#step", /step 7 of/, 12000);
    node.world.delay_ms = 60_000;
    await says(page, "#lost", /has not answered since .*\(no answer to \w+ within 8 s\)/, 20_000);
    node.world.delay_ms = 0;
    await says(page, "#connection", /^live$/, 12000);
    assert.equal(node.load.most, 1, "one request at a time");
  },

  "a failing node is polled less often": async (visit) => {
    visit.expected.push(/status of 500/);
    const node = await visit.node();
    const page = await visit.open(node.url);
    await says(page, "#connection", /^live$/);
    node.world.broken = true;
    await says(page, "#lost", /it answered 500 to status/);
    const before = count(node, "/status");
    await page.waitForTimeout(7000);
    const more = count(node, "/status") - before;
    assert.ok(more >= 1 && more <= 2, `${more} requests in 7 s`);
  },

  "a hidden tab sends no requests, and polls at once when it is shown": async (visit) => {
    const node = await visit.node();
    const page = await visit.open(node.url);
    await says(page, "#connection", /^live$/);
    const hide = (hidden) => page.evaluate((value) => {
      Object.defineProperty(document, "hidden", { configurable: true, get: () => value });
      document.dispatchEvent(new Event("visibilitychange"));
    }, hidden);
    await hide(true);
    await page.waitForTimeout(300);
    const before = count(node, "/status");
    await page.waitForTimeout(4500);
    assert.equal(count(node, "/status"), before, "the hidden tab sends no requests");
    await hide(false);
    await page.waitForTimeout(500);
    assert.ok(count(node, "/status") > before, "the shown tab polls at once");
  },

  "the page continues after a restart of the node": async (visit) => {
    visit.expected.push(REFUSED);
    const node = await visit.node();
    const page = await visit.open(node.url);
    await says(page, "#sample-list .group", /Step 7, group 27/);
    await node.stop();
    await says(page, "#connection", /no answer since \d\d:\d\d:\d\d/);
    await says(page, "#lost", /The node has not answered since .*keeps asking/);
    await says(page, "#headline", /label is the bottleneck/);
    // Another process at the same step: history and samples belong to another run and must be requested again.
    await visit.node({ run: "second", step: 7, steps: 40, mode: "preference", algorithm: "online_dpo", uptime: 3 }, node.port);
    await says(page, "#run", /second/, 15_000);
    await says(page, "#connection", /^live$/);
    await says(page, "#step", /step 7 of 40/);
    assert.equal(await page.locator("#lost").isVisible(), false);
    await says(page, "#sample-list .group", /judged by pairwise/);
    assert.ok(!(await cards(page, "#charts h3")).includes("Reward"), "curves that the new run lacks are gone");
  },

  "a node that stops answering after its last step has probably finished": async (visit) => {
    visit.expected.push(REFUSED);
    const node = await visit.node({ step: 20 });
    const page = await visit.open(node.url);
    await says(page, "#remaining", /all steps done/);
    await node.stop();
    await says(page, "#lost", /it has probably finished/);
  },

  "curves are shown for the run's figures, with one cursor that follows keyboard and mouse": async (visit) => {
    const node = await visit.node(SCENARIOS.distilled);
    const page = await visit.open(node.url);
    await says(page, "#charts", /Reward[^]*Win rate[^]*KL to the reference[^]*Throughput[^]*Gradient norm/);
    await page.focus(".plot");
    const at = async (chart = 0) => Number(await page.locator(".plot").nth(chart).getAttribute("aria-valuenow"));
    const last = await at();
    await page.keyboard.press("ArrowLeft");
    assert.ok((await at()) < last, "an arrow key goes back");
    await says(page, ".chart .reading", /step 4,014/);
    assert.equal(await at(1), await at(0), "all charts show the same step");
    await page.keyboard.press("Home");
    assert.equal(await at(), Number(await page.getAttribute(".plot", "aria-valuemin")));
    assert.match(await page.getAttribute(".plot", "aria-valuetext"), /^step \d+: reward −?[\d.]+, smoothed/);
    await page.keyboard.press("Escape");
    assert.equal(await at(), last, "Escape returns to the last step");
    const box = await page.locator(".plot").nth(3).boundingBox();
    await page.mouse.move(box.x + box.width / 2, box.y + 40);
    await says(page, ".chart .reading", /step 1,\d\d\d/);
    await page.mouse.move(0, 0);
    const points = await page.locator(".points").first().getAttribute("d");
    assert.ok(points.split("M").length > 550, "every point of a long history is drawn");
    await page.click("#more-charts summary");
    await says(page, "#charts-more", /Judge’s own score[^]*Learning rate/);
  },

  "a figure that the run lacks has no chart": async (visit) => {
    const page = await visit.open((await visit.node(SCENARIOS.preference)).url);
    await says(page, "#charts", /Preferences learned[^]*KL to the reference/);
    const titles = await cards(page, "#charts h3");
    for (const absent of ["Reward", "Score", "Win rate"]) assert.ok(!titles.includes(absent), `${absent} has no figures`);
  },

  "samples are ordered and filtered, and updates can be paused": async (visit) => {
    const node = await visit.node();
    const page = await visit.open(node.url);
    await says(page, "#sample-list .group", /Step 7, group 27[^]*reward[^]*score[^]*24 tokens, weights 6–7/);
    assert.equal(await page.locator("#sample-list .group").count(), 6);
    await page.click("#sample-more");
    assert.equal(await page.locator("#sample-list .group").count(), 24);
    const rewards = () => page.locator("#sample-list .group").evaluateAll((groups) => groups.map((group) =>
      [...group.querySelectorAll(".completion-head")].map((head) => head.textContent.match(/reward ([+−]?[\d.]+)/)).filter(Boolean).map((found) => Number(found[1].replace("−", "-")))));
    await page.selectOption("#sample-order", "highest");
    const best = (await rewards()).map((group) => Math.max(...group));
    assert.deepEqual(best, [...best].sort((a, b) => b - a), "the best group comes first");
    await page.selectOption("#sample-order", "lowest");
    const worst = (await rewards()).map((group) => Math.min(...group));
    assert.deepEqual(worst, [...worst].sort((a, b) => a - b), "the worst group comes first");
    await page.selectOption("#sample-filter", "refused");
    const refused = await cards(page, "#sample-list .group");
    assert.ok(refused.length > 0 && refused.length < 24 && refused.every((text) => text.includes("judge abstained")));
    await page.selectOption("#sample-filter", "masked");
    await says(page, "#samples-note", /None of the last 24 groups/);
    await page.selectOption("#sample-filter", "all");
    await page.selectOption("#sample-order", "newest");
    await page.check("#sample-hold");
    node.world.step = 8;
    await says(page, "#sample-new", /^4 new$/);
    await says(page, "#sample-list .group", /Step 7, group 27/);
    await page.uncheck("#sample-hold");
    await says(page, "#sample-list .group", /Step 8, group 31/);
  },

  "preferences are shown": async (visit) => {
    const page = await visit.open((await visit.node(SCENARIOS.preference)).url);
    await says(page, "#sample-list .group", /better than #2, 73 % sure/);
    await says(page, "#sample-list .group", /it preferred the same position in both orders/);
    await page.selectOption("#sample-filter", "refused");
    await says(page, "#sample-list .group", /judge failed: the judge answered 503/);
  },

  "hostile text is shown as text": async (visit) => {
    const node = await visit.node(SCENARIOS.hostile);
    for (const options of [{}, PHONE]) {
      const page = await visit.open(node.url, options);
      await says(page, "#sample-list", /<img src=x onerror=/);
      await says(page, "#servers-rows tr:nth-child(2)", /down: <img src=x onerror=[^]*<b>bold<\/b>/);
      await page.click("#sample-more");
      for (const summary of await page.locator("#samples summary").all()) await summary.click();
      await says(page, "#sample-list", /<script>window\.owned = true<\/script> <b>bold<\/b>/);
      assert.equal(await page.locator("main img, main script, main b").count(), 0, "markup became elements");
      assert.equal(await page.evaluate(() => window.owned), undefined, "a script ran");
      assert.match(await page.title(), /quickstart/);
      await assertNoOverflow(page);
      await page.close();
    }
  },

  "the token is requested from the user, sent and kept": async (visit) => {
    visit.expected.push(/status of 401/);
    const node = await visit.node({ token: "a-token-of-sixteen" });
    const page = await visit.open(node.url);
    await says(page, "#token-form", /requires its bearer token/);
    assert.equal(await page.evaluate(() => document.activeElement.id), "token", "the field has the focus");
    const before = count(node, "/status");
    await page.waitForTimeout(3000);
    assert.equal(count(node, "/status"), before, "no request is sent without a token");
    await page.keyboard.type("wrong");
    await page.keyboard.press("Enter");
    await says(page, "#token-refused", /refused/);
    await page.keyboard.type("a-token-of-sixteen");
    await page.keyboard.press("Enter");
    await says(page, "#step", /step 7 of/);
    assert.equal(await page.locator("#token-form").isVisible(), false);
    await says(page, "#sample-list .group", /Step 7/);
    await page.reload();
    await says(page, "#step", /step 7 of/);
    assert.deepEqual(await page.evaluate(() => [Object.keys(localStorage).length, location.href.includes("token")]), [0, false], "it is kept only in the tab");
  },

  "the keyboard reaches all controls, with a visible focus": async (visit) => {
    const page = await visit.open((await visit.node()).url);
    await says(page, "#sample-list .group", /Step 7/);
    const stops = await tabOrder(page);
    const names = stops.map((stop) => stop.name);
    assert.equal(names[0], "#limits", "the first stop skips the header");
    for (const wanted of ["theme", "Reward", "Gradient norm", "sample-order", "sample-filter", "sample-hold", "sample-more"]) assert.ok(names.includes(wanted), `Tab does not reach ${wanted}: ${names}`);
    assert.deepEqual(stops.filter((stop) => !stop.outlined).map((stop) => stop.name), [], "focus is not visible");
    await page.reload();
    await page.keyboard.press("Tab");
    await page.keyboard.press("Enter");
    assert.equal(await page.evaluate(() => document.activeElement.id), "limits", "the skip link moves the focus");
  },

  "light and dark are both legible": async (visit) => {
    for (const colorScheme of ["light", "dark"]) {
      for (const scenario of ["distilled", "preference", "stalled", "many"]) {
        const page = await visit.open((await visit.node({ ...SCENARIOS[scenario], faulty: true })).url, { colorScheme });
        await says(page, "#sample-list .group", /Step/);
        await page.click("#actors-table summary");
        await page.click("#more-charts summary");
        await assertAccessible(page, colorScheme);
        await page.close();
      }
    }
  },

  "the theme follows the system or the user's choice, which is stored": async (visit) => {
    const page = await visit.open((await visit.node()).url, { colorScheme: "dark" });
    const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const dark = await paper();
    await page.click("#theme");
    await says(page, "#theme", /Theme: light/);
    const light = await paper();
    assert.notEqual(light, dark);
    await page.reload();
    await says(page, "#theme", /Theme: light/);
    assert.equal(await paper(), light, "it is stored");
    await page.click("#theme");
    await says(page, "#theme", /Theme: dark/);
    assert.equal(await paper(), dark);
    await page.click("#theme");
    await says(page, "#theme", /Theme: system/);
    await page.emulateMedia({ colorScheme: "light" });
    assert.equal(await paper(), light, "it follows the system");
  },

  "the page works without storage": async (visit) => {
    const page = await visit.open((await visit.node()).url, {}, () => {
      for (const name of ["localStorage", "sessionStorage"]) Object.defineProperty(window, name, { get: () => { throw new Error("forbidden"); } });
    });
    await says(page, "#step", /step 7 of/);
    await page.click("#theme");
    await says(page, "#theme", /Theme: light/);
  },

  "nothing is animated if the user prefers reduced motion": async (visit) => {
    const page = await visit.open((await visit.node()).url, { reducedMotion: "reduce" });
    await says(page, "#step", /step 7 of/);
    const moving = await page.evaluate(() => [...document.querySelectorAll("*")].filter((node) => parseFloat(getComputedStyle(node).transitionDuration) > 0 || getComputedStyle(node).animationName !== "none").length);
    assert.equal(moving, 0);
  },

  "the page is divided into named landmarks": async (visit) => {
    const page = await visit.open((await visit.node()).url);
    for (const name of ["Bottleneck", "Actors", "Curves", "Samples"]) {
      assert.equal(await page.getByRole("region", { name, exact: true }).count(), 1, `${name} is a landmark`);
      assert.equal(await page.getByRole("heading", { name, exact: true, level: 2 }).count(), 1, `${name} is a heading`);
    }
    for (const role of ["banner", "main", "navigation", "contentinfo"]) assert.equal(await page.getByRole(role).count(), 1, `one ${role}`);
  },
};
