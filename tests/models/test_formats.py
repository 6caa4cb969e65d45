"""dtype auto: what decides it, that it is decided once, and that every stage computes in what was decided."""

from collections.abc import Callable
from pathlib import Path

import pytest

from replaceme.base.entries import Task
from replaceme.base.errors import ReplaceMeError
from replaceme.base.files import read_json
from replaceme.base.parameters import Params
from replaceme.models import formats
from replaceme.models.formats import choose_format, resolve_formats
from replaceme.models.model import Model
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.pipeline.runner import run_stages
from replaceme.running.versions import FORMAT
from replaceme.running.workspace import Workspace

Measure = Callable[[float, float], list[int]]


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measure:
    """Sets the seconds that products take in float32 and in bfloat16; returns a list that grows with each measurement."""
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))

    def set_seconds(float32: float, bfloat16: float) -> list[int]:
        measured: list[int] = []

        def measure_products(width: int, _inputs: int, _device: str) -> dict[str, float]:
            measured.append(width)
            return {"float32": float32, "bfloat16": bfloat16}

        monkeypatch.setattr(formats, "measure_products", measure_products)
        return measured

    return set_seconds


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"), [(1.0, 2.0, "float32"), (1.1, 1.0, "float32"), (2.0, 1.0, "bfloat16")]
)
def test_bfloat16_must_be_clearly_faster_and_is_measured_once(
    float32: float, bfloat16: float, chosen: str, params: Params, tiny: Model, measure: Measure
) -> None:
    measured = measure(float32, bfloat16)
    assert choose_format(params, tiny) == chosen
    measure(bfloat16, float32)
    assert choose_format(params, tiny) == chosen
    assert len(measured) == 1
    assert resolve_formats(params, tiny) == params
    automatic = params.model_copy(update={"dtype": "auto"})
    assert resolve_formats(automatic, tiny) == params.model_copy(update={"dtype": chosen})


def test_memory_asks_for_bfloat16(params: Params, tiny: Model, measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(1.0, 2.0)
    size = sum(4 * tensor.entries for tensor in tiny.stored.values())
    for memory, chosen in ((f"{size}B", "float32"), (f"{size - 1}B", "bfloat16"), ("auto", "float32"), (None, "float32")):
        assert choose_format(params.model_copy(update={"memory": memory}), tiny) == chosen
    assert choose_format(params.model_copy(update={"use_4bit": True}), tiny) == "bfloat16"
    # Each process has its own weights.
    monkeypatch.setattr(formats, "total_memory", lambda: 2 * size)
    for processes, chosen in ((1, "float32"), (2, "bfloat16")):
        assert choose_format(params.model_copy(update={"processes": processes}), tiny) == chosen


def test_a_missing_device_is_said_once(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replaceme.base.accelerators.find_kind", lambda: None)
    params = params.model_copy(update={"device": "cuda", "dtype": "auto", "tasks": (Task("nothing.txt"),)})
    with pytest.raises(ReplaceMeError) as caught:
        inspect_inputs(params, Workspace(tmp_path))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["device", "tasks"]


def test_the_measurement_takes_both_formats() -> None:
    seconds = formats.measure_products(64, 128, "cpu")
    assert seconds.keys() == {"float32", "bfloat16"}
    assert all(0 < value < 1 for value in seconds.values())


def test_all_stages_compute_in_the_format_that_the_inputs_chose(params: Params, tmp_path: Path, measure: Measure) -> None:
    measure(1.0, 2.0)
    work = Workspace(tmp_path)
    params = params.model_copy(update={"dtype": "auto", "eval_dtype": "auto"})
    run_stages(params, work, ("inputs", "generate", "calibrate", "profile"))
    assert read_json(work.model_versions)[FORMAT] == read_json(work.score_versions)[FORMAT] == "float32"
    automatic = read_json(work.profile / "profile.json")
    other = Workspace(tmp_path / "float32")
    run_stages(params.model_copy(update={"dtype": "float32"}), other, ("inputs", "generate", "calibrate", "profile"))
    assert read_json(other.profile / "profile.json") == automatic
    run_stages(params.model_copy(update={"dtype": "bfloat16"}), other, ("inputs", "generate", "calibrate", "profile"))
    assert read_json(other.profile / "profile.json") != automatic
