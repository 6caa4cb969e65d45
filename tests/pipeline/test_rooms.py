"""The rooms of the library, and the one direction of imports between them."""

import ast
import re
from pathlib import Path

import pytest

from tests.pipeline.closure import ROOT, imported_modules, parse

PACKAGE = ROOT / "replaceme"
# A room imports only rooms of earlier groups. "" is the front door.
ORDER = [
    ["base"], ["running"], ["models"], ["calibration", "edits", "statistics"], ["solvers", "training"], ["selection"],
    ["methods"], ["repair"], ["export", "evaluation"], ["report"], ["pipeline"], ["cli", ""],
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FRONT_DOOR = {"api.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def test_the_rooms_are_those_that_there_are_and_the_front_door_is_all_that_lies_at_the_top() -> None:
    assert {room_of(path) for path in FILES} == set(LEVEL)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", *FRONT_DOOR}


def test_no_import_runs_against_the_order_of_the_rooms() -> None:
    against = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES
        for module in imported_modules(path)
        if (other := room_of(module)) != (own := room_of(path))
        and LEVEL[other] >= LEVEL[own]
        # The version.
        and module != PACKAGE / "__init__.py"
    ]
    assert against == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {path: [module for module in imported_modules(path) if module.name != "__init__.py"] for path in FILES}
    done: set[Path] = set()
    circles: list[str] = []

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        if path in way:
            circles.append(" → ".join(each.stem for each in (*way[way.index(path) :], path)))
        elif path not in done:
            for module in graph[path]:
                visit(module, (*way, path))
            done.add(path)

    for path in FILES:
        visit(path, ())
    assert circles == []


def test_every_file_opens_with_what_it_does() -> None:
    for path in FILES:
        assert ast.get_docstring(parse(path)), path


def test_the_design_page_names_every_room() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\| `(\w+)/` \|", page) == [room for group in ORDER for room in group if room]
    assert set(re.findall(r"`(\w+\.py)`", page)) >= FRONT_DOOR


@pytest.mark.parametrize("page", sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]), ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    if page.name in ("CHANGELOG.md", "lab-notes.md"):  # they keep the names of their day
        return
    named = re.findall(r"`((?:replaceme|tests|stages|benchmarks)/[\w/]+\.\w+)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if "NAME" not in name and not (ROOT / name).is_file()] == []
