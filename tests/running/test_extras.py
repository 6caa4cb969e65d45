"""Optional packages: what is missing is said in one sentence that names the extra."""

import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from replaceme.base.errors import ResourceError
from replaceme.cli import commands, publish
from replaceme.cli.main import main
from replaceme.models.model import Model
from replaceme.running import extras
from replaceme.running.extras import EXTRAS, require_package
from tests.helpers import FAST, call
from tests.pipeline.closure import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
OPTIONAL = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}


def listed(path: str) -> dict[str, Requirement]:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name): each for each in found}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without the optional packages."""
    real = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in EXTRAS else real(name))


@pytest.mark.usefixtures("bare")
def test_what_is_missing_is_named_with_its_extra(
    tiny: Model, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ResourceError, match=r"^use_4bit: needs the package bitsandbytes; install it: pip install '\.\[4bit\]' in the clone\.$"
    ):
        require_package("bitsandbytes", "use_4bit")
    call(main, "compare", code=2)
    assert "needs the package dvc; install it: pip install '.[pipeline]' in the clone." in capsys.readouterr().err
    given = ["--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, "--tasks", "[]", "--use_4bit", "true"]
    call(commands.run_replaceme, *given, "--save_path", tmp_path / "r", code=2)
    assert "error: use_4bit: needs the package bitsandbytes" in capsys.readouterr().err
    with pytest.raises(ResourceError, match="needs the package dvc"):
        publish._check_scores()


def test_the_extras_that_are_named_exist() -> None:
    for package, extra in EXTRAS.values():
        assert package in {requirement.name for requirement in OPTIONAL[extra]}
        assert package not in {requirement.name for requirement in CORE}


def test_requirements_txt_installs_the_library_the_pipeline_and_4_bit() -> None:
    expected = {canonicalize_name(each.name): each for each in [*CORE, *OPTIONAL["pipeline"], *OPTIONAL["4bit"]]}
    assert listed("requirements.txt") == expected
    named = {"dvc", "torch", "transformers", "datasets", "bitsandbytes", "pyyaml", "lm-eval", "pandas"}
    assert named <= expected.keys()


def test_the_tested_versions_are_within_the_ranges() -> None:
    tested = {name: re.sub("^==", "", str(requirement.specifier)) for name, requirement in listed("constraints.txt").items()}
    ranged = [*CORE, *(each for name in ("pipeline", "4bit", "docs", "dev") for each in OPTIONAL[name])]
    outside = [str(each) for each in ranged if not each.specifier.contains(tested[canonicalize_name(each.name)])]
    assert outside == []
    assert all(re.fullmatch(r"[\w.]+", version) for version in tested.values())


def test_every_package_that_the_library_imports_is_required() -> None:
    extras = (each for name in ("pipeline", "gguf", "openvino") for each in OPTIONAL[name])
    names = {canonicalize_name(each.name) for each in [*CORE, *extras]}
    modules = {
        "llama_cpp": "llama-cpp-python",
        "yaml": "pyyaml",
        "ruamel": "ruamel-yaml",
        "pydantic_core": "pydantic",
        "markupsafe": "jinja2",
        "scmrepo": "dvc",
    }
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "replaceme").rglob("*.py")]
    found = {name for text in sources for name in re.findall(r"(?m)^ *(?:from|import) ([a-z_]\w*)[\w.]*(?: import \S|$)", text)}
    third = found - sys.stdlib_module_names - {"replaceme"}
    assert {"torch", "numpy", "dvc"} <= third
    assert {canonicalize_name(modules.get(name, name)) for name in third} <= names


def test_the_metadata_of_the_installed_distribution_is_that_of_the_file() -> None:
    installed = [Requirement(line) for line in requires(PROJECT["name"]) or []]
    if not any(each.marker and each.marker.evaluate({"extra": "4bit"}) for each in installed):
        pytest.skip("the environment was installed from an earlier pyproject.toml")
    assert {each.name for each in installed if not each.marker} == {each.name for each in CORE}
