"""Export: apply the edits to the original weights, save a normal Hugging Face folder, and prove it before it counts.

The folder appears under its name only after the verification has passed.
"""

import shutil
from pathlib import Path

from transformers import GenerationConfig

from replaceme.card import model_card
from replaceme.compute import use_processor
from replaceme.documents import Documents
from replaceme.edits import Edits
from replaceme.files import new_folder, read_json, rounded, write_json, write_text
from replaceme.models import CARD, COPIED_FILES, Model, parameter_count, recorded_model
from replaceme.own_form import FILE, is_own_form, write_own_form
from replaceme.params import Params
from replaceme.progress import logger
from replaceme.surgery import apply_edits, broken_patterns
from replaceme.verification import verify_export
from replaceme.workspace import Workspace

SHARD_SIZE = "2GB"


def export(params: Params, work: Workspace) -> None:
    """Write the pruned model's folder and metrics/export.json.

    Raises:
        VerificationError: the folder would not compute what was solved for; nothing is left behind.
    """
    use_processor(params.threads)
    source, edits = recorded_model(params, work.model_input), Edits.load(work.edits)
    with new_folder(work.model) as folder:
        counts = save_pruned(source, edits, folder)
        write_text(folder / CARD, model_card(params, source, edits, read_json(work.metric("solve"))))
        plain = not is_own_form(folder)
        # As any user loads it, by the file that was just written.
        pruned = Model(folder, folder.name, trust_remote_code=source.trust_remote_code or not plain)
        figures = verify_export(source, pruned, edits, Documents.load(work.documents))
        broken = broken_patterns(pruned.config(), source.family())
    if broken:
        logger.warning(
            "export: %s no longer follows the family's pattern: transformers and vLLM read it from the config, but a program "
            "that computes it from a layer's position, such as llama.cpp, would compute something else (docs/loading.md)",
            " and ".join(broken),
        )
    if not plain:
        logger.warning(
            "export: the result has a form that no class of transformers has: it loads with trust_remote_code=True, by the "
            "file %s beside the weights",
            FILE,
        )
    write_json(work.metric("export"), rounded({**counts, **figures}))
    logger.info(
        "export: %s, %.1f M of %.1f M parameters; state %s equals the unfused computation to %.1e, logits to %.1e",
        work.model, counts["parameters"] / 1e6, counts["parameters_dense"] / 1e6,
        "at the cut" if edits.removed_layers else "behind the last layer",
        figures["hidden_error_max"], figures["logits_error"],
    )  # fmt: skip


def save_pruned(source: Model, edits: Edits, folder: Path) -> dict[str, int]:
    """Write weights, config, tokenizer and generation config of the pruned model; return the parameter counts."""
    model = source.load()
    dense_parameters = parameter_count(model)
    apply_edits(model, source.family(), edits)
    # The original's generation config is copied as it is; saving would refuse some that are in use.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if form := edits.form(source.family().layers):
        write_own_form(folder, form, type(source.tokenizer()).__name__)
    for path in source.files(COPIED_FILES):
        shutil.copyfile(path, folder / path.name)
    return {"parameters": parameter_count(model), "parameters_dense": dense_parameters}
