"""What ``make`` says after the pipeline, with a stand-in for DVC."""

import shutil
from pathlib import Path

from tests.pipeline.closure import ROOT
from tests.pipeline.helpers import shell


def test_make_says_what_the_committed_results_are_until_they_are_ones_own(tmp_path: Path) -> None:
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    (tmp_path / ".gitignore").write_text(".venv\n", encoding="utf-8")
    (tmp_path / "dvc.lock").write_text("theirs\n", encoding="utf-8")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "evaluation.json").write_text("{}", encoding="utf-8")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    dvc = tmp_path / ".venv" / "bin" / "dvc"
    dvc.write_text("#!/bin/sh\nsleep 0.05\necho ours > dvc.lock\ntouch metrics/evaluation.json\n", encoding="utf-8")
    dvc.chmod(0o755)
    author = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
    shell(tmp_path, "git", "init", "-q")
    shell(tmp_path, "git", "add", ".")
    shell(tmp_path, "git", *author, "commit", "-q", "-m", "author")
    # The environment is there.
    output = shell(tmp_path, "make", "-o", "environment")
    assert "dvc metrics diff HEAD: compares this run with the committed one" in output
    (command,) = [line.split(": ")[0] for line in output.splitlines() if line.startswith("git ")]
    shell(tmp_path, "bash", "-euc", command.replace("git commit", f"git {' '.join(author)} commit"))
    assert "compares" not in shell(tmp_path, "make", "-o", "environment")
