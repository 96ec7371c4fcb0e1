// The page: polls the node with one request at a time, and passes each response to the parts above.

const EACH_MS = 2000;
const SLOWEST_MS = 10000;

class Page {
  constructor() {
    this.trend = new Trend();
    this.curves = new Curves();
    this.samples = new Samples();
    this.status = null;
    this.answered = null; // when the node answered last
    this.seen = null; // incarnation and step whose history and samples are shown
    this.asking = false;
    this.failures = 0;
    this.timer = null;
    this.broken = new Set();
    byId("token-form").addEventListener("submit", (event) => this.takeToken(event));
    document.addEventListener("visibilitychange", () => this.poll());
    onWidth(byId("graph"), () => this.drawActors());
    byId("actors-table").addEventListener("toggle", () => this.drawActors());
  }

  async poll() {
    clearTimeout(this.timer);
    if (this.asking || document.hidden) return;
    this.asking = true;
    let next = EACH_MS;
    try {
      const status = await ask("status");
      this.takeStatus(status);
      await this.follow(status);
    } catch (error) {
      next = this.fail(error);
    }
    this.asking = false;
    if (next !== null) this.timer = setTimeout(() => this.poll(), next);
  }

  takeStatus(status) {
    this.answered = Date.now();
    this.failures = 0;
    const restarted = this.status && this.status.incarnation_started !== status.incarnation_started;
    this.status = status;
    if (restarted) {
      this.curves.rows = [];
      this.samples.forget();
    }
    setShown(byId("token-form"), false);
    setOptional(byId("lost"), null);
    showConnection("live", "live");
    this.trend.add(status);
    this.part("header", () => showHeader(status, this.curves.rows));
    this.part("vitals", () => showVitals(status));
    this.part("diagnosis", () => showDiagnosis(status));
    this.part("stalled", () => showStalled(status.graph?.stalled, status.run));
    this.part("waiting", () => showWaiting(status.judges_away ?? [], status.run));
    this.part("servers", () => showServers(status));
    this.part("unhealthy", () => showUnhealthy(status.health));
    this.drawActors();
  }

  drawActors() {
    if (!this.status) return;
    this.part("graph", () => showGraph(this.status, this.trend));
    this.part("timeline", () => showTimeline(this.status.graph));
    this.part("tables", () => showTables(this.status, this.trend));
  }

  /** Requests history and samples, which only change with the learner's steps or with another process at the same address. */
  async follow(status) {
    const now = `${status.incarnation_started}/${status.last_step?.step}`;
    if (now === this.seen) return;
    const rows = rowsOf(await ask("history"));
    const groups = await ask("samples");
    this.seen = now;
    this.part("curves", () => this.curves.show(rows));
    this.part("header", () => showHeader(status, rows));
    this.part("samples", () => this.samples.show(groups));
    this.part("stalled", () => showStalled(status.graph?.stalled, status.run));
    this.part("waiting", () => showWaiting(status.judges_away ?? [], status.run));
    this.part("servers", () => showServers(status));
    this.part("unhealthy", () => showUnhealthy(status.health));
  }

  /** Shows the error, and returns the time until the next poll, or null if the page waits for the user. */
  fail(error) {
    if (error instanceof TokenNeeded) {
      this.askForToken();
      return null;
    }
    this.failures += 1;
    const reason = error instanceof TypeError ? "nothing answers at its address" : error.message;
    showLost(this.answered, reason, this.status);
    return Math.min(SLOWEST_MS, EACH_MS * this.failures);
  }

  askForToken() {
    const refused = nodeToken !== null;
    useToken(null);
    showConnection("token", "token needed");
    setOptional(byId("lost"), null);
    setShown(byId("token-refused"), refused);
    if (!byId("token-form").hidden && !refused) return;
    setShown(byId("token-form"), true);
    setText(byId("headline"), "The node requires its token.");
    byId("token").focus();
  }

  takeToken(event) {
    event.preventDefault();
    useToken(byId("token").value.trim());
    byId("token").value = "";
    this.poll();
  }

  /** Shows one part of the page. An error in it is logged once and does not affect the other parts. */
  part(name, show) {
    try {
      show();
    } catch (error) {
      if (!this.broken.has(name)) console.error(`the page cannot show ${name}`, error);
      this.broken.add(name);
    }
  }
}

startTheme();
new Page().poll();
