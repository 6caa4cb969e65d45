"""What a run prints: whole lines in a file, and on a terminal bars that no message is glued to."""

import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path

import pytest

from replaceme.base import progress as module
from replaceme.base.progress import configure_logging, logger, progress
from replaceme.models.model import Model
from tests.pipeline.closure import ROOT


@pytest.fixture(autouse=True)
def _same_logging_afterwards() -> Iterator[None]:
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that loops see, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_loop_in_a_file_has_lines_after_five_seconds_and_fewer_the_longer_it_takes(
    clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging()
    for item in progress(range(30), "short", "batches"):
        clock[0] += 0.15
        if item == 3:
            logger.info("decided")
    # The first item tells nothing about the others.
    for item in progress(range(6), "fitting", "hosts"):
        clock[0] += 15 if item else 60
    for _ in progress(range(1000), "walking", "batches"):
        clock[0] += 4
    for item in progress(count(), "drawing", "texts", note=lambda: "loss 2"):
        clock[0] += 7
        if item == 6:
            break
    lines = capfd.readouterr().err.splitlines()
    walking = [int(line.split()[1]) for line in lines if line.startswith("walking")]
    assert walking[:3] == [2, 4, 6]
    assert all(4 * (later - number) >= 0.1 * 4 * number for number, later in pairwise(walking))
    assert len(walking) < 60
    assert [line for line in lines if not line.startswith("walking")] == [
        "decided",
        "fitting: 1 of 6 hosts, 01:00 so far",
        "fitting: 2 of 6 hosts, 01:15 so far, about 01:00 to go",
        "fitting: 3 of 6 hosts, 01:30 so far, about 00:45 to go",
        "fitting: 4 of 6 hosts, 01:45 so far, about 00:30 to go",
        "fitting: 5 of 6 hosts, 02:00 so far, about 00:15 to go",
        "fitting: 6 of 6 hosts, 02:15 so far",
        *(f"drawing: {texts} texts, 00:{7 * texts:02} so far, loss 2" for texts in range(1, 7)),
    ]


def test_printed_lines_and_messages_keep_their_order_in_one_file() -> None:
    program = (
        "from replaceme.running.entry import run; from replaceme.base.progress import logger\n"
        "run(lambda: (logger.info('before'), print('a table'), logger.info('after')))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    assert done.stdout.splitlines() == ["before", "a table", "after"]


def terminal_output(program: str, *arguments: str) -> str:
    """Run a Python program with a terminal as its standard error, and return what it wrote there."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        parts: list[bytes] = []
        with suppress(OSError):  # the end of a pseudoterminal's output
            while part := os.read(ours, 65536):
                parts.append(part)
    os.close(ours)
    assert process.returncode == 0
    return b"".join(parts).decode()


def test_a_message_on_a_terminal_has_a_line_of_its_own_beside_the_bars() -> None:
    output = terminal_output(
        "from replaceme.base.progress import configure_logging, logger, progress\n"
        "configure_logging()\n"
        "for outer in progress(range(2), 'outer', 'hosts'):\n"
        "    for inner in progress(range(2), 'inner', 'steps'):\n"
        "        logger.info('decided %d %d', outer, inner)\n"
    )
    assert "outer" in output
    for message in ("decided 0 0", "decided 0 1", "decided 1 0", "decided 1 1"):
        (line,) = [line for line in output.split("\r\n") if message in line]
        # What stood in the line before was wiped out.
        assert re.search(rf"(^|\r|\x1b\[A){message}$", line), repr(line)
        assert re.fullmatch(r"(.*\r +\r)?(\x1b\[A|\r)*", line.removesuffix(message), flags=re.DOTALL), repr(line)


LIBRARIES = """
import sys
from replaceme.cli.commands import run_replaceme
from replaceme.pipeline import actions

def use_libraries(params, **options):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(params.model_path).save_pretrained(params.save_path)
    Dataset.from_dict({"a": [1, 2]}).map(lambda row: row).save_to_disk(params.save_path + "/table")

actions.prune = use_libraries
run_replaceme()
"""


def test_libraries_that_a_console_script_loads_late_show_no_bars(tiny: Model, tmp_path: Path) -> None:
    output = terminal_output(LIBRARIES, "--model_path", str(tiny.folder), "--save_path", str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert output.splitlines() == ["preset published (the default here)"]
