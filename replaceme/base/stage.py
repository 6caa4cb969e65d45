"""A stage of the pipeline: its function and the dependencies of its output. DVC and the console scripts run the same stages.

Each file of ``replaceme.pipeline`` declares one stage. ``tests/pipeline`` checks them against dvc.yaml and the imports.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from replaceme.base.combinations import Methods
from replaceme.base.cost import keep, measured
from replaceme.base.entry import PARAMS_FILE, run
from replaceme.base.errors import ParameterError
from replaceme.base.estimate import note, to_go
from replaceme.base.files import clear_partials
from replaceme.base.params import Params, read_params
from replaceme.base.processes import in_processes, run_step
from replaceme.base.progress import logger
from replaceme.base.ranks import launched_processes
from replaceme.base.workspace import Artifact, Workspace

# The order of the stages, after ``inputs``: from the text to the profile, to the final edits, and to the saved model.
ANALYSIS = ("generate", "calibrate", "profile")
FIT = (*ANALYSIS, "select", "plan", "activations", "solve", "repair", "heal")
COMPRESSION = (*FIT, "export")
# Judging the result is no part of the compression: it costs the same for every method.
JUDGEMENT = ("baseline", "evaluate", "report")
ORDER = (*COMPRESSION, *JUDGEMENT)
# Those that take long; their times help to say how long a run will take.
SCORED = ("baseline", "evaluate")

# Parameters of every pass over the calibration text, and of every evaluation.
PASS = ("batch_size", "dtype", "device", "device_map", "threads", "use_4bit", "trust_remote_code")
SCORING = ("tasks", "eval_tokens", "eval_batch_size", "eval_dtype", "device", "device_map", "threads", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        name: as in dvc.yaml.
        run: the function that reads artifacts, computes and writes artifacts.
        params: the parameters that its output depends on.
        reads: the artifacts that it reads.
        writes: the artifact that it writes; None if it writes only metrics.
        code: the rooms, or single files of them, that it loads, below ``replaceme/``; besides its own file.
        metrics: the metrics files that it writes.
        figures: the metrics files that it reads.
        methods: the methods that ``method`` may name; None for a stage that uses no method.
        shared: whether several processes share its passes, given what it reads; if not, one does them.
    """

    name: str
    run: Callable[[Params, Workspace], None]
    params: tuple[str, ...] = ()
    reads: tuple[Artifact, ...] = ()
    writes: Artifact | None = None
    code: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    methods: Methods | None = None
    shared: Callable[[Params, Workspace], bool] = lambda params, work: False


def run_stage(stage: Stage) -> None:
    """Run a stage on params.yaml in the current folder, and exit. The cost of a stage of the compression is kept.

    What killed stages left unfinished is cleared first.
    """
    place = Workspace()

    def work() -> None:
        for folder in (place.artifact(""), place.metric(stage.name).parent):
            clear_partials(folder)
        params = pipeline_params(stage.methods)
        check_pipeline_params(params)
        count = params.processes if params.processes > 1 and stage.shared(params, place) else 1
        in_processes(count, lambda: alone(params), params.device)

    def alone(params: Params) -> None:
        if stage.name in ORDER:
            logger.info("stage %d of %d: %s", ORDER.index(stage.name) + 1, len(ORDER), stage.name)
        with measured() as cost:
            if words := still_to_go(stage.name, params, place):
                logger.info(words)
            run_step(stage, params, place)
        if stage.name in ORDER:
            note(stage.name, params, cost["seconds"])
        if stage.name in (*COMPRESSION, *SCORED):
            keep(stage.name, params, cost)

    sys.exit(run(work, debug="--debug" in sys.argv[1:]))


def still_to_go(name: str, params: Params, work: Workspace, course: Sequence[str] = ORDER) -> str:
    """Return how long a run will take from this stage on, in words; an empty text if that isn't known.

    Args:
        name: the stage that begins.
        params: the run's.
        work: its folder.
        course: all stages of the run. The report takes seconds and is left out.
    """
    names = [each for each in course[course.index(name) :] if each != "report"] if name in course else []
    return to_go(names, [each for each in names if each in COMPRESSION], params, work)


def pipeline_params(methods: Methods | None) -> Params:
    """Read params.yaml in the current folder, as ``read_params`` does; a key that it lacks has its recommended value."""
    return read_params(PARAMS_FILE, launched_processes(), methods=methods, preset="recommended")


def check_pipeline_params(params: Params) -> None:
    """Refuse settings of the console scripts: in the pipeline, the place of the result is fixed."""
    problems = []
    if params.save_path not in (None, "artifacts/model"):
        problems.append(f"save_path: the pipeline writes to artifacts/model, not to '{params.save_path}'; use null here.")
    if params.save_transform_only:
        problems.append("save_transform_only: only the console scripts can stop at the transform; use false here.")
    if problems:
        raise ParameterError([f"{PARAMS_FILE}: {problem}" for problem in problems])
