// One chart: metrics of the learner's steps as points, and smoothed as a line. The cursor follows pointer, touch or arrow keys.

const CHART_HEIGHT = 132;
const MARGIN = { left: 46, right: 8, top: 8, bottom: 18 };

class Chart {
  /** `plan` is `{title, unit, series: [{column, name}]}`; `move(step)` is called with the cursor's step, or null without one. */
  constructor(plan, move) {
    this.plan = plan;
    this.move = move;
    this.title = element("h3", {}, plan.title);
    this.reading = element("p", { class: "reading" });
    this.plot = element("div", { class: "plot", tabindex: 0, role: "slider", "aria-label": plan.title });
    this.card = element("div", { class: "chart" }, element("div", { class: "chart-head" }, this.title, this.reading), this.plot);
    this.listen();
  }

  /** Draws `rows` of the history. */
  show(rows, cursor) {
    this.lines = this.plan.series
      .map((series) => ({ ...series, points: pointsOf(rows, series.column) }))
      .filter((line) => line.points.length > 0)
      .map((line) => ({ ...line, smooth: smoothed(line.points) }));
    this.steps = [...new Set(this.lines.flatMap((line) => line.points.map((point) => point.step)))].sort((a, b) => a - b);
    this.draw(cursor);
  }

  draw(cursor) {
    const width = this.plot.clientWidth;
    if (!this.lines?.length || width === 0) return;
    this.scale = scaleOf(this.lines, this.steps, width);
    const { x, y, ticks } = this.scale;
    const svg = drawn("svg", { width, height: CHART_HEIGHT, "aria-hidden": true });
    for (const tick of ticks) {
      svg.append(drawn("path", { class: "rule", d: `M${MARGIN.left} ${y(tick)}H${width - MARGIN.right}` }),
        label(tickWords(tick, ticks), MARGIN.left - 6, y(tick) + 4, MARGIN.left, "end quiet-text"));
    }
    const [first, last] = [this.steps[0], this.steps[this.steps.length - 1]];
    const foot = CHART_HEIGHT - 4;
    svg.append(label(`step ${figure(first)}`, MARGIN.left, foot, 90, "quiet-text"));
    if (last > first) svg.append(label(figure(last), width - MARGIN.right, foot, 60, "end quiet-text"));
    this.lines.forEach((line, i) => svg.append(
      drawn("path", { class: `points ${line.points.length < 40 ? "points-few " : ""}line-${i}`, d: line.points.map((p) => `M${x(p.step).toFixed(1)} ${y(p.value).toFixed(1)}h0`).join("") }),
      drawn("path", { class: `line line-${i}`, d: line.points.map((p, at) => `${at ? "L" : "M"}${x(p.step).toFixed(1)} ${y(line.smooth[at]).toFixed(1)}`).join("") })));
    this.needle = drawn("g", {});
    svg.append(this.needle);
    this.plot.replaceChildren(svg);
    this.point(cursor);
  }

  /** Shows the values at the step nearest to `cursor`, or at the last step if it is null. */
  point(cursor) {
    if (!this.scale) return;
    const step = cursor === null ? this.steps[this.steps.length - 1] : nearest(this.steps, cursor);
    this.step = step;
    const readings = this.lines.map((line) => {
      const at = line.points.findLastIndex((point) => point.step <= step);
      return { line, point: line.points[Math.max(0, at)], smooth: line.smooth[Math.max(0, at)] };
    });
    const named = this.plan.series.length > 1;
    this.reading.replaceChildren(...readings.map(({ line, point }, i) => element("span", {},
      named ? drawn("svg", { width: 18, height: 8, "aria-hidden": true }, drawn("path", { class: `line line-${i}`, d: "M0 4h18" })) : null,
      named ? `${line.name} ` : null,
      element("strong", {}, figure(point.value)), this.plan.unit && i === readings.length - 1 ? ` ${this.plan.unit}` : null)));
    if (cursor !== null) this.reading.append(element("span", { class: "quiet" }, `step ${figure(step)}`));
    const words = readings.map(({ line, point, smooth }) => `${line.name} ${figure(point.value)}, smoothed ${figure(smooth)}`);
    this.plot.setAttribute("aria-valuemin", this.steps[0]);
    this.plot.setAttribute("aria-valuemax", this.steps[this.steps.length - 1]);
    this.plot.setAttribute("aria-valuenow", step);
    this.plot.setAttribute("aria-valuetext", `step ${step}: ${words.join("; ")}`);
    this.needle.replaceChildren();
    if (cursor === null) return;
    const { x, y } = this.scale;
    this.needle.append(drawn("path", { class: "needle", d: `M${x(step)} ${MARGIN.top}V${CHART_HEIGHT - MARGIN.bottom}` }),
      ...readings.map(({ point }, i) => drawn("circle", { class: `needle-point line-${i}`, cx: x(point.step), cy: y(point.value), r: 3.5 })));
  }

  listen() {
    const follow = (event) => {
      if (this.scale) this.move(this.scale.stepAt(event.clientX - this.plot.getBoundingClientRect().left));
    };
    this.plot.addEventListener("pointerdown", follow);
    this.plot.addEventListener("pointermove", follow);
    this.plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.move(null));
    this.plot.addEventListener("blur", () => this.move(null));
    this.plot.addEventListener("keydown", (event) => {
      if (!this.scale || event.ctrlKey || event.altKey || event.metaKey) return;
      const last = this.steps.length - 1;
      const at = this.steps.indexOf(this.step);
      const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, PageDown: at - 10, PageUp: at + 10, Home: 0, End: last }[event.key];
      if (to === undefined && event.key !== "Escape") return;
      event.preventDefault();
      this.move(to === undefined ? null : this.steps[Math.min(last, Math.max(0, to))]);
    });
  }
}

function pointsOf(rows, column) {
  return rows.filter((row) => isFigure(row[column]) && isFigure(row.step)).map((row) => ({ step: row.step, value: row[column] }));
}

/** Returns an exponential mean over about a thirtieth of the points, which starts at the arithmetic mean of as many points. */
function smoothed(points) {
  const span = Math.max(1, points.length / 30);
  const first = points.slice(0, Math.ceil(span));
  let mean = first.reduce((sum, { value }) => sum + value, 0) / first.length;
  return points.map(({ value }) => (mean += (value - mean) / span));
}

function scaleOf(lines, steps, width) {
  const values = lines.flatMap((line) => line.points.map((point) => point.value));
  const ticks = ticksOf(Math.min(...values), Math.max(...values));
  const [low, high] = [Math.min(ticks[0], ...values), Math.max(ticks[ticks.length - 1], ...values)];
  const [first, last] = [steps[0], steps[steps.length - 1]];
  const across = width - MARGIN.left - MARGIN.right;
  const down = CHART_HEIGHT - MARGIN.top - MARGIN.bottom;
  return {
    ticks,
    x: (step) => MARGIN.left + (last > first ? (across * (step - first)) / (last - first) : across / 2),
    y: (value) => MARGIN.top + down * (1 - (value - low) / (high - low)),
    stepAt: (x) => nearest(steps, first + ((x - MARGIN.left) / across) * (last - first)),
  };
}

/** Returns three to six round numbers within or around the range from `low` to `high`. */
function ticksOf(low, high) {
  const spread = high - low || Math.abs(high) || 1;
  const rough = spread / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const each = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let i = Math.floor(low / each + 1e-9); i * each <= high + each * 0.5; i += 1) ticks.push(Number((i * each).toPrecision(12)));
  return ticks.length > 1 ? ticks : [ticks[0], ticks[0] + each];
}

/** Formats a tick with the number of decimals that all ticks of the axis need. */
function tickWords(tick, ticks) {
  const decimals = [0, 1, 2, 3].find((count) => ticks.every((each) => Math.abs(each - Number(each.toFixed(count))) < 1e-9));
  if (decimals === undefined || Math.abs(tick) >= 1e6) return figure(tick);
  return tick.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }).replace("-", "\u2212");
}

function nearest(sorted, wanted) {
  return sorted.reduce((best, value) => (Math.abs(value - wanted) < Math.abs(best - wanted) ? value : best), sorted[0]);
}
