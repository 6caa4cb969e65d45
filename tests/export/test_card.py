"""The model card: the hub's metadata, the sentences about the changes, and settings that repeat the run."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from replaceme.base.parameters import Params, read_params
from replaceme.edits.edits import Edits
from replaceme.export.card import SETTINGS, RunResults, render_card
from replaceme.methods.registry import METHODS
from replaceme.models.embedded import MODELS
from replaceme.models.model import Model
from replaceme.pipeline.report import format_continuations, format_score_section, list_hub_results
from replaceme.running.stage import SCORE_SETTINGS
from tests.conftest import WIDTH
from tests.helpers import edits_for

BASES = {"full_attention": 50_000.0, "sliding_attention": 10_000.0}

EVALUATION: dict[str, Any] = {
    "perplexity": {"prose": {"dense": 18.4163, "pruned": 32.9806, "ratio": 1.79084}},
    "accuracy": {
        "last_word": {"dense": 0.5, "pruned": 0.4, "stderr_dense": 0.02, "stderr_pruned": 0.03},
        "piqa": {"dense": 0.8, "pruned": 0.7},
    },
    "average_accuracy": {"dense": 0.65, "pruned": 0.55},
    "retention_percent": 84.6154,
    "retention_stderr": 2.3,
    "parameters": {"dense": 1000000, "pruned": 800000, "removed_percent": 20.0},
}


@pytest.fixture
def card_of(params: Params, tiny: Model, tmp_path: Path) -> Callable[..., ModelCard]:
    """Return a function that makes the card for a copy of the tiny model, given that model's own card."""

    def make(own: str | None = None, scored: bool = False, commit: str | None = None, **settings: Any) -> ModelCard:
        folder = Path(shutil.copytree(tiny.folder, tmp_path / "dense", dirs_exist_ok=True))
        if own is not None:
            (folder / "README.md").write_text(own, encoding="utf-8")
        source = Model(folder, "org/dense" if commit else "dense", commit)
        setting = params.model_copy(update={"model_path": "org/dense" if commit else str(folder), **settings})
        results = RunResults({"relative_residual": 0.25})
        if scored:
            results = replace(results, scores=format_score_section(EVALUATION), entries=list_hub_results(EVALUATION))
        return ModelCard(render_card(setting, source, edits_for(2, 2), results))

    return make


def settings_of(card: ModelCard, tmp_path: Path) -> Params:
    """Read the card's settings as a console script reads its config."""
    (block,) = re.findall(r"(?ms)^```yaml\n(.*?)^```$", card.text)
    file = tmp_path / "settings.yaml"
    file.write_text(block, encoding="utf-8")
    return read_params(file, methods=METHODS)


def test_the_metadata_and_sentences_of_a_card(card_of: Callable[..., ModelCard]) -> None:
    card = card_of(commit="c" * 40)
    assert isinstance(card.data, ModelCardData)
    assert card.data.to_dict() == {
        "base_model": "org/dense",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "depth-pruning", "replaceme"],
    }
    assert f"Layers 2–3 (counted from 0) were removed from `org/dense` (commit {'c' * 40}) with test." in card.text
    assert "folded into the MLP of layer 1" in card.text
    assert "Relative residual of the fit at the cut: 0.25." in card.text
    assert "## Scores" not in card.text


@pytest.mark.parametrize(
    ("which", "config", "said"),
    [
        ("all", {}, "All weights of the kept layers were trained on 1,000 tokens of text to match"),
        ("after_cut", {}, "All weights of the layers from the cut on were trained"),
        ("after_cut", {"intermediate_size": 24}, "All weights of the kept layers were trained"),
        ("outputs", {"intermediate_size": 24}, "The attention and MLP output projections of the kept layers were trained"),
    ],
)
def test_the_card_says_which_layers_were_trained(
    which: str, config: dict[str, Any], said: str, params: Params, tiny: Model
) -> None:
    edits = replace(edits_for(2, 2), config=config)
    edits.parameters[0, "mlp.down_proj.weight"] = torch.zeros(1)
    healed = RunResults(healed={"training_tokens": 1000})
    assert said in render_card(params.model_copy(update={"heal_weights": which}), tiny, edits, healed)


def test_licence_and_language_come_from_the_original(card_of: Callable[..., ModelCard]) -> None:
    own = "---\nlicense: other\nlicense_name: theirs\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [theirs]\n---\n# A\n"
    data = card_of(own).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "theirs", "LICENSE")
    assert data["language"] == ["en", "de"]
    assert "theirs" not in data["tags"]
    assert "base_model" not in data
    # A local copy has the base model that its card names.
    own = "---\nbase_model: org/first\n---\n"
    assert card_of(own).data.base_model == "org/first"
    assert card_of(own, commit="c" * 40).data.base_model == "org/dense"


def test_the_card_names_versions_text_and_what_the_dense_model_is(params: Params, tiny: Model) -> None:
    mixed = read_params(None, {"dataset": ["wikipedia-sample", {"/data/notes.jsonl": 3}]}, methods=METHODS)
    params = params.model_copy(update={"dataset": mixed.dataset})
    source = replace(tiny, disclosure=MODELS["smollm2-135m-instruct"].disclosure, trust_remote_code=True)
    versions = RunResults(made_with={"torch": "1.2+cpu", "lm-eval": "2.3"})
    text = render_card(params, source, edits_for(2, 2), versions, path="user/small")
    assert "Made with lm-eval 2.3, torch 1.2+cpu; other versions or another processor can change the last digits." in text
    assert f"with test.\n{source.disclosure}\n" in text
    assert 'AutoModelForCausalLM.from_pretrained("user/small", trust_remote_code=True)' in text
    assert "- Calibration text: wikipedia-sample (25 %), notes.jsonl (75 %). Other kinds of text" in text
    assert f"What is known of `{tiny.name}` there may not hold" in text
    assert "copy" not in render_card(params, tiny, edits_for(2, 2), RunResults())


@pytest.mark.parametrize(
    "own", ["", "# no block", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nlicense: {a: b}\n---\n"]
)
def test_an_empty_or_unreadable_card_of_the_original_is_skipped(own: str, card_of: Callable[..., ModelCard]) -> None:
    assert "license" not in card_of(own).data.to_dict()


def test_the_scores_are_a_table_and_the_hubs_results(card_of: Callable[..., ModelCard]) -> None:
    card = card_of(scored=True)
    assert "| prose perplexity | 18.42 | 32.98 | x 1.79 |" in card.text
    assert "| last_word accuracy | 50.0 ± 2.0 % | 40.0 ± 3.0 % | 80.0 % kept |" in card.text
    assert "84.6 ± 2.3 % of the dense model's average accuracy is kept; ± is one standard error." in card.text
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found == {("prose", "perplexity"): 32.9806, ("last_word", "accuracy"): 0.4, ("piqa", "accuracy"): 0.7}
    (index,) = card.data.to_dict()["model-index"]
    assert index["name"] == "dense without 2 of its 6 layers"
    figures = {"retention_above_chance_percent": 66.67, "retention_above_chance_stderr": 4.2}
    table = format_score_section({**EVALUATION, **figures})
    assert "is one standard error. Of what is above chance, 66.7 ± 4.2 % is." in table


def test_scores_on_calibration_text_are_marked_in_the_table_and_the_hubs_results() -> None:
    texts = {
        "prose": {"seen": 1, "overlap": 1.0},
        "piqa": {"seen": 1, "overlap": 0.3},
        "last_word": {"seen": 0, "overlap": 0.0},
    }
    evaluation = {**EVALUATION, "calibration_text": texts}
    table = format_score_section(evaluation)
    assert {row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| ")} >= {
        "prose perplexity (seen)", "last_word accuracy", "piqa accuracy (seen)", "average accuracy (in part seen)",
    }  # fmt: skip
    assert table.endswith("Seen: prose, piqa (are scored on calibration text).")
    names = [result.dataset_name for result in list_hub_results(evaluation)]
    assert names == ["prose (seen in calibration)", "last_word", "piqa (seen in calibration)"]


def test_the_settings_repeat_the_run(card_of: Callable[..., ModelCard], params: Params, tmp_path: Path) -> None:
    given = {
        "dataset": "org/1e-6", "dataset_config": "no", "dataset_split": "2024-01-01", "alpha": 1e-7, "layers_to_skip": 3,
        "min_distance_layer": 2, "eval_tokens": None, "method": "cosine", "solver": "lbfgs", "threads": 3,
    }  # fmt: skip
    tasks = read_params(None, {"tasks": ["wikipedia", {"winogrande": {"fewshots": 5}}]}, methods=METHODS).tasks
    card = card_of(commit="c" * 40, scored=True, **given, tasks=tasks)
    setting = params.model_copy(update={**given, "tasks": tasks, "model_path": "org/dense", "revision": "c" * 40})
    found = settings_of(card, tmp_path)
    assert {key: getattr(found, key) for key in (*SETTINGS, *SCORE_SETTINGS)} == {
        key: getattr(setting, key) for key in (*SETTINGS, *SCORE_SETTINGS)
    }
    assert "learning_rate" not in card.text


def test_the_card_has_no_local_paths(card_of: Callable[..., ModelCard], tmp_path: Path, text_file: Path) -> None:
    card = card_of(scored=True)
    assert str(tmp_path) not in str(card)
    found = settings_of(card, tmp_path)
    assert (found.model_path, found.dataset, found.tasks[0].name) == ("dense", text_file.name, text_file.name)


def test_refitted_linears_are_listed_by_layer(params: Params, tiny: Model) -> None:
    edits = Edits("test", [2, 3, 5])
    for layer in (0, 1, 4):
        edits.correct(layer, "mlp_output", torch.zeros(32, 48))
    edits.correct(4, "attention_output", torch.zeros(32, 32))
    text = render_card(params, tiny, edits, RunResults())
    assert "Layers 2–3, 5 (counted from 0)" in text
    assert "The MLP output projection of layers 0–1, 4 was refitted in closed form" in text
    assert "The attention output projection of layer 4 was refitted in closed form" in text
    assert "A linear map" not in text
    assert "Layer 2 (counted from 0) was removed from" in render_card(params, tiny, Edits("test", [2]), RunResults())
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"


def test_the_example_loads_the_cards_own_folder_and_generates(card_of: Callable[..., ModelCard], tiny: Model) -> None:
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", card_of().text)
    assert 'from_pretrained(".")' in code
    said: list[str] = []
    exec(code.replace('"."', repr(str(tiny.folder))), {"print": said.append})
    assert len(said) == 1


def test_nothing_in_a_continuation_ends_its_block() -> None:
    hostile = "a\n```\n# heading\n````\n<b>"
    pair = {"kind": "question", "prompt": "Which?", "answer": "Paris", "dense": hostile, "pruned": "Rome"}
    text = format_continuations([pair])
    assert "### Question (known answer: Paris)\n\n```text\nWhich?\n```" in text
    assert f"dense:\n\n`````text\n{hostile}\n`````\n\npruned:\n\n```text\nRome\n```" in text


def test_the_card_says_which_transformers_reads_the_model(save_tiny: Callable[..., Model], params: Params) -> None:
    two_bases = {name: {"rope_type": "default", "rope_theta": base} for name, base in BASES.items()}
    texts = [
        render_card(params, save_tiny("olmo3", **rope), edits_for(2, 2), RunResults())
        for rope in ({}, {"rope_parameters": two_bases})
    ]
    for text, words in zip(texts, ("beside them, those of transformers 4", "It needs transformers 5: its kinds"), strict=True):
        assert words in text
    own_form = replace(edits_for(2, 2), operators={1: torch.ones(WIDTH, dtype=torch.float64)})
    assert "It needs transformers 5, which `modeling_pruned.py`" in render_card(params, save_tiny(), own_form, RunResults())
