"""The versions of packages: as installed, without an import."""

import subprocess
import sys

import torch

from replaceme.running.versions import list_versions, versions


def test_versions_are_those_installed_and_a_missing_package_has_none() -> None:
    found = versions(("torch", "no-such-package"))
    assert found == {"no-such-package": "none", "torch": torch.__version__}
    assert list_versions(found) == f"no-such-package none, torch {torch.__version__}"


def test_no_package_is_imported_for_its_version() -> None:
    code = (
        "import sys; from replaceme.running.versions import SCORES, TEXT, versions; found = versions((*SCORES, *TEXT)); "
        "assert 'none' not in found.values(), found; print({'torch', 'transformers', 'lm_eval', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
