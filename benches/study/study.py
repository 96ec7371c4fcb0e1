#!/usr/bin/env python3
"""The study: trains a small summariser by every way of learning from feedback, and compares the results.

README.md beside this file has the design, the commands, and what is finished.
"""

import argparse
import fnmatch
import json
import shutil
import sys
import time
from pathlib import Path

import data
import evaluate
import program
import techniques
import units

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def make_data(arguments):
    """Makes the data once, and compares them with those of the results so far."""
    folder = arguments.work / "data"
    if not (folder / "counts.json").exists():
        program.need_space(arguments.work)
        # Starts, pairs and interrupted runs of other data would be used with these.
        for made in ("runs", "pairs", "judge"):
            shutil.rmtree(arguments.work / made, ignore_errors=True)
        counts = data.make(folder)
        (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    counts = json.loads((folder / "counts.json").read_text())
    record = RESULTS / "data.json"
    if record.exists():
        before = json.loads(record.read_text())
        for split in ("development", "judge", "test"):
            if before[f"{split}_sha256"] != counts[f"{split}_sha256"]:
                raise program.StudyError(
                    f"the {split} prompts made here differ from those of {record}: the package lists are of another release "
                    f"or day. Remove the folder {RESULTS} to begin the study again with these data."
                )
    else:
        RESULTS.mkdir(exist_ok=True)
        record.write_text(json.dumps(counts, indent=1) + "\n")
    return counts


def selected(arguments):
    """Returns the units to run, as (arm, seed), in the order of the study."""
    arms = units.arms()
    patterns = arguments.only.split(",") if arguments.only else list(arms)
    chosen = [arm for arm in arms if any(fnmatch.fnmatch(arm, pattern) for pattern in patterns)]
    unknown = [p for p in patterns if not any(fnmatch.fnmatch(arm, p) for arm in arms)]
    if unknown:
        raise program.StudyError(f"no arm is called {', '.join(unknown)}; the arms are {', '.join(arms)}")
    planned = [(arm, seed) for arm in chosen for seed in range(arms[arm].get("seeds", 3))]
    if arguments.seeds:
        wanted = {int(seed) for seed in arguments.seeds.split(",")}
        planned = [(arm, seed) for arm in chosen for seed in sorted(wanted)]
    # All arms with their first seed come first, so that a complete table exists early.
    return sorted(planned, key=lambda unit: unit[1])


def left(arguments):
    """Returns the selected units that have no result yet."""
    return [(arm, seed) for arm, seed in selected(arguments) if not units.result_file(RESULTS, arm, seed).exists()]


def run(arguments):
    """Runs the selected units that have no result yet."""
    make_data(arguments)
    began = time.time()
    for arm, seed in left(arguments):
        hours = (time.time() - began) / 3600
        if arguments.budget_hours and hours >= arguments.budget_hours:
            print(f"stopped after {hours:.2f} hours; the same command continues")
            return
        program.need_space(arguments.work)
        # Another process may train this unit, or may have finished it since the list was made.
        with program.lock(arguments.work, f"{arm}-{seed}", wait=False) as mine:
            if not mine or units.result_file(RESULTS, arm, seed).exists():
                continue
            started = time.time()
            print(f"{arm} seed {seed} …", flush=True)
            result = units.run(arguments.work, RESULTS, arm, seed, arguments.threads)
            minutes = (time.time() - started) / 60
            print(f"{arm} seed {seed}: {minutes:.1f} min, development {result.get('development', 'not answered')}", flush=True)


def score(arguments):
    """Scores the answers of finished units and of their starts that have no scores of this kind yet."""
    make_data(arguments)
    names = [f"{arm}-{seed}" for arm, seed in selected(arguments)]
    starts = {start_of(arm, seed) for arm, seed in selected(arguments)}
    for name in dict.fromkeys([*names, *sorted(starts - {None})]):
        answered = (RESULTS / f"{name}.answers.json.gz").exists()
        if answered and not (RESULTS / f"{name}.scores-{arguments.split}.json.gz").exists():
            log = arguments.work / "logs" / f"{Path(name).name}.log"
            print(name, evaluate.score_unit(arguments.work, RESULTS, name, arguments.split, log), flush=True)


def start_of(arm, seed):
    """Returns the name of the answers of a finished unit's start, or None if the unit is not finished."""
    file = units.result_file(RESULTS, arm, seed)
    return units.start_name(RESULTS, seed, json.loads(file.read_text())["start"]) if file.exists() else None


def compare(arguments):
    """Lets Gemma compare the answers of finished units with those of their starts."""
    make_data(arguments)
    for arm, seed in selected(arguments):
        name, start = f"{arm}-{seed}", start_of(arm, seed)
        answered = start and all((RESULTS / f"{unit}.answers.json.gz").exists() for unit in (name, start))
        if arm != "sft" and answered and not (RESULTS / f"{name}.gemma-{arguments.split}.json.gz").exists():
            log = arguments.work / "logs" / f"{name}.log"
            print(name, evaluate.compare_unit(arguments.work, RESULTS, name, start, arguments.split, log), flush=True)


def align(arguments):
    """Measures the labelers that have no result yet."""
    make_data(arguments)
    techniques.align(arguments.work, RESULTS, arguments.threads, arguments.harmless, arguments.only)


def reward_models(arguments):
    """Measures the reward models that have no result yet."""
    make_data(arguments)
    techniques.reward_models(arguments.work, RESULTS, arguments.threads, arguments.seed)


def show_tables(arguments):
    """Writes tables and plots to `results/tables`, and prints the tables."""
    try:
        import tables
    except ModuleNotFoundError as error:
        raise program.StudyError(f"{error}; run `pip install -r {HERE / 'requirements.txt'}`") from None
    print(tables.make(RESULTS, list(units.arms()), RESULTS / "tables", arguments.split))


def write_page(arguments):
    """Writes the study's page of the documentation, from the test answers."""
    import tables

    tables.page(RESULTS, list(units.arms()), program.ROOT / "docs", arguments.split)


def show_left(arguments):
    """Lists the units that have no result yet."""
    for arm, seed in left(arguments):
        print(f"{arm} seed {seed}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=program.ROOT / "runs" / "study", help="folder of data, models and runs")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("data", help="make the data from the package lists").set_defaults(act=lambda a: print(json.dumps(make_data(a), indent=1)))
    for name, act, text in [("run", run, "run the units that have no result yet"), ("left", show_left, "list these units")]:
        command = commands.add_parser(name, help=text)
        command.add_argument("--only", help="names of arms, separated by commas; * matches any text")
        command.add_argument("--seeds", help="seeds, separated by commas, instead of those of the plan")
        command.add_argument("--budget-hours", type=float, help="start no further unit after this time")
        command.add_argument("--threads", type=int, default=1, help="threads of each actor")
        command.set_defaults(act=act)
    for name, act, text in [
        ("evaluate", score, "score the answers of finished units; `run` scores those to the development prompts"),
        ("compare", compare, "let Gemma compare the answers of finished units with their start's"),
    ]:
        command = commands.add_parser(name, help=text)
        command.add_argument("--split", choices=list(evaluate.DECODINGS), default="development", help="use `test` once, at the end of the study")
        command.add_argument("--only")
        command.add_argument("--seeds")
        command.set_defaults(act=act)
    command = commands.add_parser("labelers", help="measure the labelers by technique (table 2)")
    command.add_argument("--harmless", type=Path, help="file of harmless pairs of Anthropic's HH; without it they are left out")
    command.add_argument("--only", help="a part of the names of measurements, such as `smollm2-base`")
    command.add_argument("--threads", type=int, default=1)
    command.set_defaults(act=align)
    command = commands.add_parser("reward-models", help="measure reward models by the number of labels (table 4)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--threads", type=int, default=1)
    command.set_defaults(act=reward_models)
    command = commands.add_parser("tables", help="write tables and plots from the results")
    command.add_argument("--split", choices=list(evaluate.DECODINGS), default="development")
    command.set_defaults(act=show_tables)
    command = commands.add_parser("page", help="write the page in docs/ from the results")
    command.add_argument("--split", choices=list(evaluate.DECODINGS), default="test")
    command.set_defaults(act=write_page)
    arguments = parser.parse_args()
    try:
        arguments.work = arguments.work.resolve()
        arguments.work.mkdir(parents=True, exist_ok=True)
        arguments.act(arguments)
    except (program.StudyError, data.DataError) as error:
        sys.exit(f"study: {error}")
    except OSError as error:
        sys.exit(f"study: {error}; a unit that was interrupted is continued by the same command")
    except KeyboardInterrupt:
        sys.exit("study: interrupted; the same command continues")


if __name__ == "__main__":
    main()
