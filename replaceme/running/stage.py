"""A stage of the pipeline: its function and what its output depends on; and its run by DVC.

Each file of ``replaceme.pipeline`` declares one stage. ``tests/pipeline`` checks them against dvc.yaml.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from replaceme.base.combinations import Methods
from replaceme.base.errors import ParameterError, is_out_of_device_memory
from replaceme.base.files import clear_partials, read_json
from replaceme.base.parameters import Params, read_params
from replaceme.base.progress import logger
from replaceme.base.ranks import launched_processes, world_size
from replaceme.running.cost import cost_measurement, keep_cost
from replaceme.running.entry import PARAMS_FILE, run
from replaceme.running.processes import call_in_all, run_in_processes
from replaceme.running.versions import FORMAT
from replaceme.running.workspace import Workspace

# The order of the stages, after ``inputs``: from the text to the profile, to the final edits, and to the saved model.
ANALYSIS = ("generate", "calibrate", "profile")
FIT = (*ANALYSIS, "select", "plan", "activations", "solve", "repair", "heal", "check")
COMPRESSION = (*FIT, "export")
# Judging the result is no part of the compression: it costs the same for every method.
JUDGEMENT = ("baseline", "evaluate", "report")
ORDER = (*COMPRESSION, *JUDGEMENT)

# Parameters of every pass over the calibration text; those that determine a model's scores; and those of every evaluation.
PASS = ("batch_size", "dtype", "device", "device_map", "threads", "use_4bit", "trust_remote_code")
SCORE_SETTINGS = ("tasks", "eval_tokens", "eval_batch_size", "eval_dtype")
SCORING = (*SCORE_SETTINGS, "device", "device_map", "threads", "trust_remote_code")

# What a GPU's memory can be too small for; the results depend on it by the order of sums only. And the largest ones that fitted
# where others did not, so that later stages of the process begin with them.
BATCH_SIZES = ("batch_size", "eval_batch_size")
_largest_batches: dict[str, int] = {}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        name: as in dvc.yaml.
        run: the function that reads artifacts, computes and writes artifacts.
        params: the parameters that its output depends on.
        reads: the artifacts that it reads, by their paths below ``artifacts``, as ``Workspace.plan``.
        writes: the artifact that it writes, in the same way; None if it writes only metrics.
        metrics: the metrics files that it writes.
        figures: the metrics files that it reads.
        methods: the methods that ``method`` may name; None for a stage that uses no method.
        shared: whether several processes share its passes, given what it reads; if not, one does them.
        always: whether it runs even if nothing that it depends on changed.
    """

    name: str
    run: Callable[[Params, Workspace], None]
    params: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: str | None = None
    metrics: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    methods: Methods | None = None
    shared: Callable[[Params, Workspace], bool] = lambda params, work: False
    always: bool = False


def call_stage(stage: Stage, params: Params, work: Workspace) -> None:
    """Run a stage, in all processes if they can share it, with the number formats that the inputs stage chose for auto."""
    recorded = {"dtype": work.model_versions, "eval_dtype": work.score_versions}
    automatic = [key for key in recorded if key in stage.params and getattr(params, key) == "auto"]
    params = params.model_copy(update={key: read_json(recorded[key])[FORMAT] for key in automatic})
    if world_size() == 1:
        _run_in_memory(stage, params, work)
    elif not stage.shared(params, work):
        stage.run(params, work)
    else:
        logger.info("%s: shared by %d processes", stage.name, world_size())
        call_in_all(stage.run, params, work)


def _run_in_memory(stage: Stage, params: Params, work: Workspace) -> None:
    """Run a stage; where a GPU's memory runs out, again with half as many documents in a batch, down to one.

    Processes that share a stage can't: the others would wait for the one that failed.
    """
    params = params.model_copy(update={key: min(size, getattr(params, key)) for key, size in _largest_batches.items()})
    try:
        stage.run(params, work)
        return
    except Exception as failure:
        halves = {key: size // 2 for key in BATCH_SIZES if key in stage.params and (size := getattr(params, key)) > 1}
        if not halves or not is_out_of_device_memory(failure):
            raise
    # Only here, after the handler, does nothing hold the tensors of the run that failed.
    _largest_batches.update(halves)
    for key, size in halves.items():
        logger.warning("%s: %d does not fit the GPU's memory; %s goes on with %d", key, getattr(params, key), stage.name, size)
    gc.collect()
    _run_in_memory(stage, params, work)


def run_stage(stage: Stage) -> NoReturn:
    """Run a stage on params.yaml in the current folder, as DVC does, and exit."""
    work = Workspace()

    def start() -> None:
        params = pipeline_params(stage.methods)
        check_pipeline_params(params)
        count = params.processes if params.processes > 1 and stage.shared(params, work) else 1
        run_in_processes(count, lambda: measure(params), params.device)

    def measure(params: Params) -> None:
        for folder in (work.artifact(""), work.metric("").parent):
            clear_partials(folder.rglob("*"), own=True)
        if stage.name in ORDER:
            logger.info("stage %d of %d: %s", ORDER.index(stage.name) + 1, len(ORDER), stage.name)
        with cost_measurement() as cost:
            call_stage(stage, params, work)
        if stage.name in COMPRESSION:
            keep_cost(stage.name, params, cost)

    sys.exit(run(start, debug="--debug" in sys.argv[1:]))


def pipeline_params(methods: Methods | None) -> Params:
    """Read params.yaml in the current folder, as ``read_params`` does; a key that it lacks has its recommended value."""
    return read_params(PARAMS_FILE, launched_processes(), methods=methods, preset="recommended")


def check_pipeline_params(params: Params) -> None:
    """Refuse settings of the console scripts: in the pipeline, the path of the result is fixed."""
    problems = []
    if params.save_path not in (None, "artifacts/model"):
        problems.append(f"save_path: the pipeline writes to artifacts/model, not to '{params.save_path}'; use null here.")
    if params.save_transform_only:
        problems.append("save_transform_only: only the console scripts can stop at the transform; use false here.")
    if problems:
        raise ParameterError([f"{PARAMS_FILE}: {problem}" for problem in problems])
