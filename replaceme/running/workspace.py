"""Paths of a run: the same names below any root, with and without DVC; and which files at the place of a result are ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import overload

from replaceme.base.errors import ResourceError
from replaceme.base.files import PARTIAL, read_json, write_json
from replaceme.base.fingerprints import sha256_below


@dataclass(frozen=True)
class Artifact:
    """What a stage writes, by its place below ``artifacts``."""

    place: str


class _At:
    """Attribute of ``Workspace``: ``Workspace.documents`` is the artifact, ``work.documents`` its path."""

    def __init__(self, place: str):
        self.artifact = Artifact(place)

    @overload
    def __get__(self, work: None, owner: type) -> Artifact: ...
    @overload
    def __get__(self, work: Workspace, owner: type) -> Path: ...
    def __get__(self, work: Workspace | None, owner: type) -> Artifact | Path:
        return self.artifact if work is None else work.path(self.artifact)


@dataclass(frozen=True)
class Workspace:
    """Paths of one run.

    Attributes:
        root: folder that holds ``artifacts`` and ``metrics``.
        save_path: where the pruned model goes; None is ``artifacts/model``.
    """

    root: Path = Path()
    save_path: Path | None = None

    # What is read from outside (folder). Fingerprints of the dense model's weights, config and code; of the tokenizer, the chat
    # template and the generation config; of the dense model's card and licence; of the calibration text; and of the evaluation
    # text.
    inputs = _At("inputs")
    model_input = _At("inputs/model.json")
    tokenizer_input = _At("inputs/tokenizer.json")
    card_input = _At("inputs/card.json")
    dataset_input = _At("inputs/dataset.json")
    tasks_input = _At("inputs/tasks.json")
    # Versions of the packages that read text, that compute the model, and that score it (``replaceme.running.versions``).
    text_versions = _At("inputs/text_versions.json")
    model_versions = _At("inputs/model_versions.json")
    score_versions = _At("inputs/score_versions.json")
    # How much text the dense model writes itself; and what it wrote (folder).
    own_text_input = _At("inputs/own_text.json")
    own_text = _At("own_text")
    # Calibration documents (folder).
    documents = _At("documents")
    # Distances and per-layer figures (folder).
    profile = _At("profile")
    # The blocks to remove; and with them the statistics to take.
    blocks = _At("blocks.json")
    plan = _At("plan.json")
    # Activation statistics (folder).
    statistics = _At("statistics")
    # Edits as solved, as repaired, and as healed, which are the final ones (folders).
    solution = _At("solution")
    repaired = _At("repaired")
    edits = _At("edits")
    # The pruned model (folder).
    model = _At("model")
    # Scores of the dense model, and the requests that were scored (folder).
    baseline = _At("baseline")
    # How both models go on after a few prompts.
    continuations = _At("continuations.json")
    # The page and its pictures (folder).
    report = _At("report")
    # Measured times, and the page with them (folder); no stage's output.
    speed = _At("speed")

    @classmethod
    def beside(cls, save_path: Path) -> Workspace:
        """Return the paths of a run without DVC, whose work folder lies beside its result."""
        return cls(save_path.with_name(f"{save_path.name}.work"), save_path)

    def path(self, artifact: Artifact) -> Path:
        """Return the path of an artifact."""
        if artifact == Workspace.model and self.save_path:
            return self.save_path
        return self.artifact(artifact.place)

    def artifact(self, place: str) -> Path:
        """Return the path of a place below ``artifacts``."""
        return self.root / "artifacts" / place

    def unfinished(self, name: str) -> Path:
        """Return the folder of what a stage keeps while it runs, to go on there if interrupted."""
        return self.artifact(f"{name}{PARTIAL}")

    def metric(self, name: str) -> Path:
        """Return the path of a metrics file."""
        return self.root / "metrics" / f"{name}.json"

    def record(self, stage: str) -> Path:
        """Return the path of what a run without DVC records of a finished stage."""
        return self.root / "stages" / f"{stage}.json"

    def claim(self, sums: Iterable[str]) -> None:
        """Record the sums (sha256) of files that are about to get their place in ``save_path``: they are this program's.

        They are recorded before, so that a run that is killed meanwhile knows its own files. The pipeline's place is DVC's.
        """
        if self.save_path:
            write_json(self._claims, sorted({*self._claimed(), *sums}))

    def foreign_file(self) -> str | None:
        """Return a file below ``save_path`` that this program did not write, or that was changed since; None without one."""
        claimed = self._claimed()
        links = (path.relative_to(self.model).as_posix() for path in self.model.rglob("*") if path.is_symlink())
        changed = (name for name, digest in sha256_below(self.model).items() if digest not in claimed)
        return next(chain(links, changed), None)

    @property
    def _claims(self) -> Path:
        return self.root / "claims.json"

    def _claimed(self) -> set[str]:
        try:
            return {*read_json(self._claims)}
        except (ResourceError, ValueError):  # there is none, or a crash of the machine has damaged it
            return set()
