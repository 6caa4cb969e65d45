"""The repair of kept layers and the fit of later blocks, against plain computations on the shortened model itself."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from replaceme.base import scratch
from replaceme.base.documents import Documents
from replaceme.base.errors import ResourceError
from replaceme.base.group import WHOLE
from replaceme.base.plan import Block
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.models.families import Family, family_of, parameter_of
from replaceme.models.model import Model
from replaceme.repair.state import Repair
from replaceme.statistics.features import LINEARS
from tests.conftest import LAYERS, PLAIN_REPRESENTATIVES, made_model
from tests.helpers import many_documents, passing, ridge
from tests.methods.helpers import BLOCK, same_weights, solved


def resolve(
    linears: list[Any], features: list[np.ndarray], error: np.ndarray, target: np.ndarray, sizes: list[float], step: Repair
) -> None:
    """Set the weights of linears, and the last bias, by one ridge regression toward the present weights, as strong as a step's.

    ``tests.solvers.test_held_out`` is about how the strength is chosen.
    """
    widths = [part.shape[1] for part in features]
    biased = [linear for linear in linears if getattr(linear, "bias", None) is not None][-1:]
    g = np.hstack([*features, *(np.ones((len(error), 1)) for _ in biased)])
    size = np.concatenate([np.repeat(sizes, widths), *(np.zeros(1) for _ in biased)])
    size = step.ridge * size
    change = ridge(g, error, 1 / np.square(target).sum(1), np.zeros((g.shape[1], error.shape[1])), size, bool(biased))
    change *= step.scale
    parts = np.split(change, np.cumsum(widths))
    with torch.no_grad():
        for linear, part in zip(linears, parts, strict=False):
            parameter_of(linear, "weight").add_(torch.from_numpy(part.T))
        for linear in biased:
            linear.bias += torch.from_numpy(change[-1])


@pytest.mark.parametrize(("kind", "method"), [*product(PLAIN_REPRESENTATIVES, ["lstsq"]), ("llama", "uidl"), ("phi", "uidl")])
def test_each_kept_layer_is_solved_again_on_states_of_the_shortened_model(kind: str, method: str) -> None:
    model, documents = made_model(kind, torch.float64), many_documents()
    edits, run_repair = solved(model, documents, (BLOCK,), method=method, alpha=5.0, repair=True)
    expected = deepcopy(model)
    family = family_of(model.config)
    apply_edits(expected, family, edits)
    repairs, figures = run_repair()
    steps = iter(repairs)
    for layer in range(BLOCK.end, LAYERS):
        place = layer - len(BLOCK)
        module, goal = family.decoder_layers(expected)[place], passing(model, layer, documents)
        attention, mlp = (family.linear_of(module, linear) for linear in LINEARS)
        now = passing(expected, place, documents)
        if family.parallel:
            resolve(
                [attention, mlp], [now["A"], now["G"]], goal["output"] - now["output"], goal["output"], [0.3, 1.0], next(steps)
            )
            continue
        resolve([attention], [family.multiplier * now["A"]], goal["middle"] - now["middle"], goal["middle"], [0.3], next(steps))
        now = passing(expected, place, documents)
        resolve([mlp], [family.multiplier * now["G"]], goal["output"] - now["output"], goal["output"], [1.0], next(steps))
    apply_edits(model, family, edits)
    assert same_weights(model, expected)
    assert figures == {}
    together = [LINEARS] if family.parallel else [(linear,) for linear in LINEARS]
    assert [(each.layer, each.linears) for each in repairs] == [
        (layer, linears) for layer in range(BLOCK.end, LAYERS) for linears in together
    ]
    assert all(each.after < each.before or not each.scale for each in repairs)
    assert any(each.scale for each in repairs)
    last = passing(model, LAYERS - 1 - len(BLOCK), documents)["output"]
    w = 1 / np.square(goal["output"]).sum(1)
    assert repairs[-1].after == pytest.approx(np.sqrt((np.square(goal["output"] - last).sum(1) * w).mean()), rel=1e-3)


def test_the_joint_fit_solves_the_mlp_again_on_its_new_features() -> None:
    model, documents = made_model(dtype=torch.float64), many_documents()
    edits, run_repair = solved(model, documents, (BLOCK,), transform="joint", alpha=5.0)
    expected = deepcopy(model)
    apply_edits(expected, Family(), edits)
    goal = passing(model, BLOCK.end - 1, documents)["output"]
    host = expected.model.layers[BLOCK.layer_before_cut]
    mlp = host.mlp.down_proj
    now = passing(expected, BLOCK.layer_before_cut, documents)
    repairs, _ = run_repair()
    resolve([mlp], [now["G"]], goal - now["output"], goal, [0.3], repairs[0])
    apply_edits(model, Family(), edits)
    assert same_weights(model, expected)
    assert [(each.layer, each.linears) for each in repairs] == [(BLOCK.layer_before_cut, ("mlp_output",))]


@pytest.mark.parametrize("host_only", [True, False])
@pytest.mark.parametrize("kind", PLAIN_REPRESENTATIVES)
def test_a_later_block_is_fitted_on_states_of_the_shortened_model(kind: str, host_only: bool) -> None:
    # The second block's host is the only layer between the two, or one of two.
    blocks = (Block(1, 2), Block(3, 5)) if host_only else (Block(1, 2), Block(4, 5))
    model, documents = made_model(kind, torch.float64), many_documents()
    edits, run_repair = solved(model, documents, blocks, alpha=5.0)
    expected = deepcopy(model)
    apply_edits(expected, family_of(model.config), Edits("", [1], dict(edits.transforms)))
    host, H = blocks[1].layer_before_cut, passing(model, blocks[1].end - 1, documents)["output"]
    now = passing(expected, host - 1, documents)
    M, Z = now["M"], now["output"] - now["M"]
    T = np.linalg.solve(M.T @ M + 5 * np.eye(M.shape[1]), M.T @ (H - Z))
    repairs, figures = run_repair()
    assert not repairs
    assert figures["block1"]["relative_residual"] == pytest.approx(np.linalg.norm(H - Z - M @ T) / np.linalg.norm(H), rel=1e-6)
    assert np.allclose(edits.transforms[host].numpy(), T, rtol=1e-6, atol=1e-6)
    assert edits.removed_layers == [layer for block in blocks for layer in block.layers]


# Where the cuts are changes nothing in a family, but for whether its MLP is parallel.
@pytest.mark.parametrize(
    ("kind", "blocks", "options"),
    [
        *((kind, (Block(1, 2), Block(3, 5)), {"transform": "joint", "repair": True}) for kind in PLAIN_REPRESENTATIVES),
        *((kind, (BLOCK,), {"transform": "refit", "repair": True}) for kind in PLAIN_REPRESENTATIVES),
        *(
            (kind, blocks, options)
            for kind in ("llama", "phi")
            for blocks, options in [
                ((Block(1, 2),), {"transform": "joint"}),  # the first layer is the host
                ((Block(4, 6),), {"transform": "joint", "repair": True}),  # no layer is left after the cut
                ((Block(1, 2), Block(3, 5)), {"method": "uidl", "repair": True}),
            ]
        ),
    ],
)
def test_all_repairs_are_exported_exactly(
    kind: str, blocks: tuple[Block, ...], options: dict[str, Any], save_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    source, documents = save_tiny(kind), many_documents(12)
    edits, run_repair = solved(source.load(), documents, blocks, alpha=1.0, **options)
    run_repair()
    save_pruned(source, edits, tmp_path)
    figures = verify_export(source, Model(tmp_path, "pruned"), edits, documents)
    assert figures["hidden_error_mean"] < figures["tolerance"]


@pytest.mark.parametrize(("kind", "rounds"), [("qwen2", True), ("gpt2", False)])
def test_products_in_bfloat16_change_a_repair_little_and_none_with_a_bias(
    kind: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repaired() -> Edits:
        model = made_model(kind, torch.bfloat16)
        edits, run_repair = solved(model, many_documents(), (BLOCK,), alpha=5.0, repair=True)
        run_repair()
        return edits

    monkeypatch.setattr("replaceme.statistics.sums.multiplies_bfloat16", lambda _: True)
    found = repaired().corrections
    monkeypatch.setattr("replaceme.repair.repair.gram_format", lambda *_: torch.float32)
    for name, (exact, _) in repaired().corrections.items():
        error = (found[name][0] - exact).norm() / exact.norm()
        assert 0 < error < 0.03 if rounds else error == 0


@pytest.mark.parametrize("linear", ["self_attn.q_proj", "mlp.up_proj"])
def test_each_models_attention_and_mlp_are_computed_once_a_layer(linear: str, documents: Documents) -> None:
    model, calls = made_model(), []
    _, run_repair = solved(model, documents, (BLOCK,), alpha=5.0, repair=True)
    layers = model.model.layers[BLOCK.end :]
    for layer in layers:
        layer.get_submodule(linear).register_forward_hook(lambda *_: calls.append(None))
    run_repair()
    assert len(calls) == 2 * len(layers) * documents.batch_count(4, WHOLE)


def test_the_model_itself_is_unchanged_and_no_file_is_left(documents: Documents, tmp_path: Path) -> None:
    model = made_model()
    before = deepcopy(model.state_dict())
    _, run_repair = solved(model, documents, (BLOCK,), alpha=5.0, repair=True)
    run_repair(tmp_path)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_disk_that_is_too_small_is_named(
    documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made_model()
    _, run_repair = solved(model, documents, (BLOCK,), alpha=5.0, repair=True)
    inputs = model.config.hidden_size + model.config.intermediate_size
    kept = [layer for layer in range(BLOCK.layer_before_cut, model.config.num_hidden_layers) if layer not in BLOCK.layers]
    needed = 4 * len(kept) * model.config.hidden_size * inputs
    for given in ((1000,), (1 << 30, needed - 1), (1 << 30, needed)):
        free = iter(given)
        monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=next(free, 1 << 30)))
        wrong = "states" if len(given) == 1 else "corrections" if given[1] < needed else ""
        with pytest.raises(ResourceError, match=f"repair keeps 0 MiB of {wrong} there") if wrong else nullcontext():
            run_repair(tmp_path)


def test_a_later_joint_fit_is_added_to_the_repaired_attention() -> None:
    blocks = (Block(1, 2), Block(3, 5))
    model, documents = made_model(dtype=torch.float64), many_documents()
    edits, run_repair = solved(model, documents, blocks, alpha=5.0, transform="joint", repair=True)
    dense = deepcopy(model)
    repairs, figures = run_repair()
    apply_edits(model, Family(), edits)
    # Layer 2 is the second block's host; its position is now 1, and its output is that of its last repair.
    now, H = passing(model, 1, documents)["output"], passing(dense, 4, documents)["output"]
    w = 1 / np.square(H).sum(1)
    left = np.sqrt((np.square(H - now).sum(1) * w).mean())
    host = [each for each in repairs if (each.layer, each.linears) == (2, ("mlp_output",))][-1]
    assert host.after == pytest.approx(left, rel=1e-3)
    attention, _ = edits.corrections[2, "attention_output"]
    (repaired,) = [each for each in repairs if (each.layer, each.linears) == (2, ("attention_output",))]
    assert repaired.after < repaired.before
    assert attention.abs().max() > 0
    assert figures["block1"]["weighted_residual_joint"] < figures["block1"]["weighted_residual_transform"]
