"""The repair stage: the place for edits whose features depend on an earlier solution, made on the shortened model.

Nothing that is built yet needs it, so it passes the edits through.
"""

import shutil

from replaceme.files import new_folder
from replaceme.params import Params
from replaceme.progress import logger
from replaceme.workspace import Workspace


def repair(params: Params, work: Workspace) -> None:
    """Pass the solved edits through."""
    with new_folder(work.edits) as folder:
        shutil.copytree(work.solution, folder, dirs_exist_ok=True)
    logger.info("repair: nothing to do")
