"""A shell in the project copy, and a stand-in for the hub."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TOKEN = "hf_not-to-be-seen"


class Hub:
    """Stands in for ``HfApi``."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.made: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.public = True
        self.failure: Exception | None = None

    def __call__(self, token: str) -> "Hub":
        self.tokens.append(token)
        return self

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        self.made.append((name, private))
        return f"https://hub.example/{name}"

    def repo_info(self, name: str) -> Any:
        return SimpleNamespace(private=not self.public)

    def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> None:
        assert commit_message
        if self.failure:
            raise self.failure
        for operation in operations:
            with operation.as_file() as content:
                self.files[operation.path_in_repo] = content.read()


FORKING = (sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "forking.py"))


def dvc(folder: Path, *words: str, code: int = 0, **variables: str) -> str:
    """Run DVC in the project, its stages as children of its process (``benchmarks/forking.py``); return all that it printed."""
    return shell(folder, *FORKING, *words, code=code, **variables)


def shell(folder: Path, *command: str, code: int = 0, **variables: str) -> str:
    """Run a command in the project with this environment first on PATH, and return all that it printed."""
    environment = {**os.environ, **variables, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == code, done.stdout
    return done.stdout
