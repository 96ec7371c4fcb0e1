"""Win rates, paired differences, and their 95 % intervals over seeds and prompts."""

import numpy

RESAMPLES = 1000


def length_controlled(outcomes, ratios, weights):
    """Returns the win rate at equal lengths: a logistic regression of the outcome on the logarithm of the length ratio.

    `outcomes` are 1, ½ or 0, `ratios` the logarithms of (words of A / words of B), `weights` the counts of a resample.
    A penalty of half a count on each coefficient keeps the fit finite where all outcomes are equal.
    """
    design = numpy.stack([numpy.ones_like(ratios), ratios], axis=1)
    coefficients = numpy.zeros(2)
    for _ in range(25):
        p = 1.0 / (1.0 + numpy.exp(-(design @ coefficients)))
        gradient = design.T @ (weights * (outcomes - p)) - coefficients * 0.5
        hessian = (design * (weights * p * (1 - p))[:, None]).T @ design + numpy.eye(2) * 0.5
        step = numpy.linalg.solve(hessian, gradient)
        coefficients += step
        if numpy.abs(step).max() < 1e-8:
            break
    return 1.0 / (1.0 + numpy.exp(-coefficients[0]))


def resamples(seeds, prompts, generator):
    """Yields weights of shape (seeds, prompts): seeds and prompts are drawn with replacement, independently."""
    for _ in range(RESAMPLES):
        over_seeds = numpy.bincount(generator.integers(seeds, size=seeds), minlength=seeds)
        over_prompts = numpy.bincount(generator.integers(prompts, size=prompts), minlength=prompts)
        yield numpy.outer(over_seeds, over_prompts).astype(float)


def _interval(values):
    return float(numpy.quantile(values, 0.025)), float(numpy.quantile(values, 0.975))


def difference(a, b):
    """Returns mean and interval of `a - b`; both have the shape (seeds, prompts)."""
    d, generator = numpy.asarray(a) - numpy.asarray(b), numpy.random.default_rng(0)
    samples = [float((w * d).sum() / w.sum()) for w in resamples(*d.shape, generator)]
    return float(d.mean()), _interval(samples)


def average(a):
    """Returns mean and interval of `a`, of shape (seeds, prompts)."""
    return difference(a, numpy.zeros_like(numpy.asarray(a, dtype=float)))


def win_rate(a, b, words_a, words_b):
    """Returns the length-controlled win rate and the raw one, each with its interval.

    `a` and `b` are the judge's scores of the answers, and `words_*` their lengths; all of shape (seeds, prompts).
    """
    a, b = numpy.asarray(a, dtype=float), numpy.asarray(b, dtype=float)
    outcomes = numpy.where(numpy.abs(a - b) < 1e-6, 0.5, (a > b).astype(float))
    ratios = numpy.log(numpy.maximum(numpy.asarray(words_a, dtype=float), 1)) - numpy.log(
        numpy.maximum(numpy.asarray(words_b, dtype=float), 1)
    )
    flat = outcomes.ravel(), ratios.ravel()
    controlled, raw = [], []
    for w in resamples(*outcomes.shape, numpy.random.default_rng(0)):
        controlled.append(length_controlled(*flat, w.ravel()))
        raw.append(float((w * outcomes).sum() / w.sum()))
    ones = numpy.ones(outcomes.size)
    return {
        "controlled": (float(length_controlled(*flat, ones)), _interval(controlled)),
        "raw": (float(outcomes.mean()), _interval(raw)),
        "ties": float((outcomes == 0.5).mean()),
    }
