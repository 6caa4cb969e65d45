"""Which parameters go together: which combinations are refused, and which parameters have no effect with others.

What only one method's parameters say stands in that method's file (``replaceme.methods``): a subclass of ``Settings``, and the
fields that ``Limits`` has. The functions here take these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict

Values = Mapping[str, Any]

Transform = Literal["dense", "diagonal", "two_vectors", "triangular", "orthogonal", "refit", "joint", "channels"]
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)
# Transforms that solve for new weights instead of a map; and those of them after which the layer before the cut is solved for
# again, on its features after the first solution.
NEW_WEIGHTS = ("refit", "joint", "channels")
STEPWISE = ("joint", "channels")

# The stages that ask a method for its parameters.
MethodStage = Literal["select", "plan", "solve", "repair"]


@dataclass(frozen=True)
class Use:
    """Where a parameter matters.

    Attributes:
        stages: the stages whose output it changes.
        setting: another parameter, with whose ``values`` this one has an effect; empty if it always has one.
        values: of that parameter; none are given for any that is set, as ``repair`` is by true and ``heal_tokens`` above 0.
    """

    stages: tuple[MethodStage, ...] = ()
    setting: str = ""
    values: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The setting that it belongs to, as ``solver adam``; empty if it always has an effect."""
        return f"{self.setting} {' or '.join(self.values)}".strip()

    def has_effect(self, given: Values) -> bool:
        """Return whether it has an effect, with these values of all parameters."""
        if not self.setting:
            return True
        return given[self.setting] in self.values if self.values else bool(given[self.setting])


class Settings(BaseModel):
    """The parameters of one method: each ``Annotated`` with its ``Use``, with a sentence below it and a name of its own."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def of(cls, params: BaseModel) -> Self:
        """Return this method's own parameters, taken from all."""
        return cls.model_validate(params.model_extra or {})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The settings that a method accepts.

    Attributes:
        settings: its own parameters.
        common: parameters of all methods that matter to this one, and their use here.
        words: what the method does, as a clause after "which", for the sentence that refuses a setting.
        transforms: the values of ``transform`` that it accepts.
        selections: the values of ``selection`` that it accepts, besides null (its own criterion).
        several: whether it can remove several blocks (``num_A``).
        repairs: whether the kept layers after the cut can be repaired and healed.
        packed: whether the calibration model may have 4-bit weights.
        refuses: returns a sentence for each setting that it refuses for another reason, given the values of all parameters.
            ``Method.check`` says what it needs of a model.
    """

    settings: type[Settings] = Settings
    common: Mapping[str, Use] = field(default_factory=dict)
    words: str = "puts nothing in the block's place"
    transforms: tuple[str, ...] = ("dense",)
    selections: tuple[str, ...] = ()
    several: bool = True
    repairs: bool = True
    packed: bool = True
    refuses: Callable[[Values], list[str]] = lambda values: []

    @property
    def uses(self) -> dict[str, Use]:
        """The parameters that belong to this method, common ones and its own, with their use."""
        own = self.settings.model_fields.items()
        return {**self.common, **{key: use for key, info in own for use in info.metadata if isinstance(use, Use)}}


Methods = Mapping[str, Limits]
# Parameters of all methods that have an effect only with another one.
USES: Mapping[str, Use] = {
    "refit_ridge": Use(setting="transform", values=NEW_WEIGHTS),
    "repair_ridge_attention": Use(setting="repair"),
    "repair_ridge_mlp": Use(setting="repair"),
    "heal_dataset": Use(setting="heal_tokens"),
    "heal_weights": Use(setting="heal_tokens"),
    "heal_learning_rate": Use(setting="heal_tokens"),
    "heal_tokens_per_step": Use(setting="heal_tokens"),
    "heal_rank": Use(setting="heal_weights", values=("lora",)),
    "heal_optimizer": Use(setting="heal_weights", values=("all", "after_cut", "outputs")),
}
# The methods that a parameter belongs to, by name, with their use of it; under "" that of all methods.
Users = Mapping[str, Use]


def users_of(methods: Methods) -> dict[str, Users]:
    """Return the users of each parameter that has an effect only in some settings."""
    users: dict[str, dict[str, Use]] = {}
    for name, method in methods.items():
        for key, use in method.uses.items():
            users.setdefault(key, {})[name] = use
    return {**users, **{key: {"": use} for key, use in USES.items()}}


def has_effect(users: Users, given: Values) -> bool:
    """Return whether a parameter with these users has an effect, with these values of all parameters."""
    use = users.get("") or users.get(given["method"])
    return use is not None and use.has_effect(given)


def describe_users(users: Users) -> str:
    """Return the settings that a parameter with these users belongs to, as ``solver adam of method cosine``."""
    if len(users) == 1:
        ((name, use),) = users.items()
        return " of ".join(filter(None, (use.words, name and f"method {name}")))
    *names, last = (f"{name} (with {use.words})" if use.words else name for name, use in users.items())
    return f"methods {', '.join(names)} and {last}"


def refusals(values: Values, method: Limits) -> list[str]:
    """Return a sentence for each setting that doesn't go with the others.

    Args:
        values: all parameters' values.
        method: the limits of the method that ``values`` names.
    """
    name, transform, selection, device = values["method"], values["transform"], values["selection"], values["device"]
    packed, spread = values["use_4bit"], values["device_map"] is not None
    tolerates, measures = values["tolerated_loss"] is not None, "loss" in method.selections
    removes = values["remove"] is not None
    heals, several = values["heal_tokens"] > 0, values["processes"] > 1
    criteria = ["null", *method.selections]
    # Parameter → whether the method refuses its value, and what would be right.
    unsuited = {
        "transform": (transform not in method.transforms, "dense"),
        "selection": (selection is not None and selection not in method.selections, " or ".join(criteria)),
        "tolerated_loss": (tolerates and not measures, "null"),
        "num_A": (values["num_A"] > 1 and not method.several, "1"),
        "repair": (values["repair"] and not method.repairs, "false"),
        "heal_tokens": (heals and not method.repairs, "0"),
        "use_4bit": (packed and not method.packed, "false"),
    }
    # What doesn't go with another parameter.
    conflicts = [
        (
            tolerates and measures and selection != "loss" and not removes,
            f"tolerated_loss: needs selection: loss, which measures it, and that is {format_value(selection)}.",
        ),
        (tolerates and removes, "remove: and tolerated_loss each say how much goes; use one, and null for the other."),
        (heals and packed, "use_4bit: packs the weights that heal_tokens trains; use false."),
        (heals and spread, "device_map: heal_tokens trains on one device; use null."),
        (
            heals and values["dtype"] == "float16",
            "dtype: float16 is too short for the gradients of heal_tokens; use bfloat16 or float32.",
        ),
        (several and packed, "use_4bit: packs the weights for one process; use false, or processes: 1."),
        (
            several and spread,
            "device_map: spreads the model over GPUs, of which each process has one; use null, or processes: 1.",
        ),
        (
            several and ":" in device,
            f"device: {device} is one GPU, and each process has its own; use cuda or auto, or processes: 1.",
        ),
    ]
    return [
        *(
            f"{key}: {format_value(values[key])} has no place in method {name}, which {method.words}; use {right}."
            for key, (refused, right) in unsuited.items()
            if refused
        ),
        *(sentence for refused, sentence in conflicts if refused),
        *method.refuses(values),
    ]


def format_value(value: Any) -> str:
    """Return a value as YAML writes it: null, true, 0.5."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
