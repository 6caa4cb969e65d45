"""The files of a model's folder: which hold weights, tokenizer, card and licence, and which code they name.

The name patterns say what is downloaded, fingerprinted and copied to the pruned model. Subfolders never count.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from replaceme.base.files import read_json

WEIGHTS = ("*.safetensors",)
ADAPTER = "adapter_config.json"
WEIGHT_FILES = (*WEIGHTS, "*.safetensors.index.json", "config.json", ADAPTER, "*.py")
CARD = "README.md"
# One of these is in every model's folder. The names are those of transformers' tokenizers, and of remote code's.
VOCABULARIES = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "*.bpe", "tekken.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    *VOCABULARIES, "merges*", "encoder.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    GENERATION_CONFIG,
)  # fmt: skip
CARD_FILES = (CARD, "LICENSE*", "NOTICE*")
# What a pruned model was calibrated on (``replaceme.calibration.sources``).
TEXT_RECORD = "calibration_text.json"
# What it computes for a few texts (``replaceme.export.reference``); no runtime reads subfolders.
REFERENCE = "verify/reference.safetensors"
ALL_FILES = (*WEIGHT_FILES, *TOKENIZER_FILES, *CARD_FILES, TEXT_RECORD)
# Some repositories hold the weights a second time, in their author's own format.
LEFT_OUT = "consolidated*"
_RELATIVE_IMPORT = re.compile(r"(?m)^\s*(?:from|import)\s+\.(\w+)")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file: the file, the dtype by its name in safetensors, and the shape."""

    file: Path
    format: str
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def read(self, name: str) -> Tensor:
        """Return the tensor, whose name in the file is ``name``. It is mapped: what is used of it is read then."""
        with safe_open(self.file, "pt") as weights:
            return weights.get_tensor(name)


@dataclass(frozen=True)
class ModelFiles:
    """A local folder with config, safetensors and tokenizer."""

    folder: Path

    def files(self, patterns: Iterable[str] = ALL_FILES) -> list[Path]:
        """Return the files of the folder that match any of ``patterns``, sorted."""
        return sorted(
            {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file() and not path.match(LEFT_OUT)}
        )

    def tokenizer_files(self) -> list[Path]:
        """Return the files of the tokenizer, sorted: with the code that its config names, and what that code imports."""
        code: set[Path] = set()
        modules = [reference.split(".")[0] for reference in self.code_references(TOKENIZER_CONFIG)]
        while modules:
            path = self.folder / f"{modules.pop()}.py"
            if path.is_file() and path not in code:
                code.add(path)
                modules += _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
        return sorted({*self.files(TOKENIZER_FILES), *code})

    def code_references(self, name: str) -> list[str]:
        """Return the classes that ``auto_map`` in a config file names: ``module.Class``, or ``repository--module.Class``.

        A tokenizer has a pair of them, slow and fast, either of which can be null.
        """
        try:
            auto_map = json.loads((self.folder / name).read_text(encoding="utf-8")).get("auto_map") or {}
        except (OSError, ValueError, AttributeError):  # whoever loads the file says what is wrong with it
            return []
        entries = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        references = [each for entry in entries for each in (entry if isinstance(entry, list) else [entry])]
        return [reference for reference in references if isinstance(reference, str)]

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """The tensors in the files that transformers loads, by name. Only headers are read."""
        tensors = {}
        for path in self._loaded_files():
            with safe_open(path, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    entry = weights.get_slice(name)
                    tensors[name] = StoredTensor(path, entry.get_dtype(), tuple(entry.get_shape()))
        return tensors

    def _loaded_files(self) -> list[Path]:
        if (whole := self.folder / "model.safetensors").is_file():
            return [whole]
        for index in self.files(("model.safetensors.index.json",)):
            return sorted({self.folder / name for name in read_json(index)["weight_map"].values()})
        return self.files(WEIGHTS)
