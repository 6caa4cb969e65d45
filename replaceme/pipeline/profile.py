"""profile: measure the distances between all pairs of layers, and the influence and norms of each layer."""

from collections.abc import Mapping
from typing import Any

from replaceme.base.documents import Documents
from replaceme.base.files import new_folder, write_json, write_table
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.base.ranks import rank
from replaceme.models.devices import use_processor
from replaceme.models.dtypes import working_dtype
from replaceme.models.find import calibration_context, recorded_model
from replaceme.models.memory import choose_processor, load_within_budget
from replaceme.running.stage import PASS, Stage
from replaceme.running.workspace import Workspace
from replaceme.statistics.profile import profile_model
from replaceme.statistics.proof import prove


def profile(params: Params, work: Workspace) -> None:
    """Profile the model and write ``profile.json``, ``distances.csv`` and ``layers.csv``."""
    use_processor(params.threads)
    source = recorded_model(params, work.model_input)
    if (family := source.family()).detected:
        checked = load_within_budget(source, choose_processor(params), working_dtype(source))
        prove(checked, family, Documents.load(work.documents))
        del checked
    work.profile.parent.mkdir(parents=True, exist_ok=True)
    content = profile_model(calibration_context(params, work))
    if rank():
        return
    with new_folder(work.profile) as folder:
        write_json(folder / "profile.json", content)
        head = ("host", "end", "layers_to_skip", "angular_distance", "residual")
        write_table(folder / "distances.csv", head, _list_pairs(content))
        figures = dict(sorted(content["layers"].items()))
        rows = ((layer, *row) for layer, row in enumerate(zip(*figures.values(), strict=True)))
        write_table(folder / "layers.csv", ("layer", *figures), rows)
    loudest = max(range(len(figures["max_norm"])), key=figures["max_norm"].__getitem__)
    logger.info(
        "profile: %d layers; the output of layer %d has the largest token norm, %.0f (mean %.0f)",
        len(figures["max_norm"]), loudest, figures["max_norm"][loudest], figures["mean_norm"][loudest],
    )  # fmt: skip


def _list_pairs(content: Mapping[str, Any]) -> list[tuple[int, int, int, float, float]]:
    """Return a row for each layer before a cut and the end of its block: both, their distance in layers, and the figures."""
    distances, residuals = content["angular_distance"], content["residual"]
    return [
        (layer, last + 1, last - layer, distances[layer][last], residuals[layer][last])
        for layer in range(len(distances))
        for last in range(layer + 1, len(distances))
    ]


STAGE = Stage(
    name="profile",
    run=profile,
    params=PASS,
    reads=(Workspace.model_input, Workspace.documents, Workspace.model_versions),
    writes=Workspace.profile,
    shared=lambda params, work: True,
)  # fmt: skip
