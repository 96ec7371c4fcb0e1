// One visit to the page, which records errors, violations of the content security policy and requests to other hosts.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { startNode } from "./node.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

export class Visit {
  constructor(browser, url) {
    this.browser = browser;
    this.url = url; // URL of a real node, if any
    this.faults = [];
    this.expected = []; // patterns of console errors that this check causes
    this.closing = [];
  }

  async node(scenario = {}, port = 0) {
    const node = await startNode(scenario, port);
    this.closing.push(() => node.stop());
    return node;
  }

  /** Opens the page; `before` runs in it ahead of its own scripts. */
  async open(url, options = {}, before = null) {
    const context = await this.browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
    this.closing.push(() => context.close());
    const page = await context.newPage();
    const host = new URL(url).host;
    page.on("console", (message) => message.type() === "error" && this.faults.push(`console: ${message.text()}`));
    page.on("pageerror", (error) => this.faults.push(`error: ${error.stack}`));
    page.on("request", (request) => {
      const asked = new URL(request.url());
      if (asked.protocol !== "data:" && asked.host !== host) this.faults.push(`a request to another host: ${asked}`);
    });
    await page.exposeFunction("tellViolation", (words) => this.faults.push(`content security policy: ${words}`));
    await page.addInitScript(() => document.addEventListener("securitypolicyviolation", (event) => window.tellViolation(`${event.violatedDirective} ${event.blockedURI}`)));
    if (before) await page.addInitScript(before);
    await page.goto(url);
    if (process.env.PRECEPTOR_TOKEN && this.url) {
      this.expected.push(/401/);
      await page.fill("#token", process.env.PRECEPTOR_TOKEN);
      await page.keyboard.press("Enter");
    }
    return page;
  }

  async assertClean() {
    const unexpected = this.faults.filter((fault) => !this.expected.some((pattern) => pattern.test(fault)));
    assert.deepEqual(unexpected, [], "the page made errors");
  }

  async end() {
    for (const close of this.closing.reverse()) await close();
  }
}

/** Waits until `selector` is visible and its text matches. */
export async function says(page, selector, pattern, patience = 8000) {
  const deadline = Date.now() + patience;
  let text = "";
  while (Date.now() < deadline) {
    const found = page.locator(selector).first();
    text = (await found.isVisible()) ? (await found.innerText()).replaceAll("\u00a0", " ") : "(not visible)";
    if (pattern.test(text)) return text;
    await page.waitForTimeout(50);
  }
  assert.fail(`${selector} shows “${text.slice(0, 300)}”, which does not match ${pattern}`);
}

export async function assertNoOverflow(page) {
  const [needed, there] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(needed <= there, `the page is ${needed} wide in a window of ${there}`);
  const cut = await page.evaluate(() => [...document.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().right > innerWidth + 1).length);
  assert.equal(cut, 0, "a drawing reaches beyond the window");
}

/** Asserts that axe finds no serious violation and that SVG text, which axe does not check, has a contrast of at least 4.5. */
export async function assertAccessible(page, theme) {
  await page.evaluate(AXE);
  const violations = await page.evaluate(async () => (await window.axe.run()).violations
    .filter(({ impact }) => impact === "serious" || impact === "critical")
    .map(({ id, nodes }) => `${id}: ${nodes.slice(0, 3).map((node) => `${node.target} ${node.any[0]?.message ?? ""}`).join(" | ")}`));
  assert.deepEqual(violations, [], `axe finds violations in the ${theme} theme`);
  const weak = await page.evaluate(weakDrawnText);
  assert.deepEqual(weak, [], `drawn text is too weak in the ${theme} theme`);
}

function weakDrawnText() {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\d.]+/g).slice(0, 3).map((part) => part / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const isOpaque = (colour) => colour && colour !== "none" && !/^rgba\(.*, 0\)$/.test(colour) && /\d/.test(colour) && !colour.startsWith("url");
  const below = (text) => {
    const plate = text.previousElementSibling;
    if (plate?.matches("rect.plate")) return getComputedStyle(plate).fill;
    const box = text.closest(".actor")?.querySelector(".actor-box");
    if (box) return getComputedStyle(box).fill;
    let node = text.closest("svg");
    while (node && !isOpaque(getComputedStyle(node).backgroundColor)) node = node.parentElement;
    return getComputedStyle(node).backgroundColor;
  };
  return [...document.querySelectorAll("svg text")]
    .map((text) => [text.textContent, contrast(getComputedStyle(text).fill, below(text))])
    .filter(([, ratio]) => ratio < 4.5)
    .map(([words, ratio]) => `“${words}” ${ratio.toFixed(2)}`);
}

/** Returns the elements that Tab reaches, in order, for one cycle. */
export async function tabOrder(page) {
  const stops = [];
  for (let i = 0; i < 200; i += 1) {
    await page.keyboard.press("Tab");
    const stop = await page.evaluate(() => {
      const active = document.activeElement;
      if (!active || active === document.body) return null;
      const style = getComputedStyle(active);
      return {
        name: active.id || active.getAttribute("aria-label") || active.getAttribute("href") || active.tagName.toLowerCase(),
        role: active.getAttribute("role"),
        outlined: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0,
      };
    });
    if (stop === null) return stops;
    stops.push(stop);
  }
  assert.fail(`the keyboard focus cannot leave: ${stops.slice(-4).map((stop) => stop.name)}`);
}
