"""Measures of a summary against its text and against the summary that a person wrote."""

import re
from collections import Counter


def words(text):
    """Returns the words and numbers of a text in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(answer, reference):
    """Returns the F-measure of the longest common subsequence of words (ROUGE-L, Lin 2004)."""
    a, b = words(answer), words(reference)
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    common = row[-1]
    return 2 * common / (len(a) + len(b))


def chrf(answer, reference, order=6, beta=2.0):
    """Returns chrF (Popović 2015): the F-measure of character n-grams, without spaces, averaged over n = 1 … 6."""
    a, b = re.sub(r"\s", "", answer), re.sub(r"\s", "", reference)
    precisions, recalls = [], []
    for n in range(1, order + 1):
        left = Counter(a[i : i + n] for i in range(len(a) - n + 1))
        right = Counter(b[i : i + n] for i in range(len(b) - n + 1))
        if not left or not right:
            continue
        common = sum((left & right).values())
        precisions.append(common / sum(left.values()))
        recalls.append(common / sum(right.values()))
    if not precisions:
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0.0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def copied(answer, text, n=4):
    """Returns the share of the answer's word n-grams that occur in the text; None if the answer has fewer words."""
    a, b = words(answer), words(text)
    grams = [tuple(a[i : i + n]) for i in range(len(a) - n + 1)]
    if not grams:
        return None
    present = {tuple(b[i : i + n]) for i in range(len(b) - n + 1)}
    return sum(gram in present for gram in grams) / len(grams)


def repeated(answer):
    """Returns the share of the answer's words that occurred in it before."""
    a = words(answer)
    return 1.0 - len(set(a)) / len(a) if a else 0.0
