"""The frame of every entry point: errors as one sentence, and exit codes.

Exit codes: 0 done, 2 something for the user to fix, 1 a bug here, 130 interrupted.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from replaceme.base.errors import (
    SENTENCE_CHARACTERS,
    LostProcessError,
    ParameterError,
    ReplaceMeError,
    ResourceError,
    excerpt,
    resource_failure,
)
from replaceme.base.progress import configure_logging, silence_libraries
from replaceme.base.ranks import rank, world_size

# OpenMP reads this once, when torch is loaded, so it is set here, on import: every entry point imports this file before torch.
# Threads that spin at barriers lose time next to other work: for the demo on two cores, the stage activations takes 54 s either
# way on an idle machine, but next to one busy program 136 s spinning and 94 s passive.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PARAMS_FILE = Path("params.yaml")
DEBUG_VARIABLE = "REPLACEME_DEBUG"
MOST_PROBLEMS = 20
SAYING_SECONDS = 3.0


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as a ParameterError."""

    def error(self, message: str) -> NoReturn:
        raise ParameterError(f"command line: {excerpt(message, 200)}.")


def plain_parser(prog: str, description: str, example: str) -> Parser:
    """Return the parser of a command without parameters; its options are still to be added.

    Args:
        prog: how it is called.
        description: what it does.
        example: a command line, for the end of the help.
    """
    parser = Parser(
        prog=prog, description=description, epilog=f"example:\n  {example}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_command(action: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a command on the words after its name, and end the process with the exit code."""
    arguments = sys.argv[1:]
    sys.exit(run(lambda: action(arguments), debug="--debug" in arguments))


def run(action: Callable[[], object], debug: bool = False) -> int:
    """Run ``action``, print an error as one sentence, and return the exit code."""
    configure_logging()
    try:
        silence_libraries()
        action()
    except KeyboardInterrupt:
        if world_size() == 1:  # the launcher says it for its processes
            print("interrupted; finished stages are kept, and the next run resumes there", file=sys.stderr)
        return 130
    except Exception as error:
        known = _explained(error)
        if rank() or isinstance(known, LostProcessError):
            # The first process says what all meet, and the launcher which one it lost; then it ends this one.
            time.sleep(SAYING_SECONDS)
        if debug or os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        start = f"rank {rank()}: " if rank() else ""
        problems = str(known).split("\n")
        for line in problems[:MOST_PROBLEMS]:
            print(f"{start}error: {excerpt(line, SENTENCE_CHARACTERS)}", file=sys.stderr)
        if len(problems) > MOST_PROBLEMS:
            print(f"({len(problems) - MOST_PROBLEMS} more problems are not shown)", file=sys.stderr)
        return known.exit_code if isinstance(known, ReplaceMeError) else 1
    return 0


def _explained(error: Exception) -> Exception:
    """Return the error to show: ours as it is, resource errors as a sentence, others with a hint how to get the traceback."""
    if isinstance(error, ReplaceMeError):
        return error
    if known := resource_failure(error):
        return known
    if isinstance(error, OSError) and error.filename:
        return ResourceError(f"{error.filename}: {error.strerror}.")
    reason = f"{type(error).__name__}: {excerpt(error, 150)}"
    return RuntimeError(f"unexpected {reason} (run with --debug, or {DEBUG_VARIABLE}=1, for the traceback).")
