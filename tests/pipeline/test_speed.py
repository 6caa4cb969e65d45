"""The measurement of speed: what is waited for, what is refused, and how the models are opened."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from replaceme.base.errors import ModelError
from replaceme.base.parameters import Params
from replaceme.models.model import Model
from replaceme.pipeline import actions, speed
from replaceme.running.workspace import Workspace


def test_the_clock_waits_for_every_gpu_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(str(device)))
    weights = [SimpleNamespace(device=torch.device(place)) for place in ("cuda:1", "cuda:0", "cpu", "cuda:1")]
    devices = speed.list_gpus(SimpleNamespace(parameters=lambda: weights))
    seconds, result = speed.measure_seconds(lambda: events.append("work") or 7, devices)  # type: ignore[func-returns-value]
    assert events == ["cuda:0", "cuda:1", "work", "cuda:0", "cuda:1"]
    assert (result, seconds >= 0) == (7, True)


def test_a_model_with_too_few_positions_is_refused(params: Params, save_tiny: Callable[..., Model]) -> None:
    for family in ("gpt2", "opt"):
        short = save_tiny(family, max_position_embeddings=64)
        with pytest.raises(ModelError, match=f"model_path: {family} takes 64 tokens, and a measurement needs 66 at least"):
            speed.measure_speed(params, short, short)


def test_times_fit_the_positions_that_a_model_has(params: Params, save_tiny: Callable[..., Model]) -> None:
    short = save_tiny("gpt2", max_position_embeddings=70)
    assert speed.measure_speed(params, short, short)["prompt_tokens"] == 6


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_a_model_is_trusted_only_if_the_user_says_so(
    trusted: bool, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Model] = []

    def measure(_params: Params, _dense: Model, pruned: Model) -> Any:
        opened.append(pruned)
        raise InterruptedError

    monkeypatch.setattr(actions, "measure_speed", measure)
    monkeypatch.setattr(actions, "recorded_model", lambda _params, path: Model(path, "dense"))
    monkeypatch.setattr(actions, "identity", lambda _: None)
    monkeypatch.setattr(actions, "read_json", lambda _: None)
    monkeypatch.setattr(actions, "existing_result", lambda _: Workspace(tmp_path))
    own = params.model_copy(update={"trust_remote_code": trusted})
    with pytest.raises(InterruptedError):
        actions.measure(own)
    assert [model.trust_remote_code for model in opened] == [trusted]
