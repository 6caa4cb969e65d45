"""Settings that must precede the import of torch: a fake torch prints the environment that it finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.closure import ROOT

STAGE = ["-m", "stages.profile"]
SCRIPT = ["-c", "import sys; from replaceme.commands import run_replaceme; sys.argv = ['run_replaceme']; run_replaceme()"]


@pytest.mark.parametrize("command", [STAGE, SCRIPT], ids=["stage", "console script"])
@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_threads_wait_without_spinning_unless_the_user_says_so(command: list[str], chosen: str | None, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os; os.write(1, os.environ['OMP_WAIT_POLICY'].encode()); os._exit(7)")
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"} | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, chosen or "PASSIVE"), done.stderr
