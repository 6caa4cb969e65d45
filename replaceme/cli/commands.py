"""A command of parameters: each is an option ``--key value`` over ``--config FILE``, made from the field that defines it.

``--help`` lists the common parameters in groups, with a few words each; ``--help-all`` all of them, with their sentences. The
scripts with the published names, at the end, do what ``replaceme``'s subcommands do (``replaceme.cli.main``). They take every
key, and have the published preset.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, NoReturn, get_args, get_origin

from replaceme.base.combinations import describe_users, format_value
from replaceme.base.config import parse_value, read_config
from replaceme.base.errors import ParameterError, renaming
from replaceme.base.parameters import Params, nearest, read_params
from replaceme.base.progress import silence_libraries
from replaceme.base.published import PRESETS, PUBLISHED_KEYS, RECOMMENDED, Preset
from replaceme.base.ranks import launched_processes
from replaceme.methods.registry import FIELDS, METHODS, USERS
from replaceme.running.entry import Parser, run_command
from replaceme.selection.criteria import CRITERIA

# The groups of the help. Of their parameters, those with a title are common.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "model": ("model_path", "revision", "trust_remote_code"),
    "calibration text": (
        "dataset", "dataset_size", "dataset_column", "dataset_config", "dataset_split", "dataset_revision", "max_length",
        "pack", "seed",
    ),
    "what is removed": (
        "method", "layers_to_skip", "remove", "selection", "tolerated_loss", "min_distance_layer", "max_distance_layer",
        "num_A", "merge_consecutive",
    ),
    "what takes its place": (
        "transform", "alpha", "repair", "heal_tokens", "refit_ridge", "repair_ridge_attention", "repair_ridge_mlp",
        "heal_dataset", "heal_weights", "heal_learning_rate", "heal_tokens_per_step", "heal_rank", "heal_optimizer",
        "keep_if_better", "plain",
    ),
    "scores": ("tasks", "eval_tokens", "eval_batch_size", "eval_dtype"),
    "computing": ("device", "memory", "device_map", "dtype", "batch_size", "use_4bit", "threads", "processes"),
    "result": ("save_path", "save_transform_only"),
    "parameters of single methods": tuple(key for key in FIELDS if key not in Params.model_fields),
}  # fmt: skip
ALIASES = {"model": "model_path", "layers": "layers_to_skip"}
# Any of these says how much goes; of a preset it does not count, as that knows no model.
SIZE_KEYS = ("layers_to_skip", "layers", "remove")
# What stands for a value in the help, where neither its choices nor its type say it.
METAVARS = {
    "model_path": "MODEL", "tasks": "TASKS", "device": "DEVICE", "memory": "SIZE", "remove": "SHARE", "save_path": "FOLDER",
}  # fmt: skip
# What ``save_path`` is where it isn't the folder of a new result.
SCORES_PATH = "JSON file for the scores [MODEL.evaluation.json]"
DISTANCES_PATH = "folder for the distances of all pairs [MODEL-distances]"
EDITS_PATH = "folder for the edits [MODEL-METHOD-LAYERS-transform]"
# The option of the commands whose result is a folder.
OVERWRITE = {"overwrite": ("", "replace a finished result of another model, text or setting")}
# Longer lists of choices stand in the sentence, not in the option's own line.
LONGEST_CHOICES = 48


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of parameters: a subcommand of ``replaceme``, or a script with a published name.

    Attributes:
        action: the function of ``replaceme.pipeline.actions`` that it calls with the parameters.
        description: the same in words, and in a line for the list of subcommands (``summary``).
        example: a command line.
        keys: the parameters that it uses.
        fixed: parameters that it sets itself.
        preset: the values of what nobody names; None are those that suit the config.
        save_path: what that parameter is here; empty where it is the folder of a new result.
        options: those that are no parameters, which the action takes by name: name → what stands for the value (empty for an
            option without one), a few words.
    """

    action: str
    description: str
    summary: str = ""
    example: str = ""
    keys: tuple[str, ...] = tuple(FIELDS)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    preset: Preset | None = None
    save_path: str = ""
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def run(self, arguments: Sequence[str], prog: str | None = None) -> None:
        """Read the command line and the config, and do it; ``prog`` is how a subcommand is called."""
        parser = self.make_parser(prog, full=prog is None or "--help-all" in arguments)
        words = {word.split("=")[0] for word in arguments}
        with renaming({key: f"--{alias} ({key})" for alias, key in ALIASES.items() if f"--{alias}" in words}):
            params, options = self.read_arguments(parser, arguments)
            silence_libraries(load=True)
            # Torch and the like are imported here, so that help is fast.
            from replaceme.pipeline import actions
            from replaceme.running.processes import run_in_processes

            action = getattr(actions, self.action)
            # The others compute in one process.
            count = params.processes if action in (actions.prune, actions.profile) else 1
            run_in_processes(count, lambda: action(params, **options), params.device)

    def make_parser(self, prog: str | None, full: bool) -> Parser:
        """Return the parser, whose help has all parameters with their sentences if it is ``full``; ``prog`` as of ``run``."""
        width = min(112, shutil.get_terminal_size((112, 24)).columns)
        parser = Parser(
            prog=prog, usage="%(prog)s [--config FILE] [--key value …]", description=fill(self.description, width),
            epilog=f"example:\n  {self.example}" if self.example else None, allow_abbrev=False, add_help=False,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=width),
        )  # fmt: skip
        for title, keys in GROUPS.items():
            group = parser.add_argument_group(title)
            for key in (key for key in keys if key in self.keys):
                names = [*(alias for alias, name in ALIASES.items() if name == key), key]
                _add_option(group, key, names if full else names[:1], _metavar(key), self._describe(key, full))
                _add_option(group, key, [] if full else names[1:])
        group = parser.add_argument_group("this command alone")
        for name, (metavar, words) in self.options.items():
            _add_option(group, name, [name] if metavar else [], metavar, words)
        group = parser.add_argument_group("general")
        _add_option(group, "config", ["config"], "FILE", "YAML file of parameters; what is given here overrides it")
        _add_option(group, "preset", ["preset"], "NAME", f"values of what is not named: {', '.join(PRESETS)}")
        for name in PUBLISHED_KEYS:
            _add_option(group, name, [name])
        for name in (name for name, (metavar, _) in self.options.items() if not metavar):
            group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=self.options[name][1])
        group.add_argument("--debug", action="store_true", help="show the traceback of an error")
        group.add_argument("--help", "-h", action="help", help="the common options" if prog else "show this")
        if prog:
            group.add_argument("--help-all", action="help", help="all options, with the whole description of each")
        return parser

    def read_arguments(self, parser: Parser, arguments: Sequence[str]) -> tuple[Params, dict[str, Any]]:
        """Return the parameters of a command line and its config, and the values of the other options.

        Raises:
            ParameterError: names each word that is no option.
        """
        known, unknown = parser.parse_known_args(arguments)
        del known.debug
        problems = self._refuse_words(unknown, parser.prog)
        given: dict[str, Any] = {}
        for name, value in vars(known).items():
            given[name] = value if name in (*self.options, "config", "preset") else parse_option(name, value)
        for key, value in self.fixed.items():
            if given.get(key, value) != value:
                problems.append(f"{key}: this command sets it to {value}; use run_replaceme for {given[key]}.")
        if problems:
            raise ParameterError(problems)
        config = Path(given.pop("config")) if "config" in given else None
        options = {name: given.pop(name) for name in self.options if name in given}
        params = read_params(config, {**given, **self.fixed, **launched_processes()}, METHODS, self.preset)
        if self.action == "prune":
            # Whether the command line or the config says how much goes.
            stated = {**read_config(config)[0], **given} if config else given
            options["has_size"] = any(stated.get(key) is not None for key in SIZE_KEYS)
        return params, options

    def _refuse_words(self, words: Sequence[str], prog: str) -> list[str]:
        """Return a sentence for each word that is no option."""
        names = [*self.keys, *self.options, *(alias for alias, key in ALIASES.items() if key in self.keys), *PUBLISHED_KEYS]
        problems = []
        for word in (word for word in words if word.startswith("--")):
            name = word.removeprefix("--").split("=")[0]
            if (key := ALIASES.get(name, name)) in FIELDS:
                problems.append(f"command line: {key}: {prog} has no use for it; see --help-all.")
            else:
                problems.append(f"command line: '{word}' is not an option{nearest(name, names)}; see --help.")
        return problems or [f"command line: '{word}' belongs to no option; see --help." for word in words[:1]]

    def _describe(self, key: str, full: bool) -> str:
        """Return a parameter's sentence, or its few words, with the values that it can have and its default."""
        info, choices = FIELDS[key], ", ".join(_choices(key))
        if key == "save_path" and self.save_path:
            return self.save_path
        if not full and not info.title:
            return argparse.SUPPRESS
        words = str(info.description if full else info.title)
        if choices and _metavar(key) == key.upper():
            words += f" One of {choices}." if full else f": {choices}"
        if full and key in USERS:
            words += f" ({describe_users(USERS[key])})"
        default = info.default if self.preset == "published" else RECOMMENDED.get(key, info.default)
        default = "13% of the layers" if key == "layers_to_skip" else default
        return f"{words} [{'MODEL-METHOD-LAYERS' if key == 'save_path' else _describe_value(default)}]"


def _add_option(group: Any, key: str, names: Sequence[str], metavar: str | None = None, words: str = argparse.SUPPRESS) -> None:
    """Add an option of these names for a key, if there are any; without words, one that the help leaves out."""
    if names:
        options = [f"--{name}" for name in names]
        group.add_argument(*options, dest=key, default=argparse.SUPPRESS, metavar=metavar, help=words.replace("%", "%%"))


def parse_option(key: str, text: str) -> Any:
    """Return the value of ``--key text``, as it would stand in a config file."""
    value = parse_value(text)
    if value is not None and str in _types(key):
        return text
    if key == "dataset" and not isinstance(value, list | dict):
        return text
    if key == "tasks" and isinstance(value, str):
        return [part.strip() for part in text.split(",") if part.strip()]
    return value


def _types(key: str) -> tuple[Any, ...]:
    """Return the type of a parameter, and its members; (None,) for a key that only the published program has."""
    annotation = FIELDS[key].annotation if key in FIELDS else None
    return (annotation, *get_args(annotation))


def _choices(key: str) -> tuple[str, ...]:
    """Return the values that a parameter can have, if they are few."""
    if key in ("method", "selection"):
        return tuple(METHODS if key == "method" else CRITERIA)
    if bool in _types(key):
        return "true", "false"
    return next((get_args(each) for each in _types(key) if get_origin(each) is Literal), ())


def _metavar(key: str) -> str:
    """Return what stands for a value in the help: its choices, unless they are many, or its kind."""
    if choices := _choices(key):
        return listed if len(listed := "|".join(choices)) <= LONGEST_CHOICES else key.upper()
    return METAVARS.get(key) or ("N" if int in _types(key) else "X" if float in _types(key) else "TEXT")


def _describe_value(value: Any) -> str:
    """Return a default in the help."""
    if isinstance(value, tuple | list):
        names = [str(getattr(each, "name", each)) for each in value]
        return ", ".join(names if len(names) <= 4 else [*names[:2], f"and {len(names) - 2} more"])
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else format_value(value)


def _run_script(action: str, description: str, save_path: str = "", **fixed: Any) -> NoReturn:
    options = {} if action == "evaluate" else OVERWRITE
    command = Command(
        action=action, description=description, fixed=fixed, preset="published", save_path=save_path, options=options
    )  # fmt: skip
    run_command(command.run)


def run_replaceme() -> NoReturn:
    """Prune a model, save it and score it."""
    _run_script("prune", "Prune a language model: choose a block of layers, fit its replacement, save and score the result.")


def run_uidl() -> NoReturn:
    """Prune a model by dropping the block."""
    words = "Prune a language model by UIDL: drop the block of layers with the smallest angular distance."
    _run_script("prune", words, method="uidl")


def evaluate_model() -> NoReturn:
    """Score a model."""
    _run_script("evaluate", "Score the model at model_path; save_path is a JSON file for the scores.", SCORES_PATH)


def get_distance_analysis() -> NoReturn:
    """Profile a model."""
    words = "Measure the angular distance between all pairs of layers, and what each number of layers costs."
    _run_script("profile", words, DISTANCES_PATH)


def get_lt_with_lstsq() -> NoReturn:
    """Fit a transform."""
    words = "Fit the linear transform of the best block by least squares and save it, without a model."
    _run_script("prune", words, EDITS_PATH, method="lstsq", save_transform_only=True)


def get_lt_with_solvers() -> NoReturn:
    """Fit a transform by an iterative solver."""
    words = "Fit the linear transform of the best block by an iterative solver and save it, without a model."
    _run_script("prune", words, EDITS_PATH, method="cosine", save_transform_only=True)
