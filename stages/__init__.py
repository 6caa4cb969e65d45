"""One script per stage, named as in dvc.yaml; run it as ``python -m stages.NAME`` from the repository's root.

(``python stages/select.py`` would put this folder first on the module path, where select.py hides the standard library's
module.) A stage that is started outside of the project's environment fails with one sentence.
"""

import importlib.util
import sys
from importlib import import_module

_NEEDED = ("torch", "transformers", "pydantic", "ruamel")
_missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
if _missing:
    print(
        f"error: {sys.executable} lacks {', '.join(_missing)}: run `make`, or put the environment first on PATH "
        '(`export PATH="$PWD/.venv/bin:$PATH"`).',
        file=sys.stderr,
    )
    sys.exit(2)
# It says how threads wait, which torch reads once, when it is loaded.
import_module("replaceme.running.entry")
