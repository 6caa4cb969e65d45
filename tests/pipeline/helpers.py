"""A shell in the project copy, and a stand-in for the hub."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
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


FORKING = str(Path(__file__).parents[2] / "benchmarks" / "forking.py")


def dvc(folder: Path, *words: str, code: int = 0, **variables: str) -> str:
    """Run DVC in the project, its stages as children of its process (``benchmarks/forking.py``); return all that it printed."""
    return served(folder, "dvc", *words, code=code, **variables)


def served(folder: Path, *command: str, code: int = 0, **variables: str) -> str:
    """Do what ``shell`` does for DVC or a console script, in a process that has the libraries already.

    A variable that a library reads when it is imported has the value that it had at the first call.
    """
    server = _server()
    assert server.poll() is None, "the server of commands has ended"
    assert server.stdin
    assert server.stdout
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
        environment = _environment(variables) | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        request = {"words": command, "folder": str(folder), "environment": environment, "output": output.name}
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        printed = output.read()
    assert answer == f"{code}\n", printed
    return printed


@cache
def _server() -> subprocess.Popen[str]:
    """Start this process's server of commands; it ends with this process, as its input then does."""
    return subprocess.Popen([sys.executable, FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def shell(folder: Path, *command: str, code: int = 0, **variables: str) -> str:
    """Run a command in the project with this environment first on PATH, and return all that it printed."""
    environment = _environment(variables)
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, **variables, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
