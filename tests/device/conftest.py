"""``make test-device``: what a GPU computes, on two pretended ones. A run of its own: ``auto`` is no longer the processor.

They are skipped, with the reason, where torch was built for CUDA, and where nothing can compile them.
"""

from collections.abc import Iterator

import pytest
import torch

from replaceme.base import accelerators
from replaceme.running import stage
from tests.device import pretended

OBSTACLE = pretended.obstacle()
if OBSTACLE is None:
    pretended.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if OBSTACLE else ():
        item.add_marker(pytest.mark.skip(reason=OBSTACLE))


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Give each test devices with float64, and memory enough."""
    yield
    if OBSTACLE is None:
        set_float64(there=True)
        pretended.extension.set_limit(8 << 30)
        torch.cuda.set_device(0)
        stage._largest_batches.clear()


def set_float64(*, there: bool) -> None:
    """Let the devices have float64, as CUDA's, or not, as Apple's."""
    pretended.extension.set_float64(there)
    accelerators.has_float64.cache_clear()
