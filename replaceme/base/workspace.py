"""Paths of a run: the same names below any root, for the pipeline and for the console scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import overload

from replaceme.base.files import PARTIAL


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

    # Fingerprints of the dense model's weights, config and code; of the tokenizer, the chat template and the generation config;
    # of the dense model's card and licence; of the calibration text; and of the evaluation text.
    model_input = _At("inputs/model.json")
    tokenizer_input = _At("inputs/tokenizer.json")
    card_input = _At("inputs/card.json")
    dataset_input = _At("inputs/dataset.json")
    tasks_input = _At("inputs/tasks.json")
    # Versions of the packages that read text, that compute the model, and that score it (``replaceme.base.versions``).
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
        """Return the paths of a console script's run, whose work folder lies beside its result."""
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

    def cost(self, name: str) -> Path:
        """Return the path of the file with the cost of a console script's step."""
        return self.artifact("cost") / f"{name}.json"
