"""A budget of parameters: how many layers and channels it takes, against the sizes of models that are built with them."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params, read_params
from replaceme.methods.registry import METHODS, criterion_of
from replaceme.models.model import Model, parameter_count
from replaceme.selection import budget
from replaceme.selection.budget import Sizes, apply_budget, mlp_width
from tests.conftest import DESCRIBED, EXPERTS, LAYERS, NORM_AFTER_MLP, PLAIN

BEST = {"transform": "channels", "repair": True}
# The families whose channels can be chosen.
CHANNELS = [kind for kind in PLAIN if DESCRIBED[kind].mlp_norm]


def settings(remove: str | None, **options: Any) -> Params:
    return read_params(None, {"remove": remove, **options}, METHODS)


def test_without_a_budget_nothing_changes(tiny: Model) -> None:
    params = settings(None, **BEST)
    assert apply_budget(params, tiny, criterion_of(params)) is params
    assert mlp_width(params, tiny, [2, 3]) is None


@pytest.mark.parametrize("kind", CHANNELS)
@pytest.mark.parametrize("share", ["30%", "35% of layers"])
def test_layers_and_channels_meet_a_budget_in_every_family(save_tiny: Callable[..., Model], kind: str, share: str) -> None:
    source, params = save_tiny(kind), settings(share, layers_to_skip=1, **BEST)
    assert apply_budget(params, source, criterion_of(params)).layers_to_skip == 1
    width = mlp_width(params, source, [2])
    assert width is not None
    dense, config = source.load(), source.config()
    # The family's own class, with one layer less and the narrower MLPs.
    config.update({"num_hidden_layers": LAYERS - 1})
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        if hasattr(config, name):
            config.update({name: width})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: LAYERS - 1]
    removed = parameter_count(dense) - parameter_count(AutoModelForCausalLM.from_config(config))
    of_layers = parameter_count(source.family().decoder_layers(dense))
    wanted = 0.3 * parameter_count(dense) if share == "30%" else 0.35 * of_layers
    assert removed == pytest.approx(wanted, abs=0.01 * parameter_count(dense))


@pytest.mark.parametrize("kind", [*EXPERTS, *NORM_AFTER_MLP])
def test_where_no_channels_are_chosen_the_nearest_number_of_layers_goes(save_tiny: Callable[..., Model], kind: str) -> None:
    source, params = save_tiny(kind), settings("40% of layers", method="uidl")
    count = apply_budget(params, source, criterion_of(params)).layers_to_skip
    assert count == round(0.4 * LAYERS)
    assert mlp_width(params, source, range(count)) is None


def test_methods_that_remove_parts_get_the_exact_share(tiny: Model) -> None:
    params = settings("25% of layers", method="slicegpt")
    assert apply_budget(params, tiny, criterion_of(params)).layers_to_skip == pytest.approx(0.25 * LAYERS)


@given(
    st.integers(1_000, 10**9),
    st.integers(2, 80),
    st.integers(1, 10),
    st.integers(512, 20_000),
    st.floats(1, 60),
    st.integers(1, 40),
)
def test_a_budget_is_met_within_a_hundredth(other: int, layers: int, rest: int, width: int, share: float, most: int) -> None:
    channel = 100
    layer = width * channel * (1 + rest) // rest
    sizes = Sizes(other + layers * layer, (layer,) * layers, width, channel)
    params = settings(f"{share:.2f}%", layers_to_skip=min(most, layers - 1), **BEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget.Sizes, "of", lambda model: sizes)
        criterion: Any = criterion_of(params)
        try:
            count = apply_budget(params, None, criterion).layers_to_skip  # type: ignore[arg-type]
            kept = mlp_width(params, None, range(count)) or width  # type: ignore[arg-type]
        except ParameterError:
            return
    removed = count * layer + (layers - count) * (width - kept) * channel
    assert abs(removed - sizes.budget(f"{share:.2f}%")) <= 0.01 * sizes.total + 1
    assert count <= most


def test_a_width_is_a_round_number_where_that_is_near_enough() -> None:
    # Of Llama-3.1-8B's shapes: a layer has 218 M parameters, a channel 3 · 4096.
    sizes = Sizes(8_030_261_248, (218_112_000,) * 32, 14_336, 12_288)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget.Sizes, "of", lambda model: sizes)
        kept = mlp_width(settings("20%", layers_to_skip=4, **BEST), None, range(4))  # type: ignore[arg-type]
    assert kept is not None
    assert kept % 128 == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remove": "1%"}, "remove: at least a layer goes, which is 13"),
        ({"remove": "60%", "method": "uidl", "layers_to_skip": 2}, "raise that"),
        ({"remove": "80%", **BEST}, "below the decoder layers' 78.8% of all parameters, not 80%"),
        ({"remove": "0%", **BEST}, "must be above 0%"),
        ({"remove": "75%", "layers_to_skip": 1, **BEST}, "raise layers_to_skip"),
    ],
)
def test_a_budget_that_cant_be_met_is_refused(tiny: Model, options: dict[str, Any], said: str) -> None:
    params = read_params(None, options, METHODS)
    with pytest.raises(ParameterError, match=said):
        mlp_width(apply_budget(params, tiny, criterion_of(params)), tiny, [1])


@pytest.mark.parametrize("value", ["20", "20 %", "-5%", "20% of mlps", "%"])
def test_a_share_is_a_percentage(value: str) -> None:
    with pytest.raises(ParameterError, match="remove: must be null, or a share such as 20%"):
        read_params(None, {"remove": value}, METHODS)


@pytest.mark.parametrize(("share", "level"), [("26%", "INFO"), ("20%", "WARNING")])
def test_the_log_says_how_near_the_budget_is(tiny: Model, share: str, level: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "replaceme"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget.logger, "propagate", True)
        budget.log_budget(settings(share, method="uidl"), tiny, [1, 2], None)
    record = caplog.records[-1]
    assert record.levelname == level
    assert "2 layers go, and the others keep all channels: 26." in record.getMessage()
