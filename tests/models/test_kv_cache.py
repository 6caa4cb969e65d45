"""The cache with reserved space, against a pass over the whole text."""

import pytest
import torch

from replaceme.models.families import family_of
from replaceme.models.kv_cache import cache_arguments, eager_attention_where_faster, reserved_cache
from tests.conftest import KINDS, made_model


@pytest.mark.parametrize(("kind", "config"), [*((kind, {}) for kind in KINDS), ("mistral", {"sliding_window": 64})])
def test_a_reserved_cache_gives_what_the_whole_text_gives(kind: str, config: dict[str, int]) -> None:
    model, ids = made_model(kind, **config), torch.randint(2, 400, (3, 20), generator=torch.Generator().manual_seed(5))
    cache = cache_arguments(model, reserved_cache(model.config, 20))
    with torch.no_grad():
        with eager_attention_where_faster(model, family_of(model.config)):
            steps = [model(part, **cache).logits for part in (ids[:, :4], *ids[:, 4:].split(1, dim=1))]
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "config"), [("llama", {}), ("mistral", {"sliding_window": 8})])
def test_keys_and_values_are_never_copied(kind: str, config: dict[str, int]) -> None:
    model, ids = made_model(kind, **config), torch.randint(2, 400, (3, 8))
    cache = reserved_cache(model.config, 8)
    addresses = set()
    with torch.no_grad():
        for part in ids.split(2, dim=1):
            model(part, **cache_arguments(model, cache))
            addresses |= {(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers}
    assert len(addresses) == len(cache.layers)
    assert {layer.keys.shape[-2] for layer in cache.layers} == {8}
