"""Where faults are tried: a tiny random model with its text, a folder for results and cache, and a copy of the pipeline."""

import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.forking import main as dvc
from benchmarks.tries import NEVER, Moment, Try, TryResult

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the a river mountain of runs near old town and people walk to market where bread fish wine are sold every day"
CODE = (
    "stages",
    "replaceme",
    "dvc.yaml",
    "params.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/.gitignore",
)
# One thread everywhere: OpenMP's threads don't survive a fork, and two numbers of threads give two results.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DVC_NO_ANALYTICS", "PYTHONDONTWRITEBYTECODE"), "1"),
    "MPLBACKEND": "agg",
}
SETTINGS = {
    "model_path": "model", "dataset": "text.txt", "tasks": "[held-out.txt]", "dataset_size": "20", "max_length": "48",
    "layers_to_skip": "2", "transform": "channels", "repair": "true", "heal_tokens": "4000",
    "heal_tokens_per_step": "1000", "dtype": "float32",
    "eval_dtype": "float32", "eval_tokens": "2000", "threads": "1", "device": "cpu",
}  # fmt: skip
# Files that hold times, process ids or sums of such files: that they are there is compared, not what they hold.
TIMED = re.compile(r"/costs/|work/stages/|sha256\.json$|\.lock|compression\.json$|claims\.json$")
# Figures of metrics/summary.json that vary likewise.
COSTS = ("seconds", "memory_gb", "gpu_memory_gb")


class Sandbox:
    """A folder with a model, a text and a task, the user's cache, and a folder for results; and tries in it."""

    def __init__(self, folder: Path, inputs: Path):
        self.folder, self.inputs = folder, inputs
        self.results, self.cache, self.temporary = folder / "results", folder / "cache", folder / "tmp"

    def clear(self) -> None:
        """Delete all results and the cache."""
        for part in (self.results, self.cache, self.temporary):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def start(self, action: Callable[[], Any], moment: Moment = NEVER, limit: float = 600) -> Try:
        """Start ``action`` in a child whose current folder is that of the results."""

        def inside() -> None:
            os.chdir(self.results)
            os.environ["REPLACEME_CACHE"] = str(self.cache)
            tempfile.tempdir = os.environ["TMPDIR"] = str(self.temporary)
            action()

        return Try(inside, self.folder, moment, limit)

    def run(self, action: Callable[[], Any], moment: Moment = NEVER, limit: float = 600) -> TryResult:
        return self.start(action, moment, limit).wait()

    def prune(self, **changes: str) -> Callable[[], Any]:
        """Return a call of run_replaceme with SETTINGS and ``changes``; files are those of the sandbox."""
        settings = {**SETTINGS, "save_path": "pruned", **changes}
        for key in ("model_path", "dataset"):
            settings[key] = str(self.inputs / settings[key])
        settings["tasks"] = str([str(self.inputs / "held-out.txt")])
        return partial(
            run_console_script, "run_replaceme", *(word for key, value in settings.items() for word in (f"--{key}", value))
        )

    def content(self) -> dict[str, str]:
        """Return a digest of each file of results and cache, without times; a folder that is empty has an entry, too."""
        found = {}
        for top in (self.results, self.cache, self.temporary):
            for path in sorted(top.rglob("*")):
                name = path.relative_to(self.folder).as_posix()
                if path.is_dir() and not any(path.iterdir()):
                    found[f"{name}/"] = "empty folder"
                elif path.is_file():
                    found[name] = "" if TIMED.search(name) else hashlib.sha256(_read_without_costs(path)).hexdigest()
        return found


def _read_without_costs(path: Path) -> bytes:
    """Return what a file holds, without the cost among the figures of metrics/summary.json."""
    content = path.read_bytes()
    if path.name != "summary.json":
        return content
    return json.dumps({key: value for key, value in json.loads(content).items() if key not in COSTS}).encode()


def import_copy(folder: Path) -> None:
    """Copy the pipeline, and import the library from there from now on: a run may not change when the repository does."""
    copy_code(folder)
    sys.path.insert(0, str(folder))


def copy_code(folder: Path, *more: str) -> None:
    """Copy the pipeline, and more files and folders of the repository by their names."""
    for name in (*CODE, *more):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)


def set_params(folder: Path, settings: Mapping[str, str]) -> None:
    """Change values in the params.yaml of a copy; each key has to be there."""
    file = folder / "params.yaml"
    text = file.read_text(encoding="utf-8")
    for key, value in settings.items():
        text, found = re.subn(rf"(?m)^{key}: .*$", f"{key}: {value}", text)
        assert found == 1, key
    file.write_text(text, encoding="utf-8")


def run_console_script(command: str, *words: str) -> None:
    sys.argv = [command, *words]
    getattr(importlib.import_module("replaceme.cli.commands"), command)()


def make_inputs(folder: Path, seed: int) -> None:
    """Write a tiny random Llama with its tokenizer, a text and a task."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    chance = random.Random(seed)

    def text(sentences: int) -> str:
        made = (" ".join(chance.choices(WORDS.split(), k=chance.randint(6, 18))).capitalize() + "." for _ in range(sentences))
        return "".join(sentence + ("\n\n" if number % 8 == 7 else " ") for number, sentence in enumerate(made))

    for name, sentences in (("text.txt", 600), ("held-out.txt", 100)):
        (folder / name).write_text(text(sentences), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator([text(50)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")


class PipelineSandbox(Sandbox):
    """A copy of this repository's pipeline, set to the tiny model; its results are the whole copy."""

    def __init__(self, folder: Path, inputs: Path, code: Path):
        super().__init__(folder, inputs)
        self.code = code

    def clear(self) -> None:
        super().clear()
        shutil.copytree(self.code, self.results, dirs_exist_ok=True)
        (self.results / "metrics").mkdir()
        settings = SETTINGS | {key: str(self.inputs / SETTINGS[key]) for key in ("model_path", "dataset")}
        set_params(self.results, settings | {"tasks": f"[{self.inputs / 'held-out.txt'}]"})
        subprocess.run(["git", "init", "-q"], cwd=self.results, check=True)

    def content(self) -> dict[str, str]:
        """Return what ``Sandbox.content`` does, without DVC's own folders; of dvc.lock, what has no times in it."""
        own = re.compile(r"results/\.(git|dvc)/|__pycache__")
        found = {name: digest for name, digest in super().content().items() if not own.match(name)}
        lock = (self.results / "dvc.lock").read_text(encoding="utf-8")
        sums = re.findall(r"path: (\S+)\n\s+hash: md5\n\s+md5: (\S+)", lock)
        found["results/dvc.lock"] = str(sorted({each for each in sums if not TIMED.search(f"/{each[0]}")}))
        return found


def run_dvc_repro() -> None:
    """Run ``dvc repro`` in this process, and each stage in a forked child of it."""
    dvc(["repro"])


def load_libraries(sandbox: Sandbox, *actions: Callable[[], Any]) -> None:
    """Import here whatever the actions import, so that each try begins with it."""
    names = sandbox.folder / "modules"

    def record_modules(action: Callable[[], Any]) -> None:
        try:
            action()
        finally:
            names.write_text("\n".join(name for name in sys.modules if name != "__main__"), encoding="utf-8")

    for action in actions:
        sandbox.clear()
        ended = sandbox.run(partial(record_modules, action))
        if ended.code:
            sys.exit(f"the undisturbed run fails: {ended}")
        for name in names.read_text(encoding="utf-8").splitlines():
            if not name.startswith("stages."):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
