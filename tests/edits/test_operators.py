"""Operators on the residual stream: a scalar folds; any other P is exported in a form of its own that loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from replaceme.base.documents import Documents
from replaceme.base.errors import ModelError, ParameterError
from replaceme.edits.edits import Edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import measure_cache_error, verify_export
from replaceme.models.families import family_of
from replaceme.models.model import Model
from replaceme.models.own_form import FILE, check_own_form, is_own_form
from tests.conftest import REPRESENTATIVES, WIDTH, made_model
from tests.helpers import TEXT, hooked_and_folded, norm_in_float64, shortened_logits

FORMS = {"scalar": (), "diagonal": (WIDTH,), "dense": (WIDTH, WIDTH)}


def edits_with(form: str) -> Edits:
    """Return edits that replace two single layers by an operator each."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.eye(WIDTH, dtype=torch.float64) if form == "dense" else 1.4
    made = [plain + 0.1 * torch.randn(FORMS[form], generator=generator, dtype=torch.float64) for _ in range(2)]
    return Edits("test", [2, 4], operators={1: made[0], 3: made[1]})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_operators_and_kept_layers_compute_one_after_the_other(kind: str, form: str) -> None:
    model, edits = made_model(kind, torch.float64), edits_with(form)
    family = family_of(model.config)
    if family.norm_after_mlp:
        norm_in_float64(model, family)
    expected = shortened_logits(model, edits, TEXT)
    assert (model(TEXT, use_cache=False).logits - expected).norm() > 1e-2 * expected.norm()
    hooked, found = hooked_and_folded(model, family, edits)
    assert (hooked - expected).norm() / expected.norm() < 1e-9
    # The epsilon under a norm's root matters more for a smaller state.
    if form != "scalar" or family.norm_before:
        assert (found - expected).norm() / expected.norm() < (1e-4 if form == "scalar" else 1e-9)


# How a family's layers are called does not depend on the form of the operators.
@pytest.mark.parametrize(
    ("kind", "form"),
    [*(("llama", form) for form in FORMS), *((kind, "dense") for kind in ("gpt2", "falcon", "qwen2_moe", "gemma3_text"))],
)
def test_a_saved_model_with_operators_passes_its_verification_and_loads_alone(
    kind: str, form: str, save_tiny: Any, tmp_path: Path, documents: Documents
) -> None:
    source, edits = save_tiny(kind), edits_with(form)
    counts = save_pruned(source, edits, tmp_path)
    pruned = Model(tmp_path, "pruned")
    figures = verify_export(source, pruned, edits, documents)
    assert figures["logits_error"] < 1e-3
    assert is_own_form(tmp_path) == (form != "scalar")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=form != "scalar").eval()
    expected = shortened_logits(source.load(), edits, TEXT)
    with torch.no_grad():
        assert torch.allclose(loaded(TEXT).logits, expected, rtol=1e-3, atol=1e-3)
    assert measure_cache_error(loaded, TEXT[0]) < 1e-4
    assert counts["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())


def test_a_changed_modelling_file_is_not_our_own_form(tiny: Model, tmp_path: Path) -> None:
    save_pruned(tiny, edits_with("dense"), tmp_path)
    assert is_own_form(tmp_path)
    code, config = tmp_path / FILE, tmp_path / "config.json"
    text, settings = code.read_text(), config.read_text()
    code.write_text(text + "\nprint('anything')\n")
    assert not is_own_form(tmp_path)
    code.write_text(text.replace('"LlamaConfig"', '"os.system"'))
    assert not is_own_form(tmp_path)
    code.write_text(text)
    config.write_text(json.dumps(json.loads(settings) | {"auto_map": {"AutoConfig": "other.Config"}}))
    assert not is_own_form(tmp_path)


def test_no_code_in_a_folder_of_our_form_runs_without_trust_remote_code(tiny: Model, tmp_path: Path) -> None:
    save_pruned(tiny, edits_with("dense"), tmp_path)
    trace = tmp_path / "trace"
    runs = f"open({str(trace)!r}, 'a').write('ran')\n"
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(runs + "def generate(model, **options): pass\n")
    # A class of its own: transformers marks a class that it loads, for the whole process.
    foreign = "from transformers import PreTrainedTokenizerFast\nclass Tokenizer(PreTrainedTokenizerFast): pass\n"
    (tmp_path / "foreign.py").write_text(runs + foreign)
    settings = tmp_path / "tokenizer_config.json"
    auto_map = {"auto_map": {"AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | auto_map))
    pruned = Model(tmp_path, "pruned")
    model = pruned.load()
    assert type(pruned.config()).__name__ == "PrunedConfig"
    assert "transformers_modules" not in type(model).__module__
    pruned.tokenizer()
    assert not trace.exists()
    # With trust_remote_code the same code does run.
    Model(tmp_path, "pruned", trust_remote_code=True).tokenizer()
    assert trace.read_text() == "ran"


def test_our_own_form_is_not_pruned_again_and_not_built_on_foreign_code(tiny: Model, tmp_path: Path) -> None:
    save_pruned(tiny, edits_with("dense"), tmp_path)
    with pytest.raises(ModelError, match=r"model_path: pruned was pruned into a form of its own"):
        Model(tmp_path, "pruned").family()
    config = tiny.config()
    check_own_form(config)
    config.auto_map = {"AutoConfig": "foreign.Config"}
    with pytest.raises(ParameterError, match=r"method: the result of this method needs a modelling file"):
        check_own_form(config)
