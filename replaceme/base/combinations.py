"""Which parameters go together: what can't be done is refused by name, and what has no effect is said to have none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]

SELECTIONS = ("angular", "residual", "loss", "influence", "greedy")
TRANSFORMS = ("dense", "diagonal", "two_vectors", "triangular", "orthogonal", "refit", "joint", "channels")
# Those that solve for weights instead of a map.
NEW_WEIGHTS = ("refit", "joint", "channels")


def _of(*methods: str) -> Callable[[Values], bool]:
    """Return what tells whether the method is one of these."""
    return lambda values: values["method"] in methods


_iterates = _of("cosine")


def without_attention(values: Values) -> bool:
    return values["method"] == "llm_streamline" and values["llm_streamline_form"] == "mlp"


def _steps(values: Values) -> bool:
    return _iterates(values) and values["solver"] == "adam"


def refits(values: Values) -> bool:
    return values["transform"] in NEW_WEIGHTS


def repairs(values: Values) -> bool:
    return bool(values["repair"])


def heals(values: Values) -> bool:
    return bool(values["heal_epochs"])


# Parameters that not every setting uses: what they belong to, when they have an effect.
EFFECTS: Mapping[str, tuple[str, Callable[[Values], bool]]] = {
    "alpha": ("methods lstsq, cosine and ghosted", _of("lstsq", "cosine", "ghosted")),
    "laco_layers": ("method laco", _of("laco")),
    "laco_interval": ("method laco", _of("laco")),
    "laco_threshold": ("method laco", _of("laco")),
    "linearpatch_form": ("method linearpatch", _of("linearpatch")),
    "ghosted_weighted": ("method ghosted", _of("ghosted")),
    "llm_streamline_form": ("method llm_streamline", _of("llm_streamline")),
    "llm_streamline_learning_rate": ("method llm_streamline", _of("llm_streamline")),
    "llm_streamline_epochs": ("method llm_streamline", _of("llm_streamline")),
    "plain": (
        "methods slicegpt, llm_pruner and (in form mlp) llm_streamline",
        lambda values: values["method"] in ("slicegpt", "llm_pruner") or without_attention(values),
    ),
    "refit_ridge": ("transform refit, joint or channels", refits),
    "repair_ridge_attention": ("repair", repairs),
    "repair_ridge_mlp": ("repair", repairs),
    "heal_learning_rate": ("heal_epochs above 0", heals),
    "loss": ("method cosine", _iterates),
    "accurate": ("loss cosine of method cosine", lambda values: _iterates(values) and values["loss"] == "cosine"),
    "l1_ratio": ("loss elastic_net of method cosine", lambda values: _iterates(values) and values["loss"] == "elastic_net"),
    "solver": ("method cosine", _iterates),
    "start": ("method cosine", _iterates),
    "learning_rate": ("solver adam of method cosine", _steps),
    "epochs": ("solver adam of method cosine", _steps),
    "tokens_per_step": ("solver adam of method cosine", _steps),
    "max_iterations": (
        "solvers lbfgs, cg and trust_region of method cosine",
        lambda values: _iterates(values) and values["solver"] != "adam",
    ),
}


def has_effect(key: str, values: Values) -> bool:
    """Return whether a parameter changes the result, with all parameters' values."""
    return key not in EFFECTS or EFFECTS[key][1](values)


def without_effect(given: Values, values: Values, defaults: Values) -> list[str]:
    """Return a sentence for each parameter that was given, isn't at its default, and has no effect."""
    return [
        f"{key} belongs to {EFFECTS[key][0]} and is ignored"
        for key in EFFECTS
        if key in given and values[key] != defaults[key] and not has_effect(key, values)
    ]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The settings that a method takes.

    Attributes:
        words: what it does with what goes, behind "which"; for the sentence that refuses a setting.
        transforms: the transforms that it can make of what takes the block's place.
        selections: the criteria, beside its own, by which its cut can be chosen.
        several: whether it can remove several blocks (``num_A``).
        repairs: whether the kept layers behind can be repaired, and healed, on top of it.
        packed: whether a calibration model with 4-bit weights will do.
        refusals: a sentence for each setting, of all parameters' values, that has no place in it for other reasons.
    """

    words: str = "puts nothing in the block's place"
    transforms: tuple[str, ...] = ("dense",)
    selections: tuple[str, ...] = SELECTIONS
    several: bool = True
    repairs: bool = True
    packed: bool = True
    refusals: Callable[[Values], list[str]] = lambda values: []


def refusals(values: Values, method: Limits) -> list[str]:
    """Return a sentence for each setting that has no place in a method, or would not be what its name says.

    Args:
        values: all parameters' values.
        method: the method that they name.
    """
    selection, several = values["selection"], values["num_A"] > 1
    tolerates, measures = values["tolerated_loss"] is not None, "loss" in method.selections
    wrong = {
        "transform": (values["transform"] not in method.transforms, "dense"),
        "selection": (selection is not None and selection not in method.selections, " or ".join(["null", *method.selections])),
        "tolerated_loss": (tolerates and not measures, "null"),
        "num_A": (several and not method.several, "1"),
        "repair": (values["repair"] and not method.repairs, "false"),
        "heal_epochs": (heals(values) and not method.repairs, "0"),
        "use_4bit": (values["use_4bit"] and not method.packed, "false"),
    }
    return (
        [
            f"{key}: {_shown(values[key])} has no place in method {values['method']}, which {method.words}; use {right}."
            for key, (refused, right) in wrong.items()
            if refused
        ]
        + (
            [f"tolerated_loss: needs selection: loss, which measures it, and that is {_shown(selection)}."]
            if tolerates and measures and selection != "loss"
            else []
        )
        + _healing_refusals(values)
        + method.refusals(values)
    )


def _healing_refusals(values: Values) -> list[str]:
    """Return a sentence for each setting that weights can't be trained with."""
    if not heals(values):
        return []
    wrong = {
        "use_4bit: packs the weights that heal_epochs trains; use false.": values["use_4bit"],
        "device_map: heal_epochs trains on one device; use null.": values["device_map"] is not None,
        "dtype: float16 is too short for the gradients of heal_epochs; use bfloat16 or float32.": values["dtype"] == "float16",
    }
    return [sentence for sentence, refused in wrong.items() if refused]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
