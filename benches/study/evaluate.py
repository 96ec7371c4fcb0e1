"""Answers of a policy, and their scores by the judges that labeled for no arm."""

import gzip
import json
import math
from pathlib import Path

import program
import text

# Rows of each split that are answered, and how: (name, split, temperature).
DECODINGS = {
    "development": ("development", 0.0),
    "test": ("test", 0.0),
}


def read(path):
    """Reads a file of JSON lines."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def write(path, rows):
    """Writes a file of JSON lines, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    partial.replace(path)


def answers(work, model, split, temperature, log, seed=0):
    """Returns the policy's answer to each prompt of a split, in the order of the split's file."""
    file = work / "tmp" / f"answers-{log.stem}-{split}-{temperature}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    prompts, tokens = work / "data" / f"{split}.jsonl", program.base()["rollout"]["max_new_tokens"]
    arguments = ["generate", model, "--input", prompts, "--output", file, "--like", program.config(work)]
    arguments += ["--temperature", temperature, "--seed", seed, "--max-new-tokens", tokens]
    program.run(arguments, log)
    given, rows = read(file), read(prompts)
    if [row["prompt"] for row in given] != [row["prompt"] for row in rows]:
        raise program.StudyError(f"{file} does not have the prompts of {prompts}; see {log}")
    return [row["text"].strip() for row in given]


def differences(work, name, pairs, settings, log, temperature=1.0):
    """Returns the judge's score of `first` minus that of `second` for each pair; None where the judge abstained.

    `preceptor label` writes the probability σ(difference / temperature).
    """
    found = [0.0 if pair["first"].strip() == pair["second"].strip() else None for pair in pairs]
    todo = [i for i, pair in enumerate(pairs) if found[i] is None and pair["first"].strip() and pair["second"].strip()]
    source, target = work / "tmp" / f"{name}-pairs.jsonl", work / "tmp" / f"{name}-labels.jsonl"
    target.unlink(missing_ok=True)
    write(source, [pairs[i] for i in todo])
    settings = {"labeler.pair_temperature": temperature, "labeler.cache": str(work / "labels"), **settings}
    program.run(["label", program.config(work), "--input", source, "--output", target], log, settings)
    labels = {(row["prompt"], row["first"], row["second"]): row.get("preference") for row in read(target)}
    for i in todo:
        pair = pairs[i]
        p = labels.get((pair["prompt"], pair["first"], pair["second"]))
        if p is not None:
            p = min(max(p, 1e-15), 1 - 1e-15)
            found[i] = temperature * (math.log(p) - math.log1p(-p))
    return found


def encoder_settings(work):
    """Returns the settings of the labeler that is a sentence encoder."""
    return {"labeler.type": "embedding", "labeler.model": str(program.encoder(work))}


def gemma_settings(work):
    """Returns the settings of the labeler that is Gemma's likelihood per token."""
    return {"labeler.length_normalise": True, "policy.model": str(program.gemma(work))}


def compare_unit(work, results, name, start, decoding, log):
    """Writes Gemma's score of each answer of a unit minus that of its start's answer, and returns the mean."""
    given = []
    for unit in (name, start):
        with gzip.open(results / f"{unit}.answers.json.gz", "rt") as file:
            given.append(json.load(file)[decoding])
    rows = read(work / "data" / f"{DECODINGS[decoding][0]}.jsonl")
    pairs = [{"prompt": row["prompt"], "first": a, "second": b} for row, a, b in zip(rows, *given)]
    # The probabilities of a low temperature round to 0 and 1, from which no difference can be read.
    found = differences(work, f"{name}-{decoding}-gemma", pairs, gemma_settings(work), log, 20.0)
    with gzip.open(results / f"{name}.gemma-{decoding}.json.gz", "wt") as file:
        json.dump([None if d is None else round(d, 4) for d in found], file)
    return mean(found)


def cosines(work, name, prompts, given, anchors, log):
    """Returns the cosine of each answer to its prompt. The anchor of a prompt is the prompt itself, whose cosine is 1."""
    pairs = [{"prompt": p, "first": a, "second": b} for p, a, b in zip(prompts, given, anchors)]
    found = differences(work, name, pairs, encoder_settings(work), log)
    return [None if d is None else 1.0 + d for d in found]


def score_rows(work, name, rows, given, log, with_text=True):
    """Returns the scores of an answer to each row; the cosine to the text, which takes longest, only `with_text`."""
    references, texts = [row["reference"] for row in rows], [row["prompt"] for row in rows]
    to_reference = cosines(work, f"{name}-reference", references, given, references, log)
    to_text = cosines(work, f"{name}-text", texts, given, texts, log) if with_text else None
    scored = []
    for i, (row, answer) in enumerate(zip(rows, given)):
        scores = {
            "rouge_l": text.rouge_l(answer, row["reference"]),
            "chrf": text.chrf(answer, row["reference"]),
            "cosine_reference": to_reference[i] if to_reference[i] is not None else 0.0,
            "words": len(text.words(answer)),
            "copied": text.copied(answer, row["prompt"]),
            "repeated": text.repeated(answer),
        }
        if to_text is not None:
            scores["cosine_text"] = to_text[i] if to_text[i] is not None else 0.0
        scored.append(scores)
    return scored


def score_unit(work, results, name, decoding, log):
    """Scores a unit's answers of one kind, writes the scores beside them, and returns their means."""
    with gzip.open(results / f"{name}.answers.json.gz", "rt") as file:
        given = json.load(file)[decoding]
    rows = read(work / "data" / f"{DECODINGS[decoding][0]}.jsonl")
    scored = score_rows(work, f"{Path(name).name}-{decoding}", rows, given, log)
    columns = {key: [None if row[key] is None else round(row[key], 4) for row in scored] for key in scored[0]}
    target = results / f"{name}.scores-{decoding}.json.gz"
    partial = target.with_name(target.name + ".partial")
    with gzip.open(partial, "wt") as file:
        json.dump(columns, file)
    partial.replace(target)
    return summary(scored)


def mean(values):
    """Returns mean and half of the 95 % interval (normal approximation) of the values that are there."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    average = sum(values) / len(values)
    variance = sum((value - average) ** 2 for value in values) / (len(values) - 1)
    return average, 1.96 * math.sqrt(variance / len(values))


def summary(scored):
    """Returns the mean of each score."""
    return {key: round(mean([row[key] for row in scored])[0], 4) for key in scored[0]}
