"""The Python API: prune a model in one call, over the same steps as the commands, and get its path and its figures.

``replaceme.prune`` and ``replaceme.Pruned`` are these; importing ``replaceme`` alone loads none of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import replaceme.running.entry  # noqa: F401 (sets how OpenMP waits, before torch is loaded)
from replaceme.base.errors import ParameterError, quote
from replaceme.base.files import read_json
from replaceme.base.parameters import Params, read_params
from replaceme.base.published import Preset
from replaceme.base.ranks import world_size
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.models.model_files import TEXT_RECORD
from replaceme.pipeline.actions import prune as _prune
from replaceme.pipeline.results import result_name, result_paths
from replaceme.pipeline.sizes import apply_default_size
from replaceme.running.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The method's metrics, in the order of the stages.
STAGES_WITH_FIGURES = ("select", "solve", "repair", "heal", "check", "export")
TEXTS_FILE = "texts.jsonl"
# With ``remove`` alone, the largest number of whole layers.
MOST_LAYERS = 8


@dataclass(frozen=True)
class Pruned:
    """A pruned model on disk, and what is known of it.

    Attributes:
        path: the Hugging Face folder, which ``AutoModelForCausalLM.from_pretrained`` loads.
        report: the page with scores and figures; None if nothing was scored.
        removed_layers: the removed layers of the dense model, counted from 0.
        scores: both models' scores, as in ``metrics/evaluation.json``; empty if nothing was scored.
        figures: what each stage measured, by its name: select, solve, repair, heal and export; and under compression the
            seconds and bytes that it took.
        settings: every parameter's value, as in a config file.
    """

    path: Path
    report: Path | None
    removed_layers: tuple[int, ...]
    scores: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]

    def model(self, **options: Any) -> PreTrainedModel:
        """Load the model, with options of ``AutoModelForCausalLM.from_pretrained`` such as ``dtype`` and ``device_map``.

        A form that no class of transformers has (methods linearpatch, ghosted, slicegpt and llm_pruner without ``plain``) loads
        with the file next to the weights, which this program wrote; so its code is run.
        """
        from transformers import AutoModelForCausalLM

        own_form = any(self.path.glob("*.py"))
        return AutoModelForCausalLM.from_pretrained(
            self.path, **{"trust_remote_code": own_form, "local_files_only": True, **options}
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, local_files_only=True)


def prune(
    model: str | os.PathLike[str] | PreTrainedModel,
    texts: str | os.PathLike[str] | Sequence[str] | None = None,
    layers: int | None = None,
    save_path: str | os.PathLike[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    preset: Preset = "recommended",
    overwrite: bool = False,
    **settings: Any,
) -> Pruned:
    """Remove layers of a causal language model, save the result and score both models, as ``replaceme prune`` does.

    An interrupted call goes on where it stopped. A second one with other settings, and ``overwrite``, repeats only what they
    change.

    Args:
        model: a local folder, a hub id or an embedded model's name; or a loaded model, which is first saved to a temporary
            folder and needs ``tokenizer``.
        texts: calibration text: a file, a hub id, an embedded text's name, or a list of documents. None is text that the model
            writes itself, unless the setting ``dataset`` says otherwise.
        layers: how many layers to remove; None, where the setting ``remove`` doesn't say how much, is a share (13 %) of them.
        save_path: folder of the result; None is ``<model>-<method>-<layers>`` in the current folder.
        tokenizer: of a loaded model.
        preset: the values of settings that are not given: recommended, quick (a first result), healed (trained too), or
            published (the paper's).
        overwrite: replace a finished result of another model, text or setting in ``save_path``, which is refused otherwise.
        settings: any parameter by its name (docs/parameters.md).

    Raises:
        ParameterError: a setting is unknown, out of range or doesn't go with the others; it names all of them.
        ModelError, DatasetError: the model can't be pruned exactly, or there is no such text.
        ResourceError: the machine lacks disk, memory or a device, or the hub can't be reached.
    """
    _check_call(texts, settings)
    with _saved_model(model, tokenizer) as source:
        most = MOST_LAYERS if layers is None else layers
        given = {**settings, "model_path": str(source), "layers_to_skip": most, "preset": preset}
        if save_path is not None:
            given["save_path"] = os.fspath(save_path)
        documents = None
        if isinstance(texts, str | os.PathLike):
            given["dataset"] = os.fspath(texts)
        elif texts is not None:
            documents = _list_documents(texts)
            given["dataset"] = TEXTS_FILE
        else:
            given.setdefault("dataset", "self")
        params = read_params(None, given, METHODS)
        if layers is None and params.remove is None:
            params = apply_default_size(params)
        if max(params.processes, world_size()) > 1:
            raise ParameterError("processes: a call from Python has one; use 1 here, or the command `replaceme prune`.")
        if documents is not None:
            work = result_paths(params, result_name(params))
            params = params.model_copy(update={"dataset": str(work.root / TEXTS_FILE)})
        return _read_result(params, _prune(params, documents, overwrite))


def _check_call(texts: object, settings: Mapping[str, Any]) -> None:
    """Raise ParameterError for settings that are given by another argument of the call."""
    if taken := {"model_path", "layers_to_skip", "save_transform_only"} & settings.keys():
        raise ParameterError(f"{min(taken)}: is set by the call itself; use model and layers.")
    if texts is not None and "dataset" in settings:
        raise ParameterError("dataset: is set by texts; give one of the two.")


def _list_documents(texts: Sequence[str]) -> list[str]:
    """Return the documents. Raises ParameterError for one that is no text, or empty."""
    documents = [*texts]
    wrong = next((text for text in documents if not isinstance(text, str) or not text.strip()), None)
    if not documents or wrong is not None:
        given = quote(wrong if documents else documents)
        raise ParameterError(f"texts: must be a list of texts that aren't empty, one a document, not {given}.")
    return documents


@contextmanager
def _saved_model(model: Any, tokenizer: Any) -> Iterator[str | Path]:
    """Yield where the dense model is; a loaded one is saved for as long as the block lasts."""
    if isinstance(model, str | os.PathLike):
        if tokenizer is not None:
            raise ParameterError("tokenizer: belongs to a loaded model; that of a path or a hub id is read with it.")
        yield os.fspath(model)
        return
    if not hasattr(model, "save_pretrained"):
        raise ParameterError(f"model: must be a path, a hub id or a model of transformers, not {quote(model)}.")
    if tokenizer is None:
        raise ParameterError("tokenizer: is missing; a loaded model needs it, as in prune(model, tokenizer=tokenizer).")
    with TemporaryDirectory(prefix="replaceme-") as temporary:
        origin = Path(str(getattr(model.config, "_name_or_path", "")))
        name = origin.name
        folder = Path(temporary) / (name if name not in ("", "..") else "model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # A pruned model that is pruned again.
        if (record := origin / TEXT_RECORD).is_file():
            shutil.copyfile(record, folder / TEXT_RECORD)
        yield folder


def _read_result(params: Params, work: Workspace) -> Pruned:
    figures = {name: read_json(work.metric(name)) for name in (*STAGES_WITH_FIGURES, "compression")}
    scores = read_json(work.metric("evaluation")) if params.tasks else {}
    removed = read_json(work.edits / "edits.json")["removed_layers"]
    report = work.report / "index.html" if params.tasks else None
    settings = {key: _plain(getattr(params, key)) for key in FIELDS}
    return Pruned(work.model, report, tuple(removed), scores, figures, settings)


def _plain(value: Any) -> Any:
    return [each.plain() for each in value] if isinstance(value, tuple) else value
