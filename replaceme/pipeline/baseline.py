"""baseline: score the dense model, once for all experiments."""

from replaceme.base.files import new_folder, read_json
from replaceme.base.parameters import Params
from replaceme.base.ranks import rank
from replaceme.evaluation.scores import score_model
from replaceme.models.find import recorded_model
from replaceme.running.stage import SCORING, Stage
from replaceme.running.workspace import Workspace


def score_baseline(params: Params, work: Workspace) -> None:
    """Score the dense model, and write the scores."""
    model = recorded_model(params, work.model_input)
    scores = score_model(params, model, read_json(work.tasks_input), is_dense=True)
    if rank():
        return
    with new_folder(work.baseline) as folder:
        scores.save(folder)


STAGE = Stage(
    name="baseline",
    run=score_baseline,
    params=SCORING,
    reads=(Workspace.model_input, Workspace.tokenizer_input, Workspace.tasks_input, Workspace.score_versions),
    writes=Workspace.baseline,
    shared=lambda params, work: bool(params.tasks),
)
