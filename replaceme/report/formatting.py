"""How the page and the comparison of experiments write figures."""

from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]


def format_number(value: float) -> str:
    """Write a figure with four significant digits, an integer in full."""
    if isinstance(value, int) or 1000 <= abs(value) < 1e7:
        return typeset_minus(f"{value:,.0f}")
    return typeset_minus(f"{value:.4g}")


def format_digits(value: float, count: int) -> str:
    """Write a figure with ``count`` significant digits, trailing zeros included, and one with more integer digits in full."""
    return f"{value:#.{count}g}".rstrip(".") if value < 10**count - 0.5 else f"{value:,.0f}"


def format_with_error(figures: Figures, key: str) -> str:
    """Write a figure with four digits, and two of its error, so that the figures of a column can be compared at a glance."""
    error = figures.get(f"stderr_{key}")
    return format_digits(figures[key], 4) + ("" if error is None else f" ± {format_digits(error, 2)}")


def format_percent(value: float, error: float | None = None, *, scale: float = 100, sign: str = "") -> str:
    """Write a fraction (or, with ``scale`` 1, a percentage) in percent; with ``sign`` "+", a plus before a gain."""
    return typeset_minus(f"{scale * value:{sign}.1f}") + ("" if error is None else f" ± {scale * error:.1f}")


def format_quantity(value: float, unit: str = "") -> str:
    """Write a large figure with a decimal prefix: ``134.5 M``, ``269.1 MB``."""
    power = sum(abs(value) >= 1000**power for power in (1, 2, 3, 4))
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()


def format_duration(seconds: float) -> str:
    """Write a time with three significant digits: ``45.7 ms``, ``9.29 min``."""
    units = (("h", 3600), ("min", 60), ("s", 1))
    unit, length = next((pair for pair in units if seconds >= pair[1]), ("ms", 1e-3))
    return f"{format_digits(seconds / length, 3)} {unit}"


def typeset_minus(text: str) -> str:
    """Write minus signs as such."""
    return text.replace("-", "−")
