"""What the pretended device raises, as a real one does: without it, the other tests here would show nothing."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.device import pretended
from tests.device.conftest import set_float64


@pytest.mark.parametrize(
    "mix",
    [
        lambda there: there @ torch.ones(3, 3),
        lambda there: there + torch.ones(3),
        lambda there: torch.cat([there, there.to("cuda:1")]),
        lambda there: there.index_select(0, torch.tensor([0])),
        lambda there: torch.ones(3)[torch.tensor([0]).cuda()],
        lambda there: there.cpu().lerp_(there, 0.5),
        lambda there: torch.rand(3, device="cuda", generator=torch.Generator()),
    ],
)
def test_operators_that_mix_devices_raise(mix: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError, match="device"):
        mix(torch.ones(3, 3, device="cuda"))


def test_the_processor_cannot_read_the_device() -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        torch.ones(3, device="cuda").numpy()


def test_what_is_not_written_is_nan() -> None:
    assert bool(torch.empty(3, device="cuda").isnan().all())


@pytest.mark.parametrize(
    "make", [lambda x: x.double(), lambda x: x.sum(dtype=torch.float64), lambda x: x.cpu().double().cuda()]
)
def test_without_float64_nothing_is_computed_in_it(make: Callable[[Any], Any]) -> None:
    x = torch.ones(3, device="cuda")
    assert make(x).dtype == torch.float64
    set_float64(there=False)
    with pytest.raises(TypeError, match="float64"):
        make(x)
    assert (2.5 * x).dtype == torch.float32


def test_memory_ends_at_the_limit() -> None:
    pretended.extension.set_limit(torch.cuda.memory_allocated() + (1 << 20))
    held = torch.ones(200_000, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(200_000, device="cuda")
    del held
    torch.ones(200_000, device="cuda")


def test_each_thread_has_a_present_device_of_its_own() -> None:
    torch.cuda.set_device(1)
    made = [torch.ones(1, device="cuda")]
    thread = threading.Thread(target=lambda: made.append(torch.ones(1, device="cuda")))
    thread.start()
    thread.join()
    assert [str(each.device) for each in made] == ["cuda:1", "cuda:0"]
