"""Pairs of summaries whose better one is known: the summary that a person wrote, against one that is worse by construction."""

import math
import random
from collections import Counter, defaultdict

from text import words

KINDS = {
    "swapped": "the summary of another package, chosen at random",
    "near": "the summary of the package with the most similar description",
    "corrupted": "the written summary with one word exchanged for one from the most similar package's summary",
    "shuffled": "the words of the written summary in another order",
    "copy": "as many words from the beginning of the description",
    "sample": "a summary that the fine-tuned policy sampled",
}


def nearest(rows):
    """Returns for each row the index of the other row with the most similar description, by the cosine of TF-IDF."""
    documents = [Counter(words(row["prompt"])) for row in rows]
    frequency = Counter(word for document in documents for word in document)
    weights, postings = [], defaultdict(list)
    for i, document in enumerate(documents):
        raw = {w: n * math.log(len(rows) / frequency[w]) for w, n in document.items() if frequency[w] > 1}
        norm = math.sqrt(sum(value * value for value in raw.values())) or 1.0
        weights.append({w: value / norm for w, value in raw.items()})
        for w, value in weights[-1].items():
            # Words of more than a twentieth of the rows carry little weight and cost most of the time.
            if frequency[w] < max(2, len(rows) // 20):
                postings[w].append((i, value))
    found = []
    for i, row in enumerate(weights):
        scores = defaultdict(float)
        for w, value in row.items():
            for j, other in postings.get(w, ()):
                scores[j] += value * other
        scores.pop(i, None)
        found.append(max(scores, key=lambda j: (scores[j], -j)) if scores else (i + 1) % len(rows))
    return found


def _corrupted(reference, other, text, random_):
    """Exchanges one long word of `reference` for one of `other` that is in neither summary nor text."""
    parts, known = reference.split(), set(words(reference + " " + text))
    places = [i for i, part in enumerate(parts) if len(part) >= 4 and part.isalpha()]
    donors = [part for part in other.split() if len(part) >= 4 and part.isalpha() and part.lower() not in known]
    if not places or not donors:
        return None
    parts[random_.choice(places)] = random_.choice(donors)
    return " ".join(parts)


def worse(kind, i, rows, near, random_):
    """Returns the worse summary of row `i`, or None if there is none of this kind."""
    row, other = rows[i], rows[near[i]]
    reference = row["reference"]
    if kind == "swapped":
        return rows[(i + random_.randrange(1, len(rows))) % len(rows)]["reference"]
    if kind == "near":
        return other["reference"]
    if kind == "corrupted":
        return _corrupted(reference, other["reference"], row["prompt"], random_)
    if kind == "shuffled":
        parts = reference.split()
        random_.shuffle(parts)
        return " ".join(parts) if parts != reference.split() else None
    if kind == "copy":
        return " ".join(row["prompt"].split()[: len(reference.split())])
    raise ValueError(kind)


def make(rows, kinds, seed, samples=None):
    """Returns a pair of each row, of the kinds in turn; a row without a pair of its kind is left out.

    The kind "sample" needs `samples`, one of each row.
    """
    near, random_, pairs = nearest(rows), random.Random(seed), []
    for i, row in enumerate(rows):
        kind = kinds[i % len(kinds)]
        rejected = samples[i] if kind == "sample" else worse(kind, i, rows, near, random_)
        if rejected and rejected.lower() != row["reference"].lower():
            pairs.append({"prompt": row["prompt"], "chosen": row["reference"], "rejected": rejected, "kind": kind})
    return pairs


def against_reference(rows, kind, seed):
    """Returns pairs for a judge that reads the written summary instead of the text.

    The better answer is what a person wrote for another package of the same source; the worse one is the summary of
    another package (`near`), or the better one with a word exchanged (`corrupted`).
    """
    near, random_, found = nearest(rows), random.Random(seed), []
    for i, row in enumerate(rows):
        for other in row["others"][:1]:
            donor = rows[near[i]]["reference"]
            rejected = donor if kind == "near" else _corrupted(other, donor, row["reference"], random_)
            if rejected and rejected != other:
                found.append({"prompt": row["reference"], "chosen": other, "rejected": rejected, "kind": kind})
    return found
