"""evaluate: score the pruned model and compare it with the dense one.

Here, and not in ``baseline``, the tasks are compared with the calibration text: all calibrations share a baseline.
"""

from collections.abc import Mapping
from typing import Any

from replaceme.base.documents import TEXT, Documents
from replaceme.base.files import read_json, round_floats, write_json
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.base.ranks import rank
from replaceme.calibration.sources import read_record
from replaceme.evaluation.comparison import compare_scores
from replaceme.evaluation.contamination import CalibrationText
from replaceme.evaluation.continuations import pair_continuations
from replaceme.evaluation.scores import Scores, score_model
from replaceme.models.model import Model
from replaceme.running.stage import SCORING, Stage
from replaceme.running.workspace import Workspace


def evaluate(params: Params, work: Workspace) -> None:
    """Score the pruned model, write metrics/evaluation.json and both models' continuations."""
    pruned = Model(work.model, work.model.name, trust_remote_code=params.trust_remote_code)
    dense = Scores.load(work.baseline)
    text = Documents.load(work.documents)
    if (healed := work.edits / TEXT).is_dir():
        text = Documents([*text.documents, *Documents.load(healed).documents])
    calibration = CalibrationText.of_documents(read_record(work.model), text, pruned.tokenizer())
    scores = score_model(params, pruned, read_json(work.tasks_input), dense, calibration)
    if rank():
        return
    _warn_of_differences(dense.figures, scores.figures)
    comparison = round_floats(compare_scores(dense.figures, scores.figures, dense.items, scores.items))
    write_json(work.metric("evaluation"), comparison)
    write_json(work.continuations, pair_continuations(dense.continuations, scores.continuations))


def _warn_of_differences(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> None:
    """Warn if the two models were scored on different devices, or with different versions of a package."""
    before, now = ({"device": figures["device"], **figures["made_with"]} for figures in (dense, pruned))
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        logger.warning(
            "evaluate: the dense model was scored with %s, the pruned one with %s; that alone changes the last digits",
            *(", ".join(f"{name} {made.get(name, 'none')}" for name in changed) for made in (before, now)),
        )  # fmt: skip


STAGE = Stage(
    name="evaluate",
    run=evaluate,
    params=SCORING,
    reads=(
        Workspace.tasks_input, Workspace.documents, Workspace.edits, Workspace.model, Workspace.baseline,
        Workspace.score_versions,
    ),
    writes=Workspace.continuations,
    shared=lambda params, work: bool(params.tasks),
    metrics=("evaluation",),
)  # fmt: skip
