"""The benchmark of faults sees what it looks for."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.faults import describe_differences
from benchmarks.sandbox import Sandbox
from tests.pipeline.closure import ROOT

# A program that makes two folders and a file, each below the folder that is its argument.
WRITER = """
import sys
from pathlib import Path
from benchmarks.tries import Moment, Try

folder = Path(sys.argv[1])

def write():
    for step in ("one", "two"):
        (folder / step).mkdir()
    (folder / "two/file").write_text("content")
    print("written")
    sys.exit(3)

ended = Try(write, folder, Moment(operation=int(sys.argv[2])), 30).wait()
print(ended.code, ended.operations, ended.killed, ended.said.strip())
"""


def tried(folder: Path, operation: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WRITER, folder, str(operation)], cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE
    )
    return done.stdout.strip()


def test_a_try_is_killed_before_the_operation_that_is_asked_for(tmp_path: Path) -> None:
    said = tried(tmp_path, 3)
    assert said.startswith("-9 3 True")
    assert said.endswith(f"killed before file operation 3: open {tmp_path}/two/file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["one", "two"]


def test_a_try_that_ends_first_is_reported_with_its_code_and_its_operations(tmp_path: Path) -> None:
    assert tried(tmp_path, 4) == "3 3 False written"
    assert (tmp_path / "two/file").read_text(encoding="utf-8") == "content"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda made: (made / "pruned/model.safetensors").write_bytes(b"\1"),
            "other bits: results/pruned/model.safetensors",
        ),
        (lambda made: (made / "pruned/model.safetensors").unlink(), "missing: results/pruned/model.safetensors"),
        (lambda made: (made / "pruned.7.partial").touch(), "left behind: results/pruned.7.partial"),
        (lambda made: (made / "empty").mkdir(), "left behind: results/empty/"),
        (lambda made: (made / "pruned.work/stages/solve.json").write_text("2 s"), ""),
    ],
)
def test_flipped_missing_and_left_files_are_seen_and_times_are_not(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    sandbox = Sandbox(tmp_path, tmp_path)
    sandbox.clear()
    for name in ("pruned/config.json", "pruned/model.safetensors", "pruned.work/stages/solve.json"):
        (sandbox.results / name).parent.mkdir(parents=True, exist_ok=True)
        (sandbox.results / name).write_bytes(b"\0")
    right = sandbox.content()
    change(sandbox.results)
    assert describe_differences(right, sandbox.content()) == words
