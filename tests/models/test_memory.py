"""``memory``: sizes, what auto chooses, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from replaceme.base.errors import ParameterError
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params, read_params, size_of
from replaceme.cli import commands
from replaceme.export import card
from replaceme.methods.registry import METHODS
from replaceme.models import devices, memory
from replaceme.models.devices import free_memory
from replaceme.models.memory import load_within_budget, measure_parts, weight_budget, weight_bytes
from replaceme.models.model import Model
from replaceme.models.streaming import stream_of
from replaceme.pipeline.runner import STAGES
from tests.helpers import FAST, call
from tests.pipeline.closure import ROOT


def allowed(value: str | None, **options: Any) -> Params:
    return read_params(None, {"memory": value, "device": "cpu", **options}, METHODS)


def test_sizes() -> None:
    sizes = {"6GB": 6 * 10**9, "500MB": 5 * 10**8, "2GiB": 2 << 30, "1.5 GB": 15 * 10**8, "7B": 7, "3KiB": 3072, "1TB": 10**12}
    assert {text: size_of(text) for text in sizes} == sizes
    assert [allowed(text).memory for text in sizes] == [*sizes]


@pytest.mark.parametrize("value", ["6", "GB", "6 gigabytes", "-1GB", "6Gb", "auto ", 6, 6.5, True])
def test_other_values_are_refused_with_the_forms_that_there_are(value: Any) -> None:
    with pytest.raises(ParameterError, match=r"memory: must be auto, null, or a size such as 6GB or 500MiB, not "):
        allowed(value)


def test_what_fits_is_loaded_whole_and_what_does_not_is_streamed(tiny: Model) -> None:
    needed = weight_bytes(tiny, "float32")
    for value in (None, "auto", f"{needed}B"):
        assert stream_of(load_within_budget(tiny, allowed(value), "float32")) is None
    own = stream_of(load_within_budget(tiny, allowed(f"{needed - 1}B"), "float32"))
    assert own is not None
    assert own.budget == needed - 1 - measure_parts(tiny, "float32")[0]
    # The dtype counts.
    assert weight_budget(tiny, allowed(f"{needed - 1}B"), "bfloat16") is None


def test_auto_takes_a_share_of_what_is_free(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = weight_bytes(tiny, "float32")
    for free, streams in ((needed / memory.AUTO_FRACTION + 8, False), (needed / memory.AUTO_FRACTION - 8, True)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert (weight_budget(tiny, allowed("auto"), "float32") is not None) == streams
    # What can't be streamed is loaded whole, whatever is free.
    assert weight_budget(tiny, allowed("auto"), "float32", obstacle="it is trained") is None
    with pytest.raises(
        ParameterError, match=r"^memory: 9KB is less than the 0\.243 MB of llama, and it is trained; use auto or"
    ):
        weight_budget(tiny, allowed("9KB"), "float32", obstacle="it is trained")


def test_free_memory_is_what_the_machine_or_its_container_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, limit, use = (tmp_path / name for name in ("meminfo", "max", "current"))
    info.write_text("MemTotal:       9000 kB\nMemAvailable:   4000 kB\n", encoding="utf-8")
    for name, path in (("MEMORY_INFO", info), ("GROUP_LIMIT", limit), ("GROUP_USE", use)):
        monkeypatch.setattr(devices, name, path)
    assert free_memory("cpu") == 4000 << 10
    use.write_text("1000000\n", encoding="utf-8")
    for text, free in (("max", 4000 << 10), ("3000000", 2_000_000), ("900000", 0)):
        limit.write_text(f"{text}\n", encoding="utf-8")
        assert free_memory("cpu") == free
    assert devices.total_memory() == 900_000
    limit.write_text("max\n", encoding="utf-8")
    assert devices.total_memory() > 1 << 30
    info.unlink()
    assert free_memory("cpu") > 1 << 20


def run(source: Model, text: Path, target: Path, *options: str, code: int = 0) -> None:
    places: list[str | Path] = ["--model_path", source.folder, "--dataset", text, "--tasks", f"[{text}]", "--save_path", target]
    call(commands.run_replaceme, *places, "--layers_to_skip", "2", "--eval_tokens", "300", *FAST, *options, code=code)


REFUSED = {
    "use_4bit packs them": ["--use_4bit", "true"],
    "device_map spreads them": ["--device_map", "auto"],
    "heal_tokens trains many layers": ["--heal_tokens", "1k"],
    "method slicegpt works on many layers": ["--method", "slicegpt"],
    "method llm_pruner works on many layers": (
        ["--method", "llm_pruner", "--min_distance_layer", "1", "--max_distance_layer", "5", "--max_length", "64"]
    ),
    "method llm_streamline works on many layers": ["--method", "llm_streamline"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_needs_the_whole_model_is_refused_before_any_work(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    # Four bits take less.
    given, needed = ("90KB", "0.105 MB") if "4bit" in reason else ("200KB", "0.243 MB")
    run(tiny, text_file, tmp_path / "pruned", "--memory", given, *REFUSED[reason], code=2)
    said = capsys.readouterr().err
    assert f"memory: {given} is less than the {needed} of llama, and {reason}" in said
    assert "use auto or null." in said
    assert not (tmp_path / "pruned.work").exists()


def test_too_little_is_refused_with_what_would_do(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny, text_file, tmp_path / "pruned", "--memory", "80KB", code=2)
    outside, largest = measure_parts(tiny, "float32")
    assert outside + largest == 83_200
    assert (
        "memory: 0.08 MB is too little for llama, of which 0.0832 MB have to be there at once; allow more, such as 0.115 MB."
        in capsys.readouterr().err
    )


def test_a_matrix_that_a_layer_gets_counts_from_the_start(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = sum(measure_parts(tiny, "float32")) + 4 * tiny.config().hidden_size ** 2
    options = ("--method", "linearpatch", "--tasks", "[]", "--memory")
    run(tiny, text_file, tmp_path / "pruned", *options, f"{needed - 1}B", code=2)
    assert "have to be there at once" in capsys.readouterr().err
    assert not (tmp_path / "pruned.work").exists()
    run(tiny, text_file, tmp_path / "pruned", *options, f"{needed}B")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", "--transform channels --repair true --selection loss --dataset_size 8"),
        ("mixtral", "--method prune_and_comp --tasks [] --dataset_size 8"),
    ],
)
def test_a_streamed_run_gives_the_same_model_and_the_same_figures(
    save_tiny: Callable[..., Model], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    kind: str, options: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = save_tiny(kind)
    outside, largest = measure_parts(source, "float32")
    for name, value in (("whole", "null"), ("streamed", f"{outside + 2 * largest}B")):
        # The dense model is scored by both.
        monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / f"cache of {name}"))
        run(source, text_file, tmp_path / name, *options.split(), "--debug", "--memory", value, "--batch_size", "4")
    said = capsys.readouterr().err
    assert f"memory: {kind} is streamed: of its weights" in said
    assert "memory: weights take up to" in said
    assert sha256_below(tmp_path / "streamed") == sha256_below(tmp_path / "whole")
    works = (tmp_path / "streamed.work", tmp_path / "whole.work")
    found, expected = (
        {place: digest for place, digest in sha256_below(work).items() if not place.startswith("stages/")} for work in works
    )
    timed = "metrics/compression.json"
    assert found.pop(timed)
    assert expected.pop(timed)
    assert found == expected


def test_no_stage_runs_again_because_of_the_memory() -> None:
    assert [name for name, stage in STAGES.items() if "memory" in stage.params] == []
    assert "memory" not in card.SETTINGS
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert [name for name, stage in stages.items() if "memory" in stage.get("params", [])] == []
