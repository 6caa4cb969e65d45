"""One try of a program that may be killed, or run out of disk, at a chosen moment.

A try is a forked child of a process that has all libraries loaded, so it costs what the program computes and not the seconds
of its imports. A moment is either the n-th file operation below a folder (opening for writing, renaming, removing, making a
folder, …; the same one in each repetition) or a time after the start. The child, and what it starts, is killed by SIGKILL.
"""

import atexit
import contextlib
import fcntl
import mmap
import os
import re
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PIPE_BYTES = 1 << 20
UNLIMITED = 1e9


@dataclass(frozen=True)
class Moment:
    """When a try is killed: before its ``operation``-th file operation (from 1), or ``seconds`` after its start."""

    operation: int = 0
    seconds: float = UNLIMITED
    # Kill only the process that does the operation, as a machine short of memory does; not all that belong to the try.
    alone: bool = False
    # Happens instead of the kill; for an operation only.
    happens: Callable[[], None] | None = None

    def __str__(self) -> str:
        if self.operation:
            return f"before file operation {self.operation}{', the one process alone' if self.alone else ''}"
        return f"after {self.seconds:.3f} s" if self.seconds < UNLIMITED else "not at all"


NEVER = Moment()


@dataclass(frozen=True)
class TryResult:
    """How a try ended: exit code (negative: the signal), output, seconds, file operations, and whether it had to be stopped."""

    code: int
    said: str
    seconds: float
    operations: int
    hung: bool = False

    def __str__(self) -> str:
        said = " | ".join(self.sentences) or " | ".join(line for line in self.said.splitlines() if line.strip())[-400:]
        return f"{'hung' if self.hung else f'exit code {self.code}'}: {said}"

    @property
    def killed(self) -> bool:
        return not self.hung and ("killed before file operation" in self.said or self.code == -signal.SIGKILL)

    @property
    def sentences(self) -> list[str]:
        return re.findall(r"(?m)^error: (.*)$", self.said)

    @property
    def refused(self) -> bool:
        """Whether the program stopped as it promises: exit code 2 and one sentence."""
        return self.code == 2 and len(self.sentences) == 1 and "Traceback" not in self.said


class Try:
    """A started try; ``wait`` returns how it ended."""

    def __init__(self, action: Callable[[], Any], below: Path, moment: Moment, limit: float):
        self.moment, self.limit, self.began = moment, limit, time.monotonic()
        self.counter = mmap.mmap(-1, 8)
        self.output, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setpgid(0, 0)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.addaudithook(_Counter(self.counter, str(below), moment))
            run_and_exit(action)
        os.close(writing)

    def wait(self) -> TryResult:
        """Kill the try at its moment, or when it takes longer than the limit; return how it ended."""
        status: int | None = None
        end = min(self.moment.seconds, self.limit)
        while status is None:
            pid, found = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                status = found
            elif time.monotonic() - self.began > end:
                self.kill()
                _, status = os.waitpid(self.pid, 0)
            else:
                time.sleep(0.005)
        seconds = time.monotonic() - self.began
        self.kill()  # What the try started and a lone kill left alive.
        os.set_blocking(self.output, False)
        said = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.output, PIPE_BYTES):
                said += part
        os.close(self.output)
        code = os.waitstatus_to_exitcode(status)
        operations = struct.unpack("q", self.counter[:])[0]
        self.counter.close()
        hung = code == -signal.SIGKILL and end == self.limit and seconds >= end
        return TryResult(code, said.decode("utf-8", "replace"), seconds, operations, hung)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class _Counter:
    """An audit hook that counts file operations below a folder, in all processes of a try, and kills at one of them."""

    def __init__(self, counter: mmap.mmap, below: str, moment: Moment):
        self.counter, self.below, self.moment = counter, below, moment

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & WRITING:
                return
        elif event not in OPERATIONS:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        # A relative path is that of a file in a folder that shutil.rmtree holds open.
        if not path or (path.startswith("/") and not path.startswith(self.below)):
            return
        count = struct.unpack("q", self.counter[:])[0] + 1
        self.counter[:] = struct.pack("q", count)
        if count == self.moment.operation and self.moment.happens:
            self.moment.happens()
        elif count == self.moment.operation:
            os.write(2, f"\nkilled before file operation {count}: {event} {path}\n".encode())
            if self.moment.alone:
                os.kill(os.getpid(), signal.SIGKILL)
            os.killpg(0, signal.SIGKILL)


def run_and_exit(action: Callable[[], Any]) -> NoReturn:
    """Run a program in a forked child and end the child as the interpreter would."""
    code = 0
    try:
        action()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
