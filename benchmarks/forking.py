"""DVC whose stages are forked children of its own process, and a server whose forked children are such DVCs.

The libraries, which take most of a small stage's time, are loaded once for all stages of a command, and by the server once for
all commands; each stage loads the project's own code.
"""

import gc
import json
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto", "datasets",
    "lm_eval.evaluator", "lm_eval.models.utils", "scipy.stats", "matplotlib.pyplot", "pandas", "jinja2", "ruamel.yaml",
    "pydantic.main", "pydantic.fields", "pydantic.dataclasses", "pydantic.type_adapter", "pydantic.functional_validators",
)  # fmt: skip
# What DVC loads for each command.
DVC = (
    "dvc.cli.parser", "dvc.repo", "dvc.repo.datasets", "dvc.repo.experiments", "dvc.repo.plots", "dvc.analytics",
    "dvc.cachemgr", "dvc.data_cloud", "dvc.dirs", "dvc.lock", "dvc.rwlock", "dvc.scm",
)  # fmt: skip


def run_stage_command(_: Any, command: str, **options: Any) -> None:
    """Run a stage's command, as ``dvc.stage.run._run`` does."""
    from dvc.stage.exceptions import StageCmdFailedError

    from benchmarks.tries import run_and_exit

    load(LIBRARIES)
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
        if hook := os.environ.get("STAGE_HOOK"):  # a Python file, which finds the module's name as ``stage``
            runpy.run_path(hook, {"stage": module})
        run_and_exit(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise StageCmdFailedError(command, code)


def load(modules: Sequence[str]) -> None:
    for name in modules:
        import_module(name)


def main(words: Sequence[str]) -> NoReturn:
    """Run a DVC command."""
    from dvc.cli import main
    from dvc.stage import run

    run._run = run_stage_command
    sys.exit(main([*words]))


def run_script() -> None:
    """Run the console script that sys.argv names."""
    name, *words = sys.argv
    if name == "dvc":
        main(words)
    if hook := os.environ.get("SCRIPT_HOOK"):  # a Python file
        runpy.run_path(hook)
    entry_points(group="console_scripts", name=name)[name].load()()


def serve() -> None:
    """Run a console script for each line of the input, one after the other, and answer each with the exit code.

    A line is a JSON object: ``words`` (the script's name and its arguments), ``folder`` and ``environment`` to run in, and
    ``output``, the file that gets what it prints.
    """
    from benchmarks.tries import run_and_exit

    load((*LIBRARIES, *DVC))
    # A collection in a child would visit, and so copy, all objects of the libraries.
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            for place, flags, numbers in ((os.devnull, os.O_RDONLY, (0,)), (request["output"], os.O_WRONLY, (1, 2))):
                opened = os.open(place, flags)
                for number in numbers:
                    os.dup2(opened, number)
            os.environ.clear()
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            sys.argv = request["words"]
            run_and_exit(run_script)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    # OpenMP's threads don't survive a fork.
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    serve()
