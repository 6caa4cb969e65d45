"""Which parameters go together: impossible combinations are refused by name, and parameters without effect are reported.

The parameters of a single method and its refusals stand in the method's own file (``replaceme.methods``), as a subclass of
``Settings`` and its ``Limits``, which these functions take.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

Values = Mapping[str, Any]

Transform = Literal["dense", "diagonal", "two_vectors", "triangular", "orthogonal", "refit", "joint", "channels"]
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)
# Transforms that solve for new weights instead of a map.
NEW_WEIGHTS = ("refit", "joint", "channels")


# The stages that ask a method for its parameters.
Asking = Literal["select", "plan", "solve", "repair"]


@dataclass(frozen=True)
class Use:
    """How a method uses a parameter.

    Attributes:
        stages: the stages whose output the parameter changes.
        words: the setting of the method that it belongs to ("solver adam"); empty if it always has an effect.
        when: whether it has an effect, given the values of all parameters.
    """

    stages: tuple[Asking, ...] = ()
    words: str = ""
    when: Callable[[Values], bool] = lambda values: True


class Settings(BaseModel):
    """The parameters of one method. Each field is ``Annotated`` with its ``Use``; names are unique over all methods."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    @classmethod
    def of(cls, params: BaseModel) -> Self:
        """Return this method's own parameters, taken from all."""
        return cls.model_validate(params.model_extra or {})

    @classmethod
    def uses(cls) -> dict[str, Use]:
        """Return each parameter's use."""
        return {
            name: next((each for each in info.metadata if isinstance(each, Use)), Use())
            for name, info in cls.model_fields.items()
        }


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The settings that a method accepts.

    Attributes:
        settings: its own parameters.
        shared: parameters that it shares with other methods, and their use here.
        words: what the method does, as a clause after "which", for the sentence that refuses a setting.
        transforms: the values of ``transform`` that it accepts.
        selections: the values of ``selection`` that it accepts, besides null (its own criterion).
        several: whether it can remove several blocks (``num_A``).
        repairs: whether the kept layers after the cut can be repaired and healed.
        packed: whether the calibration model may have 4-bit weights.
        refusals: takes the values of all parameters and returns a sentence for each one refused for another reason.
    """

    settings: type[Settings] = Settings
    shared: Mapping[str, Use] = field(default_factory=dict)
    words: str = "puts nothing in the block's place"
    transforms: tuple[str, ...] = ("dense",)
    selections: tuple[str, ...] = ()
    several: bool = True
    repairs: bool = True
    packed: bool = True
    refusals: Callable[[Values], list[str]] = lambda values: []


Methods = Mapping[str, Limits]


def refits(values: Values) -> bool:
    """Return whether the transform solves for new weights instead of a map."""
    return values["transform"] in NEW_WEIGHTS


def repairs(values: Values) -> bool:
    """Return whether the kept layers after the cut are repaired."""
    return bool(values["repair"])


def heals(values: Values) -> bool:
    """Return whether the result is healed (trained)."""
    return bool(values["heal_epochs"])


# The setting that a parameter belongs to, and whether the parameter has an effect.
Effect = tuple[str, Callable[[Values], bool]]
# Parameters that belong to no method and have an effect only in some settings.
EFFECTS: Mapping[str, Effect] = {
    "refit_ridge": ("transform refit, joint or channels", refits),
    "repair_ridge_attention": ("repair", repairs),
    "repair_ridge_mlp": ("repair", repairs),
    "heal_learning_rate": ("heal_epochs above 0", heals),
}


def effects_of(methods: Methods) -> dict[str, Effect]:
    """Return the effects of the methods' parameters, and ``EFFECTS``."""
    users: dict[str, dict[str, Use]] = {}
    for name, method in methods.items():
        for key, use in {**method.shared, **method.settings.uses()}.items():
            users.setdefault(key, {})[name] = use
    return {key: _effect(uses) for key, uses in users.items()} | dict(EFFECTS)


def _effect(uses: Mapping[str, Use]) -> Effect:
    def when(values: Values) -> bool:
        use = uses.get(values["method"])
        return use is not None and use.when(values)

    if len(uses) == 1:
        ((name, use),) = uses.items()
        return (f"{use.words} of method {name}" if use.words else f"method {name}"), when
    *others, last = (f"{name} (with {use.words})" if use.words else name for name, use in uses.items())
    return f"methods {', '.join(others)} and {last}", when


def without_effect(given: Values, values: Values, defaults: Values, effects: Mapping[str, Effect]) -> list[str]:
    """Return a sentence for each given parameter that differs from its default and has no effect."""
    return [
        f"{key} belongs to {words} and is ignored"
        for key, (words, when) in ((key, effects[key]) for key in given if key in effects)
        if values[key] != defaults[key] and not when(values)
    ]


def own_fields(methods: Methods) -> dict[str, FieldInfo]:
    """Return the methods' own parameters, by name."""
    return {name: info for method in methods.values() for name, info in method.settings.model_fields.items()}


def refusals(values: Values, method: Limits) -> list[str]:
    """Return a sentence for each setting that the method refuses.

    Args:
        values: all parameters' values.
        method: the limits of the method that ``values`` names.
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
            if tolerates and measures and selection != "loss" and values["remove"] is None
            else []
        )
        + (
            ["remove: and tolerated_loss each say how much goes; use one, and null for the other."]
            if tolerates and values["remove"] is not None
            else []
        )
        + _healing_refusals(values)
        + _processes_refusals(values)
        + method.refusals(values)
    )


def _healing_refusals(values: Values) -> list[str]:
    """Return a sentence for each setting that makes healing impossible."""
    if not heals(values):
        return []
    wrong = {
        "use_4bit: packs the weights that heal_epochs trains; use false.": values["use_4bit"],
        "device_map: heal_epochs trains on one device; use null.": values["device_map"] is not None,
        "dtype: float16 is too short for the gradients of heal_epochs; use bfloat16 or float32.": values["dtype"] == "float16",
    }
    return [sentence for sentence, refused in wrong.items() if refused]


def _processes_refusals(values: Values) -> list[str]:
    """Return a sentence for each setting that several processes can't share."""
    if values["processes"] == 1:
        return []
    wrong = {
        "use_4bit: packs the weights for one process; use false, or processes: 1.": values["use_4bit"],
        "device_map: spreads the model over GPUs, of which each process has one; use null, or processes: 1.": values[
            "device_map"
        ]
        is not None,
        f"device: {values['device']} is one GPU, and each process has its own; use cuda or auto, or processes: 1.": ":"
        in values["device"],
    }
    return [sentence for sentence, refused in wrong.items() if refused]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
