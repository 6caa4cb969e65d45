"""The two presets: what a run takes for the parameters that nobody names.

``published`` is what the published program does, for the parameters that it has: the defaults in ``replaceme.base.parameters``.
``recommended`` is what we found to keep more of the model. Its values stand here alone; the pipeline's params.yaml states them,
and a test holds the two equal.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from replaceme.base.errors import ParameterError, excerpt, shown
from replaceme.base.published import PUBLISHED_KEYS

Preset = Literal["recommended", "published"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

# As in a config file, where they differ from the published values.
RECOMMENDED: Mapping[str, Any] = {
    "dataset": ["wikipedia-sample", "finance-answers", "python-code", "self"],
    "dataset_size": 80,
    "pack": True,
    "batch_size": 2,
    "selection": "loss",
    "transform": "channels",
    "repair": True,
    "tasks": [
        "wikipedia", "bbc_news", "gutenberg_fiction", "python_code", "finance_answers", "medical_abstracts",
        "convention_speeches", "wikipedia_last_word", "wikipedia_continuation", "retrieval_exact",
    ],
    "eval_tokens": 8192,
}  # fmt: skip
# The recommended cut and what takes its place belong to the recommended method. Any other one stays what was published of it.
RECOMMENDED_METHOD = "lstsq"
OF_THE_METHOD = ("selection", "transform", "repair")
# The keys that a config of the published program can have.
PROGRAM_KEYS = frozenset(
    (
        "method", "model_path", "dataset", "dataset_column", "dataset_size", "batch_size", "max_length", "use_4bit",
        "layers_to_skip", "min_distance_layer", "merge_consecutive", "alpha", "num_A", "save_path", "save_transform_only",
        "solver", "loss", "accurate", "tasks", "token", *PUBLISHED_KEYS,
    )
)  # fmt: skip


def preset_of(file: Mapping[str, Any], given: Mapping[str, Any], default: Preset | None, place: str) -> tuple[Preset, str]:
    """Return the preset of a run, and a clause that says why.

    Args:
        file: the config file's content; empty without one.
        given: the command line's values.
        default: where neither names one; None is published for a config of the published program, which is one that names a
            method and only keys which that program has, and recommended otherwise.
        place: the file, for the clause.

    Raises:
        ParameterError: there is no such preset, or it would set nothing, as the file states every parameter that it sets.
    """
    for origin, values in (("command line", given), (place, file)):
        if "preset" not in values:
            continue
        named = values["preset"]
        if named not in PRESETS:
            raise ParameterError(f"{origin}: preset: must be recommended or published, not {shown(named)}.")
        if file.keys() >= RECOMMENDED.keys():
            raise ParameterError(
                f"{origin}: preset: {named} would set nothing, as {place} states all of {', '.join(RECOMMENDED)}; change these."
            )
        return named, f"{origin} says so"
    if default:
        return default, "the default here"
    if "method" in file and file.keys() <= PROGRAM_KEYS:
        return "published", f"{excerpt(place)} names only keys of the published program; preset: recommended keeps more"
    return "recommended", "the default"


def preset_values(preset: Preset, method: object) -> dict[str, Any]:
    """Return what a preset sets with a method, as in a config file."""
    if preset == "published":
        return {}
    own = method == RECOMMENDED_METHOD
    return {key: value for key, value in RECOMMENDED.items() if own or key not in OF_THE_METHOD}
