"""report: a page with scores, figures and settings."""

from replaceme.base.files import new_folder
from replaceme.base.params import Params
from replaceme.base.settings import WITHOUT_EFFECT
from replaceme.base.stage import Stage
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.report.page import render

# Everything that a result can depend on.
ALL = tuple(name for name in FIELDS if name not in WITHOUT_EFFECT)


def write_report(params: Params, work: Workspace) -> None:
    """Write the report, which has no times."""
    page = render(params, work)
    with new_folder(work.report) as folder:
        page.save(folder)


STAGE = Stage(
    name="report",
    run=write_report,
    params=ALL,
    reads=(
        Workspace.profile, Workspace.blocks, Workspace.solution, Workspace.edits, Workspace.continuations,
        Workspace.text_versions, Workspace.model_versions, Workspace.score_versions,
    ),
    writes=Workspace.report,
    figures=("select", "solve", "repair", "heal", "export", "evaluation"),
    code=(
        "base", "models/embedded.py", "models/packages.py", "selection/criteria.py", "selection/blocks.py", "methods", "report",
    ),
    methods=METHODS,
)  # fmt: skip
