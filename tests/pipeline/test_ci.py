"""What .ci/run does."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.pipeline.closure import ROOT


def test_the_suite_runs_as_a_user_whom_read_only_files_stop(tmp_path: Path) -> None:
    kept, make = tmp_path / "kept", tmp_path / "make"
    kept.write_text("one", encoding="utf-8")
    kept.chmod(0o444)
    # In the place of `make`: the tests pass if the file can't be written to, all else passes.
    make.write_text('#!/bin/sh\n[ "$1" != test ] || ! echo two > "$KEPT"\n', encoding="utf-8")
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "KEPT": str(kept)}
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)
    if "no user namespace" in done.stderr:
        pytest.skip("this machine lets root make no user namespace")
    assert done.returncode == 0
    assert kept.read_text(encoding="utf-8") == "one"
