import errno
import os
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from replaceme.base.entry import run
from replaceme.base.errors import ParameterError, ResourceError
from replaceme.base.files import copy_content, new_folder, read_json, rounded, write_json
from replaceme.base.fingerprints import sha256_below


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


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("half", encoding="utf-8")
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("new", encoding="utf-8")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["out", "out/whole"]


def test_an_old_folder_that_was_put_aside_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / "out.old.partial"
    aside.mkdir()
    (aside / "whole").write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]


def test_an_old_folder_that_was_put_aside_stops_no_later_run(tmp_path: Path) -> None:
    for name in ("out", "out.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "whole").write_text(name, encoding="utf-8")
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("new", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "whole").read_text(encoding="utf-8") == "new"


def test_a_failure_between_the_two_renames_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("old", encoding="utf-8")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if str(source).endswith("out.partial"):
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


def test_a_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("one", encoding="utf-8")
    os.utime(path, (time.time() - 60, time.time() - 60))
    first = sha256_below(tmp_path)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert sha256_below(tmp_path) == first


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
