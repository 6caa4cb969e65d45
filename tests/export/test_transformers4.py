"""The exported config.json says in the keys of transformers 4 what it says in those of transformers 5, or the card asks for 5.

``frequencies_of_4`` reads it as transformers 4.57 does. It reads all families itself in ``make test-transformers4``.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from replaceme.edits.edits import Edits
from replaceme.export.save import save_pruned
from replaceme.export.transformers4 import add_older_keys, rename_tokenizer_keys, transformers_4_obstacle
from replaceme.models.model import Model
from tests.conftest import KINDS, UNDESCRIBED, made_config

BASE, LOCAL = 50_000.0, 7_000.0
PLAIN_ROPE = {"rope_type": "default", "rope_theta": BASE}
LLAMA3 = {
    **PLAIN_ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
LINEAR = {**PLAIN_ROPE, "rope_type": "linear", "factor": 4.0}
ROTARY = [kind for kind in (*KINDS, *UNDESCRIBED) if getattr(made_config(kind), "rope_parameters", None)]
NESTED = [kind for kind in ROTARY if "full_attention" in made_config(kind).rope_parameters]


def frequencies_of_4(config: dict[str, Any], attention: str) -> list[float]:
    """Return the inverse frequencies that transformers 4.57 computes from a config.json, for a kind of attention."""
    neox = config["model_type"] == "gpt_neox"
    base = config.get("rotary_emb_base" if neox else "rope_theta", 10_000.0)
    share = config.get("rotary_pct" if neox else "partial_rotary_factor", 0.25 if neox else 1.0)
    scaling = config.get("rope_scaling")
    if attention == "sliding_attention":
        if config["model_type"] == "gemma3_text":
            base = config.get("rope_local_base_freq", 10_000.0)
        if config["model_type"] in ("gemma3_text", "olmo3"):
            scaling = None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turning = int(size * share)
    plain = [base ** (-2 * number / turning) for number in range(turning // 2)]
    if scaling is None:
        return plain
    if scaling["rope_type"] == "linear":
        return [each / scaling["factor"] for each in plain]
    assert scaling["rope_type"] == "llama3"
    low, high, length = (scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    scaled = []
    for each in plain:
        turns = length * each / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0), 1)
        scaled.append((1 - smooth) * each / scaling["factor"] + smooth * each)
    return scaled


def frequencies_of_5(model: Any, attention: str) -> list[float]:
    """Return those that the model loaded by this transformers turns by."""
    buffers = {name: value for name, value in model.named_buffers() if name.endswith("inv_freq") and "original" not in name}
    named = [value for name, value in buffers.items() if attention in name]
    return list(map(float, (named or [*buffers.values()])[0]))


@pytest.mark.parametrize("kind", ROTARY)
def test_transformers_4_turns_by_the_same_frequencies(save_tiny: Callable[..., Model], tmp_path: Path, kind: str) -> None:
    rope = made_config(kind).rope_parameters
    local = LOCAL if kind == "gemma3_text" else BASE
    bases = (
        {"full_attention": PLAIN_ROPE, "sliding_attention": {**PLAIN_ROPE, "rope_theta": local}}
        if kind in NESTED
        else {**rope, "rope_theta": BASE}
    )
    config, model = exported(save_tiny(kind, rope_parameters=bases, **UNDESCRIBED.get(kind, {})), tmp_path)
    assert transformers_4_obstacle(config) is None
    for attention in bases if kind in NESTED else ("full_attention",):
        assert frequencies_of_4(config, attention) == pytest.approx(frequencies_of_5(model, attention), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", LLAMA3),
        ("qwen3", LINEAR),
        ("gemma3_text", {"full_attention": LINEAR, "sliding_attention": {**PLAIN_ROPE, "rope_theta": LOCAL}}),
        ("olmo3", {"full_attention": LINEAR, "sliding_attention": PLAIN_ROPE}),
        ("phi", {**PLAIN_ROPE, "partial_rotary_factor": 0.25}),
    ],
)
def test_transformers_4_scales_them_alike(
    save_tiny: Callable[..., Model], tmp_path: Path, kind: str, rope: dict[str, Any]
) -> None:
    config, model = exported(save_tiny(kind, rope_parameters=rope), tmp_path)
    for attention in ("full_attention", "sliding_attention"):
        assert frequencies_of_4(config, attention) == pytest.approx(frequencies_of_5(model, attention), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {**PLAIN_ROPE, "rope_type": "proportional"}),
        ("olmo3", {"full_attention": PLAIN_ROPE, "sliding_attention": {**PLAIN_ROPE, "rope_theta": LOCAL}}),
        ("gemma3_text", {"full_attention": LINEAR, "sliding_attention": LINEAR}),
        ("modernbert", {"full_attention": PLAIN_ROPE, "sliding_attention": {**PLAIN_ROPE, "rope_theta": LOCAL}}),
    ],
)
def test_what_the_older_keys_cannot_say_is_left_out_and_named(kind: str, rope: dict[str, Any]) -> None:
    config = {"model_type": kind, "dtype": "float32", "rope_parameters": rope}
    assert transformers_4_obstacle(config)
    assert add_older_keys(config) == {**config, "torch_dtype": "float32"}


def test_other_entries_with_an_older_name_get_it() -> None:
    config = {"model_type": "qwen3_moe", "dtype": "bfloat16", "num_local_experts": 4}
    assert add_older_keys(config) == {**config, "torch_dtype": "bfloat16", "num_experts": 4}
    phi3 = {"rope_type": "longrope", "rope_theta": BASE, "short_factor": [1.0], "long_factor": [2.0], "factor": 4.0}
    assert add_older_keys({"model_type": "phi3", "rope_parameters": phi3})["rope_scaling"] == {
        "type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
    }  # fmt: skip


def test_the_tokenizer_has_a_class_and_tokens_that_transformers_4_knows(tmp_path: Path, tiny: Model) -> None:
    exported(tiny, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path, tiny.folder))
    assert ours("the river")["input_ids"] == theirs("the river")["input_ids"]
    assert rename_tokenizer_keys({"extra_special_tokens": ["<a>"], "tokenizer_class": "GPT2Tokenizer"}) == {
        "additional_special_tokens": ["<a>"], "tokenizer_class": "GPT2Tokenizer",
    }  # fmt: skip


def exported(source: Model, folder: Path) -> tuple[dict[str, Any], Any]:
    """Save a pruned model; return its config.json and the loaded model."""
    save_pruned(source, Edits("test", [1]), folder)
    torch.manual_seed(0)
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), Model(folder, "pruned").load("float32")
