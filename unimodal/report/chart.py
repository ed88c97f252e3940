"""Loss curves as inline SVG: logarithmic height, a faint line of what was measured under a running mean, a legend."""

import math
from html import escape

Points = list[tuple[int, float]]

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 38
FLOOR = 1e-4  # a loss at or below it is drawn there


def thin(points: Points, count: int = 160) -> list[tuple[float, float]]:
    """At most `count` points: means over equal runs of neighbours, so that a long run stays a small page."""
    size = math.ceil(len(points) / count)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in run) / len(run), sum(v for _, v in run) / len(run)) for run in runs]


def running_mean(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Each height becomes the mean of its neighbours, up to `window` on either side."""
    heights = [value for _, value in points]
    parts = [heights[max(0, i - window) : i + 1 + window] for i in range(len(heights))]
    return [(step, sum(part) / len(part)) for (step, _), part in zip(points, parts)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round heights between low and high: 1, 2, 5 per decade, or the decades alone where those would crowd."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**k for k in decades for digit in (1, 2, 5) if low <= digit * 10.0**k <= high]
    return ticks if len(ticks) <= 6 else [10.0**k for k in decades if low <= 10.0**k <= high]


def step_ticks(last: float) -> list[int]:
    """Zero and about four round steps up to the last."""
    raw = max(last / 4, 1)
    power = 10 ** math.floor(math.log10(raw))
    gap = int(next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw))
    return list(range(0, int(last) + 1, gap))


def loss_chart(title: str, losses: dict[str, Points]) -> str:
    """A `<figure>` with one curve per loss over the training steps.

    Args:
        title: what the figure shows, read out by screen readers.
        losses: name -> (step, value), at least one point in all.
    """
    curves = {name: thin(points) for name, points in losses.items() if points}
    heights = [max(value, FLOOR) for curve in curves.values() for _, value in curve]
    low, high = min(heights) / 1.15, max(heights) * 1.15
    last = max(max(curve[-1][0] for curve in curves.values()), 1)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = math.log(max(value, FLOOR) / low) / math.log(high / low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(points: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)

    parts = []
    for tick in log_ticks(low, high):
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for mark in step_ticks(last):
        anchor = "end" if x(mark) > WIDTH - 2 * RIGHT else "middle"
        parts.append(f'<text x="{x(mark):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{mark:,}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{middle_x}" y="{HEIGHT - 4}" text-anchor="middle">training step</text>')
    parts.append(f'<text transform="translate(11 {middle_y}) rotate(-90)" text-anchor="middle">loss (log)</text>')

    legend = []
    for i, (name, curve) in enumerate(curves.items()):
        smooth = running_mean(curve, len(curve) // 25)
        step, value = smooth[-1]
        parts.append(f'<path class="raw c{i % 6}" d="{path(curve)}"/><path class="curve c{i % 6}" d="{path(smooth)}"/>')
        parts.append(f'<circle class="c{i % 6}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>')
        dash = f'<path class="curve c{i % 6}" d="M1 4H19"/>'
        swatch = f'<svg class="swatch" viewBox="0 0 20 8" aria-hidden="true">{dash}</svg>'
        legend.append(f"<li>{swatch}{escape(name)} <b>{curve[0][1]:.3g} → {value:.3g}</b></li>")
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg><figcaption><ul>{''.join(legend)}</ul></figcaption></figure>"
    )
