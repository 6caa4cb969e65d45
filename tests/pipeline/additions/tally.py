"""tally: a made-up stage that counts the planned blocks."""

from replaceme.base.files import write_json
from replaceme.base.parameters import Params
from replaceme.base.plan import Plan
from replaceme.running.stage import Stage
from replaceme.running.workspace import Workspace


def tally(params: Params, work: Workspace) -> None:
    """Write metrics/tally.json."""
    write_json(work.metric("tally"), {"blocks": len(Plan.load(work.plan).blocks), "seed": params.seed})


STAGE = Stage(name="tally", run=tally, params=("seed",), reads=(Workspace.plan,), metrics=("tally",))
