"""Packages that only some of the work needs: extras of the distribution, named in one sentence where they are missing."""

from importlib.util import find_spec

from replaceme.base.errors import ResourceError

# Module → the package that it comes in, and the extra that installs it.
EXTRAS = {"dvc": ("dvc", "pipeline"), "bitsandbytes": ("bitsandbytes", "4bit")}
EXTRAS |= {"llama_cpp": ("llama-cpp-python", "gguf"), "openvino": ("openvino", "openvino")}


def require_package(module: str, why: str) -> None:
    """Raise ResourceError if an optional package is not installed.

    Args:
        module: one of ``EXTRAS``.
        why: what needs it, as the start of the sentence: ``use_4bit``.
    """
    if find_spec(module) is None:
        package, extra = EXTRAS[module]
        raise ResourceError(f"{why}: needs the package {package}; install it: pip install '.[{extra}]' in the clone.")
