"""Least squares: where its fits run."""

from typing import Any

import pytest
import torch

from replaceme.base.parameters import read_params
from replaceme.base.plan import Block
from replaceme.methods.registry import METHODS
from replaceme.solvers import closed_forms
from replaceme.solvers.closed_forms import solve_closed_form
from tests.helpers import elsewhere
from tests.solvers.helpers import made_sums, made_tokens


@pytest.mark.parametrize(("transform", "device"), [("orthogonal", "meta"), ("triangular", "cpu")])
def test_least_squares_fits_an_orthogonal_map_on_the_device_of_the_model(
    transform: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replaceme.models.devices.resolve_device", lambda _: "meta")
    used: list[str] = []

    def watched(gram: torch.Tensor, *rest: Any) -> torch.Tensor:
        used.append(gram.device.type)
        return solve_closed_form(gram, *rest)

    monkeypatch.setattr(closed_forms, "solve_closed_form", watched)
    M, Z, H = made_tokens(60)
    statistics = {"gram": made_sums(M, Z, H), "sample": {"added": M, "rest": Z, "target": H}}
    params = read_params(None, {"transform": transform, "alpha": 0.1})
    with elsewhere():
        (found,) = METHODS["lstsq"].solve(params, Block(1, 2), statistics.__getitem__).edits.transforms.values()
    assert used == [device]
    sums = statistics["gram"]
    assert torch.equal(found, solve_closed_form(sums["gram"], sums["cross"], 0.1, transform))
