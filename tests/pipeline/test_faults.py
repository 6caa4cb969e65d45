"""The benchmark of faults sees what it looks for."""

import subprocess
import sys
from pathlib import Path

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
