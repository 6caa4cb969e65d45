"""The published program's names for our parameters, so that its config files run unchanged, and the presets.

Keys whose value asks for nothing (``diag: false``) are dropped. A value that asks for something not offered here is refused by
name. Keys that only mattered to the published program are ignored, with a log line.

A preset says what a run takes for the parameters that nobody names. ``published`` is what the published program does: the
defaults in ``replaceme.base.parameters``. ``recommended`` is what we found to keep more of the model. Its values stand here
alone; the pipeline's params.yaml states them, and a test holds the two equal. ``quick`` is the same on a quarter of the text,
with fewer scores: a first result. ``healed`` takes text of the model's own too, and is trained.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from replaceme.base.entries import SELF, is_own_text
from replaceme.base.errors import ParameterError, quote

# Key → the transform that it asks for.
STRUCTURES = {"diag": "diagonal", "two_vectors": "two_vectors", "thri": "triangular"}
# scipy's spellings, in lower case.
SOLVERS = {"l-bfgs": "lbfgs", "l-bfgs-b": "lbfgs", "trust-ncg": "trust_region"}
# Paths of results, which are known by their content here.
PATHS = ("distances_path", "activations_save_path")
# The keys that only the published program has.
PUBLISHED_KEYS = ("dataset_subset", *PATHS, *STRUCTURES)
# All keys that its configs can have.
PROGRAM_KEYS = frozenset(
    (
        "method", "model_path", "dataset", "dataset_column", "dataset_size", "batch_size", "max_length", "use_4bit",
        "layers_to_skip", "min_distance_layer", "merge_consecutive", "alpha", "num_A", "save_path", "save_transform_only",
        "solver", "loss", "accurate", "tasks", "token", *PUBLISHED_KEYS,
    )
)  # fmt: skip
# What its task ``default`` stands for: its table's tasks (ReplaceMe, arXiv 2505.02819, table 1); they need the hub.
PUBLISHED_TASKS = ("boolq", "hellaswag", "piqa", "mmlu")

# Tokens that a pass of healing had over the recommended text, when it was counted in passes.
EPOCH_TOKENS = 64_000

Preset = Literal["recommended", "quick", "healed", "published"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
# As in a config file, where they differ from the published values.
RECOMMENDED: Mapping[str, Any] = {
    "dataset": ["wikipedia-sample", "finance-answers", "python-code"],
    "dataset_size": 64,
    "pack": True,
    "batch_size": 2,
    "dtype": "auto",
    "eval_dtype": "auto",
    "layers_to_skip": 4,
    "selection": "loss",
    "transform": "channels",
    "repair": True,
    "keep_if_better": True,
    "tasks": [
        "wikipedia", "bbc_news", "gutenberg_fiction", "python_code", "finance_answers", "medical_abstracts",
        "convention_speeches", "wikipedia_last_word", "wikipedia_continuation", "retrieval_exact",
    ],
    "eval_tokens": 4096,
}  # fmt: skip
# What these presets change of the recommended values.
CHANGES: Mapping[Preset, Mapping[str, Any]] = {
    "quick": {"dataset_size": 16, "tasks": ["bbc_news", "medical_abstracts", "wikipedia_last_word"], "eval_tokens": 2048},
    "healed": {
        "dataset": [*RECOMMENDED["dataset"], "self"],
        "heal_dataset": [{"wikipedia-sample": 2}, "finance-answers", "python-code"],
        "heal_tokens": 250_000,
        "heal_tokens_per_step": 2048,
        "heal_learning_rate": 2e-4,
    },
}
# The recommended cut and its replacement belong to the recommended method. Any other one stays what was published of it.
RECOMMENDED_METHOD = "lstsq"
OF_THE_METHOD = ("selection", "transform", "repair")


def translate(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return our parameters, notes for the log, and problems.

    Args:
        raw: keys and values from a config file or the command line.
    """
    ours, notes, problems = dict(raw), list[str](), list[str]()
    if "token" in ours:
        ours.pop("token")
        problems.append("token: secrets don't belong in parameters; set the environment variable HF_TOKEN.")
    if (split := ours.pop("dataset_subset", None)) is not None:
        if (named := ours.get("dataset_split")) not in (None, split):
            problems.append(f"dataset_subset: says {quote(split)} and dataset_split {quote(named)}; keep one.")
        ours["dataset_split"] = split
        notes.append("dataset_subset is read as dataset_split, as the published program does")
    if "layers" in ours:
        if (named := ours.get("layers_to_skip", ours["layers"])) != ours["layers"]:
            problems.append(f"layers: says {quote(ours['layers'])} and layers_to_skip {quote(named)}; keep one.")
        ours["layers_to_skip"] = ours.pop("layers")
    for key in PATHS:
        if ours.pop(key, None) is not None:
            notes.append(f"{key} is ignored: results are cached by content, never read from a path")
    _translate_structure(ours, notes, problems)
    if isinstance(epochs := ours.get("heal_epochs"), int) and not isinstance(epochs, bool):
        del ours["heal_epochs"]
        ours = {"heal_tokens": epochs * EPOCH_TOKENS} | ({"heal_weights": "outputs"} if epochs else {}) | ours
        notes.append(f"heal_epochs: {epochs} is read as heal_tokens: {ours['heal_tokens']}, of the last linears")
    for key in ("solver", "loss"):
        if ours.get(key, "") is None:  # null in the published files means not set
            ours.pop(key)
    if isinstance(solver := ours.get("solver"), str):
        ours["solver"] = SOLVERS.get(solver.lower(), solver.lower())
        if ours["solver"] == "newton-cg":
            ours.pop("solver")
            problems.append(f"solver: {solver} is not offered; trust_region uses the same second derivatives, cg none.")
        elif ours["solver"] != solver.lower():
            notes.append(f"solver {solver} is read as {ours['solver']}")
    if "tasks" in ours:
        ours["tasks"] = _list_tasks(ours["tasks"])
    return ours, notes, problems


def drop_replaced(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's keys without those that the command line overrides under another name."""
    replaced = STRUCTURES.keys() & given.keys()
    if "transform" in given or any(given[key] is True for key in replaced):
        replaced = {"transform", *STRUCTURES}
    if {"dataset_split", "dataset_subset"} & given.keys():
        replaced = {*replaced, "dataset_split", "dataset_subset"}
    return {key: value for key, value in file.items() if key not in replaced}


def _translate_structure(ours: dict[str, Any], notes: list[str], problems: list[str]) -> None:
    """Replace the keys of a map's structure by ``transform``."""
    given = {key: value for key in STRUCTURES if (value := ours.pop(key, None)) is not None}
    problems += [
        f"{key}: must be true or false, not {quote(value)}." for key, value in given.items() if not isinstance(value, bool)
    ]
    asked = [key for key, value in given.items() if value is True]
    if len(asked) > 1:
        problems.append(f"{asked[0]}: is true and so is {asked[1]}, but a transform has one structure; keep one.")
    elif asked:
        transform = STRUCTURES[asked[0]]
        if (named := ours.get("transform", transform)) != transform:
            problems.append(f"{asked[0]}: asks for transform {transform}, and transform says {quote(named)}; keep one.")
        ours["transform"] = transform
        notes.append(f"{asked[0]} is read as transform: {transform}")


def _list_tasks(tasks: Any) -> Any:
    """Return a value of ``tasks`` as a list: the published form is one mapping, ``{piqa: {fewshots: 0}, default: null}``."""
    if tasks is None:
        return []
    if isinstance(tasks, str):
        tasks = [tasks]
    if isinstance(tasks, Mapping):
        tasks = [{name: options} for name, options in tasks.items()]
    if not isinstance(tasks, list | tuple):
        return tasks
    listed: list[Any] = []
    for entry in tasks:
        if entry == "default":
            listed += PUBLISHED_TASKS
        elif isinstance(entry, Mapping) and [*entry] == ["default"]:
            listed += [{name: entry["default"]} for name in PUBLISHED_TASKS]
        else:
            listed.append(entry)
    return listed


def choose_preset(
    file: Mapping[str, Any], given: Mapping[str, Any], default: Preset | None, file_name: str
) -> tuple[Preset, str]:
    """Return the preset of a run, and a clause that says why.

    Args:
        file: the config file's content; empty without one.
        given: the command line's values.
        default: where neither names one; None is published for a config of the published program, which is one that names a
            method and only keys which that program has, and recommended otherwise.
        file_name: for the clause.

    Raises:
        ParameterError: there is no such preset, or it would set nothing, as the file states every parameter that it sets.
    """
    for origin, values in (("command line", given), (file_name, file)):
        if "preset" in values:
            named = values["preset"]
            if named not in PRESETS:
                raise ParameterError(f"{origin}: preset: must be one of {', '.join(PRESETS)}, not {quote(named)}.")
            if file.keys() >= RECOMMENDED.keys():
                stated = ", ".join(RECOMMENDED)
                raise ParameterError(
                    f"{origin}: preset: {named} would set nothing, as {file_name} states all of {stated}; change these."
                )
            return named, f"{origin} says so"
    if default:
        return default, "the default here"
    if "method" in file and file.keys() <= PROGRAM_KEYS:
        return "published", f"{file_name} names only keys of the published program; preset: recommended keeps more"
    return "recommended", "the default"


def preset_values(preset: Preset, method: object, named: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a preset sets with a method, as in a config file.

    Args:
        preset: the preset.
        method: the method.
        named: what the user sets. Who names a text for the calibration means it for the healing too, unless it is the model's
            own, which no training has alone.
    """
    if preset == "published":
        return {}
    own = method == RECOMMENDED_METHOD
    recommended = {key: value for key, value in RECOMMENDED.items() if own or key not in OF_THE_METHOD}
    values = {**recommended, **CHANGES.get(preset, {})}
    if not is_own_text((named or {}).get("dataset", SELF)):
        values.pop("heal_dataset", None)
    return values
