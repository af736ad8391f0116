"""Latencies in buckets of equal ratio: percentiles, and a picture in text or SVG."""

import math
from collections import Counter
from collections.abc import Mapping

_STEPS_PER_OCTAVE = 16
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
_ROWS = 20
_WIDTH, _HEIGHT, _MARGIN = 720, 360, 48
_COLOURS = ("#2563eb", "#ea580c")
SVG_START = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
"""The first line of every picture, by which one is known."""


class Histogram:
    """Times in buckets, each 4.4 % wider than the one before it; of any number of them in a few kilobytes."""

    def __init__(self) -> None:
        self.count = 0
        self._buckets: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Add a time.

        Args:
            seconds: More than 0; less than a nanosecond counts as that.
        """
        self.count += 1
        self._buckets[round(_STEPS_PER_OCTAVE * math.log2(max(seconds, 1e-9)))] += 1

    def percentiles(self) -> dict[str, float | None]:
        """Return p50, p90, p99 and p99.9 in seconds, within 2.2 %; None where there is no time."""
        return {name: self._percentile(share) for name, share in _PERCENTILES.items()}

    def octaves(self, steps: int) -> dict[int, int]:
        """Return how many times fall into each step.

        Args:
            steps: How many steps there are from a time to its double.

        Returns:
            The counts by the number n of the step, which begins at `2 ** (n / steps)` seconds.
        """
        counts: Counter[int] = Counter()
        for bucket, count in self._buckets.items():
            counts[math.floor(bucket * steps / _STEPS_PER_OCTAVE)] += count
        return dict(counts)

    def _percentile(self, share: float) -> float | None:
        rank = math.ceil(share * self.count)
        for bucket in sorted(self._buckets):
            rank -= self._buckets[bucket]
            if rank <= 0:
                return float(2.0 ** (bucket / _STEPS_PER_OCTAVE))
        return None


def format_seconds(seconds: float | None) -> str:
    """Return a time for people, such as `1.2 ms`.

    Args:
        seconds: The time; None where there is none.
    """
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def draw_text(histogram: Histogram, bar: str, width: int = 50) -> str:
    """Return a picture in text: a line for each range of times, the most frequent one of full width.

    Args:
        histogram: The times.
        bar: The character of the bars.
        width: The width of the longest bar.
    """
    steps = 2
    while steps > 1 and len(histogram.octaves(steps)) > _ROWS:
        steps -= 1
    counts = histogram.octaves(steps)
    lines = []
    for step in range(min(counts), max(counts) + 1) if counts else ():
        count = counts.get(step, 0)
        length = math.ceil(width * count / max(counts.values()))
        lines.append(f"  {format_seconds(2.0 ** (step / steps)):>8} {bar * length} {count:,}")
    return "\n".join(lines)


def draw_svg(title: str, histograms: Mapping[str, Histogram]) -> str:
    """Return a picture as SVG: how many calls took how long, on a scale of equal ratios.

    Args:
        title: What was measured.
        histograms: The times by what took them; at most two.
    """
    from xml.sax.saxutils import escape  # noqa: PLC0415 (only here)

    steps = 4
    counts = {name: histogram.octaves(steps) for name, histogram in histograms.items() if histogram.count}
    every = [step for count in counts.values() for step in count]
    first, last = (min(every), max(every)) if every else (0, 0)
    most = max((count for by_step in counts.values() for count in by_step.values()), default=1)
    slot = (_WIDTH - 2 * _MARGIN) / (last - first + 1)
    bottom = _HEIGHT - _MARGIN
    parts = [
        SVG_START,
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_MARGIN}" y="20" font-size="14">{escape(title)}</text>',
        f'<path d="M{_MARGIN} {bottom}H{_WIDTH - _MARGIN}" stroke="black"/>',
    ]
    for index, (name, by_step) in enumerate(counts.items()):
        width = slot / len(counts)
        colour = _COLOURS[index % len(_COLOURS)]
        for step, count in sorted(by_step.items()):
            height = max(1.0, (bottom - _MARGIN) * count / most)
            x = _MARGIN + (step - first) * slot + index * width
            tip = f"<title>{escape(name)}: {count:,} from {format_seconds(2.0 ** (step / steps))}</title>"
            place = f'x="{x:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" height="{height:.1f}"'
            parts.append(f'<rect {place} fill="{colour}">{tip}</rect>')
        parts.append(f'<text x="{_WIDTH - _MARGIN - 90}" y="{36 + 16 * index}" fill="{colour}">{escape(name)}</text>')
    for step in range(first, last + 1):
        if step % steps == 0:
            x = _MARGIN + (step - first) * slot
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{format_seconds(2.0 ** (step / steps))}</text>'
            )
    parts.append(f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">time of a call</text></svg>')
    return "\n".join(parts) + "\n"
