"""The command ``replaceme``: one subcommand for each thing that there is to do, without DVC and from any folder.

Its preset is the recommended one; a config of the published program is read as published (``replaceme.base.presets``).
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from replaceme import __version__, actions, experiments, publish
from replaceme.arguments import GROUPS, command_parser, named_as_typed, parse
from replaceme.base.entry import Parser, plain_parser, run_command
from replaceme.base.errors import ParameterError, excerpt
from replaceme.base.params import Params, nearest, read_params
from replaceme.base.progress import silence_libraries
from replaceme.base.ranks import launched_processes
from replaceme.methods.registry import METHODS

_BY_TITLE = {group.title: group.keys for group in GROUPS}
_MODEL, _TEXT, _COMPUTING, _SCORES = (_BY_TITLE[title] for title in ("model", "calibration text", "computing", "scores"))
# What an evaluation and a measurement of speed need of the computing.
_WHERE = ("device", "device_map", "threads")
_ALL = tuple(key for group in GROUPS for key in group.keys)


@dataclass(frozen=True)
class Command:
    """A subcommand of parameters.

    Attributes:
        words: one line, for the list of commands.
        description: what it does.
        example: a command line.
        keys: the parameters that it uses.
        action: what it does with them.
        fixed: parameters that it sets itself.
        place: what ``save_path`` is here; None is the folder of a new result.
        own: options that are no parameters, which the action takes by name: name → what stands for the value, a few words.
    """

    words: str
    description: str
    example: str
    keys: tuple[str, ...]
    action: Callable[..., object]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    place: str | None = None
    own: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def parser(self, name: str, everything: bool = False) -> Parser:
        """Return its parser; ``everything`` describes the rare parameters too."""
        prog = f"replaceme {name}"
        return command_parser(prog, self.description, self.example, self.keys, self.place, everything, self.own)

    def read(self, parser: Parser, arguments: Sequence[str]) -> tuple[Params, dict[str, str]]:
        """Return the parameters of a command line and its config, and the values of its own options."""
        config, given = parse(parser, arguments, self.keys, self.own)
        own = {name: given.pop(name) for name in self.own if name in given}
        return read_params(config, {**given, **self.fixed, **launched_processes()}, METHODS, preset=None), own

    def run(self, name: str, arguments: Sequence[str]) -> None:
        """Read the command line and the config, and do it."""
        parser = self.parser(name, everything="--help-all" in arguments)
        with named_as_typed(arguments):
            params, own = self.read(parser, arguments)
            silence_libraries(load=True)
            actions.together(self.action, params, **own)


COMMANDS: Mapping[str, Command] = {
    "prune": Command(
        "shorten a model, save it and score it beside the dense one",
        "Shorten a language model: choose the layers to remove, solve for what takes their place, save a Hugging Face folder,\n"
        "prove it, and score both models. An interrupted run goes on where it stopped.",
        "replaceme prune --model Qwen/Qwen3-8B --dataset fineweb --layers 4 --device cuda --save_path smaller",
        _ALL,
        actions.prune,
    ),
    "evaluate": Command(
        "score any model",
        "Score the model at --model, pruned or not: perplexity of texts, accuracy on tasks. --save_path is a JSON file.",
        "replaceme evaluate --model smaller --tasks wikipedia,bbc_news --compare_with smollm2-135m-instruct",
        (*_MODEL, *_SCORES, *_WHERE, "memory", "save_path"),
        actions.evaluate,
        place="JSON file for the scores [MODEL.evaluation.json]",
        own={"compare_with": ("MODEL", "dense model that is scored too, and stands beside it: twice the time [not set]")},
    ),
    "profile": Command(
        "measure all pairs of layers, and list the best block of each size",
        "Measure the angular distance and the residual of a linear map between all pairs of layers, and list the best block\n"
        "of each size.",
        "replaceme profile --model smollm2-135m-instruct --dataset notes.txt --dataset_size 16",
        (*_MODEL, *_TEXT, "min_distance_layer", "max_distance_layer", *_COMPUTING, "save_path"),
        actions.profile,
        place="folder for the distances of all pairs [MODEL-distances]",
    ),
    "solve": Command(
        "solve for what takes the layers' place, and save that alone",
        "Choose the layers to remove, solve for what takes their place, and save these edits (safetensors), without a model.",
        "replaceme solve --method cosine --solver lbfgs --layers 4 --save_path map",
        tuple(key for key in _ALL if key not in _SCORES),
        actions.prune,
        {"save_transform_only": True},
        place="folder for the edits [MODEL-METHOD-LAYERS-transform]",
    ),
    "speed": Command(
        "time a pruned model against its dense one",
        "Time prefill and decoding of the dense model (--model) and of the pruned one (--save_path, or the pipeline's\n"
        "artifacts/model) in turn, and write the report with these times.",
        "replaceme speed --model smollm2-135m-instruct --save_path smaller",
        (*_MODEL, "save_path", "eval_batch_size", "eval_dtype", *_WHERE),
        actions.measure,
        place="the pruned model [the pipeline's artifacts/model]",
    ),
}


def report_parser() -> Parser:
    """Return the parser of ``replaceme report``."""
    description = "Print a result's scores, and write its report: a page with figures, cost and measured times."
    parser = plain_parser("replaceme report", description, "replaceme report --save_path smaller --output report")
    parser.add_argument("--save_path", metavar="FOLDER", help="the result [the pipeline's artifacts/model]")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path("report"), help="folder for the page [report]")
    return parser


def _report(arguments: Sequence[str]) -> None:
    options = report_parser().parse_args(arguments)
    actions.report(read_params(None, {"save_path": options.save_path}), options.output)


# Those that take no parameters.
OTHERS: Mapping[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "report": ("print a result's scores, and write its page", _report),
    "push": ("put a pruned model on the hub, with its card", publish.push),
    "compare": ("put the pipeline's experiments side by side (DVC)", experiments.compare),
}


def main() -> NoReturn:
    """Run ``replaceme``."""
    run_command(_run)


def overview() -> Parser:
    """Return the parser of ``replaceme`` without a command."""
    words = {name: command.words for name, command in COMMANDS.items()} | {name: words for name, (words, _) in OTHERS.items()}
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
        overview().print_help()
        return
    name, *rest = arguments
    if name in COMMANDS:
        COMMANDS[name].run(name, rest)
    elif name in OTHERS:
        OTHERS[name][1](rest)
    elif name.startswith("-"):
        overview().parse_args(arguments)
        raise ParameterError(f"command line: a command comes first, one of {', '.join([*COMMANDS, *OTHERS])}.")
    else:
        known = [*COMMANDS, *OTHERS]
        raise ParameterError(
            f"command line: '{excerpt(name)}' is not a command{nearest(name, known)}; use one of {', '.join(known)}."
        )
