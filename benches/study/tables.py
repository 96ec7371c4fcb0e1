"""Tables and plots from the results, as Markdown and SVG."""

import gzip
import json
from pathlib import Path

import intervals
import plots
import program
import units as studied

SHOWN = [
    ("rouge_l", "ROUGE-L", 100),
    ("chrf", "chrF", 100),
    ("cosine_reference", "cosine to the written summary", 100),
    ("cosine_text", "cosine to the text", 100),
]
BESIDE = [("words", "words", 1), ("copied", "copied 4-grams, %", 100), ("repeated", "repeated words, %", 100)]


def units(results):
    """Returns the results of all finished units, by arm and seed."""
    found = {}
    for file in sorted(results.glob("*-[0-9]*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["arm"], {})[result["seed"]] = result
    return found


def scores(results, name, decoding):
    """Returns the scores of the answers of this name by prompt, or None if they are missing."""
    file = results / f"{name}.scores-{decoding}.json.gz"
    if not file.exists():
        return None
    with gzip.open(file, "rt") as text:
        return json.load(text)


def _cell(found, scale=100.0, digits=1, sign=False):
    value, (low, high) = found
    plus = "+" if sign else ""
    return f"{value * scale:{plus}.{digits}f} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"


def start_scores(results, unit, decoding):
    """Returns the scores of the start of a finished unit, or None if they are missing."""
    return scores(results, studied.start_name(results, unit["seed"], unit["start"]), decoding)


def _both(results, finished, arm, other, decoding):
    """Returns the scores of two arms for the seeds that both have. An arm is paired with its own start if the other is `sft`."""
    pairs = []
    for seed, unit in sorted(finished.get(arm, {}).items()):
        a = scores(results, f"{arm}-{seed}", decoding)
        if other == "sft":
            b = start_scores(results, unit, decoding)
        else:
            b = scores(results, f"{other}-{seed}", decoding) if seed in finished.get(other, {}) else None
        if a and b:
            pairs.append((a, b))
    return [a for a, _ in pairs], [b for _, b in pairs]


def starts_note(results, finished, decoding):
    """Tells which seeds have two fine-tuned starts, and how far their answers differ; empty if none has.

    Arms of such a seed are compared with each other although their starts were rounded otherwise; each is compared with
    the answers of its own start.
    """
    lines = []
    for seed, unit in sorted(finished.get("sft", {}).items()):
        others = {arm: seeds[seed]["start"] for arm, seeds in finished.items() if seed in seeds and seeds[seed]["start"] != unit["start"]}
        for start in sorted(set(others.values())):
            name = studied.start_name(results, seed, start)
            a, b = scores(results, name, decoding), scores(results, f"sft-{seed}", decoding)
            if not a or not b:
                continue
            given = []
            for answers in (name, f"sft-{seed}"):
                with gzip.open(results / f"{answers}.answers.json.gz", "rt") as text:
                    given.append(json.load(text)[decoding])
            equal = sum(x == y for x, y in zip(*given)) / len(given[0])
            found = intervals.win_rate(_column([a], "cosine_reference"), _column([b], "cosine_reference"), _column([a], "words"), _column([b], "words"))
            arms = ", ".join(arm for arm, of in others.items() if of == start)
            lines.append(
                f"The start of seed {seed} was trained on processors of two kinds, whose sums are rounded otherwise. The arms {arms} began from the "
                f"second one. {100 * equal:.0f} % of the two starts' answers are equal; the win rate of the second over the first, controlled for "
                f"length, is {_cell(found['controlled'])} %."
            )
    return "\n\n".join(lines)


def _column(rows, key):
    return [[0.0 if value is None else value for value in row[key]] for row in rows]


def win_rate(results, finished, arm, other, decoding, judge="cosine_reference"):
    """Returns the win rate of an arm over another one, or None if they have no seed in common."""
    a, b = _both(results, finished, arm, other, decoding)
    if not a:
        return None
    return intervals.win_rate(_column(a, judge), _column(b, judge), _column(a, "words"), _column(b, "words"))


def gemma_counts(results):
    """Tells whether Gemma's agreement with people's choices excludes one half, for each kind of pair that was measured."""
    files = list((results / "alignment").glob("gemma-likelihood-mean-*.json"))
    return bool(files) and all(json.loads(file.read_text())["alignment"]["low"] > 0.5 for file in files)


def gemma_table(results, finished, decoding):
    """Returns the win rates over the fine-tuned start by Gemma, or why it does not judge."""
    lines = ["| arm | seeds | length-controlled, % | raw, % |", "|---|---|---|---|"]
    for arm, seeds in finished.items():
        rows, words, start = [], [], []
        for seed in sorted(seeds):
            file = results / f"{arm}-{seed}.gemma-{decoding}.json.gz"
            both = [scores(results, f"{arm}-{seed}", decoding), start_scores(results, seeds[seed], decoding)]
            if file.exists() and all(both):
                with gzip.open(file, "rt") as text:
                    rows.append([value or 0.0 for value in json.load(text)])
                words.append(both[0]["words"])
                start.append(both[1]["words"])
        if rows and not any("gemma" in str(unit.get("pairs")) for unit in seeds.values()):
            found = intervals.win_rate(rows, [[0.0] * len(row) for row in rows], words, start)
            lines.append(f"| {arm} | {len(rows)} | {_cell(found['controlled'])} | {_cell(found['raw'])} |")
    if len(lines) == 2:
        return ""
    return "\n".join(lines) + "\n" + ("" if gemma_counts(results) else "\nGemma does not count as a judge: on the judge split its agreement with people has an interval that includes one half, or was not measured.\n")


def arms_table(results, finished, decoding):
    """Returns the first table: every arm against its fine-tuned start."""
    heads = ["arm", "seeds", "win rate over SFT, length-controlled, %", "raw, %", "ties, %", "by chrF, length-controlled, %"]
    heads += [f"{name}, difference to SFT" for _, name, _ in SHOWN] + [name for _, name, _ in BESIDE] + ["KL"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm in finished:
        a, b = _both(results, finished, arm, "sft", decoding)
        if not a:
            continue
        cells = [arm, str(len(a))]
        if arm == "sft":
            cells += ["–", "–", "–", "–"]
            cells += [_cell(intervals.average(_column(a, key)), scale) for key, _, scale in SHOWN]
        else:
            if _is_judged(finished, arm):
                found = win_rate(results, finished, arm, "sft", decoding)
                cells += [_cell(found["controlled"]), _cell(found["raw"]), f"{100 * found['ties']:.0f}"]
            else:
                cells += ["the encoder labels", "–", "–"]
            cells.append(_cell(win_rate(results, finished, arm, "sft", decoding, "chrf")["controlled"]))
            cells += [_cell(intervals.difference(_column(a, key), _column(b, key)), scale, sign=True) for key, _, scale in SHOWN]
        for key, _, scale in BESIDE:
            values = [value for row in a for value in row[key] if value is not None]
            cells.append(f"{scale * sum(values) / len(values):.1f}")
        last = [unit["path"][-5:] for unit in finished[arm].values() if unit["path"]]
        kl = [step["kl"] for steps in last for step in steps if "kl" in step]
        cells.append(f"{sum(kl) / len(kl):.2f}" if kl else "0")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_judged(finished, arm):
    """Tells whether MiniLM may judge the arm, which it does not where it labels."""
    settings = [str(unit["set"]) + str(unit.get("pairs")) for unit in finished[arm].values()]
    return not any(word in text for text in settings for word in ("minilm", "embedding", "encoder"))


def between_table(results, finished, decoding):
    """Returns the win rates of the arms over each other."""
    names = [arm for arm in finished if arm != "sft"]
    lines = ["| arm | over | seeds | judge | length-controlled, % | raw, % |", "|---|---|---|---|---|---|"]
    for i, arm in enumerate(names):
        for other in names[:i]:
            judged = _is_judged(finished, arm) and _is_judged(finished, other)
            found = win_rate(results, finished, arm, other, decoding, "cosine_reference" if judged else "chrf")
            if found:
                count = len(_both(results, finished, arm, other, decoding)[0])
                lines.append(f"| {arm} | {other} | {count} | {'cosine' if judged else 'chrF'} | {_cell(found['controlled'])} | {_cell(found['raw'])} |")
    return "\n".join(lines) + "\n"


STALENESS = {"direct-eta0": 0, "direct": 1, "direct-eta4": 4}


def staleness_table(results, finished, decoding):
    """Returns the third table: synchronous training against bounds of one and four versions, at equal steps."""
    heads = ["bound", "seeds", "seconds of a step", "win rate over SFT, length-controlled, %"]
    heads += [f"{name}, difference to the synchronous run" for _, name, _ in SHOWN]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, bound in STALENESS.items():
        found = win_rate(results, finished, arm, "sft", decoding)
        if not found:
            continue
        seconds = [step["seconds"] for unit in finished[arm].values() for step in unit["path"] if "seconds" in step]
        # The first and last steps of a run wait for nothing, or for everything; the median does not see them.
        median = f"{sorted(seconds)[len(seconds) // 2]:.1f}" if seconds else "–"
        cells = [str(bound), str(len(_both(results, finished, arm, "sft", decoding)[0])), median, _cell(found["controlled"])]
        a, b = _both(results, finished, arm, "direct-eta0", decoding)
        for key, _, scale in SHOWN:
            same = arm == "direct-eta0" or not a
            cells.append("–" if same else _cell(intervals.difference(_column(a, key), _column(b, key)), scale, sign=True))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


PAPER = {  # Alignment on summaries in %, Lee et al. 2023, for the techniques of the same name.
    "base-0": 76.1, "base-1": 76.0, "base-2": 75.7, "base-0-cot": 77.5, "detailed-0": 77.4, "detailed-2": 76.3,
    "detailed-0-cot": 78.0, "detailed-2-cot": 76.8,
}


def labelers_table(results):
    """Returns the second table: agreement of each labeler and technique with people's choices, by kind of pair."""
    kinds = ["near", "corrupted", "shuffled", "copy", "reference-near", "reference-corrupted", "harmless"]
    rows = {}
    for file in sorted((results / "alignment").glob("*.json")):
        kind = max((k for k in kinds if file.stem.endswith("-" + k)), key=len)
        rows.setdefault(file.stem.removesuffix("-" + kind), {})[kind] = json.loads(file.read_text())
    shown = [kind for kind in kinds if any(kind in row for row in rows.values())]
    if not rows:
        return ""
    lines = ["| labeler and technique | " + " | ".join(shown) + " | same position in both orders, % | paper, summaries |"]
    lines.append("|" + "---|" * (len(shown) + 3))
    for name, row in rows.items():
        cells = []
        for kind in shown:
            found = row.get(kind, {}).get("alignment")
            cells.append(f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]" if found else "–")
        flips = [f["same position"]["value"] for f in row.values() if isinstance(f["same position"], dict)]
        cells.append(f"{100 * sum(flips) / len(flips):.0f}" if flips else "–")
        cells.append(str(PAPER.get(name.split("-", 1)[1], "–")))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def reward_models_table(results):
    """Returns the fourth table: accuracy of reward models by the number of labels that they were trained on."""
    lines, rows = [], []
    for file in (results / "reward-models").glob("*.json"):
        kind, count, seed = file.stem.rsplit("-", 2)
        rows.append((kind, int(count), int(seed), json.loads(file.read_text())))
    for kind, count, seed, row in sorted(rows, key=lambda entry: entry[:3]):
        if not lines:
            lines = ["| labels of | labels | seed | " + " | ".join(row) + " |", "|" + "---|" * (3 + len(row))]
        found = [measured["accuracy"] for measured in row.values()]
        cells = [f"{100 * f['value']:.1f} [{100 * f['low']:.1f}, {100 * f['high']:.1f}]" for f in found]
        lines.append(f"| {kind} | {count} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if lines else ""


def ordered(results, order):
    """Returns the finished units by arm, with the arms in the given order."""
    finished = units(results)
    if not finished:
        raise program.StudyError(f"{results} has no finished unit; run `study.py run` first")
    for arm, seeds in finished.items():
        for seed, unit in seeds.items():
            name = studied.start_name(results, seed, unit["start"])
            if not (results / f"{name}.answers.json.gz").exists():
                raise program.StudyError(f"the answers of the start of {arm} with seed {seed} are missing ({name}.answers.json.gz); run the unit sft of this seed, or the arm again")
    return dict(sorted(finished.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def minutes(finished):
    """Returns the minutes of all units."""
    return sum(sum(unit["minutes"].values()) for seeds in finished.values() for unit in seeds.values())


def write_plots(finished, folder, prefix=""):
    """Writes the plots of the measures over the KL divergence."""
    for name, key in (("quality", "cosine_reference"), ("rouge", "rouge_l"), ("copied", "copied")):
        series = {arm: [step for unit in seeds.values() for step in unit["path"]] for arm, seeds in finished.items()}
        (folder / f"{prefix}{name}.svg").write_text(plots.over_kl(series, key))


def page(results, order, docs, decoding="test"):
    """Writes the study's page of the documentation from the template `page.txt`, with its plots."""
    finished = ordered(results, order)
    parts = {
        "arms": arms_table(results, finished, decoding),
        "between": between_table(results, finished, decoding) + "\n" + starts_note(results, finished, decoding),
        "gemma": gemma_table(results, finished, decoding),
        "labelers": labelers_table(results),
        "staleness": staleness_table(results, finished, decoding),
        "reward_models": reward_models_table(results),
        "minutes": f"{minutes(finished):.0f}",
    }
    some = next(unit for seeds in finished.values() for unit in seeds.values() if unit["path"])
    base = some["base"]
    parts["steps"] = str(base["run"]["steps"])
    parts["completions"] = str(base["learner"]["batch_groups"] * base["rollout"]["group_size"])
    scored = scores(results, next(f"{arm}-{seed}" for arm, seeds in finished.items() for seed in seeds), decoding)
    if scored is None:
        raise program.StudyError(f"no {decoding} answers are scored; run `study.py evaluate --split {decoding}` first")
    parts["prompts"] = f"{len(scored['words']):,}"
    text = (Path(__file__).parent / "page.txt").read_text()
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part.strip() or "Not measured yet.")
    (docs / "study.md").write_text(text)
    write_plots(finished, docs, "study-")
    return text


def make(results, order, folder, decoding):
    """Writes the tables and plots of one kind of answers, with the arms in the given order; returns the tables."""
    finished = ordered(results, order)
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# Results: {decoding} answers\n\n{arms_table(results, finished, decoding)}\n{between_table(results, finished, decoding)}\n{starts_note(results, finished, decoding)}\n\n"
    more = {
        "Win rates over SFT by Gemma": gemma_table(results, finished, decoding),
        "Labelers by technique": labelers_table(results),
        "Staleness": staleness_table(results, finished, decoding),
        "Reward models by number of labels": reward_models_table(results),
    }
    for title, table in more.items():
        if table:
            text += f"## {title}\n\n{table}\n"
    text += f"Minutes of one core in all: {minutes(finished):.0f}.\n"
    Path(folder / f"{decoding}.md").write_text(text)
    write_plots(finished, folder)
    return text
