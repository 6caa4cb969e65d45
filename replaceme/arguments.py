"""The command line of parameters: any key as ``--key value``, over a config file, and its help.

A script with a published name lists every parameter with its whole description. The command ``replaceme`` lists those that a
subcommand uses, in groups: the common ones with a few words each, all of them under ``--help-all``.
"""

import argparse
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from replaceme.base.entry import Parser
from replaceme.base.errors import ParameterError, ReplaceMeError, excerpt
from replaceme.base.parameters import nearest, parse_value
from replaceme.base.presets import PRESETS, RECOMMENDED
from replaceme.base.published import PUBLISHED_KEYS
from replaceme.methods.registry import EFFECTS, FIELDS, METHODS
from replaceme.selection.criteria import CRITERIA

ALIASES = {"model": "model_path", "layers": "layers_to_skip"}
PRESET_HELP = "values of what is not named: recommended, or published (the paper's)"
# Longer lists of choices stand in the sentence, not in the option's own line.
LONGEST_CHOICES = 48


@dataclass(frozen=True)
class Group:
    """A group of parameters in the help of ``replaceme``.

    Attributes:
        title: of the group.
        common: the parameters in every help, each with a few words.
        rare: those under ``--help-all`` alone.
    """

    title: str
    common: Mapping[str, str]
    rare: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All parameters of the group."""
        return (*self.common, *self.rare)


GROUPS = (
    Group("model", {"model_path": "hub id, local folder or embedded model"}, ("revision", "trust_remote_code")),
    Group(
        "calibration text",
        {
            "dataset": "text file, hub id, embedded text, self (the model writes it), or [a, {b: share}]",
            "dataset_size": "documents",
        },
        ("dataset_column", "dataset_config", "dataset_split", "dataset_revision", "max_length", "pack", "seed"),
    ),
    Group(
        "what is removed",
        {
            "method": "what takes the place of the removed layers, or parts of layers",
            "layers_to_skip": "layers to remove",
            "remove": "a share instead, as 20% or '20% of layers'",
            "selection": "what the cut minimises; null: the method's own criterion",
            "tolerated_loss": "remove as many layers as raise the loss by no more, in nats",
        },
        ("min_distance_layer", "max_distance_layer", "num_A", "merge_consecutive"),
    ),
    Group(
        "what takes its place",
        {
            "transform": "a map's shape, or new weights of the layer before the cut",
            "alpha": "ridge of a map, in units of MᵀM",
            "repair": "re-solve the kept layers after the cut",
            "heal_epochs": "passes over the text that train them afterwards",
        },
        ("refit_ridge", "repair_ridge_attention", "repair_ridge_mlp", "heal_learning_rate", "plain"),
    ),
    Group(
        "scores",
        {"tasks": "embedded texts, lm-eval tasks, your files: a,b,c", "eval_tokens": "tokens of each perplexity task"},
        ("eval_batch_size", "eval_dtype"),
    ),
    Group(
        "computing",
        {
            "device": "auto, cpu, cuda or cuda:N",
            "memory": "of the weights: auto, or a size as 6GB (a larger model is streamed)",
        },
        ("device_map", "dtype", "batch_size", "use_4bit", "threads", "processes"),
    ),
    Group("result", {"save_path": "its folder; intermediate results lie beside it, in FOLDER.work"}),
    Group(
        "parameters of single methods", {}, tuple(key for method in METHODS.values() for key in method.settings.model_fields)
    ),
)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=min(112, shutil.get_terminal_size((112, 24)).columns))


def script_parser(description: str) -> Parser:
    """Return the parser of a script with a published name: every parameter, with its description."""
    parser = Parser(description=description, allow_abbrev=False)
    _add_general(parser)
    for name in FIELDS:
        _add(
            parser,
            name,
            [f"--{name}", *(f"--{alias}" for alias, key in ALIASES.items() if key == name)],
            "VALUE",
            _described(name),
        )
    return parser


def command_parser(
    prog: str,
    description: str,
    example: str,
    keys: Iterable[str],
    place: str | None,
    everything: bool,
    own: Mapping[str, tuple[str, str]],
) -> Parser:
    """Return the parser of a subcommand: the parameters that it uses, in groups.

    Args:
        prog: how it is called.
        description: what it does.
        example: a command line, for the end of the help.
        keys: the parameters that it uses.
        place: what ``save_path`` is here; None is the folder of a new result.
        everything: whether the help describes the rare ones too.
        own: its options that are no parameters: name → what stands for the value, and a few words.
    """
    parser = Parser(
        prog=prog, usage=f"{prog} [--config FILE] [--key value …]", description=description, allow_abbrev=False, add_help=False,
        epilog=f"example:\n  {example}", formatter_class=_Formatter,
    )  # fmt: skip
    used = frozenset(keys)
    for group in GROUPS:
        section = parser.add_argument_group(group.title)
        for key in (key for key in group.keys if key in used):
            shown, *hidden = [*(f"--{alias}" for alias, name in ALIASES.items() if name == key), f"--{key}"]
            words = argparse.SUPPRESS
            if key == "save_path" and place:
                words = place
            elif everything:
                words = _described(key, recommended=True)
            elif key in group.common:
                words = f"{group.common[key]}{_choices(key)} [{_default(key, recommended=True)}]"
            _add(section, key, [shown], _metavar(key), words)
            for flag in hidden:
                _add(section, key, [flag], None, argparse.SUPPRESS)
    if own:
        section = parser.add_argument_group("this command alone")
        for name, (metavar, words) in own.items():
            _add(section, name, [f"--{name}"], metavar, words)
    general = parser.add_argument_group("general")
    _add_general(general)
    general.add_argument("--help", "-h", action="help", help="the common options")
    general.add_argument("--help-all", action="help", help="all options, with the whole description of each")
    return parser


def parse(
    parser: Parser, arguments: Sequence[str], keys: Iterable[str] = tuple(FIELDS), own: Iterable[str] = ()
) -> tuple[Path | None, dict[str, Any]]:
    """Return the config file and the overrides of a command line.

    Args:
        parser: ``script_parser`` or ``command_parser``.
        arguments: the words after the command.
        keys: the parameters that the command uses.
        own: its options that are no parameters, whose values stay text; they are among the overrides.

    Raises:
        ParameterError: names each word that is no option, and each option given twice with different values.
    """
    known, unknown = parser.parse_known_args(arguments)
    names, problems = [*keys, *own], []
    for word in unknown:
        if word.startswith("--"):
            name = word.lstrip("-").split("=")[0]
            if (key := ALIASES.get(name, name)) in FIELDS:
                problems.append(f"command line: {key}: {parser.prog} has no use for it; see --help-all.")
            else:
                hint = nearest(name, [*names, *(alias for alias, key in ALIASES.items() if key in names), *PUBLISHED_KEYS])
                problems.append(f"command line: '{excerpt(word)}' is not an option{hint}; see --help.")
    if unknown and not problems:
        problems.append(f"command line: '{excerpt(unknown[0])}' belongs to no option; see --help.")
    given = {name: list(dict.fromkeys(values)) for name, values in vars(known).items() if name not in ("debug", "help_all")}
    for name, values in given.items():
        if len(values) > 1:
            first, second, *_ = map(excerpt, values)
            problems.append(f"command line: {name}: is given twice, as {first} and as {second}; keep one.")
    if problems:
        raise ParameterError(problems)
    config = Path(given.pop("config")[0]) if "config" in given else None
    return config, {name: value if name in own else typed(name, value) for name, (value,) in given.items()}


def named_as_typed(arguments: Sequence[str]) -> AbstractContextManager[None]:
    """Let an error inside the block that begins with a parameter name the alias too, if that is what was typed."""
    words = {word.split("=")[0] for word in arguments}
    return renamed({key: f"--{alias} ({key})" for alias, key in ALIASES.items() if f"--{alias}" in words})


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let an error inside the block that begins with one of these parameters begin with its other name."""
    try:
        yield
    except ReplaceMeError as error:
        problems = str(error).split("\n")
        for key, name in names.items():
            problems = [re.sub(rf"^(command line: |){key}: ", rf"\1{name}: ", each) for each in problems]
        error.args = ("\n".join(problems),)
        if isinstance(error, ParameterError):
            error.problems = problems
        raise


def typed(name: str, value: str) -> Any:
    """Return the value of ``--name value``, as it would stand in a config file."""
    parsed, field = parse_value(value), FIELDS.get(name)
    if parsed is not None and field and field.annotation in (str, str | None):
        return value
    if name == "dataset" and isinstance(parsed, str | int | float):
        return value
    if name == "tasks" and isinstance(parsed, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return parsed


def _add_general(parser: Any) -> None:
    # Every option is collected, so that one given twice is noticed, under whichever of its names.
    _add(parser, "config", ["--config"], "FILE", "YAML file of parameters; what is given here overrides it")
    _add(parser, "preset", ["--preset"], "|".join(PRESETS), PRESET_HELP)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name in PUBLISHED_KEYS:
        _add(parser, name, [f"--{name}"], None, argparse.SUPPRESS)


def _add(parser: Any, key: str, flags: Sequence[str], metavar: str | None, words: str) -> None:
    parser.add_argument(
        *flags, dest=key, action="append", default=argparse.SUPPRESS, metavar=metavar, help=words.replace("%", "%%")
    )


def _described(key: str, recommended: bool = False) -> str:
    """Return a parameter's sentence, with the values that it can name, what it belongs to, and its default."""
    names = {"method": METHODS, "selection": CRITERIA}.get(key)
    one_of = f" One of {', '.join(names)}." if names else ""
    belongs = f" ({EFFECTS[key][0]})" if key in EFFECTS else ""
    return f"{FIELDS[key].description}{one_of}{belongs} [{_default(key, recommended)}]"


def _choices(key: str) -> str:
    """Return the values that the option's own line is too short for."""
    choices = _values(key)
    return f": {', '.join(choices)}" if choices and _metavar(key) == key.upper() else ""


def _metavar(key: str) -> str:
    if choices := _values(key):
        return joined if len(joined := "|".join(choices)) <= LONGEST_CHOICES else key.upper()
    kinds = {int: "N", float: "X", str: "FOLDER" if key == "save_path" else "TEXT"}
    named = {"model_path": "MODEL", "dataset": "TEXT", "tasks": "TASKS", "device": "DEVICE", "remove": "SHARE"}
    annotation = FIELDS[key].annotation
    kind = next((kind for kind in (annotation, *get_args(annotation)) if kind in kinds), str)
    return named.get(key, kinds[kind])


def _values(key: str) -> tuple[str, ...]:
    """Return the values that a parameter can have, if they are few."""
    if key in ("method", "selection"):
        return tuple(METHODS if key == "method" else CRITERIA)
    annotation = FIELDS[key].annotation
    if annotation is bool:
        return "true", "false"
    literal = next((each for each in (annotation, *get_args(annotation)) if get_origin(each) is Literal), None)
    return tuple(map(str, get_args(literal))) if literal else ()


def _default(key: str, recommended: bool = False) -> str:
    value = RECOMMENDED.get(key, FIELDS[key].default) if recommended else FIELDS[key].default
    if recommended and key == "save_path":
        return "MODEL-METHOD-LAYERS"
    if value is None:
        return "not set" if recommended else "null"
    if isinstance(value, float) and recommended:
        return f"{value:g}"
    if isinstance(value, bool) and recommended:
        return str(value).lower()
    if isinstance(value, tuple | list) and recommended:
        names = [str(each) for each in value]
        return ", ".join(names if len(names) <= 4 else [*names[:2], f"and {len(names) - 2} more"])
    return str(value)
