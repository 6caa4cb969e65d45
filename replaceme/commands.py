"""The scripts with the published names: the work of the command ``replaceme``, with every key and the published preset."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from replaceme.actions import evaluate, measure, profile, prune, together
from replaceme.arguments import named_as_typed, parse, script_parser
from replaceme.base.entry import run_command
from replaceme.base.errors import ParameterError
from replaceme.base.params import Params, read_params
from replaceme.base.progress import silence_libraries
from replaceme.base.ranks import launched_processes
from replaceme.methods.registry import METHODS


def run_replaceme() -> NoReturn:
    """Prune a model, save it and score it."""
    _main(prune, "Prune a language model: choose a block of layers, fit its replacement, save and score the result.")


def run_uidl() -> NoReturn:
    """Prune a model by dropping the block."""
    _main(prune, "Prune a language model by UIDL: drop the block of layers with the smallest angular distance.", method="uidl")


def evaluate_model() -> NoReturn:
    """Score a model."""
    _main(evaluate, "Score the model at model_path; save_path is a JSON file for the scores.")


def measure_speed() -> NoReturn:
    """Measure the dense and the pruned model."""
    _main(
        measure,
        "Measure prefill and decoding of the dense model (model_path) and of the pruned one (save_path, or artifacts/model), "
        "in turn, and write the report with these times.",
    )


def get_distance_analysis() -> NoReturn:
    """Profile a model."""
    _main(profile, "Measure the angular distance between all pairs of layers, and list the best block of each size.")


def get_lt_with_lstsq() -> NoReturn:
    """Fit a transform."""
    _main(
        prune, "Fit the linear transform of the best block by least squares and save it, without a model.",
        method="lstsq", save_transform_only=True,
    )  # fmt: skip


def get_lt_with_solvers() -> NoReturn:
    """Fit a transform by an iterative solver."""
    _main(
        prune, "Fit the linear transform of the best block by an iterative solver and save it, without a model.",
        method="cosine", save_transform_only=True,
    )  # fmt: skip


def _main(action: Callable[[Params], object], description: str, **fixed: Any) -> NoReturn:
    def work(arguments: Sequence[str]) -> None:
        with named_as_typed(arguments):
            config, overrides = parse(script_parser(description), arguments)
            for key, value in fixed.items():
                if overrides.get(key, value) != value:
                    raise ParameterError(f"{key}: this command sets it to {value}; use run_replaceme for {overrides[key]}.")
            params = read_params(config, {**overrides, **fixed, **launched_processes()}, METHODS)
            silence_libraries(load=True)
            together(action, params)

    run_command(work)
