"""Curves of a training: one table (step, figure) each, in DVCLive's format, extended while the training runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from replaceme.base.files import round_floats

# The loss of a step's batch, and that of the held-out documents.
CURVES = ("loss", "held_out_loss")
Rows = Mapping[str, Sequence[tuple[int, float]]]


def write_curves(folder: Path, rows: Rows) -> None:
    """Write ``NAME.tsv`` for each curve, with the rows so far."""
    for name in CURVES:
        (folder / f"{name}.tsv").write_text(f"step\t{name}\n", encoding="utf-8")
        for step, value in rows.get(name, ()):
            add_row(folder, name, step, value)


def add_row(folder: Path, name: str, step: int, value: float) -> None:
    """Append a row to a curve."""
    with (folder / f"{name}.tsv").open("a", encoding="utf-8") as table:
        table.write(f"{step}\t{round_floats(value, 9)}\n")
