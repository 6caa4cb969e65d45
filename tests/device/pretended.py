"""Two pretended CUDA devices (pretended.cpp), for a torch without CUDA: ``install`` before torch is asked for one.

They show mixed devices, a device without a number in a thread with another present one, wrong figures of memory, formats and
kernels that a device lacks. They can't show a kernel's own numbers, speed, races of streams, or bitsandbytes' kernels.
"""

import re
import shutil
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

SOURCE = Path(__file__).with_name("pretended.cpp")
# The dispatch keys of a native function that CUDA has a kernel for.
KEYS = {"CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
# The extension: what it exports is at the end of pretended.cpp.
extension: Any = None


def obstacle() -> str | None:
    """Return why there can be no pretended device here; None if there can."""
    if torch.backends.cuda.is_built():
        return "torch was built for CUDA: run the tests on a GPU instead"
    if torch.accelerator.is_available():
        return "there is an accelerator: run the tests on it instead"
    return None if shutil.which("c++") and shutil.which("ninja") else "a C++ compiler and ninja are needed"


def install() -> None:
    """Compile the extension, once in a folder of torch's, and let ``torch.cuda`` speak of its devices."""
    global extension
    from torch.utils.cpp_extension import load

    flags = ["-O0", "-g0", "-fvisibility=default"]
    extension = load(f"pretended_{torch.__version__.split('+')[0].replace('.', '_')}", [str(SOURCE)], extra_cflags=flags)
    extension.describe(*_describe_operators())
    for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
        for name, value in _cuda_functions().items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]  # torch._dynamo imports it
    plain = torch.UntypedStorage.__deepcopy__
    torch.UntypedStorage.__deepcopy__ = lambda self, memo: _copy_storage(self, memo, plain)  # type: ignore[method-assign]


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Yield a dict that has the block's traffic after its end: bytes ``to_device`` and ``to_host``, ``copies`` and ``waits``.

    The host waits for a device where it reads a value of it, copies without ``non_blocking``, or synchronizes.
    """
    before, counts = extension.traffic(), dict[str, int]()
    yield counts
    counts.update({name: count - before[name] for name, count in extension.traffic().items()})


def _describe_operators() -> tuple[set[str], set[str]]:
    """Return the operators whose CUDA wrapper checks no devices, and all that have a kernel, from torch's own table."""
    text = (files("torchgen") / "packaged/ATen/native/native_functions.yaml").read_text()
    named = {entry["func"].split("(")[0]: entry for entry in yaml.load(text, yaml.CSafeLoader)}
    free, known = set(), set()
    for name, entry in named.items():
        # A functional or in-place form of a structured operator is computed, and checked, with its out form.
        target = named.get(entry.get("structured_delegate", name), entry)
        tables = entry.get("dispatch", {"CompositeImplicitAutograd": ""}), target.get("dispatch", {})
        keys = {key.strip() for table in tables for own in table for key in own.split(",")}
        generated = [each for each in re.split(r",\s*", entry.get("autogen", "")) if each]
        if keys & KEYS or generated or "ufunc_inner_loop" in target:
            known.add(f"aten::{name}")
        known.update(f"aten::{each}" for each in generated)
        if "NoCheck" in f"{entry.get('device_check')} {target.get('device_check')}":
            free.add(f"aten::{name}")
    return free, known


def _cuda_functions() -> dict[str, Any]:
    """Return what stands in ``torch.cuda`` in the place of functions that this torch lacks."""
    properties = types.SimpleNamespace(name="Pretended GPU", major=8, minor=0, total_memory=8 << 30, multi_processor_count=8)
    return {
        "_is_compiled": lambda: True, "_lazy_init": lambda: None, "init": lambda: None, "is_available": lambda: True,
        "is_initialized": lambda: True, "_is_in_bad_fork": lambda: False, "device_count": extension.count,
        "_device_count_nvml": extension.count, "current_device": extension.current, "_exchange_device": extension.choose,
        "_maybe_exchange_device": extension.choose, "set_device": lambda device: extension.choose(_number(device)) and None,
        "device": _Device, "get_device_name": lambda device=None: f"Pretended GPU {_number(device)}",
        "get_device_capability": lambda device=None: (8, 0), "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: ["sm_80"], "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (extension.total() - extension.reserved(_number(device)), extension.total()),
        "memory_allocated": lambda device=None: extension.used(_number(device)),
        "memory_reserved": lambda device=None: extension.reserved(_number(device)),
        "max_memory_allocated": lambda device=None: extension.peak(_number(device)),
        "empty_cache": extension.empty_cache, "ipc_collect": lambda: None,
        "synchronize": lambda device=None: extension.synchronize(_number(device)),
        "is_current_stream_capturing": lambda: False, "get_rng_state": lambda device="cuda": extension.state(_number(device)),
        "set_rng_state": lambda state, device="cuda": extension.set_state(_number(device), state.cpu()),
        "get_rng_state_all": lambda: [extension.state(number) for number in range(extension.count())],
        "manual_seed": lambda seed: extension.seed(extension.current(), int(seed)), "manual_seed_all": _seed_all,
    }  # fmt: skip


def _number(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    number = None if device is None else torch.device(device).index
    return extension.current() if number is None else number


def _seed_all(seed: int) -> None:
    for number in range(extension.count()):
        extension.seed(number, int(seed) & (2**64 - 1))


class _Device:
    def __init__(self, device: Any):
        self.number = _number(device)

    def __enter__(self) -> None:
        self.before = extension.choose(self.number)

    def __exit__(self, *_: object) -> None:
        extension.choose(self.before)


def _copy_storage(storage: Any, memo: dict[Any, Any], plain: Any) -> Any:
    if storage.device.type != "cuda":
        return plain(storage, memo)
    copies = memo.setdefault("torch", {})
    if storage._cdata not in copies:
        made = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage()
        copies[storage._cdata] = made.copy_(storage)
    return copies[storage._cdata]
