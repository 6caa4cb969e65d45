"""Loading a model: 4-bit weights, weights placed by accelerate, a hub model's revision in the card, and counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from replaceme.base.errors import ModelError
from replaceme.cli import commands
from replaceme.models.model import Model, embedding_count, parameter_count
from tests.conftest import made_model
from tests.helpers import FAST, TEXT, call


@pytest.fixture
def wide(save_tiny: Callable[..., Model]) -> Model:
    """A tiny model whose width is a multiple of NF4's block size, 64."""
    return save_tiny(hidden_size=64, intermediate_size=128)


@pytest.fixture
def prune(text_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that prunes a model with selection by loss, a joint fit and repair, and returns the result's folder."""

    def run(model_path: Path | str, name: str, *options: str) -> Path:
        call(
            commands.run_replaceme, "--model", model_path, "--dataset", text_file, "--layers", "2", *FAST, "--tasks",
            text_file, "--eval_tokens", "600", "--selection", "loss", "--transform", "joint", "--repair", "true",
            "--save_path", tmp_path / name, *options,
        )  # fmt: skip
        return tmp_path / name

    return run


def test_a_model_is_loaded_in_4_bits(wide: Model) -> None:
    linear = wide.load("bfloat16", "cpu", use_4bit=True).model.layers[0].mlp.down_proj
    assert linear.weight.dtype == torch.uint8
    assert linear.weight.numel() == 64 * 128 // 2
    assert linear.weight.quant_type == "nf4"


@pytest.mark.parametrize(
    ("attribute", "broken", "said"),
    [
        ("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False, "requires bitsandbytes"),
        ("bitsandbytes.nn.Linear4bit.forward", lambda *_: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_unavailable_4_bit_linears_are_refused_with_the_reason(
    attribute: str, broken: Any, said: str, wide: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribute, broken)
    with pytest.raises(ModelError, match=rf"^use_4bit: .*{said}.*; use false\.$"):
        wide.load("bfloat16", "cpu", use_4bit=True)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_model_placed_by_a_device_map_computes_the_same(device_map: str, tiny: Model) -> None:
    with torch.inference_mode():
        assert torch.equal(tiny.load(device_map=device_map)(TEXT).logits, tiny.load()(TEXT).logits)


def test_a_device_map_without_room_is_refused_with_the_reason(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **options: Any) -> None:
        raise ValueError(f"no room for {options['device_map']}")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"device_map: llama could not be loaded \(ValueError: no room for auto\); use null"):
        tiny.load(device_map="auto")


def test_a_partly_offloaded_model_gives_the_same_edits_and_scores(
    tiny: Model, prune: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prune(tiny.folder, "plain")
    load, spread = AutoModelForCausalLM.from_pretrained, []

    def load_and_spread(*args: Any, device_map: Any = None, **options: Any) -> Any:
        model, report = load(*args, **options)
        if device_map is None:
            return model, report
        spread.append(device_map)
        # Half of the layers are on disk and are loaded one by one.
        devices = {f"model.layers.{layer}": "disk" if layer >= 3 else "cpu" for layer in range(len(model.model.layers))}
        devices |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        return dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path / f"offloaded-{len(spread)}"), report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_and_spread)
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    offloaded = prune(tiny.folder, "spread", "--device_map", "auto")
    assert set(spread) == {"auto"}
    assert len(spread) >= 4
    for name in ("artifacts/edits/edits.safetensors", "artifacts/profile/profile.json", "metrics/evaluation.json"):
        results = [(result.with_name(f"{result.name}.work") / name).read_bytes() for result in (plain, offloaded)]
        assert results[0] == results[1], name


def test_the_card_names_the_pruned_commit(
    save_tiny: Callable[..., Model], put_into_hub_cache: Callable[..., Path], prune: Callable[..., Path]
) -> None:
    put_into_hub_cache(save_tiny("qwen3").folder, "v2", "2" * 40)
    result = prune("owner/name", "of-the-hub", "--revision", "v2")
    card = (result / "README.md").read_text(encoding="utf-8")
    assert "base_model: owner/name" in card
    assert f"(commit {'2' * 40})" in card
    assert json.loads((result / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen3"


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_counted_once_where_the_head_shares_them(tied: bool) -> None:
    model = made_model(tie_word_embeddings=tied)
    inner = sum(weight.numel() for name, weight in model.model.named_parameters() if not name.startswith("embed_tokens"))
    assert parameter_count(model) - embedding_count(model) == inner
