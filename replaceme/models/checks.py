"""Refuse a model's folder that can't be used, before any work, in one sentence. Of the weights, only headers are read."""

from safetensors import SafetensorError, safe_open

from replaceme.base.errors import ModelError, excerpt
from replaceme.base.files import read_json
from replaceme.base.progress import logger
from replaceme.models.dtypes import FORMATS, stored_dtype
from replaceme.models.model import Model
from replaceme.models.model_files import ADAPTER, TOKENIZER_CONFIG, VOCABULARIES, WEIGHTS

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_folder(model: Model) -> None:
    """Raise ModelError unless the folder has config, safetensors and tokenizer, no adapter, and no code of elsewhere."""
    adapter = (model.folder / ADAPTER).is_file()
    if not (model.folder / "config.json").is_file():
        if adapter:
            raise ModelError(f"model_path: {model.name} holds only an adapter; merge it into its base model first.")
        raise ModelError(f"model_path: {model.name} is not a model folder: it has no config.json.")
    if adapter:
        raise ModelError(
            f"model_path: {model.name} holds an adapter ({ADAPTER}) beside its model, and it would be left out; merge it into "
            "the model, or remove its files."
        )
    if not model.files(WEIGHTS):
        if model.files(PICKLED):
            raise ModelError(
                f"model_path: {model.name} has pickled weights only, which can run code when loaded; convert it to safetensors."
            )
        raise ModelError(f"model_path: {model.name} has no safetensors weights.")
    if not model.files(VOCABULARIES):
        raise ModelError(f"model_path: {model.name} has no tokenizer files.")
    for name in ("config.json", TOKENIZER_CONFIG):
        if elsewhere := [reference for reference in model.code_references(name) if "--" in reference]:
            raise ModelError(
                f"model_path: auto_map in {name} of {model.name} names code of another repository ({elsewhere[0]}), which "
                "can change at any time; use a copy of the model with that code in its folder, or without auto_map."
            )


def check_weights(model: Model) -> None:
    """Raise ModelError if a weight file is damaged, a shard named by the index is missing, or a dtype can't be kept."""
    for index in model.files(("*.safetensors.index.json",)):
        try:
            shards = {name: model.folder / name for name in sorted(set(read_json(index)["weight_map"].values()))}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"model_path: {index.name} of {model.name} can't be read.") from None
        if missing := [name for name, path in shards.items() if not path.is_file()]:
            raise ModelError(f"model_path: {model.name} lacks {missing[0]}, which {index.name} names.")
    for path in model.files(WEIGHTS):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as failure:
            raise ModelError(f"model_path: {path.name} of {model.name} is damaged ({excerpt(failure, 150)}).") from None
    _check_dtypes(model)


def _check_dtypes(model: Model) -> None:
    """Log that some weights are stored in another dtype than most. Raises ModelError if they can't keep it."""
    stored, usual = model.stored, stored_dtype(model)
    others = {name for name, tensor in stored.items() if FORMATS.get(tensor.format, usual) != usual}
    if others and (kept := others & {*model.match_names(model.skeleton(model.config()), stored).values()}):
        logger.info(
            "model_path: %d of %d weights are stored in another format than most (%s), such as %s: passes compute in that one, "
            "and the pruned model keeps each as it is stored",
            len(kept), len(stored), usual, min(kept),
        )  # fmt: skip
