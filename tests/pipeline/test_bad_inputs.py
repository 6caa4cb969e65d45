"""The benchmark of bad inputs: what it makes repeats, what it judges, and that a case of each kind passes."""

import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from benchmarks import bad_inputs
from benchmarks.bad_inputs import KINDS, Case, count_outcomes, run_case, run_cases


def says(text: str, code: int) -> Callable[[], NoReturn]:
    def command() -> NoReturn:
        sys.stderr.write(text)
        sys.exit(code)

    return command


def breaks() -> None:
    raise KeyError("alpha")


@pytest.mark.parametrize(
    ("command", "verdict"),
    [
        (says("error: alpha: is wrong.\n", 2), "refused"),
        (says("error: config.yaml: is wrong.\nerror: seed: too.\n", 2), "refused"),
        (says("a line of the log\n", 0), "ran"),
        (says("error: alpha: is wrong.\n", 1), "failed"),
        (says("error: alpha: is wrong.\n", 0), "failed"),
        (says("error: it is wrong.\n", 2), "failed"),
        (says(f"error: alpha: {'x' * 300}\n", 2), "failed"),
        (says("Traceback (most recent call last)\nerror: alpha: is wrong.\n", 2), "failed"),
        (breaks, "failed"),
        (signal.pause, "failed"),
    ],
)
def test_a_case_passes_if_it_is_refused_by_a_short_sentence_that_names_what_is_wrong(
    command: Callable[[], Any], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_inputs, "LIMIT_SECONDS", 1.0 if command is signal.pause else 60.0)
    assert run_case(Case(command, {}, {"config.yaml": b""}))[0] == verdict


@pytest.mark.slow
def test_a_case_of_each_kind_passes(capfd: pytest.CaptureFixture[str]) -> None:
    rows = count_outcomes(run_cases(len(KINDS), seed=7))
    assert [(kind, cases, failed) for kind, cases, _, _, failed in rows] == [(kind, 1, 0) for kind in KINDS]
    assert "failed:" not in capfd.readouterr().err
