"""Files are written whole or not at all, also where the writer is killed; and sums of files follow their content."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replaceme.base import fingerprints
from replaceme.base.errors import ResourceError
from replaceme.base.files import (
    clear_partials,
    copy_tree,
    new_folder,
    read_json,
    round_floats,
    temporary_folder,
    write_json,
    write_text,
)
from replaceme.base.fingerprints import code_digest, sha256_below
from tests.interruption import died_at, ended_process, forked


def write(path: Path, text: str = "new") -> None:
    with new_folder(path) as folder:
        # transformers copies a model's code to a place that has the folder's name.
        assert folder.name == path.name
        (folder / "whole").write_text(text, encoding="utf-8")


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def interrupted(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "half").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt


def test_an_interrupted_folder_never_appears_and_leaves_the_old_one_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert names_below(tmp_path) == []
    write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert names_below(tmp_path) == ["out", "out/whole"]
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "whole").read_text(encoding="utf-8") == "new"


def test_a_failure_between_the_two_renames_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if target == tmp_path / "out" and source.name == "out":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "out", "new")
    assert names_below(tmp_path) == ["out", "out/whole"]
    assert (tmp_path / "out" / "whole").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_writer_that_is_killed_at_any_operation_leaves_the_old_or_the_new_content(kind: str, tmp_path: Path) -> None:
    path, number = tmp_path / "out", 0
    put: Callable[[Path, str], None] = write if kind == "folder" else write_text
    whole = path / "whole" if kind == "folder" else path
    put(path, "old")
    while died_at(number, lambda: put(path, "new"), tmp_path):
        number += 1
        # Between its two renames, a folder is not there.
        assert not path.exists() or whole.read_text(encoding="utf-8") in ("old", "new")
        clear_partials(tmp_path.iterdir())
        assert [name for name in names_below(tmp_path) if not name.startswith("out")] == []
        assert not list(tmp_path.glob("*.partial"))
        put(path, "old")
    assert number > (5 if kind == "folder" else 1)


def test_what_a_living_process_writes_is_left_alone_and_so_are_other_names(tmp_path: Path) -> None:
    # The parent can be the first process itself.
    living = [f"out.abcdefgh.{process}.partial" for process in {os.getppid(), 1}]
    mine = ["healing.partial", "a.5-0.5B", "notes.12", "model.12.partial.md", "x.partial"]
    ended, own = f"out.abcdefgh.{ended_process()}.partial", f"out.{os.getpid()}.partial"
    for name in (*living, *mine, ended, own):
        (tmp_path / name).mkdir()
    clear_partials(tmp_path.iterdir())
    assert names_below(tmp_path) == sorted([*living, *mine, own])
    # In a container, an earlier process had the same number.
    clear_partials(tmp_path.iterdir(), own=True)
    assert names_below(tmp_path) == sorted([*living, *mine])


def test_two_processes_that_write_one_folder_leave_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with new_folder(path) as folder:
        (folder / "a").write_text("A", encoding="utf-8")
        assert forked(lambda: write(path)) == 0
        assert names_below(path) == ["whole"]
        (folder / "c").write_text("A", encoding="utf-8")
    assert names_below(tmp_path) == ["out", "out/a", "out/c"]


def test_temporary_folders_of_ended_processes_are_deleted_and_open_ones_are_not(tmp_path: Path) -> None:
    def leave() -> None:
        with temporary_folder("scratch-", tmp_path) as folder:
            (folder / "0").touch()
            os._exit(0)

    assert forked(leave) == 0
    assert len(list(tmp_path.iterdir())) == 1
    with temporary_folder("scratch-", tmp_path) as folder, temporary_folder("scratch-", tmp_path) as other:
        assert {*tmp_path.iterdir()} == {folder, other}
    assert not list(tmp_path.iterdir())


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
    copy_tree(output, copy)
    for name in ("hard", "inner/soft"):
        assert (copy / name).stat().st_mode & 0o200
        (copy / name).write_text("two", encoding="utf-8")
    assert (kept.read_text(encoding="utf-8"), kept.stat().st_mode & 0o777) == ("one", 0o444)
    (output / "weights").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="No such file"):
        copy_tree(output, copy)


def test_json_is_sorted_refuses_nan_and_a_missing_file_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "a": 2,\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": 2, "b": 1}
    with pytest.raises(ResourceError, match=r"plan\.json does not exist: run the stage that writes it"):
        read_json(tmp_path / "plan.json")


def test_metrics_have_at_most_six_digits() -> None:
    assert round_floats({"a": {"b": 1.23456789, "c": 123456789, "d": 1.5e-9}}) == {
        "a": {"b": 1.23457, "c": 123456789, "d": 1.5e-9}
    }


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file whose sum is remembered; a minute later, so that what was just written is settled."""
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 60)
    monkeypatch.setattr(fingerprints, "LARGE_BYTES", 2)
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    (tmp_path / "large").write_text("one", encoding="utf-8")
    return tmp_path / "large"


def test_a_large_file_is_read_once_also_by_the_next_process(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sha256_below(large)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    for _ in range(2):
        assert sha256_below(large) == first
        fingerprints._remembered.cache_clear()


@pytest.mark.parametrize("damage", ["[", "", "{}"])
def test_without_what_was_remembered_a_file_is_read_again(large: Path, damage: str, tmp_path: Path) -> None:
    first = sha256_below(large)
    (tmp_path / "cache" / "sha256.json").write_text(damage, encoding="utf-8")
    fingerprints._remembered.cache_clear()
    assert sha256_below(large) == first


def test_changed_content_is_noticed_at_the_same_size_and_time(large: Path) -> None:
    times, first = large.stat(), sha256_below(large)
    large.write_text("two", encoding="utf-8")
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256_below(large) != first


def test_a_file_that_changes_while_it_is_read_or_was_just_written_is_read_again(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, contents = fingerprints.hashlib.file_digest, iter(["two", "six"])

    def changing(stream: Any, name: str) -> Any:
        found = digest(stream, name)
        large.write_text(next(contents), encoding="utf-8")
        return found

    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", changing)
        first = sha256_below(large)
        assert sha256_below(large) != first
    monkeypatch.setattr("time.time", lambda: large.stat().st_mtime)
    third = sha256_below(large)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        sha256_below(large)
    assert third != first


def test_the_digest_of_the_code_changes_with_code_and_with_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    for name in ("room/a.py", "page.html", "notes.txt"):
        (tmp_path / name).write_text("before", encoding="utf-8")
    digests = []
    for name in ("none", "notes.txt", "page.html", "room/a.py"):
        (tmp_path / name).write_text("after", encoding="utf-8")
        code_digest.cache_clear()
        digests.append(code_digest(tmp_path))
    assert digests[0] == digests[1]
    assert len({*digests}) == 3
    assert code_digest() != digests[-1]
