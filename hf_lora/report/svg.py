"""Small pictures as SVG in the page's own colours: curves with axes."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 48
_MOST_POINTS = 400

Curve = tuple[str, str, Sequence[tuple[float, float]]]
"""A title, a class for the style, and points (x, y)."""


def curves(
    found: Sequence[Curve],
    *,
    x: str,
    y: str,
    title: str,
    bottom: float | None = None,
    top: float | None = None,
    whole: bool = False,
) -> str:
    """Return curves in one picture.

    Args:
        found: The curves.
        x: What stands below.
        y: What stands beside.
        title: For who does not see it.
        bottom: Where the axis beside begins; else below the lowest point.
        top: Likewise.
        whole: Whether below stand whole numbers alone.
    """
    points = [p for _, _, curve in found for p in curve if all(map(math.isfinite, p))]
    if not points:
        return ""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, right = min(xs), max(xs)
    low = min(ys) if bottom is None else bottom
    high = max(ys) if top is None else top
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - left) / ((right - left) or 1.0)
        up = (point[1] - low) / ((high - low) or 1.0)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}">'
    ]
    for tick in ticks:
        _, at = place((left, tick))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" class="end">{tick:.4g}</text>')
    across = _ticks(left, right, most=6)
    if whole:
        across = sorted({float(round(tick)) for tick in across})
    for tick in across:
        if left <= tick <= right:
            at, _ = place((tick, low))
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 26}" class="mid">{tick:.6g}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" class="end">{escape(x)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_TOP - 12}" class="start">{escape(y)}</text>')
    for name, style, curve in found:
        kept = [p for p in _thinned(curve) if all(map(math.isfinite, p))]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(place, kept))
        parts.append(
            f'<polyline class="{style}" points="{line}"><title>{escape(name)}</title></polyline>'
        )
        if "dots" in style:
            parts += [
                f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="3.5"/>'
                for px, py in map(place, kept)
            ]
    return "".join([*parts, "</svg>"])


def _thinned(curve: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    step = max(1, len(curve) // _MOST_POINTS)
    return [*curve[::step], curve[-1]] if step > 1 else curve


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from one end to the other."""
    span = (high - low) or abs(high) or 1.0
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.floor(low / step) * step
    return [first + i * step for i in range(math.ceil((high - first) / step - 1e-9) + 1)]
