"""The token ids of all scored requests: made once for the dense model, and reused for every pruned one.

On disk: ``windows.safetensors`` and ``windows.json`` (perplexity), ``pairs.safetensors`` (context and continuation of each
request, looked up by the sha256 of its text).
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from replaceme.base.files import read_json, write_json
from replaceme.evaluation.perplexity import Windows

Pair = tuple[list[int], list[int]]


@dataclass
class Encodings:
    """Token ids of the requests so far, by the sha256 of their text."""

    pairs: dict[bytes, Pair] = field(default_factory=dict)

    def pair(self, context: str, continuation: str, encode: Callable[[str, str], Pair]) -> Pair:
        """Return a request's token ids; encode it only if it is new."""
        key = hashlib.sha256(f"{len(context)}:{context}{continuation}".encode()).digest()
        if key not in self.pairs:
            self.pairs[key] = encode(context, continuation)
        return self.pairs[key]


@dataclass
class Requests:
    """All requests of a set of tasks, for one tokenizer.

    Attributes:
        windows: task → the windows of its text.
        encodings: the requests of all other tasks.
    """

    windows: dict[str, Windows] = field(default_factory=dict)
    encodings: Encodings = field(default_factory=Encodings)

    def save(self, folder: Path) -> None:
        """Write the requests into ``folder``."""
        tensors = {f"{task}/{n}": ids for task, cut in self.windows.items() for n, ids in enumerate(cut.windows)}
        save_file(tensors or {"none": torch.zeros(1)}, folder / "windows.safetensors")
        counts = {task: {**asdict(cut), "windows": len(cut.windows)} for task, cut in self.windows.items()}
        write_json(folder / "windows.json", counts)
        # The choices of an item share its context, so it is stored once.
        parts: dict[tuple[int, ...], int] = {}
        pairs = self.encodings.pairs
        indices = [[parts.setdefault(tuple(part), len(parts)) for part in pair] for pair in pairs.values()]
        save_file(
            {
                "keys": torch.frombuffer(bytearray(b"".join(pairs) or b"\0"), dtype=torch.uint8),
                "pairs": torch.tensor(indices, dtype=torch.int32).reshape(-1, 2),
                "ids": torch.tensor([number for part in parts for number in part], dtype=torch.int32),
                "lengths": torch.tensor([len(part) for part in parts], dtype=torch.int32),
            },
            folder / "pairs.safetensors",
        )

    @classmethod
    def load(cls, folder: Path) -> "Requests":
        """Read what ``save`` wrote."""
        tensors = load_file(folder / "windows.safetensors")
        windows = {
            task: Windows(**{**counts, "windows": [tensors[f"{task}/{n}"] for n in range(counts["windows"])]})
            for task, counts in read_json(folder / "windows.json").items()
        }
        stored = load_file(folder / "pairs.safetensors")
        keys, ids = bytes(stored["keys"].numpy()), stored["ids"].tolist()
        bounds = [0, *stored["lengths"].cumsum(0).tolist()]
        parts = [ids[start:end] for start, end in pairwise(bounds)]
        pairs = {
            keys[32 * n : 32 * n + 32]: (parts[context], parts[continuation])
            for n, (context, continuation) in enumerate(stored["pairs"].tolist())
        }
        return cls(windows, Encodings(pairs))
