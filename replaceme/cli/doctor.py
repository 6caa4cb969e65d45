"""``replaceme doctor``: what this machine has and what a run would take of it, in ten lines for an issue."""

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from replaceme import __version__
from replaceme.running.entry import Parser, plain_parser
from replaceme.running.machine import machine
from replaceme.running.versions import FOUR_BIT, SCORES, list_versions, versions

PACKAGES = (*SCORES, *FOUR_BIT, "accelerate", "dvc")
# Width and features of the product that is timed: those of a model with 1.5 billion parameters.
WIDTH, FEATURES = 1536, 8960


def make_parser() -> Parser:
    """Return the parser of ``replaceme doctor``."""
    return plain_parser("replaceme doctor", "Print what this machine has and what a run would use.", "replaceme doctor")


def doctor(arguments: Sequence[str]) -> None:
    """Print the lines."""
    make_parser().parse_args(arguments)
    for name, words in describe_machine():
        print(f"{name:10}{words}")


def describe_machine() -> Iterator[tuple[str, str]]:
    """Yield what a person reports, and ``device: auto`` and the like would be here: a name and words each."""
    from replaceme.base import accelerators
    from replaceme.base.files import cache_folder
    from replaceme.models.devices import free_memory, kind_of, resolve_device, total_memory
    from replaceme.models.formats import measure_products
    from replaceme.models.memory import AUTO_FRACTION, format_size

    yield "replaceme", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield "packages", list_versions(versions(PACKAGES))
    yield "machine", machine().partition(";")[0]
    yield "memory", f"{format_size(free_memory('cpu'))} of {format_size(total_memory())} are free"
    for number in range(accelerators.count_devices()):
        device = f"{accelerators.find_kind()}:{number}"
        free, total = accelerators.memory(device)
        exact = "float64" if str(accelerators.float64_device(device)) == device else "no float64: sums are the processor's"
        yield device, f"{kind_of(device)}, {format_size(free)} of {format_size(total)} are free, {exact}"
    chosen = resolve_device("auto")
    seconds = measure_products(WIDTH, FEATURES, chosen)
    times = ", ".join(f"{format} in {1000 * each:.3g} ms" for format, each in seconds.items())
    yield "device", f"auto is {chosen} ({kind_of(chosen)})"
    known = accelerators.has_bfloat16(chosen)
    auto = "" if known is None else f"auto is {'bfloat16' if known else 'float32'}; "
    yield "dtype", f"{auto}on {chosen}, a product of {WIDTH} x {FEATURES} takes {times}"
    limit = format_size(int(AUTO_FRACTION * free_memory(chosen)))
    yield "weights", f"memory: auto lets them take {limit}; larger models are streamed"
    yield "cache", str(cache_folder()).replace(str(Path.home()), "~")
