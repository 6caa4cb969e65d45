"""The comparison with plain removal: its figures, and what is exported."""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM

import replaceme
from replaceme.base.documents import Documents
from replaceme.base.errors import ModelError
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.evaluation import perplexity
from replaceme.evaluation.plain_removal import compare_with_plain_removal, plain_cuts
from replaceme.models.families import family_of
from replaceme.pipeline import check
from tests.conftest import LAYERS, made_model, made_text
from tests.helpers import context_of, edits_for


def score_plainly(edits: Edits, documents: Documents) -> tuple[float, float]:
    """Return the KL from the dense model and the perplexity ratio of a model whose layers are really gone."""
    dense, pruned = made_model(), made_model()
    apply_edits(pruned, family_of(pruned.config), edits)
    kl, rise, count = 0.0, 0.0, 0
    for document in documents.documents:
        with torch.no_grad():
            p, q = (log_softmax(model(document[None]).logits[0, :-1].double(), -1) for model in (dense, pruned))
        kl += float((p.exp() * (p - q)).sum())
        rise += float(sum(sign * cross_entropy(logs, document[1:], reduction="sum") for sign, logs in ((1, q), (-1, p))))
        count += len(document) - 1
    return kl / count, exp(rise / count)


def test_the_figures_are_those_of_models_whose_layers_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    # All tokens: the divergence is then exact.
    monkeypatch.setattr(perplexity, "TOP", made_model().config.vocab_size)
    documents = Documents([*torch.randint(2, 400, (6, 30), generator=torch.Generator().manual_seed(1))])
    edits, cuts = edits_for(2, 2), [[2, 3], [1, 2], [3, 4]]
    found = compare_with_plain_removal(context_of(made_model(), documents), edits, cuts)
    plain = {score_plainly(Edits("", cut), documents): cut for cut in cuts}
    assert [*found.result.values()] == pytest.approx(score_plainly(edits, documents), rel=1e-5)
    assert [*found.plain.values()] == pytest.approx(min(plain), rel=1e-5)
    assert found.removed_layers == plain[min(plain)]
    assert found.tokens == 6 * 29
    single = [
        [score_plainly(each, Documents([document]))[0] for document in documents.documents]
        for each in (edits, Edits("", [*found.removed_layers]))
    ]
    differences = torch.tensor(single[0]) - torch.tensor(single[1])
    assert found.stderr == pytest.approx(float(differences.std()) / 6**0.5, rel=1e-4)


def test_the_cuts_are_the_results_own_and_the_best_of_each_ranking() -> None:
    first = [[float(10 * abs(start - 3) + end) for end in range(LAYERS)] for start in range(LAYERS)]
    second = [[float(abs(start - 1)) for _ in range(LAYERS)] for start in range(LAYERS)]
    assert plain_cuts([first, second], range(1, 4), [2, 3]) == [[2, 3], [3, 4], [1, 2]]
    # Layers that lie apart are no block; where no block fits, nothing is left.
    assert plain_cuts([first], range(1, 4), [1, 3]) == [[3, 4], [2, 3]]
    assert plain_cuts([first], range(1, 1), [1, 3]) == []


@pytest.fixture
def settings(tiny: Any, tmp_path: Path) -> Mapping[str, Any]:
    (tmp_path / "text.txt").write_text(made_text(300), encoding="utf-8")
    return {
        "layers": 2, "texts": str(tmp_path / "text.txt"), "dataset_size": 12, "max_length": 48, "dtype": "float32",
        "threads": 1, "tasks": [], "model": tiny.folder, "save_path": tmp_path / "small",
    }  # fmt: skip


def spoil(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Multiply the KL of each result by a factor; plain removal's stays."""
    true = check.compare_with_plain_removal

    def changed(*arguments: Any) -> Any:
        found = true(*arguments)
        found.result["kl"] = factor * found.plain["kl"]
        return replace(found, stderr=0.01 * found.plain["kl"])

    monkeypatch.setattr(check, "compare_with_plain_removal", changed)


@pytest.mark.parametrize(
    ("factor", "given", "replaced"),
    [
        (2.0, {}, True),
        (0.5, {}, False),
        (2.0, {"transform": "dense", "repair": False, "selection": "angular"}, False),
        (2.0, {"method": "prune_and_comp"}, False),
        (1.0, {}, False),
    ],
    ids=["worse", "better", "a published map", "another method", "as good"],
)
def test_what_is_worse_than_plain_removal_is_not_exported_unless_a_published_method_was_asked_for(
    factor: float, given: Mapping[str, Any], replaced: bool, settings: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, factor)
    pruned = replaceme.prune(**settings, **{"keep_if_better": True, **given})
    figures, card = pruned.figures["check"], (pruned.path / "README.md").read_text(encoding="utf-8")
    assert figures["plain_removal_is_exported"] is replaced
    assert ("is exported. On" in card) is replaced
    assert ("This is worse." in card) is (factor > 1 and not replaced)
    assert ("with plain removal." in card) is replaced
    if replaced:
        plain = figures["plain_removal"]
        assert pruned.removed_layers == tuple(range(plain["first_layer"], plain["last_layer"] + 1))
        assert "refitted" not in card
        assert "Relative residual" not in card
        expected, found = made_model(), AutoModelForCausalLM.from_pretrained(pruned.path, dtype="float32")
        apply_edits(expected, family_of(expected.config), Edits("", [*pruned.removed_layers]))
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "given",
    [{"keep_if_better": False}, {"preset": "published"}, {"memory": "200KB"}, {"method": "slicegpt"}, {"method": "uidl"}],
    ids=["off", "published", "streamed", "no whole layer", "plain removal itself"],
)
def test_without_a_comparison_the_result_is_kept(given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    pruned = replaceme.prune(**settings, **given)
    assert pruned.figures["check"] == {}
    assert "dense model wrote" not in (pruned.path / "README.md").read_text(encoding="utf-8")
    assert json.loads((pruned.path.parent / "small.work" / "metrics" / "check.json").read_text()) == {}


@pytest.mark.parametrize("cause", ["no cache", "overflow"])
def test_a_model_that_can_write_or_predict_nothing_here_keeps_its_result(
    cause: str, settings: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Documents:
        raise ModelError("dataset: self needs a model with a cache.")

    if cause == "no cache":
        monkeypatch.setattr(check, "write_own_text", refuse)
    else:
        spoil(monkeypatch, float("nan"))
    assert replaceme.prune(**settings).figures["check"] == {}
