"""The commands of the README and the site can be parsed; those marked quick are run in ``test_pipeline.py``."""

import re
import shlex
from contextlib import chdir
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path

import pytest
import yaml
from dvc.cli import parse_args

from replaceme.base.parameters import read_params
from replaceme.cli import doctor, experiments, publish, serving
from replaceme.cli.commands import Command, parse_option
from replaceme.cli.main import COMMANDS as COMMANDS_WITH_PARAMETERS
from replaceme.cli.main import OTHERS, make_report_parser
from replaceme.methods.registry import METHODS
from tests.pipeline.closure import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs" / "guides" / "choosing-settings.md").read_text(encoding="utf-8")
# The lab notes keep the commands of their day.
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in ("lab-notes.md", "experiments.md")]


def commands_of(page: Path) -> list[str]:
    """Return the lines of the page's bash blocks, without comments."""
    blocks = re.findall(r"(?ms)^```bash(?: quick)?\n(.*?)^```$", page.read_text(encoding="utf-8"))
    return [line for body in blocks for line in body.replace("\\\n", " ").splitlines() if line and line[0] != "#"]


COMMANDS = commands_of(ROOT / "README.md")
ALL_COMMANDS = sorted({line for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES) for line in commands_of(page)})
SCRIPTS = [
    "run_replaceme",
    "run_uidl",
    "evaluate_model",
    "get_distance_analysis",
    "get_lt_with_lstsq",
    "get_lt_with_solvers",
]


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_every_command_is_one_that_there_is(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "replaceme":
        check_replaceme(words[1:])
    elif words[0] in ("torchrun", "srun"):
        assert "$(which replaceme) " in line
        check_replaceme(words[words.index("replaceme)") + 1 :])
    elif words[0] in SCRIPTS:
        read(Command(action="prune", description="a script", preset="published"), words[1:])
    elif words[0] == "make":
        targets = re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
        assert set(words[1:]) <= set(targets)
    elif words[0] == "dvc":
        parse_args(words[1:])
        settings = [word.partition("=") for flag, word in pairwise(words) if flag == "-S"]
        keys = [key for key, _, _ in settings]
        for values in product(*(value.split(",") for _, _, value in settings)):
            settings_of_run = {key: parse_option(key, value) for key, value in zip(keys, values, strict=True)}
            read_params(ROOT / "params.yaml", settings_of_run, METHODS)
    else:
        assert words[0] in {"export", "git", "python", "cd", "convert-hf-to-gguf", "pytest"}


def check_replaceme(words: list[str]) -> None:
    """Read a command line of ``replaceme``, without running it."""
    if words[0] in COMMANDS_WITH_PARAMETERS:
        read(COMMANDS_WITH_PARAMETERS[words[0]], words[1:])
    else:
        parsers = {
            "report": make_report_parser, "push": publish.make_parser, "compare": experiments.make_parser,
            "doctor": doctor.make_parser, "verify": serving.make_verify_parser, "convert": serving.make_convert_parser,
            "chat": serving.make_chat_parser,
        }  # fmt: skip
        assert words == ["--version"] or parsers[words[0]]().parse_args(words[1:])


def read(command: Command, words: list[str]) -> None:
    with chdir(ROOT):
        command.read_arguments(
            command.make_parser(None, full=True), [word for word in words if word not in ("--help", "--help-all")]
        )


def test_the_settings_are_those_of_params_yaml() -> None:
    stated = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.*?) \|", SETTINGS)
    assert len(rows) > 10
    for key, value in rows:
        if key != "tasks":
            assert parse_option(key, value) == stated[key], key


def test_the_site_shows_every_command() -> None:
    shown = {line.split()[1] for line in ALL_COMMANDS if line.startswith("replaceme ")}
    assert COMMANDS_WITH_PARAMETERS.keys() | OTHERS.keys() <= shown


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *(page for page in PAGES if page.parent.name != "methods")], ids=lambda page: page.stem
)
def test_pictures_pages_and_headings_that_a_page_links_to_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = []
    for file, _, anchor in (link.partition("#") for link in links if "://" not in link):
        target = page.parent / file if file else page
        if not target.is_file() or (anchor and anchor not in headings_of(target)):
            missing.append(f"{file}#{anchor}")
    assert missing == []


def headings_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    text = re.sub(r'--8<-- "(.+)"', lambda part: (ROOT / part[1]).read_text(encoding="utf-8"), page.read_text(encoding="utf-8"))
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_stands_in_the_sites_navigation() -> None:
    named = set(re.findall(r"(?m)^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES} | {"lab-notes.md"}


# Modules of runtimes, each in an environment of its own.
RUNTIMES = ("llama_cpp", "onnxruntime_genai", "vllm")
NAMED = {name for page in PAGES for name in re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8"))}
MODULES = sorted(name for name in NAMED if name.split(".")[0] not in RUNTIMES)


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_are_named_exist(module: str) -> None:
    assert find_spec(module)
