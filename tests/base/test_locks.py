"""Locks between processes, and what they share: of two, one works; and what is shared is made again unless it is unchanged."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from replaceme.base.errors import ParameterError
from replaceme.base.files import new_folder, write_text
from replaceme.base.locks import held
from replaceme.base.shared import make_once
from tests.interruption import died_at, forked, started


def refuse(holder: str) -> None:
    raise ParameterError(f"in use by {holder}")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_lock_names_its_holder_and_leaves_nothing(tmp_path: Path) -> None:
    def second() -> None:
        with held(tmp_path / "lock", refuse):
            pass

    with held(tmp_path / "lock", refuse):
        with pytest.raises(
            ParameterError, match=rf"in use by \S+, process {os.getpid()} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d"
        ):
            second()
        assert forked(second) == 1
    assert list(tmp_path.iterdir()) == []
    assert forked(second) == 0


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    def hold() -> None:
        with held(tmp_path / "lock", refuse):
            (tmp_path / "begun").touch()
            time.sleep(600)

    child = started(hold)
    wait_for((tmp_path / "begun").exists)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with held(tmp_path / "lock", refuse):
        assert "process" in (tmp_path / "lock.txt").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_many_processes_hold_a_lock_one_after_the_other(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0", encoding="utf-8")

    def add() -> None:
        for _ in range(5):
            with held(tmp_path / "lock", lambda holder: None):
                number = int(count.read_text(encoding="utf-8"))
                time.sleep(0.002)
                count.write_text(str(number + 1), encoding="utf-8")

    children = [started(add) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert count.read_text(encoding="utf-8") == "20"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "key"


def makes(path: Path, made: Path) -> Callable[[], None]:
    """Return what makes a shared folder, and notes each time in the file ``made``."""

    def make() -> None:
        with made.open("a", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()}\n")
        with new_folder(path) as folder:
            for name in ("a", "b", "note"):
                (folder / name).write_text(f"the content of {name}", encoding="utf-8")

    return make


def test_the_second_process_waits_for_the_first_and_uses_what_it_made(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "replaceme")
    made = tmp_path / "made"

    def slow() -> None:
        (tmp_path / "begun").touch()
        wait_for((tmp_path / "waits").exists)
        makes(shared, made)()

    child = started(lambda: make_once(shared, "baseline", slow))
    wait_for((tmp_path / "begun").exists)

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            (tmp_path / "waits").touch()

    handler = Waits()
    logging.getLogger("replaceme").addHandler(handler)
    try:
        assert not make_once(shared, "baseline", makes(shared, made))
    finally:
        logging.getLogger("replaceme").removeHandler(handler)
    assert os.waitpid(child, 0)[1] == 0
    assert f", process {child} on " in caplog.text
    assert caplog.text.count("baseline: waiting for ") == 1
    assert made.read_text(encoding="utf-8") == f"{child}\n"


def test_what_a_killed_process_began_is_made_by_the_next(shared: Path, tmp_path: Path) -> None:
    make, number = makes(shared, tmp_path / "made"), 0
    while died_at(number, lambda: make_once(shared, "baseline", make), shared.parent):
        number += 1
        make_once(shared, "baseline", make)
        assert sorted(path.name for path in shared.parent.iterdir()) == ["key", "key.sums.json"]
        assert sorted(path.name for path in shared.iterdir()) == ["a", "b", "note"]
        shutil.rmtree(shared.parent)
    assert number > 10


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file was halved": lambda folder: (folder / "a").write_bytes((folder / "a").read_bytes()[:7]),
    "a file was emptied": lambda folder: (folder / "a").write_bytes(b""),
    "a bit was flipped": lambda folder: (folder / "a").write_bytes(b"the content of \x60"),
    "a file is gone": lambda folder: (folder / "a").unlink(),
    "a file was added": lambda folder: (folder / "c").touch(),
    "a file was renamed": lambda folder: (folder / "a").rename(folder / "c"),
    "the sums are gone": lambda folder: folder.with_name("key.sums.json").unlink(),
    "the sums were halved": lambda folder: folder.with_name("key.sums.json").write_text("{"),
    "the sums are others": lambda folder: folder.with_name("key.sums.json").write_text("[]"),
    "the sums are no text": lambda folder: folder.with_name("key.sums.json").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_shared_is_made_anew_unless_it_is_unchanged(
    damage: str, shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = makes(shared, tmp_path / "made")
    assert make_once(shared, "baseline", make, apart=("note",))
    write_text(shared / "note", "another")
    assert not make_once(shared, "baseline", make, apart=("note",))
    assert not caplog.messages
    DAMAGES[damage](shared)
    assert make_once(shared, "baseline", make, apart=("note",))
    assert caplog.messages == [f"baseline: {shared} is incomplete or was changed; it is made anew"]
    assert {path.name: path.read_text() for path in shared.iterdir()} == {
        name: f"the content of {name}" for name in ("a", "b", "note")
    }
