"""DVC whose stages are forked children of its own process: ``python benchmarks/forking.py repro`` is ``dvc repro``.

The libraries, which take most of a small stage's time, are loaded once for all stages; each loads the project's own code.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers.models.llama.modeling_llama", "datasets", "matplotlib.pyplot", "pandas", "jinja2")


def stage(_: Any, command: str, **options: Any) -> None:
    """Run a stage's command, as ``dvc.stage.run._run`` does."""
    from dvc.stage.exceptions import StageCmdFailedError

    from benchmarks.tries import run_and_exit

    for library in LIBRARIES:
        import_module(library)
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os.environ.clear()
        os.environ.update(options["env"])
        os.chdir(options["cwd"])
        sys.argv = [command]
        # As ``python -m`` has it; this repository's own code is not what is tested.
        sys.path[:] = [options["cwd"], *(place for place in sys.path if Path(place) != ROOT)]
        module = command.removeprefix("python -m ")
        run_and_exit(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise StageCmdFailedError(command, code)


def main(words: Sequence[str]) -> NoReturn:
    """Run a DVC command."""
    from dvc.cli import main
    from dvc.stage import run

    run._run = stage
    sys.exit(main([*words]))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    # OpenMP's threads don't survive a fork.
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    main(sys.argv[1:])
