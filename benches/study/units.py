"""A unit of the study: one arm with one seed, from the training to its answers and scores."""

import gzip
import json
import shutil
import time
import tomllib

import evaluate
import pairs
import program
from evaluate import read, write

PAIRS = 320
# Added to a unit's seed after fine-tuning: with the same seed, the arms would be trained on the prompts whose written
# summaries their start was fine-tuned on, in the same order.
AFTER_FINE_TUNING = 1000
KINDS = ["near", "corrupted", "copy", "sample"]


def arms():
    """Returns the arms of `configs/arms.toml`, in their order."""
    return tomllib.loads((program.CONFIGS / "arms.toml").read_text())


def result_file(results, arm, seed):
    """Returns the path of a unit's result."""
    return results / f"{arm}-{seed}.json"


def start(work, seed, threads):
    """Returns the folder of the fine-tuned policy that all arms of a seed start from, and trains it if it is not there."""
    folder = work / "runs" / f"sft-{seed}"
    with program.lock(work, f"start-{seed}"):
        if not (folder / "done").exists():
            settings = {**common(work, seed, threads), **arms()["sft"]["set"], "run.steps": 1, "learner.lr": 1e-12}
            settings |= evaluate.encoder_settings(work)
            train(work, folder, settings, f"sft-{seed}", threads)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            (folder / "done").touch()
    return folder / "reference"


def start_name(results, seed, fingerprint):
    """Returns the name of the answers of an arm's start: `sft-<seed>`, or that of a start with other weights.

    On a processor of another kind the fine-tuned policy of a seed is another one, since its sums are rounded otherwise.
    """
    file = result_file(results, "sft", seed)
    same = file.exists() and json.loads(file.read_text())["start"] == fingerprint
    return f"sft-{seed}" if same else f"starts/sft-{seed}-{fingerprint}"


def answer_start(work, results, seed, model, log):
    """Writes answers and scores of a start that is not the one of the unit `sft`, if they are missing."""
    # Another process may be about to answer with this start as the unit `sft`.
    with program.lock(work, f"sft-{seed}"):
        pass
    name = start_name(results, seed, fingerprint(model))
    if not name.startswith("starts/"):
        return
    with program.lock(work, f"start-{seed}"):
        if not (results / f"{name}.scores-development.json.gz").exists():
            (results / "starts").mkdir(exist_ok=True)
            answer(work, results, name, model, log, seed)


def answer(work, results, name, model, log, seed):
    """Writes a policy's answers to the prompts of all splits, with the scores of the development prompts; returns these."""
    given = {
        decoding: evaluate.answers(work, model, split, temperature, log, seed)
        for decoding, (split, temperature) in evaluate.DECODINGS.items()
    }
    with gzip.open(results / f"{name}.answers.json.gz", "wt") as file:
        json.dump(given, file)
    return evaluate.score_unit(work, results, name, "development", log)


def fingerprint(model):
    """Returns the checksum of a policy's weights, from the list of checksums that the program writes beside them."""
    sums = dict(reversed(line.split(maxsplit=1)) for line in (model / "SHA256SUMS").read_text().splitlines())
    return sums["model.safetensors"][:16]


def common(work, seed, threads):
    """Returns the settings of every training run."""
    keys = ("rollout.threads", "labeler.threads", "reward.threads", "learner.threads")
    return {"data.path": str(work / "data" / "train.jsonl"), "run.seed": seed, **{key: threads for key in keys}}


def train(work, folder, settings, name, threads):
    """Trains until the run's last step; an interrupted run is resumed from its checkpoint."""
    arguments = ["train", program.config(work), "--run-dir", folder]
    if folder.exists():
        if any(folder.glob("checkpoints/step-*")) or any(folder.glob("fine-tuning/checkpoints/step-*")):
            arguments.append("--resume")
        else:
            shutil.rmtree(folder)
    program.run(arguments, work / "logs" / f"{name}.log", settings, threads)


def samples(work, seed, threads):
    """Returns a sample of the fine-tuned policy for each prompt of the pairs."""
    rows = read(work / "data" / "pairs.jsonl")[:PAIRS]
    write(work / "data" / "paired.jsonl", rows)
    return rows, evaluate.answers(work, start(work, 0, threads), "paired", 0.9, work / "logs" / f"pairs-{seed}.log", seed)


def pair_file(work, kind, threads):
    """Returns the file of pairs that reward models learn from: `people` has hard labels, other kinds are an AI labeler's.

    The pairs are those of `people`, or two samples of the fine-tuned policy in the kinds whose name begins with `own`.
    """
    file = work / "pairs" / f"{kind}.jsonl"
    if file.exists():
        return file
    source = None if kind in ("people", "own") else pair_file(work, "own" if kind.startswith("own") else "people", threads)
    with program.lock(work, f"pairs-{kind}"):
        if file.exists():
            return file
        if kind == "people":
            rows, sampled = samples(work, 0, threads)
            write(file, pairs.make(rows, KINDS, 0, sampled))
        elif kind == "own":
            (rows, first), (_, second) = (samples(work, seed, threads) for seed in (1, 2))
            found = [{"prompt": row["prompt"], "first": a, "second": b} for row, a, b in zip(rows, first, second)]
            write(file, [pair for pair in found if pair["first"].strip() != pair["second"].strip()])
        else:
            partial = file.with_suffix(".partial.jsonl")
            settings = {"labeler.threads": threads, **labelers(work)[kind]()}
            arguments = ["label", program.config(work), "--input", source, "--output", partial]
            program.run(arguments, work / "logs" / f"{kind}.log", settings)
            partial.rename(file)
    return file


def labelers(work):
    """Returns functions that give the settings of the AI labelers of pairs, by their names in `arms.toml`."""
    likelihood = {"labeler.length_normalise": True}
    return {
        "labeled": lambda: likelihood,
        "labeled-given": lambda: {**likelihood, "labeler.unconditional_weight": 0},
        "labeled-by-gemma": lambda: evaluate.gemma_settings(work),
        "own-given": lambda: {**likelihood, "labeler.unconditional_weight": 0},
        "own-encoder": lambda: {**evaluate.encoder_settings(work), "labeler.pair_temperature": 0.1},
    }


def run(work, results, arm, seed, threads):
    """Trains one unit, answers the prompts of all splits, and writes its result with the scores of the development prompts."""
    began, plan, name = time.time(), arms()[arm], f"{arm}-{seed}"
    log, model, path = work / "logs" / f"{name}.log", start(work, seed, threads), []
    begun = fingerprint(model)
    if arm != "sft":
        beginning = model
        folder = work / "runs" / name
        settings = {**common(work, AFTER_FINE_TUNING + seed, threads), "policy.model": str(model), **plan["set"]}
        if settings.get("labeler.model") == "minilm":
            settings |= evaluate.encoder_settings(work)
        if "pairs" in plan:
            settings["reward_model.pairs"] = str(pair_file(work, plan["pairs"], threads))
        train(work, folder, settings, name, threads)
        model, path = max((folder / "checkpoints").glob("step-*")), course(work, folder, log)
        answer_start(work, results, seed, beginning, work / "logs" / f"start-{seed}.log")
    trained = time.time()
    result = {"arm": arm, "seed": seed, "set": plan["set"], "pairs": plan.get("pairs"), "base": program.base(), "start": begun, "path": path}
    if plan.get("answers", True):
        result["development"] = answer(work, results, name, model, log, seed)
    result["minutes"] = {"training": round((trained - began) / 60, 1), "evaluation": round((time.time() - trained) / 60, 1)}
    result_file(results, arm, seed).write_text(json.dumps(result) + "\n")
    if arm != "sft":
        shutil.rmtree(work / "runs" / name, ignore_errors=True)
    return result


RECORDED = {"score": "score/mean", "kl": "kl/mean", "entropy": "entropy/mean", "seconds": "time/step_seconds"}


def course(work, folder, log):
    """Returns the course of a run: for each step the labeler's score, the KL divergence, and the quality of the samples.

    A training prompt is sampled before the policy is trained on it, and each is used once, so that the samples of a step
    measure the policy on prompts that it has not seen.
    """
    references = {row["prompt"]: row["reference"] for row in read(work / "data" / "train.jsonl")}
    samples = read(folder / "samples.jsonl")
    rows = [{"prompt": row["prompt"], "reference": references[row["prompt"]]} for row in samples]
    scored = evaluate.score_rows(work, folder.name, rows, [row["completion"] for row in samples], log, with_text=False)
    metrics = {row["step"]: row for row in read(folder / "metrics.jsonl")}
    steps = []
    for step in sorted({row["step"] for row in samples}):
        found = [score for score, row in zip(scored, samples) if row["step"] == step]
        figures = {"step": step, **evaluate.summary(found)}
        for short, key in RECORDED.items():
            if metrics.get(step, {}).get(key) is not None:
                figures[short] = round(metrics[step][key], 4)
        steps.append(figures)
    return steps
