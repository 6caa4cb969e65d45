"""Apply the edits to the original weights and save the result as a Hugging Face folder.

The caller verifies the folder (``replaceme.export.verification``) before it gives it its final name.
"""

import shutil
from pathlib import Path

from replaceme.base.files import read_json, write_json
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.export.shards import save_streamed
from replaceme.export.transformers4 import TOKENIZER_CLASS, add_older_keys, rename_tokenizer_keys
from replaceme.models.dtypes import stored_dtype
from replaceme.models.memory import stream
from replaceme.models.model import Model, parameter_count
from replaceme.models.model_files import TOKENIZER_CONFIG
from replaceme.models.own_form import write_own_form

SHARD_SIZE = "2GB"


def save_pruned(source: Model, edits: Edits, folder: Path, room: int | None = None) -> dict[str, int]:
    """Write weights, config, tokenizer and generation config of the pruned model.

    Args:
        source: the dense model.
        edits: the changes.
        folder: where the files go.
        room: the bytes that weights in memory may take, where the layers are read and written one at a time; None is without
            limit. The files are the same.

    Returns:
        The numbers of parameters: of the pruned model, and of the dense one.
    """
    from transformers import GenerationConfig

    family = source.family()
    model = source.load_stored() if room is None else stream(source, room=room, as_stored=True)
    dense_parameters = parameter_count(model)
    # The original's generation config is copied below: saving would refuse some that are in use.
    model.generation_config = GenerationConfig()
    if room is None:
        apply_edits(model, family, edits)
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    else:
        save_streamed(model, family, edits, folder, SHARD_SIZE)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # transformers writes the dtype of the first weight.
    config = {**read_json(folder / "config.json"), "dtype": str(stored_dtype(source)).removeprefix("torch.")}
    write_json(folder / "config.json", add_older_keys(config))
    if form := edits.own_form(family.layers):
        tokenizer = type(source.tokenizer()).__name__
        write_own_form(folder, form, TOKENIZER_CLASS.get(tokenizer, tokenizer))
    for path in source.copied_files():
        shutil.copyfile(path, folder / path.name)
    _rename_tokenizer(folder / TOKENIZER_CONFIG)
    counts = {"parameters": parameter_count(model), "parameters_dense": dense_parameters}
    # Only the garbage collector would let the weights go, and the proof loads two models more.
    model.to("meta")
    return counts


def _rename_tokenizer(file: Path) -> None:
    """Give a copied tokenizer_config.json the names that transformers 4 knows; a file that has them stays as it is."""
    if file.is_file() and (config := read_json(file)) != (old := rename_tokenizer_keys(config)):
        write_json(file, old)
