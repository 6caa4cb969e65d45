from math import pi

import pytest
import torch

from replaceme.base.documents import Documents
from replaceme.statistics.profile import profile_model
from tests.conftest import LAYERS, made_model
from tests.helpers import context_of, layer_outputs


def test_distances_equal_a_plain_reference(documents: Documents) -> None:
    model = made_model()
    found = profile_model(context_of(model, documents))["angular_distance"]
    for i, j in [(0, 1), (0, LAYERS - 1), (2, 4)]:
        total = 0.0
        for document in documents.documents:
            states = layer_outputs(model, document)
            cosine = torch.cosine_similarity(states[i + 1][-1].double(), states[j + 1][-1].double(), dim=0)
            total += float(torch.arccos(cosine)) / pi
        assert found[i][j] == pytest.approx(total / len(documents), abs=1e-6)
        assert found[j][i] == pytest.approx(found[i][j], abs=1e-12)


def test_influence_and_norms_equal_a_plain_reference(documents: Documents) -> None:
    model = made_model()
    found = profile_model(context_of(model, documents))["layers"]
    states = [
        torch.cat(parts).double() for parts in zip(*(layer_outputs(model, each) for each in documents.documents), strict=True)
    ]
    for layer in range(LAYERS):
        before, after = states[layer], states[layer + 1]
        assert found["block_influence"][layer] == pytest.approx(
            1 - float(torch.cosine_similarity(before, after).mean()), abs=1e-6
        )
        assert found["mean_norm"][layer] == pytest.approx(float(after.norm(dim=1).mean()), rel=1e-5)
        assert found["max_norm"][layer] == pytest.approx(float(after.norm(dim=1).max()), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_padding_and_batch_size_change_nothing(documents: Documents, batch_size: int) -> None:
    model = made_model(dtype=torch.float64)
    expected = profile_model(context_of(model, documents, 1))
    found = profile_model(context_of(model, documents, batch_size))
    assert torch.tensor(found["angular_distance"]) == pytest.approx(torch.tensor(expected["angular_distance"]), abs=1e-7)
    for figure, values in expected["layers"].items():
        assert found["layers"][figure] == pytest.approx(values, rel=1e-5)


def test_a_layer_that_does_nothing_has_no_influence_and_no_distance(documents: Documents) -> None:
    model = made_model(attention_bias=False, mlp_bias=False)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    found = profile_model(context_of(model, documents))
    assert found["layers"]["block_influence"][2] == pytest.approx(0, abs=1e-6)
    assert found["angular_distance"][1][2] == pytest.approx(0, abs=1e-6)
