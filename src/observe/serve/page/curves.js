// The charts, with a cursor that all of them share. A metric that the run does not have is not shown.

const CURVES = [
  { title: "Reward", series: [{ column: "reward/mean", name: "reward" }] },
  { title: "Score", series: [{ column: "score/mean", name: "score" }] },
  { title: "Win rate", series: [{ column: "win_rate", name: "win rate" }] },
  { title: "Preferences learned", series: [{ column: "preference/accuracy", name: "share ranked correctly" }] },
  { title: "KL to the reference", unit: "nats", series: [{ column: "kl/mean", name: "KL" }] },
  { title: "Length", unit: "tokens", series: [{ column: "length/mean", name: "length" }] },
  { title: "Throughput", unit: "tokens/s", series: [{ column: "rate/generated_tokens", name: "generated" }, { column: "rate/trained_tokens", name: "trained" }] },
  { title: "Entropy", unit: "nats", series: [{ column: "entropy/mean", name: "entropy" }] },
  { title: "Staleness", unit: "versions", series: [{ column: "staleness/mean", name: "mean" }, { column: "staleness/max", name: "oldest" }] },
  { title: "Gradient norm", series: [{ column: "gradient/norm", name: "norm" }] },
];

const MORE_CURVES = [
  { title: "Judge’s own score", series: [{ column: "judge/mean", name: "judge" }] },
  { title: "Preference margin", series: [{ column: "preference/margin", name: "margin" }] },
  { title: "Repetition", series: [{ column: "repetition/mean", name: "share repeated" }] },
  { title: "Policy loss", series: [{ column: "loss/policy", name: "loss" }] },
  { title: "Importance ratios", series: [{ column: "ratio/effective", name: "effective share" }, { column: "ratio/clipped", name: "clipped share" }] },
  { title: "Time of a step", unit: "s", series: [{ column: "time/step_seconds", name: "step" }] },
  { title: "Learning rate", series: [{ column: "learning_rate", name: "rate" }] },
];

class Curves {
  constructor() {
    this.rows = [];
    this.cursor = null;
    const move = (step) => this.move(step);
    this.parts = [[CURVES, "charts"], [MORE_CURVES, "charts-more"]].map(([plans, place]) => ({
      place: byId(place),
      charts: plans.map((plan) => new Chart(plan, move)),
    }));
    onWidth(byId("charts"), () => this.draw());
    byId("more-charts").addEventListener("toggle", () => this.show(this.rows));
  }

  show(rows) {
    this.rows = rows;
    for (const { place, charts } of this.parts) {
      const known = charts.filter((chart) => chart.plan.series.some(({ column }) => rows.some((row) => isFigure(row[column]))));
      const cards = known.map((chart) => chart.card);
      if (cards.length !== place.children.length || cards.some((card, i) => card !== place.children[i])) place.replaceChildren(...cards);
      for (const chart of known) chart.show(rows, this.cursor);
    }
    setShown(byId("more-charts"), byId("charts-more").children.length > 0);
    setOptional(byId("curves-note"), rows.length ? "Points are the learner’s steps, the line is smoothed. Point at a chart, or use the arrow keys in it, to read all of them at one step." : "No step is done yet.");
  }

  draw() {
    for (const { charts } of this.parts) for (const chart of charts) chart.draw(this.cursor);
  }

  move(step) {
    this.cursor = step;
    for (const { charts } of this.parts) for (const chart of charts) chart.point(step);
  }
}

/** Returns the history as rows of named columns. */
function rowsOf(history) {
  return history.rows.map((row) => Object.fromEntries(history.columns.map((column, i) => [column, row[i]])));
}
