"""The command ``replaceme``: a subcommand for each thing that there is to do, without DVC and from any folder.

Its preset is the recommended one; a config of the published program is read as published (``replaceme.base.published``).
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from replaceme import __version__
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import nearest, read_params
from replaceme.cli import doctor, experiments, publish, serving
from replaceme.cli.commands import DISTANCES_PATH, EDITS_PATH, GROUPS, OVERWRITE, SCORES_PATH, Command
from replaceme.running.entry import Parser, plain_parser, run_command

_MODEL, _TEXT, _COMPUTING, _SCORES = (GROUPS[title] for title in ("model", "calibration text", "computing", "scores"))
# What an evaluation and a measurement of speed need of the computing.
_WHERE = ("device", "device_map", "threads")
_ALL = tuple(key for keys in GROUPS.values() for key in keys if key != "save_transform_only")

COMMANDS: Mapping[str, Command] = {
    "prune": Command(
        action="prune",
        summary="shorten a model, save it and score it beside the dense one",
        description="Shorten a language model: choose the layers to remove, solve for what takes their place, save a Hugging "
        "Face folder, prove it, and score both models. An interrupted run goes on where it stopped.",
        example="replaceme prune --model Qwen/Qwen3-8B --dataset fineweb --layers 4 --device cuda --save_path smaller",
        keys=_ALL,
        options=OVERWRITE,
    ),
    "evaluate": Command(
        action="evaluate",
        summary="score any model",
        description="Score the model at --model, pruned or not: perplexity of texts, accuracy on tasks.",
        example="replaceme evaluate --model smaller --tasks wikipedia,bbc_news --compare_with smollm2-135m-instruct",
        keys=(*_MODEL, *_SCORES, *_WHERE, "memory", "save_path"),
        save_path=SCORES_PATH,
        options={"compare_with": ("MODEL", "dense model that is scored too, and stands beside it: twice the time [not set]")},
    ),
    "profile": Command(
        action="profile",
        summary="show what each number of layers costs on a text and saves, and measure all pairs of layers",
        description="Measure the angular distance and the residual of a linear map between all pairs of layers, and show "
        "what each number of layers costs, with nothing in their place, and saves, to choose by looking.",
        example="replaceme profile --model smollm2-135m-instruct --dataset notes.txt --dataset_size 16",
        keys=(*_MODEL, *_TEXT, "min_distance_layer", "max_distance_layer", *_COMPUTING, "save_path"),
        save_path=DISTANCES_PATH,
        options=OVERWRITE,
    ),
    "solve": Command(
        action="prune",
        summary="solve for what takes the layers' place, and save that alone",
        description="Choose the layers to remove, solve for what takes their place, and save these edits (safetensors), "
        "without a model.",
        example="replaceme solve --method cosine --solver lbfgs --layers 4 --save_path map",
        keys=tuple(key for key in _ALL if key not in _SCORES),
        fixed={"save_transform_only": True},
        save_path=EDITS_PATH,
        options=OVERWRITE,
    ),
    "speed": Command(
        action="measure",
        summary="time a pruned model against its dense one",
        description="Time prefill and decoding of the dense model (--model) and of the pruned one (--save_path, or the "
        "pipeline's artifacts/model) in turn, and write the report with these times.",
        example="replaceme speed --model smollm2-135m-instruct --save_path smaller",
        keys=(*_MODEL, "save_path", "eval_batch_size", "eval_dtype", *_WHERE),
        save_path="the pruned model [the pipeline's artifacts/model]",
    ),
}


def make_report_parser() -> Parser:
    """Return the parser of ``replaceme report``."""
    description = "Print a result's scores, and write its report: a page with figures, cost and measured times."
    parser = plain_parser("replaceme report", description, "replaceme report --save_path smaller --output report")
    parser.add_argument("--save_path", metavar="FOLDER", help="the result [the pipeline's artifacts/model]")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path("report"), help="folder for the page [report]")
    return parser


def _report(arguments: Sequence[str]) -> None:
    options = make_report_parser().parse_args(arguments)
    from replaceme.pipeline.actions import report

    report(read_params(None, {"save_path": options.save_path}), options.output)


# Those that take no parameters.
OTHERS: Mapping[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "report": ("print a result's scores, and write its page", _report),
    "verify": ("is what is served the model that was proved: compare a folder or a server", serving.verify),
    "convert": ("convert a model for llama.cpp (GGUF) or OpenVINO, and verify it", serving.convert),
    "chat": ("chat with a pruned model beside its dense one", serving.chat),
    "push": ("put a pruned model on the hub, with its card", publish.push),
    "compare": ("put the pipeline's experiments side by side (DVC)", experiments.compare),
    "doctor": ("say what this machine has and what a run would use, for an issue", doctor.doctor),
}


def main() -> NoReturn:
    """Run ``replaceme``."""
    run_command(_run)


def make_overview() -> Parser:
    """Return the parser of ``replaceme`` without a command."""
    words = {name: command.summary for name, command in COMMANDS.items()} | {name: words for name, (words, _) in OTHERS.items()}
    parser = Parser(
        prog="replaceme", usage="replaceme COMMAND [--key value …]", add_help=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Depth pruning of language models: remove layers, solve for what takes their place, say what it cost.\n\n"
        "commands:\n" + "\n".join(f"  {name:10}{words}" for name, words in words.items()),
        epilog="`replaceme COMMAND --help` lists a command's options.\n\n"
        "example:\n  replaceme prune --layers 4 --save_path smaller",
    )  # fmt: skip
    parser.add_argument("--help", "-h", action="help", help="show this")
    parser.add_argument("--version", action="version", version=f"replaceme {__version__}", help="print the version")
    return parser


def _run(arguments: Sequence[str]) -> None:
    if not arguments:
        make_overview().print_help()
        return
    name, *rest = arguments
    names = [*COMMANDS, *OTHERS]
    if name in COMMANDS:
        COMMANDS[name].run(rest, f"replaceme {name}")
    elif name in OTHERS:
        OTHERS[name][1](rest)
    elif name.startswith("-"):
        make_overview().parse_args(arguments)
        raise ParameterError(f"command line: a command comes first, one of {', '.join(names)}.")
    else:
        raise ParameterError(f"command line: '{name}' is not a command{nearest(name, names)}; use one of {', '.join(names)}.")
