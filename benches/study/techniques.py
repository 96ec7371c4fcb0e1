"""Measures of labelers and reward models: agreement by technique (table 2), and accuracy by number of labels (table 4)."""

import json
import shutil

import evaluate
import pairs
import program
import units

# Techniques of asking the judge, and the number of pairs: a rationale takes minutes of one core.
VARIANTS = {
    "base-0": 100, "base-1": 100, "base-2": 100, "detailed-0": 100, "detailed-1": 100, "detailed-2": 100,
    "base-0-cot": 30, "detailed-0-cot": 30, "direct": 100, "likelihood": 200, "likelihood-mean": 200,
}
# Self-consistency: the mean over k sampled rationales.
SELF_CONSISTENCY = {"detailed-0-cot-k4": (4, 20), "detailed-0-cot-k16": (16, 8)}
KINDS = ("near", "corrupted", "shuffled", "copy")
LABELS = (40, 80, 160, 320)


def judge_pairs(work, kind):
    """Returns the file of one kind of pairs of the judge split."""
    file = work / "judge" / f"{kind}.jsonl"
    if not file.exists():
        rows = evaluate.read(work / "data" / "judge.jsonl")
        guided = kind.startswith("reference-")
        found = pairs.against_reference(rows, kind.removeprefix("reference-"), 0) if guided else pairs.make(rows, [kind], 0)
        evaluate.write(file, found)
    return file


def judges(work, threads):
    """Returns the settings of each judge, with the techniques that are measured."""
    start = str(units.start(work, 0, threads))
    likelihood = {"likelihood": 200, "likelihood-mean": 200}
    return {
        "smollm2": ({}, {**VARIANTS, **{name: n for name, (_, n) in SELF_CONSISTENCY.items()}}),
        "start": ({"labeler.model": start}, likelihood),
        "gemma": ({"policy.model": str(program.gemma(work))}, {**likelihood, "base-0": 100, "detailed-2": 100, "direct": 100}),
        "minilm": (evaluate.encoder_settings(work), {"configured": 400}),
    }


def measurements(work, threads, harmless):
    """Yields (name, settings, file, variant, pairs) of each measurement of a labeler."""
    for judge, (settings, variants) in judges(work, threads).items():
        for variant, limit in variants.items():
            for kind in KINDS:
                yield f"{judge}-{variant}-{kind}", settings, judge_pairs(work, kind), variant, limit
            if judge == "minilm":
                for kind in ("reference-near", "reference-corrupted"):
                    yield f"{judge}-{variant}-{kind}", settings, judge_pairs(work, kind), variant, limit
            if harmless and judge == "smollm2":
                yield f"{judge}-{variant}-harmless", {**settings, "labeler.templates": "harmless"}, harmless, variant, limit


def align(work, results, threads, harmless, only):
    """Measures each labeler that has no result yet."""
    folder = results / "alignment"
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings, file, variant, limit in measurements(work, threads, harmless):
        target = folder / f"{name}.json"
        if target.exists() or (only and only not in name):
            continue
        settings = {"data.path": str(work / "data" / "train.jsonl"), "data.max_prompt_tokens": 1024, **settings}
        asked = variant
        if variant in SELF_CONSISTENCY:
            asked = variant.rsplit("-", 1)[0]
            settings |= {"labeler.rationales": SELF_CONSISTENCY[variant][0], "labeler.rationale_temperature": 0.7}
        settings["labeler.rationale_tokens"] = 128
        arguments = ["eval", "alignment", program.config(work), "--input", file, "--variants", asked, "--limit", limit, "--format", "json"]
        printed = program.run(arguments, work / "logs" / "alignment.log", settings, threads)
        row = json.loads(printed.strip().splitlines()[0])[0] if printed.startswith("[{") else json.loads(printed)
        target.write_text(json.dumps(row) + "\n")
        print(name, row["alignment"], flush=True)


def reward_models(work, results, threads, seed=0):
    """Trains a reward model on each number of labels of people and of the AI labeler, and measures it on the judge split."""
    folder = results / "reward-models"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, mode, labels in (("people", "human", "hard"), ("labeled", "distilled", "soft")):
        for count in LABELS:
            target = folder / f"{kind}-{count}-{seed}.json"
            if target.exists():
                continue
            some = work / "pairs" / f"{kind}-{count}.jsonl"
            evaluate.write(some, evaluate.read(units.pair_file(work, kind, threads))[:count])
            run, name = work / "runs" / f"reward-{kind}-{count}-{seed}", f"reward-{kind}-{count}-{seed}"
            settings = {
                **units.common(work, seed, threads), "policy.model": str(units.start(work, seed, threads)), "run.mode": mode,
                "run.steps": 1, "reward_model.pairs": str(some), "reward_model.labels": labels, "reward_model.holdout": 0.0,
            }
            if mode == "distilled":
                settings["reward_model.online"] = False
            units.train(work, run, settings, name, threads)
            model, row = max((run / "checkpoints").glob("step-*")) / "reward_model", {}
            for worse in KINDS:
                arguments = ["eval", "reward-accuracy", model, program.config(work), "--input", judge_pairs(work, worse)]
                printed = program.run([*arguments, "--limit", 100, "--format", "json"], work / "logs" / f"{name}.log")
                row[worse] = json.loads(printed)[0]
            target.write_text(json.dumps(row) + "\n")
            shutil.rmtree(run, ignore_errors=True)
            print(name, row, flush=True)
