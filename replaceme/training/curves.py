"""The curves of a training: a table (step, figure) each, that grows while it runs. The form is DVCLive's."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from replaceme.base.files import rounded

# Of a step's batch, and of the documents that are held out.
CURVES = ("loss", "held_out_loss")
Rows = Mapping[str, Sequence[tuple[int, float]]]


def write_curves(folder: Path, rows: Rows) -> None:
    """Write ``NAME.tsv`` for each curve, with what there is of it."""
    for name in CURVES:
        (folder / f"{name}.tsv").write_text(f"step\t{name}\n", encoding="utf-8")
        for step, value in rows.get(name, ()):
            add_row(folder, name, step, value)


def add_row(folder: Path, name: str, step: int, value: float) -> None:
    """Add a row to a curve."""
    with (folder / f"{name}.tsv").open("a", encoding="utf-8") as table:
        table.write(f"{step}\t{rounded(value, 9)}\n")
