"""Messages and exit codes; and settings that must precede the import of torch, whose fake prints the environment it finds."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from replaceme.base.errors import SENTENCE_CHARACTERS, ModelError, ParameterError, excerpt
from replaceme.running.entry import run
from tests.pipeline.closure import ROOT

STAGE = ["-m", "stages.profile"]
SCRIPT = ["-c", "import sys; from replaceme.cli.commands import run_replaceme; sys.argv = ['run_replaceme']; run_replaceme()"]


@pytest.mark.parametrize(("command", "chosen"), [(STAGE, None), (SCRIPT, "ACTIVE")], ids=["stage", "console script"])
def test_threads_wait_without_spinning_unless_the_user_says_so(command: list[str], chosen: str | None, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os; os.write(1, os.environ['OMP_WAIT_POLICY'].encode()); os._exit(7)")
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"} | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, chosen or "PASSIVE"), done.stderr


def failing(error: BaseException, debug: bool = False) -> int:
    def fail() -> None:
        raise error

    return run(fail, debug)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ParameterError(["alpha: is\x0bwrong.", "seed: too."]), 2, "error: alpha: is wrong.\nerror: seed: too.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), 2, "error: a file grew beyond what its file system"),
        (SafetensorError("I/O error: File too large (os error 27)"), 2, "error: a file grew beyond what its file system"),
        (MemoryError(), 2, "error: memory ran out; lower batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: memory ran out; lower batch_size"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied."),
        (KeyboardInterrupt(), 130, "interrupted; finished stages are kept"),
        (KeyError("a\n" * 10_000), 1, "error: unexpected KeyError: "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_end_in_a_sentence_and_an_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == code
    message = capsys.readouterr().err
    assert message.startswith(said)
    assert "Traceback" not in message
    assert message.count("\n") == said.count("error: ") or code == 130


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(ParameterError("a: is wrong."), debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_long_message_is_cut_in_its_middle_and_of_many_the_first_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(ModelError(f"model_path: there is no folder {'x' * 10_000}; give a folder.")) == 2
    said = capsys.readouterr().err.removeprefix("error: ").removesuffix("\n")
    assert len(said) == SENTENCE_CHARACTERS
    assert said.startswith("model_path: there is no folder xxx")
    assert said.endswith("xxx; give a folder.")
    assert failing(ParameterError([f"k{number}: is not a parameter." for number in range(2000)])) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: k0: is not a parameter."
    assert lines[19:] == ["error: k19: is not a parameter.", "(1980 more problems are not shown)"]


@given(st.text(), st.integers(10, 100))
def test_an_excerpt_is_one_printable_line_with_both_ends_of_the_text(text: str, most: int) -> None:
    cut, line = excerpt(text, most), " ".join(text.split())
    assert len(cut) <= most
    assert cut.isprintable()
    if line.isprintable() and len(line) <= most:
        assert cut == line
    assert excerpt(text * 1000, most)[:5] == excerpt(text * 100, most)[:5]
