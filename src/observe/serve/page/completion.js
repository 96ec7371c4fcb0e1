// One group on the page: a prompt, its completions, and their labels. All of it is untrusted text.

const LONG_PROMPT = 420; // characters; more is folded
const LONG_COMPLETION = 1600;

const FINISHES = { eos: "end token", stop: "stop string", length: "truncated at the length limit" };

/** Returns the value by which a completion is ranked: its reward, else its score, else its mean preference; null without any. */
function worth(completion) {
  if (isFigure(completion.reward)) return completion.reward;
  if (isFigure(completion.score)) return completion.score;
  const better = (completion.preferences ?? []).map((one) => one.better).filter(isFigure);
  return better.length ? better.reduce((sum, p) => sum + p, 0) / better.length : null;
}

function drawGroup(group) {
  const title = `Step ${group.step}, group ${group.group}`;
  const about = [`row ${group.row}`];
  if (group.labeler) about.push(`judged by ${group.labeler}`);
  if (isFigure(group.reward_model)) about.push(`reward model ${group.reward_model}`);
  const masked = group.masked ? `\u26a0 masked${typeof group.masked === "string" ? `: ${group.masked}` : ""}` : null;
  const ranked = group.completions.map((completion, i) => ({ completion, i }))
    .sort((a, b) => (worth(b.completion) ?? -Infinity) - (worth(a.completion) ?? -Infinity));
  return element("article", { class: "group", "aria-label": title },
    element("div", { class: "group-head" }, element("h3", {}, title), element("span", { class: "quiet" }, about.join(", ")),
      masked ? element("strong", { class: "warns" }, masked) : null),
    drawText(group.prompt, LONG_PROMPT, "prompt"),
    element("ol", { class: "completions" }, ...ranked.map(({ completion, i }) => drawCompletion(completion, i))));
}

function drawText(text, limit, kind) {
  if (text.trim() === "") return element("p", { class: `${kind} quiet` }, "(nothing but white space)");
  if (text.length <= limit) return element("p", { class: `${kind} written` }, text);
  return element("details", { class: kind },
    element("summary", { class: "written" }, `${text.slice(0, Math.round(limit * 0.7))}… (${counted(figure(text.length), "character")})`),
    element("p", { class: "written" }, text));
}

function drawCompletion(completion, i) {
  const facts = [FINISHES[completion.finish] ?? completion.finish, counted(completion.tokens, "token"), versionWords(completion.versions)];
  const figures = [["reward", completion.reward], ["score", completion.score]].filter(([, value]) => isFigure(value));
  return element("li", { class: "completion" },
    element("div", { class: "completion-head" },
      element("span", { class: "quiet" }, `#${i + 1}`),
      ...figures.map(([name, value]) => element("span", {}, `${name} `, element("strong", {}, signed(value)))),
      verdictWords(completion)),
    drawText(completion.text, LONG_COMPLETION, "answer"),
    preferenceList(completion.preferences ?? []),
    element("p", { class: "quiet" }, facts.filter(Boolean).join(", ")));
}

function signed(value) {
  return value > 0 ? `+${figure(value)}` : figure(value);
}

function versionWords(versions) {
  return versions?.length && isFigure(versions[0]) ? `weights ${range(versions.filter(isFigure))}` : null;
}

/** Returns the judge's verdict, unless it equals the score that is shown already. */
function verdictWords(completion) {
  const verdict = completion.verdict;
  if (!verdict) return null;
  if (isFigure(verdict.label)) return verdict.label === completion.score ? null : element("span", {}, "judge ", element("strong", {}, signed(verdict.label)));
  return element("span", { class: "warns" }, `\u26a0 ${refusalWords(verdict)}`);
}

function refusalWords(verdict) {
  if (verdict.abstention !== undefined) return `judge abstained: ${verdict.abstention}`;
  return verdict.failure !== undefined ? `judge failed: ${verdict.failure}` : "judge gave no label";
}

function preferenceList(preferences) {
  if (preferences.length === 0) return null;
  return element("ul", { class: "preferences" }, ...preferences.map((one) => element("li", {}, preferenceWords(one))));
}

function preferenceWords(one) {
  const other = `#${one.with + 1}`;
  if (!isFigure(one.better)) return `against ${other}: \u26a0 ${refusalWords(one.refused ?? {})}`;
  const flipped = one.flipped ? "; \u26a0 it preferred the same position in both orders" : "";
  if (one.better === 0.5) return `as good as ${other}${flipped}`;
  const [word, probability] = one.better > 0.5 ? ["better", one.better] : ["worse", 1 - one.better];
  return `${word} than ${other}, ${percent(probability)} sure${flipped}`;
}
