"""Averaged layers, against numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from replaceme.base.errors import ReplaceMeError
from replaceme.base.parameters import Params
from replaceme.base.plan import Block
from replaceme.export.save import save_pruned
from replaceme.methods.registry import METHODS
from replaceme.models.model import Model
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.running.workspace import Workspace


def test_the_hosts_linears_are_the_mean_and_its_norms_stay(tiny: Model, params: Params, tmp_path: Path) -> None:
    edits = METHODS["average"].solve(params, Block(2, 4), lambda name: {}).edits
    edits.removed_layers = [2, 3]
    save_pruned(tiny, edits, tmp_path)
    dense, pruned = tiny.load().model.layers, Model(tmp_path, "pruned").load().model.layers
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        for part in ("weight", "bias"):
            mean = np.mean([dense[layer].get_parameter(f"{path}.{part}").detach().numpy() for layer in (1, 2, 3)], axis=0)
            assert np.allclose(pruned[1].get_parameter(f"{path}.{part}").detach().numpy(), mean, atol=1e-6)
    assert (pruned[1].input_layernorm.weight == dense[1].input_layernorm.weight).all()
    assert (pruned[2].mlp.down_proj.weight == dense[4].mlp.down_proj.weight).all()


def test_models_without_a_mean_of_layers_are_refused(params: Params, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    given = {"method": "average", "model_path": str(save_tiny("mixtral").folder)}
    with pytest.raises(ReplaceMeError, match="method: average is not derived for the mixture of experts of the family"):
        inspect_inputs(params.model_copy(update=given), Workspace(tmp_path / "work"))
