"""profile: measure the distances between all pairs of layers, and the influence and norms of each layer."""

from collections.abc import Mapping
from typing import Any

from replaceme.base.documents import Documents
from replaceme.base.files import new_folder, round_floats, write_json, write_text
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
        write_text(folder / "distances.csv", _format_pairs(content))
        write_text(folder / "layers.csv", _format_layers(content["layers"]))
    figures = content["layers"]
    loudest = max(range(len(figures["max_norm"])), key=figures["max_norm"].__getitem__)
    logger.info(
        "profile: %d layers; the output of layer %d has the largest token norm, %.0f (mean %.0f)",
        len(figures["max_norm"]), loudest, figures["max_norm"][loudest], figures["mean_norm"][loudest],
    )  # fmt: skip


def _format_pairs(content: Mapping[str, Any]) -> str:
    distances, residuals = content["angular_distance"], content["residual"]
    rows = [
        f"{layer},{last + 1},{last - layer},{round_floats(distances[layer][last])},{round_floats(residuals[layer][last])}"
        for layer in range(len(distances))
        for last in range(layer + 1, len(distances))
    ]
    return "\n".join(["host,end,layers_to_skip,angular_distance,residual", *rows]) + "\n"


def _format_layers(figures: dict[str, list[float]]) -> str:
    rows = [
        ",".join(map(str, [layer, *(round_floats(figures[name][layer]) for name in sorted(figures))]))
        for layer in range(len(figures["max_norm"]))
    ]
    return "\n".join([",".join(["layer", *sorted(figures)]), *rows]) + "\n"


STAGE = Stage(
    name="profile",
    run=profile,
    params=PASS,
    reads=(Workspace.model_input, Workspace.documents, Workspace.model_versions),
    writes=Workspace.profile,
    shared=lambda params, work: True,
)  # fmt: skip
