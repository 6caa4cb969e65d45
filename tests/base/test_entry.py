"""Messages and exit codes; and settings that must precede the import of torch, whose fake prints the environment it finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replaceme.base.entry import run
from replaceme.base.errors import SENTENCE_CHARACTERS, ModelError, ParameterError, excerpt, shown
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


def failing(error: Exception) -> int:
    def fail() -> None:
        raise error

    return run(fail)


def test_a_message_is_cut_in_its_middle_and_keeps_what_would_be_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(ModelError(f"model_path: there is no folder {'x' * 10_000}; give a folder.")) == 2
    said = capsys.readouterr().err.removeprefix("error: ").removesuffix("\n")
    assert len(said) == SENTENCE_CHARACTERS
    assert said.startswith("model_path: there is no folder xxx")
    assert said.endswith("xxx; give a folder.")


def test_each_problem_of_a_list_has_its_line_and_an_unknown_error_only_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(ParameterError(["alpha: is\x0bwrong.", "seed: too."])) == 2
    assert capsys.readouterr().err == "error: alpha: is wrong.\nerror: seed: too.\n"
    assert failing(KeyError("a\n" * 10_000)) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: unexpected KeyError: ")
    assert said.endswith("(run with --debug, or REPLACEME_DEBUG=1, for the traceback).")


def test_of_a_long_list_of_problems_the_first_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(ParameterError([f"k{number}: is not a parameter." for number in range(2000)])) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: k0: is not a parameter."
    assert said[19:] == ["error: k19: is not a parameter.", "(1980 more problems are not shown)"]


@given(st.text(), st.integers(10, 100))
def test_an_excerpt_is_one_printable_line_with_both_ends_of_the_text(text: str, most: int) -> None:
    cut, line = excerpt(text, most), " ".join(text.split())
    assert len(cut) <= most
    assert cut.isprintable()
    if line.isprintable() and len(line) <= most:
        assert cut == line
    assert excerpt(text * 1000, most)[:5] == excerpt(text * 100, most)[:5]


def test_nested_values_are_cut_before_they_are_written() -> None:
    nested: list[object] = ["x" * 100]
    for _ in range(60):
        nested = [nested] * 10
    assert len(shown(nested)) <= 80
    assert shown({"a": 1}) == "{'a': 1}"
    assert shown("x" * 10**7).startswith("'xxx")
