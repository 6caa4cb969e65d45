"""Compare the experiments of this workspace: a table, quality against size, and methods at the same size.

``dvc exp show`` shows every column; this shows the settings that differ, the main results, and the cost. With ``--speed``, each
model is taken from DVC's cache and measured against its dense model. Models are identified by DVC's checksums of their weights,
config and code, so a model that was measured before isn't even taken from the cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from replaceme.base.entry import Parser, plain_parser, run_command
from replaceme.base.errors import ParameterError, ReplaceMeError, ResourceError, excerpt
from replaceme.base.extras import need
from replaceme.base.files import new_folder, read_json, rounded, temporary_folder, write_json
from replaceme.base.parameters import Params, read_params
from replaceme.base.progress import align, logger, silence_libraries
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import METHODS

if TYPE_CHECKING:
    from replaceme.report.experiment_comparison import ExperimentComparison

SPEED_FILE = "speed.json"
# Git ignores it, so that a comparison leaves the repository clean.
OUTPUT = Path("artifacts/experiments")
Record = dict[str, Any]
PLACE = Workspace()
# Read from DVC's cache: the pruned model, the fingerprint of the dense one, and the settings.
MODEL, DENSE, PARAMS = PLACE.model.as_posix(), PLACE.model_input.as_posix(), "params.yaml"

# Metrics files that a comparison needs, beside DVC's record, which has the summary.
FIGURES = ("evaluation", "solve", "compression")


def compare_experiments() -> NoReturn:
    """Print and save the table and the pictures of the experiments."""
    run_command(partial(compare, prog=None))


def compare(arguments: Sequence[str], prog: str | None = "replaceme compare") -> None:
    """Read the command line, and compare."""
    options = parser(prog).parse_args(arguments)
    _compare(options.rev, options.num, options.output, options.speed)


def parser(prog: str | None = None) -> Parser:
    """Return the command's parser; ``prog`` is how it is called, if not by the script's name."""
    description = "Compare the experiments of this repository: table, CSV and pictures."
    parser = plain_parser(prog, description, "replaceme compare --speed")
    parser.add_argument("--rev", action="append", help="commit whose experiments are compared; repeatable [HEAD]")
    parser.add_argument(
        "--num", type=int, default=1, help="number of commits, counted back from that one, whose experiments are compared [1]"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder for the results [{OUTPUT}]")
    parser.add_argument(
        "--speed", action="store_true", help="also measure each model against its dense one, unless it was measured before"
    )
    return parser


def _compare(revisions: Sequence[str] | None, number: int, output: Path, speed: bool = False) -> None:
    from replaceme.report.experiment_comparison import comparison_of
    from replaceme.report.experiment_table import shown

    if output.exists() and not (output / "experiments.csv").is_file():
        raise ParameterError(
            f"--output: {excerpt(output, 150)} exists and holds no comparison of experiments; choose another folder."
        )
    comparison = comparison_of(_recorded(revisions, number))
    # Save before the measurement, which takes long.
    _save(comparison, output)
    if speed:
        _add_speeds(comparison, output)
        _save(comparison, output)
    rows, notes = shown(comparison)
    print(align(rows), *notes, sep="\n")
    logger.info("the table and the pictures are in %s", output)


def _recorded(revisions: Sequence[str] | None, number: int) -> list[dict[str, Any]]:
    """Return DVC's record of each experiment, with all its figures. Raises ParameterError outside of a repository."""
    need("dvc", "compare_experiments")

    from dvc.api import exp_show
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    try:
        records: list[dict[str, Any]] = exp_show(revs=list(revisions) if revisions else None, num=number)
        figures = _figures(sorted({str(record["rev"]) for record in records} - {"workspace"}))
    except (DvcException, SCMError) as failure:
        raise ParameterError(f"compare_experiments: {excerpt(failure, 200)} (run it inside the repository).") from failure
    return [figures.get(str(record["rev"]), {}) | record for record in records]


def _figures(revisions: Sequence[str]) -> dict[str, Record]:
    """Return the figures that git has of each revision, by their places in the files: ``perplexity.wikipedia.ratio``."""
    from dvc.repo import Repo

    if not revisions:
        return {}
    with Repo() as repo:
        files = [str(Path(repo.root_dir, PLACE.metric(name))) for name in FIGURES]
        found = repo.metrics.show(targets=files, revs=list(revisions), hide_workspace=False)
    return {
        revision: {key: value for file in entry.get("data", {}).values() for key, value in _flat(file.get("data", {}))}
        for revision, entry in found.items()
    }


def _flat(figures: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        yield from _flat(value, f"{start}{name}.") if isinstance(value, Mapping) else [(f"{start}{name}", value)]


def _add_speeds(comparison: ExperimentComparison, output: Path) -> None:
    from replaceme.report.experiment_comparison import SPEEDS

    silence_libraries(load=True)
    times = speeds_of(comparison.table.to_dict("records"), output / SPEED_FILE)
    for kind, column in SPEEDS.items():
        comparison.table[column] = [record[kind]["speedup"] if record else None for record in times]


def _save(comparison: ExperimentComparison, output: Path) -> None:
    """Write the table and the figures; keep the measured times."""
    from replaceme.report.experiment_comparison import RETENTION
    from replaceme.report.experiment_table import markdown, shown
    from replaceme.report.methods_figure import methods_figure
    from replaceme.report.theme import png
    from replaceme.report.tradeoff import quality_against_size

    with new_folder(output) as folder:
        comparison.table.map(rounded).to_csv(folder / "experiments.csv", index=False)
        (folder / "experiments.md").write_text(markdown(*shown(comparison)), encoding="utf-8")
        title = _title(comparison.quality)
        (folder / "quality.png").write_bytes(png(quality_against_size(comparison.points(), title, comparison.higher_is_better)))
        rows, column = comparison.same_size()
        if rows:
            (folder / "methods.png").write_bytes(png(methods_figure(rows, _title(column), column == RETENTION)))
        if (output / SPEED_FILE).is_file():
            shutil.copyfile(output / SPEED_FILE, folder / SPEED_FILE)


def _title(column: str) -> str:
    from replaceme.report.experiment_comparison import RATIO, RETENTION, UNSEEN

    if column == RETENTION:
        return "accuracy kept (% of dense)"
    return f"perplexity of {'unseen text' if column == UNSEEN else column.removesuffix(RATIO)} (times dense)"


def speeds_of(experiments: Sequence[Mapping[str, Any]], memory: Path) -> list[Record | None]:
    """Return the times of each experiment, as from ``measure_speed``; None, after a warning, where the model is missing.

    Args:
        experiments: ``experiment`` (its name) and ``revision``.
        memory: JSON file of earlier measurements in the same setting and on the same device; new ones are added at once.
    """
    known: list[Record] = read_json(memory) if memory.is_file() else []
    found: list[Record | None] = []
    for number, each in enumerate(experiments, 1):
        name = each["experiment"]
        try:
            record, new = _speed(str(each["revision"]), str(name), known, memory.parent)
        except ReplaceMeError as problem:
            logger.warning("%s: its speed is left out: %s", name, problem)
            found.append(None)
            continue
        if new:
            known.append(record)
            write_json(memory, known)
        found.append(record)
        speedups = record["prefill_seconds"]["speedup"], record["decode_seconds_per_token"]["speedup"]
        how = "measured" if new else "known"
        logger.info("%s (%d of %d): prefill × %.2f, decoding × %.2f, %s", name, number, len(experiments), *speedups, how)
    return found


def _speed(revision: str, name: str, known: Sequence[Record], beside: Path) -> tuple[Record, bool]:
    """Return the times of one experiment, and whether they are new."""
    from replaceme.speed import setting_of

    files = _opened(revision)
    with temporary_folder(f"{beside.name}-", beside.absolute().parent) as place:
        sums = _of_cache(lambda: _sums(files), name)
        _of_cache(lambda: files.get(PARAMS, str(place / PARAMS)), name)
        params = read_params(place / PARAMS, methods=METHODS, preset="recommended")
        wanted = {"files": sums, **setting_of(params)}
        for record in known:
            if {key: record.get(key) for key in wanted} == wanted:
                return record, False
        _of_cache(lambda: files.get(MODEL, str(place / "model"), recursive=True), name)
        _of_cache(lambda: files.get(DENSE, str(place / "dense.json")), name)
        times = _measured(params, place, name)
    return rounded({"experiment": name, **times, **wanted}, 4), True


def _measured(params: Params, place: Path, name: str) -> Record:
    from replaceme.models.find import recorded_model
    from replaceme.models.model import Model
    from replaceme.speed import measure_speed

    pruned = Model(place / "model", name, trust_remote_code=params.trust_remote_code)
    return measure_speed(params, recorded_model(params, place / "dense.json"), pruned)


def _opened(revision: str) -> Any:
    """Return the file system of a revision: git's files and those of DVC's cache."""
    from dvc.api import DVCFileSystem

    return DVCFileSystem(rev=revision)


def _sums(files: Any) -> dict[str, str]:
    """Return DVC's checksums of the model's weights, config and code: file → MD5."""
    from replaceme.models.model import WEIGHT_FILES

    inside = {path: Path(path).name for path in files.find(MODEL)}
    return {
        name: files.info(path)["md5"]
        for path, name in sorted(inside.items())
        if any(Path(name).match(pattern) for pattern in WEIGHT_FILES)
    }


def _of_cache(work: Callable[[], Any], name: str) -> Any:
    try:
        return work()
    except Exception as failure:  # DVC raises many kinds of errors for a file that its cache lacks.
        raise ResourceError(
            f"its model is not in DVC's cache ({type(failure).__name__}); `dvc exp apply {name}` and `dvc repro` make it again."
        ) from failure
