"""The machine, in words, for what depends on it: times and memory. Loads no torch."""

import os
import platform
import re
import sys
from functools import cache
from pathlib import Path

from replaceme.base.ranks import world_size
from replaceme.running.versions import list_versions, versions

# Linux alone has it.
CPU_INFO = Path("/proc/cpuinfo")
# What times depend on besides the machine.
PACKAGES = ("torch", "transformers")


@cache
def processor() -> str:
    """Return the processor's name; its architecture where the system doesn't name it."""
    named = re.search(r"(?m)^model name\s*: (.+)$", CPU_INFO.read_text(encoding="utf-8")) if CPU_INFO.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def machine() -> str:
    """Return processor, cores that this process may use, memory, GPUs if this process used any, and versions of packages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = [processor(), f"{cores} core{'s' * (cores > 1)}", f"{memory / 1e9:.3g} GB of memory", *_gpus()]
    parts += [f"the first of {world_size()} processes"] if world_size() > 1 else []
    return f"{', '.join(parts)}; {list_versions(versions(PACKAGES))}"


def _gpus() -> list[str]:
    if "torch" not in sys.modules:
        return []
    from replaceme.base.accelerators import used_names

    return used_names()
