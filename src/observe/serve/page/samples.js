// The list of sampled groups, with its order, its filter, and the pause of updates.

const FEW = 6;

const FILTERS = {
  all: () => true,
  length: (group) => group.completions.some((one) => one.finish === "length"),
  refused: (group) => group.completions.some((one) => isRefused(one.verdict) || (one.preferences ?? []).some((p) => p.refused)),
  flipped: (group) => group.completions.some((one) => (one.preferences ?? []).some((p) => p.flipped)),
  masked: (group) => Boolean(group.masked),
};

function isRefused(verdict) {
  return Boolean(verdict) && !isFigure(verdict.label);
}

const ORDERS = {
  newest: () => 0,
  highest: (a, b) => extreme(b, Math.max, -Infinity) - extreme(a, Math.max, -Infinity) || 0,
  lowest: (a, b) => extreme(a, Math.min, Infinity) - extreme(b, Math.min, Infinity) || 0,
};

function extreme(group, pick, none) {
  const worths = group.completions.map(worth).filter(isFigure);
  return worths.length ? pick(...worths) : none;
}

class Samples {
  constructor() {
    this.groups = [];
    this.latest = [];
    this.unseen = new Set();
    this.drawn = new Map();
    this.expanded = false;
    this.order = byId("sample-order");
    this.filter = byId("sample-filter");
    this.hold = byId("sample-hold");
    for (const control of [this.order, this.filter]) control.addEventListener("change", () => this.draw());
    this.hold.addEventListener("change", () => this.release());
    byId("sample-more").addEventListener("click", () => {
      this.expanded = !this.expanded;
      this.draw();
    });
  }

  /** Forgets all groups, because another process may use the same numbers for other groups. */
  forget() {
    this.drawn.clear();
    this.latest = [];
    if (!this.hold.checked) this.groups = [];
  }

  /** Shows the newest groups. While updates are paused, they are only counted. */
  show(groups) {
    const known = new Set([...this.groups, ...this.latest].map(groupKey));
    this.latest = groups;
    if (this.hold.checked && this.groups.length > 0) {
      for (const group of groups) if (!known.has(groupKey(group))) this.unseen.add(groupKey(group));
      setText(byId("sample-new"), this.unseen.size ? `${this.unseen.size} new` : "");
      return;
    }
    this.groups = groups;
    this.draw();
  }

  release() {
    if (this.hold.checked) return;
    this.unseen.clear();
    setText(byId("sample-new"), "");
    this.groups = this.latest;
    this.draw();
  }

  draw() {
    setShown(byId("sample-controls"), this.groups.length > 0);
    const chosen = this.groups.filter(FILTERS[this.filter.value]).sort(ORDERS[this.order.value]);
    const shown = this.expanded ? chosen : chosen.slice(0, FEW);
    const articles = shown.map((group) => this.article(group));
    const list = byId("sample-list");
    if (articles.length !== list.children.length || articles.some((one, i) => one !== list.children[i])) list.replaceChildren(...articles);
    setOptional(byId("samples-note"), this.note(chosen.length));
    const more = byId("sample-more");
    setShown(more, chosen.length > FEW);
    setText(more, this.expanded ? `Show the first ${FEW}` : `Show all ${chosen.length}`);
    const keep = new Set(this.groups.map(groupKey));
    for (const key of this.drawn.keys()) if (!keep.has(key)) this.drawn.delete(key);
  }

  note(count) {
    if (this.groups.length === 0) return "No group has been trained on yet.";
    return count === 0 ? `None of the last ${this.groups.length} groups matches.` : null;
  }

  /** Returns the element of a group. It is reused, because a group never changes, so that opened details stay open. */
  article(group) {
    const key = groupKey(group);
    if (!this.drawn.has(key)) this.drawn.set(key, drawGroup(group));
    return this.drawn.get(key);
  }
}

function groupKey(group) {
  return `${group.step}/${group.group}`;
}
