"""Writes benches/RESULTS.md and benches/results.json from the measurements that run.py collects."""

import json
from statistics import median

from limits import Limits, bound

SIDES = ["preceptor", "pytorch", "llama.cpp"]


class Figures:
    """Medians of all measurements of one kind of work, by side and settings."""

    def __init__(self, lines):
        self.limits = Limits(lines)
        self.groups = {}
        for line in latest(lines):
            job = line["job"]
            if "wall_s" in line:
                key = tuple(job[name] for name in ["side", "work", "model", "threads", "length", "weights", "precision"])
                self.groups.setdefault(key, []).append(line)
        self.rows = {key: self.row(key, group) for key, group in self.groups.items()}

    def row(self, key, lines):
        side, work, model, threads, length, weights, precision = key
        per_unit = lambda name: median(value / line["units"] for line in lines for value in line[name])
        row = dict(zip(["side", "work", "model", "threads", "length", "weights", "precision"], key))
        row |= {"unit": lines[0]["unit"], "runs": sum(len(line["wall_s"]) for line in lines),
                "wall_s": per_unit("wall_s"), "cpu_s": per_unit("cpu_s"),
                "peak_mib": median(line["peak_rss_kib"] for line in lines) / 1024}
        limit = bound(self.limits, row, 1)
        if limit:
            row["share"] = limit / row["wall_s"]
        for name in ["attention_s_per_unit", "ratio", "eta0_wall_s", "generation_alone_s", "learning_alone_s"]:
            if name in lines[0]:
                row[name] = median(line[name] for line in lines)
        return row

    def get(self, side, work, model, threads, length=0, weights="f32", precision="highest"):
        return self.rows.get((side, work, model, threads, length, weights, precision))

    def fastest(self, side, work, model, threads):
        """Returns the fastest row of a side with any number formats."""
        rows = [row for row in self.rows.values()
                if (row["side"], row["model"], row["threads"]) == (side, model, threads) and row["work"] in work]
        return min(rows, key=lambda row: row["wall_s"], default=None)


def latest(lines):
    """Returns the last line of each job."""
    return {tuple(line["job"].values()): line for line in lines}.values()


def write(lines, folder, missing):
    """Writes both files. `missing` are the jobs of the requested work that were not measured."""
    lines = list(latest(lines))
    figures = Figures(lines)
    parts = [head(lines, missing), limits(lines, figures), goals(figures), comparison(figures), decoding(figures), length(figures),
             overlap(figures)]
    (folder / "RESULTS.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    machine = lines[-1]["machine"] if lines else {}
    rows = sorted(figures.rows.values(), key=lambda row: [str(value) for value in row.values()])
    content = {"machine": machine, "versions": lines[-1]["versions"] if lines else {}, "rows": rows,
               "products_gflops": figures.limits.products, "read_gb_per_s": figures.limits.read}
    (folder / "results.json").write_text(json.dumps(rounded(content), indent=1) + "\n")


def rounded(value):
    """Rounds all numbers to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def head(lines, missing):
    if not lines:
        return "# Results\n\nThere are no measurements yet."
    machine, versions = lines[-1]["machine"], lines[-1]["versions"]
    commits = list(dict.fromkeys(line["commit"] for line in lines if line["job"]["side"] == "preceptor"))
    busiest = max(line["others_cpus"] for line in lines)
    return f"""\
# Results

`python3 benches/peers/run.py` measured these figures and wrote this page; do not edit it. [README.md](README.md) describes \
the comparison and the goals that are not reached. The figures are also in [results.json](results.json).

- **Machine**: {machine["cpu"]}, {machine["cores"]} cores, {", ".join(machine["instructions"])}, \
{machine["memory_gib"]} GiB of memory; {machine["system"]}.
- **Programs**: Preceptor at {", ".join(commits)} ({machine["rustc"]}), PyTorch {versions["torch"]}, \
transformers {versions["transformers"]}, TRL {versions["trl"]}, llama.cpp of xllamacpp {versions["xllamacpp"]}.
- **Method**: the same shapes, token ids and number of threads, random weights, `f32` unless another format is named. Each \
measurement is a separate process; those of a row were made in turn, and the row has their median. Other processes used at \
most {busiest:.1f} CPUs during a measurement.{absent(lines, missing)}"""


def absent(lines, missing):
    """Returns a list item about the measurements that were not made."""
    if not missing:
        return ""
    settings = lambda job: tuple(value for name, value in job.items() if name != "round")
    known = {settings(line["job"]) for line in lines}
    kinds = {}
    for job in missing:
        if settings(job) not in known:
            length = f" at {job['length']:,}" if job["length"] >= 1024 else ""
            kinds.setdefault(f"`{job['work']}` ({job['model']}{length})", set()).add(job["side"])
    names = [name if "preceptor" in sides else f"{name} of {', '.join(sorted(sides))}" for name, sides in kinds.items()]
    return (f"\n- **Missing**: {len(missing)} measurements of the complete comparison were not made, repetitions included."
            + (f" Without any: {', '.join(names)}." if names else ""))


def limits(lines, figures):
    rows, memory = {}, {}
    for line in lines:
        job = line["job"]
        for shape, rates in line.items():
            if job["work"] == "products" and isinstance(rates, dict) and "split" in rates:
                rows.setdefault(shape, {})[job["side"], job["threads"]] = rates
        if job["work"] == "memory":
            memory[job["side"], job["threads"]] = line
    if not rows:
        return ""
    threads = sorted({threads for cells in rows.values() for _, threads in cells})
    table = Table(["product, GFLOP/s"] + [f"Preceptor, {plural(n, 'thread')}" for n in threads]
                  + [f"PyTorch, {plural(n, 'thread')}" for n in threads])
    for shape, cells in rows.items():
        def cell(side, n):
            rates = cells.get((side, n), {})
            own = number(rates.get("split"))
            return own if n == 1 or "each" not in rates else f"{own}; {number(rates['each'])}"
        table.add(shape.replace("x", " × "), *(cell(side, n) for side in SIDES[:2] for n in threads))
    speeds = Table(["memory, GB/s"] + table.names[1:])
    for name in ["read", "copy"]:
        speeds.add(name, *(number(memory.get((side, n), {}).get(name)) for side in SIDES[:2] for n in threads))
    peaks = " and ".join(f"{number(figures.limits.products[n])} GFLOP/s and {number(figures.limits.read[n])} GB/s with "
                         f"{plural(n, 'thread')}" for n in threads)
    return f"""\
## Limits of the machine

The highest figures of any program are the limits to which the other tables compare: {peaks}. In the columns of several \
threads, the first figure is one product divided over the threads, the second one product on each of them. Reads and writes \
of a copy both count.

{table}

{speeds}"""


def goals(figures):
    """Returns the table of the project's goals."""
    table = Table(["goal", "figure", "reached"])

    def goal(text, value, reached, form):
        table.add(text, "not measured" if value is None else form(value),
                  "" if value is None else "yes" if reached(value) else "no")

    share = lambda row: row and row.get("share")
    times = lambda figure: f"{figure:.2f} times"
    goal("share of the peak of products in the learner with two replicas, SmolLM2: at least 75 %",
         share(figures.get("preceptor", "gradients", "smollm2", 2)), lambda x: x >= 0.75, percent)
    for weights in ["f32", "bf16", "q8_0"]:
        goal(f"share of the memory bound in a decode step of one completion, SmolLM2, `{weights}`: at least 85 %",
             share(figures.get("preceptor", "decode-1", "smollm2", 1, 128, weights)), lambda x: x >= 0.85, percent)
    ours, theirs = (figures.get(side, "grpo", "smollm2", 2) for side in SIDES[:2])
    both = ours and theirs
    goal("GRPO on SmolLM2 compared with TRL, by the clock on two cores: at least 8 times",
         both and theirs["wall_s"] / ours["wall_s"], lambda x: x >= 8, times)
    goal("the same per CPU-second: at least 6 times", both and theirs["cpu_s"] / ours["cpu_s"], lambda x: x >= 6, times)
    for threads in [1, 2]:
        pair = [figures.fastest(side, ["grpo", "grpo-whole"], "tiny", threads) for side in SIDES[:2]]
        goal(f"GRPO on the tiny model, each side's fastest setting, {plural(threads, 'thread')}: at least 8 times",
             all(pair) and pair[1]["wall_s"] / pair[0]["wall_s"] or None, lambda x: x >= 8, times)
    checkpointed = [figures.get(side, "grpo-checkpointed", "smollm2", 2) for side in SIDES[:2]]
    memory = "peak memory of GRPO on SmolLM2"
    for text, own, other in [
        (f"{memory} relative to TRL's", ours, theirs),
        (f"{memory} with one replica and activation checkpointing, relative to TRL's without checkpointing",
         checkpointed[0], theirs),
        (f"{memory} with one replica and activation checkpointing, relative to TRL's with checkpointing", *checkpointed),
    ]:
        goal(f"{text}: at most a half", own and other and own["peak_mib"] / other["peak_mib"], lambda x: x <= 0.5,
             lambda x: f"{x:.2f}")
    return f"## Goals\n\n{table}"


def comparison(figures):
    table = Table(["work", "model", "threads", "unit", "per second: Preceptor", "PyTorch, TRL", "ratio",
                   "ratio per CPU-second", "share of the limit: Preceptor", "PyTorch, TRL", "peak MiB: Preceptor",
                   "PyTorch, TRL", "runs"])
    for row in figures.rows.values():
        if row["side"] != "preceptor" or row["length"] or row["work"] == "overlap":
            continue
        if row["weights"] != "f32" and row["work"] != "grpo":
            continue
        of = lambda work: figures.get("pytorch", work, row["model"], row["threads"])
        others = [(row["work"], of(row["work"]))] + ([("grpo-whole", of("grpo-whole"))] if row["work"] == "grpo" else [])
        for work, theirs in others:
            if not theirs and work != row["work"]:
                continue
            format = "" if row["weights"] == "f32" else f", rollouts in `{row['weights']}`"
            theirs = theirs or {}
            ratio = lambda name: f"{theirs[name] / row[name]:.2f}" if theirs else ""
            table.add(work + format, row["model"], row["threads"], row["unit"], number(1 / row["wall_s"]),
                      number(theirs and 1 / theirs["wall_s"]), ratio("wall_s"), ratio("cpu_s"),
                      percent(row.get("share")), percent(theirs.get("share")), number(row["peak_mib"]),
                      number(theirs.get("peak_mib")), row["runs"])
    if not table.rows:
        return ""
    return f"""\
## Training and labeling

Ratios above 1 are in favour of Preceptor. The share of the limit is the time of the work's products and of the bytes that \
it has to read, at the limits above, divided by the measured time; a prompt that completions share is counted once for both \
sides.

{table}"""


def decoding(figures):
    table = Table(["work", "model", "format", "tokens per second: Preceptor", "llama.cpp", "transformers",
                   "share of the limit: Preceptor", "llama.cpp", "transformers", "peak MiB: Preceptor", "llama.cpp",
                   "transformers"])
    for row in figures.rows.values():
        is_decode = row["work"] == "decode-1" and row["length"] == 128
        if row["side"] != "preceptor" or not (is_decode or row["work"].startswith("generate-")):
            continue
        find = lambda side, weights: figures.get(side, row["work"], row["model"], row["threads"], row["length"], weights)
        cells = [row, find("llama.cpp", row["weights"]) or {},
                 find("pytorch", "f32") or {} if row["weights"] == "f32" else {}]
        table.add(row["work"], row["model"], row["weights"], *(number(cell and 1 / cell["wall_s"]) for cell in cells),
                  *(percent(cell.get("share")) for cell in cells), *(number(cell.get("peak_mib")) for cell in cells))
    if not table.rows:
        return ""
    return f"""\
## Sampling

One thread. `decode-1` is a decode step after 128 tokens; `generate-N` samples N completions of 64 tokens after prompts of 64 \
and includes the prompts. The limit of more than one sequence in `q8_0` is that of products in `f32`, although 8-bit integers \
are multiplied.

{table}"""


def length(figures):
    parts = []
    titles = {"decode-1": "Decode step of one sequence", "decode-8": "Decode step of 8 sequences that share a prompt",
              "score-long": "Log-probabilities", "gradient-long": "Gradient"}
    for work, title in titles.items():
        table = Table(["length", "ms per token: Preceptor", "PyTorch", "llama.cpp", "attention in Preceptor",
                       "share of the limit: Preceptor", "PyTorch", "llama.cpp", "peak MiB: Preceptor", "PyTorch",
                       "llama.cpp"])
        rows = [row for row in figures.rows.values()
                if row["side"] == "preceptor" and row["work"] == work and row["length"] >= 1024]
        for row in sorted(rows, key=lambda row: row["length"]):
            cells = [figures.get(side, work, row["model"], row["threads"], row["length"]) or {} for side in SIDES]
            table.add(row["length"], *(number(cell and 1e3 * cell["wall_s"]) for cell in cells),
                      percent(row["attention_s_per_unit"] / row["wall_s"]), *(percent(cell.get("share")) for cell in cells),
                      *(number(cell.get("peak_mib")) for cell in cells))
        if table.rows:
            parts.append(f"### {title}, {rows[0]['model']}\n\n{table}")
    if not parts:
        return ""
    intro = """\
## Length

One thread. The length is that of the context of a decode step, and that of prompt and completion together, one half each, for \
log-probabilities and gradients, whose unit is a token of the completion. Preceptor's gradient is that of two completions \
which share the prompt, and its memory is that of both; PyTorch has one row. llama.cpp reads the same tokens for \
*log-probabilities* but computes no logits. The share of attention is the time of the attention kernels alone on the same \
shapes, divided by the time of the work."""
    return "\n\n".join([intro, *parts])


def overlap(figures):
    table = Table(["model", "samples", "η = 1: wall s", "η = 0: wall s", "generation alone s", "learning alone s",
                   "wall / longer"])
    for row in figures.rows.values():
        if row["work"] == "overlap":
            group = figures.groups[tuple(row[name] for name in
                                         ["side", "work", "model", "threads", "length", "weights", "precision"])]
            table.add(row["model"], group[0]["units"], number(row["wall_s"] * group[0]["units"]),
                      number(row["eta0_wall_s"]), number(row["generation_alone_s"]), number(row["learning_alone_s"]),
                      f"{row['ratio']:.2f}")
    if not table.rows:
        return ""
    return f"""\
## Overlap of generation and learning

Two threads. A complete run at η = 1, where both work concurrently, and one at η = 0, where each waits for the other. The \
first batch is generated and the last one trained on without overlap, so that even perfect overlap gives more than 1.

{table}"""


class Table:
    """Markdown table."""

    def __init__(self, names):
        self.names, self.rows = names, []

    def add(self, *cells):
        self.rows.append([str(cell) for cell in cells])

    def __str__(self):
        lines = [self.names, ["---"] * len(self.names), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plural(count, noun):
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def percent(share):
    return f"{100 * share:.0f} %" if share else ""


def number(value):
    """Formats a number with three significant digits, or all digits before the point."""
    return "" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
