"""What the host waits for a device for: a few results of a batch, however many layers, documents and tokens it has."""

from pathlib import Path

import pytest
import torch

from replaceme.cli.main import main
from replaceme.edits.edits import Edits
from replaceme.evaluation.perplexity import score_windows
from replaceme.evaluation.windows import Windows
from replaceme.models.devices import release_memory
from replaceme.models.memory import measure_parts, weight_bytes
from replaceme.models.model import Model
from replaceme.pipeline.runner import run_stages
from replaceme.running.stage import FIT
from replaceme.running.workspace import Workspace
from tests.conftest import LAYERS
from tests.device import pretended
from tests.device.test_results import fit, make_params
from tests.helpers import call

# Waits for one more batch. Each forward pass has one of transformers' (for its mask). The profile reads the sampled tokens of
# each layer, the choice of a cut the losses of each text, and a repair the states after each pass through a layer.
MOST = {"profile": LAYERS + 2, "select": 3, "activations": 1, "repair": 6 * LAYERS}


def test_the_host_waits_a_few_times_for_a_batch(tmp_path: Path) -> None:
    waits: dict[str, list[int]] = {}
    for size in (10, 1):
        params, work = make_params(tmp_path, "llama", {"batch_size": size}, "cuda"), Workspace(tmp_path / str(size))
        for stage in ("inputs", *FIT):
            with pretended.counting() as counts:
                run_stages(params, work, [stage])
            waits.setdefault(stage, []).append(counts["waits"])
    for stage, most in MOST.items():
        few, many = waits[stage]
        assert many - few <= most * (20 - 2), stage


def test_scores_of_a_batch_of_windows_are_read_at_once(tiny: Model) -> None:
    model = tiny.load("float32", "cuda:0")
    # Two batches, of 10 windows and of 2; each window has two parts.
    windows = Windows([torch.arange(2, 102) for _ in range(12)], [*range(12)], 1, 1, 1)
    with pretended.counting() as counts:
        dense = score_windows(model, windows, 1, "dense", keep_likely=True)
    assert counts["waits"] <= 2 * 2 + 2 * 12
    with pretended.counting() as counts:
        scores = score_windows(model, windows, 1, "pruned", dense)
    # One tells whether the device has float64.
    assert counts["waits"] <= 2 * 4 + 1
    assert scores["losses"].equal(dense["losses"])


def test_the_speed_of_a_chat_is_read_when_the_answer_is_there(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["a question"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines, ""))
    call(main, "chat", tiny.folder, "--tokens", "3")


def test_at_five_memory_limits_the_default_finds_the_processors_cut_and_channels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"dataset_size": 8}
    removed, _ = fit(tmp_path, "llama", few, "cpu")
    channels = _channels(tmp_path, "cpu")
    release_memory()
    before = torch.accelerator.memory_allocated(0)
    torch.accelerator.reset_peak_memory_stats(0)
    fit(tmp_path, "llama", few, "cuda")
    source = Model(tmp_path / "models" / "llama", "llama")
    whole, (outside, layer) = weight_bytes(source, "float32"), measure_parts(source, "float32")
    beside = torch.accelerator.max_memory_allocated(0) - before - whole
    for part in (1.0, 1.5, 2.0, 4.0, 5.9):
        budget = outside + int(part * layer)
        release_memory()
        # A layer more: its weights are there twice while it is loaded.
        pretended.extension.set_limit(torch.accelerator.memory_allocated(0) + beside + budget + layer)
        own_removed, _ = fit(tmp_path, "llama", {**few, "memory": f"{budget}B"}, "cuda", str(part))
        assert own_removed == removed
        assert _channels(tmp_path, f"cuda{part}") == channels
    assert not [record.message for record in caplog.records if "does not fit" in record.message]


def _channels(folder: Path, name: str) -> dict[int, list[list[int]]]:
    return {layer: own.tolist() for layer, own in Edits.load(Workspace(folder / "llama" / name).edits).channels.items()}
