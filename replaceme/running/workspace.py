"""Paths of a run: the same names below any root, with and without DVC; and which files of a result this program wrote."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import overload

from replaceme.base.errors import ResourceError
from replaceme.base.files import PARTIAL, read_json, write_json
from replaceme.base.fingerprints import sha256_below


class _Artifact:
    """A file or folder that a stage writes: ``Workspace.plan`` is its path below ``artifacts``, ``work.plan`` its path."""

    def __init__(self, name: str):
        self.name = name

    @overload
    def __get__(self, work: None, owner: type) -> str: ...
    @overload
    def __get__(self, work: Workspace, owner: type) -> Path: ...
    def __get__(self, work: Workspace | None, owner: type) -> str | Path:
        return self.name if work is None else work.artifact(self.name)


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
    # template and the generation config; of the dense model's card and licence; of the text of calibration and healing; and of
    # the evaluation text.
    inputs = _Artifact("inputs")
    model_input = _Artifact("inputs/model.json")
    tokenizer_input = _Artifact("inputs/tokenizer.json")
    card_input = _Artifact("inputs/card.json")
    dataset_input = _Artifact("inputs/dataset.json")
    heal_dataset_input = _Artifact("inputs/heal_dataset.json")
    tasks_input = _Artifact("inputs/tasks.json")
    # Versions of the packages that read text, that compute the model, and that score it (``replaceme.running.versions``).
    text_versions = _Artifact("inputs/text_versions.json")
    model_versions = _Artifact("inputs/model_versions.json")
    score_versions = _Artifact("inputs/score_versions.json")
    # How much text the dense model writes itself; and what it wrote (folder).
    own_text_input = _Artifact("inputs/own_text.json")
    own_text = _Artifact("own_text")
    # Calibration documents (folder).
    documents = _Artifact("documents")
    # Distances and per-layer figures (folder).
    profile = _Artifact("profile")
    # The blocks to remove; and with them the statistics to take.
    blocks = _Artifact("blocks.json")
    plan = _Artifact("plan.json")
    # Activation statistics (folder).
    statistics = _Artifact("statistics")
    # Edits as solved, as repaired, as healed, and the final ones (folders).
    solution = _Artifact("solution")
    repaired = _Artifact("repaired")
    healed = _Artifact("healed")
    edits = _Artifact("edits")
    # The pruned model (folder).
    model = _Artifact("model")
    # Scores of the dense model, and the requests that were scored (folder).
    baseline = _Artifact("baseline")
    # How both models go on after a few prompts.
    continuations = _Artifact("continuations.json")
    # The page and its pictures (folder).
    report = _Artifact("report")
    # Measured times, and the page with them (folder); no stage's output.
    speed = _Artifact("speed")

    @classmethod
    def for_result(cls, save_path: Path) -> Workspace:
        """Return the paths of a run without DVC, whose work folder lies next to its result."""
        return cls(save_path.with_name(f"{save_path.name}.work"), save_path)

    def artifact(self, name: str) -> Path:
        """Return the path of what is ``name`` below ``artifacts``."""
        return self.save_path if name == Workspace.model and self.save_path else self.root / "artifacts" / name

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints of the stage that runs; it is deleted once all that the stage writes is there."""
        return self.artifact(f"checkpoints{PARTIAL}")

    @property
    def heal_checkpoints(self) -> Path:
        """The folder of the checkpoints of the healing; it stays, so that a longer one goes on from there."""
        return self.artifact("heal_checkpoints")

    def metric(self, name: str) -> Path:
        """Return the path of a metrics file."""
        return self.root / "metrics" / f"{name}.json"

    def record(self, stage: str) -> Path:
        """Return the path of what a run without DVC records of a finished stage."""
        return self.root / "stages" / f"{stage}.json"

    def record_own_files(self, path: Path) -> None:
        """Record the sums (sha256) of a file or folder that is about to be moved to ``save_path``: this program wrote it.

        They are recorded before the move, so that the next run knows the files if this one is killed. In the pipeline, DVC
        knows them.
        """
        if self.save_path:
            write_json(self._own_files, sorted({*self._read_own_files(), *sha256_below(path).values()}))

    def find_foreign_file(self) -> str | None:
        """Return a file below ``save_path`` that this program did not write, or that was changed since; None without one."""
        own = self._read_own_files()
        links = (path.relative_to(self.model).as_posix() for path in self.model.rglob("*") if path.is_symlink())
        changed = (name for name, digest in sha256_below(self.model).items() if digest not in own)
        return next(chain(links, changed), None)

    @property
    def _own_files(self) -> Path:
        return self.root / "claims.json"

    def _read_own_files(self) -> set[str]:
        try:
            return {*read_json(self._own_files)}
        except (ResourceError, ValueError):  # there is none, or a crash of the machine has damaged it
            return set()
