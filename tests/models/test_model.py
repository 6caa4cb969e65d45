"""Finding and loading a model: hub revisions, 4-bit weights, and weights placed by accelerate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from replaceme import commands
from replaceme.base.errors import ModelError
from replaceme.base.parameters import read_params
from replaceme.edits.edits import Edits
from replaceme.models import hub
from replaceme.models.families import Linear
from replaceme.models.find import find_model
from replaceme.models.model import Model, embedding_count, parameter_count
from tests.conftest import LAYERS, made_model
from tests.helpers import FAST, call

TEXT = torch.arange(2, 42)[None]
MAPS = ["auto", "balanced", "balanced_low_0", "sequential"]


@pytest.fixture
def wide(save_tiny: Callable[..., Model]) -> Model:
    """A tiny model whose width is a multiple of NF4's block size, 64."""
    return save_tiny(hidden_size=64, intermediate_size=128)


@pytest.fixture
def prune(text_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that prunes a model with selection by loss, a joint fit and repair, and returns the result's folder."""

    def run(source: Model, name: str, *options: str) -> Path:
        call(
            commands.run_replaceme, "--model", source.folder, "--dataset", text_file, "--layers", "2", *FAST, "--tasks",
            text_file, "--eval_tokens", "600", "--selection", "loss", "--transform", "joint", "--repair", "true",
            "--save_path", tmp_path / name, *options,
        )  # fmt: skip
        return tmp_path / name

    return run


def edits_of(result: Path) -> Edits:
    return Edits.load(result.with_name(f"{result.name}.work") / "artifacts" / "edits")


def test_edits_from_4_bit_calibration_are_applied_to_the_original_weights(wide: Model, prune: Callable[..., Path]) -> None:
    result = prune(wide, "in-4-bits", "--use_4bit", "true")
    edits, dense, pruned = (
        edits_of(result),
        load_file(wide.folder / "model.safetensors"),
        load_file(result / "model.safetensors"),
    )
    kept = [layer for layer in range(LAYERS) if layer not in edits.removed_layers]
    linears: dict[str, Linear] = {"self_attn.o_proj": "attention_output", "mlp.down_proj": "mlp_output"}
    changed = 0
    for name, weight in pruned.items():
        if not name.startswith("model.layers."):
            assert torch.equal(weight, dense[name]), name
            continue
        position, module, part = name.removeprefix("model.layers.").partition(".")[0], *name.split(".", 3)[3].rsplit(".", 1)
        layer = kept[int(position)]
        original = dense[f"model.layers.{layer}.{module}.{part}"]
        change = edits.changes().get((layer, linears[module])) if module in linears else None
        if change is not None:
            addition = change.weight if part == "weight" else change.bias
            folded = original.double() if change.transform is None else change.transform.T @ original.double()
            original = (folded if addition is None else folded + addition.double()).float()
            changed += 1
        assert torch.equal(weight, original), name
    assert changed >= 4
    # The calibration itself differed, though.
    plain = edits_of(prune(wide, "plain"))
    assert not torch.equal(next(iter(plain.transforms.values())), next(iter(edits.transforms.values())))


def test_a_model_is_loaded_in_4_bits(wide: Model) -> None:
    linear = wide.load("bfloat16", "cpu", use_4bit=True).model.layers[0].mlp.down_proj
    assert linear.weight.dtype == torch.uint8
    assert linear.weight.numel() == 64 * 128 // 2
    assert linear.weight.quant_type == "nf4"


@pytest.mark.parametrize(
    ("attribute", "stand_in", "said"),
    [
        ("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False, "requires bitsandbytes"),
        ("bitsandbytes.nn.Linear4bit.forward", lambda *_: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_unavailable_4_bit_linears_are_refused_with_the_reason(
    attribute: str,
    stand_in: Any,
    said: str,
    wide: Model,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(attribute, stand_in)
    monkeypatch.chdir(tmp_path)
    call(
        commands.run_replaceme,
        "--model",
        wide.folder,
        "--dataset",
        text_file,
        "--layers",
        "2",
        *FAST,
        "--use_4bit",
        "true",
        code=2,
    )
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: use_4bit: ")
    assert said in error
    assert error.endswith("; use false.")


@pytest.mark.parametrize("device_map", MAPS)
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
    plain = prune(tiny, "plain")
    load, spread = AutoModelForCausalLM.from_pretrained, []

    def load_and_spread(*args: Any, device_map: Any = None, **options: Any) -> Any:
        model, report = load(*args, **options)
        if device_map is None:
            return model, report
        spread.append(device_map)
        # Half of the layers are on disk and are loaded one by one.
        places = {f"model.layers.{layer}": "disk" if layer >= 3 else "cpu" for layer in range(len(model.model.layers))}
        places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        return dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / f"offloaded-{len(spread)}"), report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_and_spread)
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    found = prune(tiny, "spread", "--device_map", "auto")
    assert set(spread) == {"auto"}
    assert len(spread) >= 4
    for name in ("artifacts/edits/edits.safetensors", "artifacts/profile/profile.json", "metrics/evaluation.json"):
        results = [(result.with_name(f"{result.name}.work") / name).read_bytes() for result in (plain, found)]
        assert results[0] == results[1], name


@pytest.fixture
def cached(tiny: Model, save_tiny: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """Two revisions of a hub model in the hub's cache, with the hub unreachable."""
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    revisions = {"main": tiny, "v2": save_tiny("qwen3")}
    folder = tmp_path / "hub" / "models--owner--name"
    for number, (revision, source) in enumerate(revisions.items()):
        commit = f"{number + 1}" * 40
        shutil.copytree(source.folder, folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit, encoding="utf-8")
    return revisions


@pytest.mark.parametrize("revision", [None, "v2", "2" * 40])
def test_the_named_revision_is_loaded(revision: str | None, cached: dict[str, Model]) -> None:
    found = find_model(read_params(None, {"model_path": "owner/name", "revision": revision}))
    expected = cached["v2" if revision else "main"]
    assert (found.name, found.commit) == ("owner/name", ("2" if revision else "1") * 40)
    with torch.inference_mode():
        assert torch.equal(found.load()(TEXT).logits, expected.load()(TEXT).logits)


@pytest.mark.usefixtures("cached")
def test_a_missing_revision_is_refused() -> None:
    with pytest.raises(ModelError, match="model_path: owner/name is no local path, and the hub can't be reached"):
        find_model(read_params(None, {"model_path": "owner/name", "revision": "v3"}))


@pytest.mark.usefixtures("cached")
def test_the_card_names_the_pruned_commit(prune: Callable[..., Path]) -> None:
    result = prune(Model(Path("owner/name"), ""), "of-the-hub", "--revision", "v2")
    card = (result / "README.md").read_text(encoding="utf-8")
    assert "base_model: owner/name" in card
    assert f"(commit {'2' * 40})" in card
    assert json.loads((result / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen3"


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_counted_once_where_the_head_shares_them(tied: bool) -> None:
    model = made_model(tie_word_embeddings=tied)
    inner = sum(weight.numel() for name, weight in model.model.named_parameters() if not name.startswith("embed_tokens"))
    assert parameter_count(model) - embedding_count(model) == inner
