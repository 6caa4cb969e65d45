"""Apply the edits to the original weights and save the result as a Hugging Face folder.

A streamed model is edited layer by layer. transformers saves it from tensors that are mapped: what no edit changes from the
model's files, the rest from scratch files.

The caller verifies the folder (``replaceme.export.verification``) before it gives it its final name.
"""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from replaceme.base.files import read_json, write_json
from replaceme.base.scratch import copy_to_scratch
from replaceme.edits.edits import OUTSIDE, Edits
from replaceme.edits.fold import apply_edits, edited_parameters, shorten
from replaceme.export.transformers4 import TOKENIZER_CLASS, add_older_keys, rename_tokenizer_keys
from replaceme.models.dtypes import dtype_name, stored_dtype
from replaceme.models.families import Family, in_torch_layout
from replaceme.models.memory import load_streamed
from replaceme.models.model import Model, parameter_count
from replaceme.models.model_files import CARD_FILES, TOKENIZER_CONFIG
from replaceme.models.own_form import write_own_form
from replaceme.models.streaming import evict_layers, layers_in_memory

SHARD_SIZE = "2GB"


def save_pruned(source: Model, edits: Edits, folder: Path, budget: int | None = None) -> dict[str, int]:
    """Write weights, config, tokenizer and generation config of the pruned model.

    Args:
        source: the dense model.
        edits: the changes.
        folder: where the files go.
        budget: the bytes that weights in memory may take, where the layers are read and written one at a time; None is without
            limit. The files are the same.

    Returns:
        The numbers of parameters: of the pruned model, and of the dense one.
    """
    from transformers import GenerationConfig

    family = source.family()
    model = source.load_stored() if budget is None else load_streamed(source, None, budget)
    dense_parameters = parameter_count(model)
    # The original's generation config is copied below: saving would refuse some that are in use.
    model.generation_config = GenerationConfig()
    if budget is None:
        apply_edits(model, family, edits)
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    else:
        tensors = apply_edits_by_layer(model, family, edits, folder)
        model.save_pretrained(folder, state_dict=tensors, max_shard_size=SHARD_SIZE, save_original_format=False)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # transformers writes the dtype of the first weight.
    config = {**read_json(folder / "config.json"), "dtype": dtype_name(stored_dtype(source))}
    write_json(folder / "config.json", add_older_keys(config))
    if form := edits.own_form(family.layers):
        tokenizer = type(source.tokenizer()).__name__
        write_own_form(folder, form, TOKENIZER_CLASS.get(tokenizer, tokenizer))
    # The card is replaced by ours later; licence and notice stay.
    for path in {*source.tokenizer_files(), *source.files(CARD_FILES)}:
        shutil.copyfile(path, folder / path.name)
    tokenizer_file = folder / TOKENIZER_CONFIG
    # With the names that transformers 4 knows; a file that has them stays as it is.
    if tokenizer_file.is_file() and (own := read_json(tokenizer_file)) != (renamed := rename_tokenizer_keys(own)):
        write_json(tokenizer_file, renamed)
    counts = {"parameters": parameter_count(model), "parameters_dense": dense_parameters}
    # Only the garbage collector would let the weights go, and the proof loads two models more.
    model.to("meta")
    return counts


def apply_edits_by_layer(model: Any, family: Family, edits: Edits, folder: Path) -> dict[str, Tensor]:
    """Apply edits to a streamed model, in place, and return the tensors to save: name in the files → value.

    One layer at a time is in memory. In the order of the result, transformers divides a resident model between files. Only
    experts, of which it counts one, can be divided otherwise.

    Args:
        model: the dense model, each weight in the dtype that it is stored in.
        family: its description.
        edits: the changes, without a ``ModelEdit``.
        folder: for scratch files, whose space is freed when the tensors are gone.
    """
    from transformers.core_model_loading import revert_weight_conversion

    folder.mkdir(parents=True, exist_ok=True)
    layers = shorten(model, family, edits)
    # Of the layers, these are empty.
    tensors = dict(revert_weight_conversion(model, dict(model.state_dict())))
    for at in (at for at in range(len(layers)) if at not in set(edits.removed_layers)):
        edited = {
            name: in_torch_layout(model, name, exact).to(model.get_parameter(name).dtype)
            for name, exact in edited_parameters(model, family, layers, edits, at)
        }
        with layers_in_memory([layers[at]]):
            own = dict(layers[at].state_dict(prefix=f"{family.layers}.{edits.position(at)}."))
            mapped = {id(value) for value in own.values()}
            for name, value in revert_weight_conversion(model, own | edited).items():
                tensors[name] = value if id(value) in mapped else copy_to_scratch(value, folder, "export")
    for name, exact in edited_parameters(model, family, layers, edits, OUTSIDE):
        tensors[name] = in_torch_layout(model, name, exact).to(model.get_parameter(name).dtype)
    evict_layers(model)
    return tensors
