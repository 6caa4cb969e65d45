"""The choice of layers from made-up profiles."""

import pytest


@pytest.fixture(autouse=True)
def _without_recorded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stage run without a model's record, which only ``remove`` needs."""
    monkeypatch.setattr("replaceme.pipeline.select.recorded_model", lambda *_: None)
