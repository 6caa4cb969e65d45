"""Locks between processes, and what they build once: of two, one works."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from replaceme.base.errors import ParameterError
from replaceme.base.files import new_folder
from replaceme.base.locks import build_once, holding_lock
from tests.interruption import died_at, forked, started


def refuse() -> None:
    raise ParameterError("in use")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_lock_is_one_process_s_and_free_when_that_is_killed(tmp_path: Path) -> None:
    def hold(seconds: float = 600) -> None:
        with holding_lock(tmp_path / "lock", refuse):
            (tmp_path / "begun").touch()
            time.sleep(seconds)

    child = started(hold)
    wait_for((tmp_path / "begun").exists)
    with pytest.raises(ParameterError, match="in use"):
        hold(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    hold(0)
    assert forked(lambda: hold(0)) == 0


def test_many_processes_hold_a_lock_one_after_the_other(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0", encoding="utf-8")

    def add() -> None:
        for _ in range(5):
            with holding_lock(tmp_path / "lock", lambda: None):
                number = int(count.read_text(encoding="utf-8"))
                time.sleep(0.002)
                count.write_text(str(number + 1), encoding="utf-8")

    children = [started(add) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert count.read_text(encoding="utf-8") == "20"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "key"


def builder(path: Path, built: Path) -> Callable[[], None]:
    """Return what builds a shared folder, and notes each time in the file ``built``."""

    def build() -> None:
        with built.open("a", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()}\n")
        with new_folder(path) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(f"the content of {name}", encoding="utf-8")

    return build


def test_the_second_process_waits_for_the_first_and_uses_what_it_built(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "replaceme")
    built = tmp_path / "built"

    def slow() -> None:
        (tmp_path / "begun").touch()
        wait_for((tmp_path / "waits").exists)
        builder(shared, built)()

    child = started(lambda: build_once(shared, "baseline", slow))
    wait_for((tmp_path / "begun").exists)

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            (tmp_path / "waits").touch()

    handler = Waits()
    logging.getLogger("replaceme").addHandler(handler)
    try:
        assert not build_once(shared, "baseline", builder(shared, built))
    finally:
        logging.getLogger("replaceme").removeHandler(handler)
    assert os.waitpid(child, 0)[1] == 0
    assert caplog.text.count("baseline: waiting for another process") == 1
    assert built.read_text(encoding="utf-8") == f"{child}\n"


def test_what_a_killed_process_began_is_built_by_the_next(shared: Path, tmp_path: Path) -> None:
    build, number = builder(shared, tmp_path / "built"), 0
    while died_at(number, lambda: build_once(shared, "baseline", build), shared.parent):
        number += 1
        build_once(shared, "baseline", build)
        assert sorted(path.name for path in shared.parent.iterdir()) == ["key", "key.lock", "key.sums.json"]
        assert sorted(path.name for path in shared.iterdir()) == ["a", "b"]
        assert not build_once(shared, "baseline", build)
        shutil.rmtree(shared.parent)
    assert number > 5


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit was flipped": lambda folder: (folder / "a").write_bytes(b"the content of \x60"),
    "a file is gone": lambda folder: (folder / "a").unlink(),
    "a file was added": lambda folder: (folder / "c").touch(),
    "the sums are gone": lambda folder: folder.with_name("key.sums.json").unlink(),
    "the sums were halved": lambda folder: folder.with_name("key.sums.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_changed_is_built_anew(damage: str, shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build = builder(shared, tmp_path / "built")
    build_once(shared, "baseline", build)
    (shared / "b").write_text("another", encoding="utf-8")
    assert not build_once(shared, "baseline", build, unchecked=["b"])
    assert not caplog.messages
    DAMAGES[damage](shared)
    assert build_once(shared, "baseline", build, unchecked=["b"])
    assert caplog.messages == [f"baseline: {shared} is incomplete or was changed; it is made anew"]
    assert {path.name: path.read_text() for path in shared.iterdir()} == {name: f"the content of {name}" for name in ("a", "b")}
