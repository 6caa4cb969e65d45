"""``replaceme doctor``: the lines for an issue."""

from importlib.metadata import version

import pytest

from replaceme.base.parameters import read_params
from replaceme.cli.main import main
from replaceme.models.devices import kind_of
from tests.helpers import call


def test_ten_lines_say_what_the_machine_has_and_what_a_run_would_use(capsys: pytest.CaptureFixture[str]) -> None:
    call(main, "doctor")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert len(lines) <= 10
    assert f"torch {version('torch')}, " in lines["packages"]
    assert lines["device"] == f"{read_params(None, {}).device} is cpu ({kind_of('cpu')})"
    assert lines["dtype"].startswith("on cpu, a product of ")
    assert lines["weights"].startswith("memory: auto lets them take ")
