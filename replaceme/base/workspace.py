"""Where each stage's results lie: the same names below any root, for the pipeline and for the console scripts."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Paths of one run.

    Attributes:
        root: folder that holds ``artifacts`` and ``metrics``.
        save_path: where the pruned model goes; None is ``artifacts/model``.
    """

    root: Path = Path()
    save_path: Path | None = None

    def artifact(self, name: str) -> Path:
        """Return the path of a stage's output."""
        return self.root / "artifacts" / name

    def metric(self, name: str) -> Path:
        """Return the path of a metrics file."""
        return self.root / "metrics" / f"{name}.json"

    def cost(self, name: str) -> Path:
        """Return the path of what a stage of the compression cost."""
        return self.artifact("cost") / f"{name}.json"

    @property
    def model_input(self) -> Path:
        """Fingerprint of the dense model's weights and config."""
        return self.artifact("inputs") / "model.json"

    @property
    def tokenizer_input(self) -> Path:
        """Fingerprint of the tokenizer, the chat template and the generation config."""
        return self.artifact("inputs") / "tokenizer.json"

    @property
    def card_input(self) -> Path:
        """Fingerprint of the dense model's card and licence."""
        return self.artifact("inputs") / "card.json"

    @property
    def dataset_input(self) -> Path:
        """Fingerprint of the calibration text."""
        return self.artifact("inputs") / "dataset.json"

    @property
    def tasks_input(self) -> Path:
        """Fingerprint of the evaluation text."""
        return self.artifact("inputs") / "tasks.json"

    @property
    def documents(self) -> Path:
        """Calibration documents (folder)."""
        return self.artifact("documents")

    @property
    def profile(self) -> Path:
        """Distances and per-layer figures (folder)."""
        return self.artifact("profile")

    @property
    def blocks(self) -> Path:
        """The blocks to remove."""
        return self.artifact("blocks.json")

    @property
    def plan(self) -> Path:
        """The blocks to remove and the statistics to take."""
        return self.artifact("plan.json")

    @property
    def statistics(self) -> Path:
        """Activation statistics (folder)."""
        return self.artifact("statistics")

    @property
    def solution(self) -> Path:
        """Edits as solved (folder)."""
        return self.artifact("solution")

    @property
    def repaired(self) -> Path:
        """Edits as repaired (folder)."""
        return self.artifact("repaired")

    @property
    def edits(self) -> Path:
        """Edits as healed, the final ones (folder)."""
        return self.artifact("edits")

    @property
    def model(self) -> Path:
        """The pruned model (folder)."""
        return self.save_path or self.artifact("model")

    @property
    def baseline(self) -> Path:
        """Scores of the dense model, and the requests that were scored (folder)."""
        return self.artifact("baseline")

    @property
    def speed(self) -> Path:
        """Measured times, and the page with them (folder); no stage's output."""
        return self.artifact("speed")

    @property
    def report(self) -> Path:
        """The page and its pictures (folder)."""
        return self.artifact("report")
