"""The pipeline's stages as the console scripts run them, without DVC: one after the other, each unless its stamp fits.

A stamp is made of the code, the parameters that the step uses, and the content that it read and wrote: an interrupted run
goes on where it stopped, a new α repeats nothing before the solve, and an output that somebody changed is made again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from replaceme.calibration import calibrate
from replaceme.card import SETTINGS
from replaceme.combinations import EFFECTS
from replaceme.compute import resolve_device
from replaceme.cost import COMPRESSION, recorded
from replaceme.embedded import cache_folder
from replaceme.evaluation.scores import evaluate, score_baseline
from replaceme.export import export
from replaceme.files import new_folder, read_json, write_json
from replaceme.fingerprints import sha256_below
from replaceme.healing import heal
from replaceme.models import CARD
from replaceme.params import Params
from replaceme.planning import plan
from replaceme.profile import profile
from replaceme.progress import logger
from replaceme.repair import repair
from replaceme.report.page import write_report
from replaceme.selection import select
from replaceme.solution import solve
from replaceme.statistics import observe_activations
from replaceme.workspace import Workspace

PASS = ("batch_size", "dtype", "device", "device_map", "threads", "use_4bit", "trust_remote_code")
SCORING = ("tasks", "eval_tokens", "eval_batch_size", "eval_dtype", "device", "device_map", "threads", "trust_remote_code")
ALL = [name for name in Params.model_fields if name not in ("save_path", "save_transform_only")]

MERGING = tuple(name for name in EFFECTS if name.startswith("laco_"))
TRAINING = (*(name for name in EFFECTS if name.startswith("llm_streamline_")), "plain")
REPAIRING = tuple(name for name in EFFECTS if name.startswith("repair_"))
HEALING = ("heal_epochs", *(name for name in EFFECTS if name.startswith("heal_")))
SOLVING = tuple(name for name in EFFECTS if name not in MERGING + TRAINING + REPAIRING + HEALING)

# Of the dense model alone, so the same for every result that is made of it.
SHARED = ("baseline",)


@dataclass(frozen=True)
class Step:
    """One stage as the console scripts run it; tests compare it with dvc.yaml.

    Attributes:
        run: the stage's function.
        params: the parameters that change its output.
        reads: what it reads, as names of ``Workspace`` paths.
        writes: its main output, likewise; None where it writes metrics alone.
        metrics: the metrics files that it writes.
        figures: the metrics files that it reads.
        costs: the steps whose cost it reads.
    """

    run: Callable[[Params, Workspace], None]
    params: tuple[str, ...]
    reads: tuple[str, ...]
    writes: str | None
    metrics: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()


STEPS: Mapping[str, Step] = {
    "calibrate": Step(
        calibrate,
        (
            "dataset_config", "dataset_split", "dataset_column", "dataset_size", "max_length", "pack", "seed",
            "trust_remote_code",
        ),
        ("tokenizer_input", "dataset_input"),
        "documents",
    ),
    "profile": Step(profile, PASS, ("model_input", "documents"), "profile"),
    "select": Step(
        select,
        (
            "method", "transform", "selection", "layers_to_skip", "tolerated_loss", "min_distance_layer", "max_distance_layer",
            "num_A", "merge_consecutive", *MERGING, *PASS,
        ),
        ("profile", "model_input", "documents"),
        "blocks",
        ("select",),
    ),
    "plan": Step(
        plan,
        ("method", "transform", "linearpatch_form", "ghosted_weighted", "loss", "accurate"),
        ("blocks",),
        "plan",
    ),
    "activations": Step(observe_activations, PASS, ("model_input", "documents", "plan"), "statistics"),
    "solve": Step(
        solve,
        ("method", "transform", *SOLVING, "device", "threads"),
        ("plan", "statistics"),
        "solution",
        ("solve",),
    ),
    "repair": Step(
        repair,
        (
            "method", "transform", "layers_to_skip", "min_distance_layer", "max_distance_layer", "repair", *TRAINING,
            *REPAIRING, *SOLVING, *PASS,
        ),
        ("model_input", "documents", "plan", "solution"),
        "repaired",
        ("repair",),
    ),
    "heal": Step(heal, (*HEALING, *PASS), ("model_input", "documents", "plan", "repaired"), "edits", ("heal",)),
    "export": Step(
        export,
        SETTINGS,
        ("model_input", "tokenizer_input", "card_input", "documents", "edits"),
        "model",
        ("export",),
        ("solve",),
    ),
    "baseline": Step(score_baseline, SCORING, ("model_input", "tokenizer_input", "tasks_input"), "baseline"),
    "evaluate": Step(evaluate, SCORING, ("tasks_input", "model", "baseline"), None, ("evaluation",)),
    "report": Step(
        write_report,
        tuple(ALL),
        ("profile", "blocks", "solution", "edits"),
        "report",
        ("compression",),
        ("select", "solve", "repair", "heal", "export", "evaluation"),
        COMPRESSION,
    ),
}  # fmt: skip


def run_steps(params: Params, work: Workspace, names: Sequence[str]) -> list[str]:
    """Run the steps whose stamp doesn't fit, in order, and return their names."""
    ran = []
    for name in names:
        step, stamp = STEPS[name], work.root / "steps" / f"{name}.json"
        key = _key(params, work, step)
        outputs = [*([getattr(work, step.writes)] if step.writes else []), *map(work.metric, step.metrics)]
        if name in COMPRESSION:
            outputs.append(work.cost(name))
        if stamp.is_file() and read_json(stamp) == [key, _sums(outputs)]:
            logger.info("%s: unchanged since an earlier run", name)
            continue
        stamp.unlink(missing_ok=True)
        if name in SHARED:
            _run_once_for_all(name, key, getattr(work, str(step.writes)), partial(step.run, params, work))
        else:
            with recorded(work.cost(name)) if name in COMPRESSION else nullcontext():
                step.run(params, work)
        write_json(stamp, [key, _sums(outputs)])
        ran.append(name)
    return ran


def _run_once_for_all(name: str, key: str, output: Path, step: Callable[[], None]) -> None:
    """Take a step's output from the user's cache, or run it and keep it there: other results use it too."""
    shared = cache_folder() / f"{name}s" / key
    if shared.is_dir():
        logger.info("%s: known from an earlier run", name)
    else:
        step()
    source, target = (shared, output) if shared.is_dir() else (output, shared)
    with new_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _sums(paths: Sequence[Path]) -> list[dict[str, str]]:
    return [_content(path) if path.exists() else {} for path in paths]


def _content(path: Path) -> dict[str, str]:
    """Return the sums of what a step reads or writes, but for a model's card: it gets the scores when they are known."""
    return {name: digest for name, digest in sha256_below(path).items() if name != CARD}


def _key(params: Params, work: Workspace, step: Step) -> str:
    package = Path(__file__).parent
    content = {
        # On another kind of device the last digits differ.
        "device": resolve_device(params.device).split(":")[0],
        "code": {name: digest for name, digest in sha256_below(package).items() if name.endswith((".py", ".html"))},
        "params": params.model_dump(include=set(step.params)),
        "reads": {name: _content(getattr(work, name)) for name in step.reads},
        "figures": {name: sha256_below(work.metric(name)) for name in step.figures},
        "costs": {name: sha256_below(work.cost(name)) for name in step.costs},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
