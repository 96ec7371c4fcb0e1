"""Plots as SVG, written by hand so that they need no library."""

import math

COLOURS = ["#1b6ca8", "#d1495b", "#2e8b57", "#8d5a97", "#c98a1b", "#4d4d4d", "#17a2a2", "#a0522d", "#7f9f1f"]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 62, 150, 20, 48
NAMES = {
    "cosine_reference": "cosine to the written summary",
    "rouge_l": "ROUGE-L against the written summary",
    "copied": "share of copied 4-grams",
    "score": "score of the labeler",
}
WINDOW = 5


def _ticks(low, high):
    """Returns about five round numbers between two values."""
    span = max(high - low, 1e-9)
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 6)
    first = math.ceil(low / step)
    return [i * step for i in range(int(first), int(high / step + 1e-9) + 1)]


def _points(steps, key):
    """Returns (KL, value) averaged over windows of steps, in the order of the steps."""
    by_step = {}
    for row in steps:
        if row.get(key) is not None and row.get("kl") is not None:
            by_step.setdefault((row["step"] - 1) // WINDOW, []).append((max(row["kl"], 0.0), row[key]))
    return [tuple(sum(p[i] for p in points) / len(points) for i in (0, 1)) for _, points in sorted(by_step.items())]


def over_kl(series, key):
    """Returns a plot of a measure against the KL divergence from the fine-tuned policy, one line for each arm."""
    lines = {name: _points(steps, key) for name, steps in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    everything = [p for points in lines.values() for p in points] or [(0.0, 0.0), (1.0, 1.0)]
    x1 = max(x for x, _ in everything) * 1.02 or 1.0
    y0, y1 = min(y for _, y in everything), max(y for _, y in everything)
    margin = (y1 - y0) * 0.06 or 0.05
    y0, y1 = y0 - margin, y1 + margin

    def at(x, y):
        return (
            LEFT + x / x1 * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in _ticks(0.0, x1):
        x, _ = at(tick, y0)
        out.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#e5e5e5"/>')
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(y0, y1):
        _, y = at(0, tick)
        out.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e5e5e5"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">KL divergence from the start, nats per summary</text>')
    out.append(f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{NAMES[key]}</text>')
    for i, (name, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = at(*points[-1])
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 12}" y="{TOP + 14 + 18 * i}" fill="{colour}">{name}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
