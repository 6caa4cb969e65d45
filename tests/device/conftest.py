"""``make test-device``: what a GPU computes, on two pretended ones. A run of its own: ``auto`` is no longer the processor.

They are skipped, with the reason, where torch was built for CUDA, and where nothing can compile them. On a real device, its
results alone are compared with the processor's.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from replaceme.base import accelerators
from replaceme.cli import serving
from replaceme.models import formats
from replaceme.pipeline import speed
from replaceme.running import cost, stage
from tests.device import pretended

OBSTACLE = pretended.obstacle()
# A real device is asked for its results only: the other tests set what a pretended one has.
REAL = torch.cuda.is_available()
if OBSTACLE is None:
    pretended.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if OBSTACLE else ():
        if not (REAL and item.path.stem == "test_results"):
            item.add_marker(pytest.mark.skip(reason=OBSTACLE))


class _Clock:
    """In the place of ``time`` where times are reported: no clock is read before the devices have done what they were given."""

    def __getattr__(self, name: str) -> Any:
        assert not pretended.extension.queued(), "a clock is read while a device computes"
        return getattr(time, name)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test devices with float64, and memory enough."""
    for module in (serving, formats, speed, cost) if OBSTACLE is None else ():
        monkeypatch.setattr(module, "time", _Clock())
    yield
    if OBSTACLE is None:
        accelerators.synchronize_all()
        set_float64(there=True)
        pretended.extension.set_limit(8 << 30)
        torch.cuda.set_device(0)
        stage._largest_batches.clear()


def set_float64(*, there: bool) -> None:
    """Let the devices have float64, as CUDA's, or not, as Apple's."""
    pretended.extension.set_float64(there)
    accelerators.has_float64.cache_clear()
