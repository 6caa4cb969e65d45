import errno
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from replaceme.base.entry import run
from replaceme.base.errors import ParameterError, ResourceError
from replaceme.base.files import (
    ASIDE,
    clear_partials,
    copy_content,
    new_folder,
    partial_suffix,
    read_json,
    rounded,
    temporary_folder,
    write_json,
    write_text,
)
from replaceme.base.fingerprints import sha256_below
from tests.interruption import died_at, ended_process, forked


def interrupted(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "half").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt


def test_an_interrupted_folder_never_appears(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_folder_leaves_the_old_one_as_it_was(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_new_folder_has_its_name_from_the_start(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        assert folder.name == "out"
        assert not (tmp_path / "out").exists()


def left_by(process: int, path: Path, kind: str = "", text: str = "half") -> Path:
    """Make the folder that a process of this machine has not finished, or has moved aside, and return it."""
    left = path.with_name(path.name + partial_suffix(kind).replace(f".{os.getpid()}-", f".{process}-"))
    left.mkdir()
    (left / "whole").write_text(text, encoding="utf-8")
    return left


def write(path: Path, text: str = "new") -> None:
    with new_folder(path) as folder:
        (folder / "whole").write_text(text, encoding="utf-8")


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    left_by(ended_process(), tmp_path / "out")
    left_by(ended_process(), tmp_path / "out.txt")
    write(tmp_path / "out")
    write_text(tmp_path / "out.txt", "new")
    assert names_below(tmp_path) == ["out", "out.txt", "out/whole"]


def test_what_a_living_process_writes_is_never_touched(tmp_path: Path) -> None:
    # The parent can be the first process itself.
    living = [left_by(process, tmp_path / "out") for process in {os.getppid(), 1}]
    elsewhere = tmp_path / f"out.{ended_process()}-00000000.partial"
    elsewhere.mkdir()
    write(tmp_path / "out")
    clear_partials(tmp_path)
    assert {*living, elsewhere, tmp_path / "out"} == set(tmp_path.iterdir())
    # Who alone writes there need not ask whether the process lives: its number may be in use again, on any machine.
    clear_partials(tmp_path, alone=True)
    assert names_below(tmp_path) == ["out", "out/whole"]


def test_only_names_of_partials_are_cleared(tmp_path: Path) -> None:
    mine = ["healing.partial", "a.5-0.5B", "notes.12-abcdef01", "model.12-myhost.partial", "x.partial", "x.old.partial"]
    for name in mine:
        (tmp_path / name).mkdir()
    clear_partials(tmp_path, alone=True)
    assert names_below(tmp_path) == sorted(mine)


def test_two_processes_that_write_one_folder_leave_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with new_folder(path) as folder:
        (folder / "a").write_text("A", encoding="utf-8")

        def other() -> None:
            with new_folder(path) as mine:
                (mine / "b").write_text("B", encoding="utf-8")

        assert forked(other) == 0
        assert names_below(path) == ["b"]
        (folder / "c").write_text("A", encoding="utf-8")
    assert names_below(tmp_path) == ["out", "out/a", "out/c"]


@pytest.mark.parametrize("process", ["ended", "this"])
def test_an_old_folder_that_was_put_aside_comes_back(process: str, tmp_path: Path) -> None:
    left_by(ended_process() if process == "ended" else os.getpid(), tmp_path / "out", ASIDE, "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert names_below(tmp_path) == ["out", "out/whole"]
    assert (tmp_path / "out" / "whole").read_text(encoding="utf-8") == "old"


def test_an_old_folder_that_was_put_aside_stops_no_later_run(tmp_path: Path) -> None:
    left_by(ended_process(), tmp_path / "out", ASIDE, "old")
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names_below(tmp_path) == ["out", "out/whole"]
    assert (tmp_path / "out" / "whole").read_text(encoding="utf-8") == "new"


def test_a_folder_whose_writer_is_killed_at_any_operation_is_whole(tmp_path: Path) -> None:
    path, number = tmp_path / "out", 0
    write(path, "old")
    while died_at(number, lambda: write(path), tmp_path):
        number += 1
        write(tmp_path / "another")  # no other target touches what this one has left
        assert not path.exists() or (path / "whole").read_text(encoding="utf-8") in ("old", "new")
        clear_partials(tmp_path)
        assert names_below(tmp_path) == ["another", "another/whole", "out", "out/whole"]
        write(path, "old")
    assert number > 5


def test_temporary_folders_of_ended_processes_are_deleted(tmp_path: Path) -> None:
    def leave() -> None:
        with temporary_folder("scratch-", tmp_path) as folder:
            (folder / "0").touch()
            os._exit(0)

    assert forked(leave) == 0
    assert len(list(tmp_path.iterdir())) == 1
    with temporary_folder("scratch-", tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_a_failure_between_the_two_renames_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("old", encoding="utf-8")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(source).parent.name == f"out{partial_suffix()}":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("new", encoding="utf-8")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]
    assert (tmp_path / "out" / "whole").read_text(encoding="utf-8") == "old"


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "secretive").touch(mode=0o600)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out" / "secretive").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_copy_of_read_only_links_can_be_written_to_and_leaves_them_as_they_are(tmp_path: Path) -> None:
    kept, output, copy = (tmp_path / name for name in ("kept", "output", "copy"))
    (output / "inner").mkdir(parents=True)
    kept.write_text("one", encoding="utf-8")
    kept.chmod(0o444)
    (output / "hard").hardlink_to(kept)
    (output / "inner" / "soft").symlink_to(kept)
    copy.mkdir()
    copy_content(output, copy)
    for name in ("hard", "inner/soft"):
        assert (copy / name).stat().st_mode & 0o200
        (copy / name).write_text("two", encoding="utf-8")
    assert (kept.read_text(encoding="utf-8"), kept.stat().st_mode & 0o777) == ("one", 0o444)


def test_a_link_to_nothing_is_not_left_out_of_a_copy(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "weights").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        copy_content(tmp_path / "output", tmp_path)


def test_json_is_sorted_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "a": 2,\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": 2, "b": 1}


def test_a_missing_output_of_an_earlier_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"plan\.json does not exist: run the stage that writes it"):
        read_json(tmp_path / "plan.json")


def test_metrics_have_at_most_six_digits() -> None:
    assert rounded({"a": {"b": 1.23456789, "c": 123456789, "d": 1.5e-9}}) == {"a": {"b": 1.23457, "c": 123456789, "d": 1.5e-9}}


def test_changed_content_is_noticed_at_the_same_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one", encoding="utf-8")
    first = sha256_below(path)
    path.write_text("two", encoding="utf-8")
    assert sha256_below(path) != first


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A minute later: files that were just written are settled. The sums of other tests are not known."""
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 60)
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    path = tmp_path / "texts" / "file"
    path.parent.mkdir()
    path.write_text("one", encoding="utf-8")
    return path


@pytest.mark.usefixtures("later")
def test_a_settled_file_is_read_once(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sha256_below(one.parent)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert sha256_below(one.parent) == first


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("damage", ["[]", "null", '{"files": 3}', "halved", "emptied", "a bit", "another digest", "entries"])
def test_remembered_sums_that_are_damaged_are_ignored(one: Path, damage: str, tmp_path: Path) -> None:
    first, memory = sha256_below(one), tmp_path / "cache" / "sha256.json"
    content = memory.read_text(encoding="utf-8")
    digest = first["file"]
    assert digest in content
    other = digest.translate(str.maketrans("0123456789", "1234567890"))
    changed = {
        "halved": content[: len(content) // 2], "emptied": "", "a bit": content.replace(digest[:8], other[:8]),
        "another digest": content.replace(digest, other), "entries": json.dumps({str(one): 3}),
    }  # fmt: skip
    memory.write_text(changed.get(damage, damage), encoding="utf-8")
    assert sha256_below(one) == first
    assert digest in memory.read_text(encoding="utf-8")


@pytest.mark.parametrize("seconds", [-60, 3600])
def test_a_fresh_file_whose_time_was_set_is_not_remembered(one: Path, seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(one, (time.time() + seconds, time.time() + seconds))
    sha256_below(one)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        sha256_below(one)


@pytest.mark.usefixtures("later")
def test_a_file_that_changes_while_it_is_read_is_not_remembered(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.file_digest

    def changing(stream: Any, name: str) -> Any:
        found = digest(stream, name)
        one.write_text("two", encoding="utf-8")
        return found

    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", changing)
        first = sha256_below(one)
    assert sha256_below(one) != first


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ParameterError(["a: is wrong.", "b: is wrong."]), 2, "error: a: is wrong.\nerror: b: is wrong.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), 2, "error: a file grew beyond what its file system"),
        (SafetensorError("I/O error: File too large (os error 27)"), 2, "error: a file grew beyond what its file system"),
        (MemoryError(), 2, "error: memory ran out; lower batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: memory ran out; lower batch_size"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied."),
        (KeyboardInterrupt(), 130, "interrupted; finished stages are kept"),
        (KeyError("x"), 1, "error: unexpected KeyError: 'x' (run with --debug"),
    ],
)
def test_errors_end_in_a_sentence_and_an_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert run(fail) == code
    message = capsys.readouterr().err
    assert message.startswith(said)
    assert "Traceback" not in message


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ParameterError("a: is wrong.")

    assert run(fail, debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_sum_taken_from_a_fresh_file_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one", encoding="utf-8")
    times = path.stat()
    first = sha256_below(path)
    path.write_text("two", encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a coarse clock would have it
    assert sha256_below(path) != first
