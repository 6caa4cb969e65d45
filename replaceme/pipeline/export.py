"""export: save the pruned model as a Hugging Face folder, which gets its name only after verification."""

from replaceme.base.documents import Documents
from replaceme.base.errors import ParameterError
from replaceme.base.files import new_folder, read_json, round_floats, write_json, write_text
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.calibration.sources import healing_params, identify_sources, write_record
from replaceme.edits.edits import Edits
from replaceme.export.card import SETTINGS, RunResults, render_card
from replaceme.export.reference import read_model, save_reference
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.methods.registry import METHODS
from replaceme.models.depth import broken_patterns
from replaceme.models.devices import use_processor
from replaceme.models.find import recorded_model
from replaceme.models.memory import choose_processor, load_within_budget, proof_budget
from replaceme.models.model import Model
from replaceme.models.model_files import CARD
from replaceme.models.own_form import FILE, is_own_form
from replaceme.running.stage import Stage
from replaceme.running.workspace import Workspace


def export(params: Params, work: Workspace) -> None:
    """Write the pruned model's folder, with the reference that a served copy is compared with, and metrics/export.json.

    Raises:
        VerificationError: the saved model would not compute the solution; no folder is left.
    """
    use_processor(params.threads)
    source, edits = recorded_model(params, work.model_input), Edits.load(work.edits)
    obstacle = "the method's edit changes the shapes of weights" if edits.model_edit and edits.model_edit.reshapes else None
    # The proof computes on the processor.
    budget = proof_budget(source, choose_processor(params), obstacle)
    with new_folder(work.model) as folder:
        counts = save_pruned(source, edits, folder, budget)
        sources = identify_sources(params, read_json(work.dataset_input))
        if healed := read_json(work.heal_dataset_input):
            sources += identify_sources(healing_params(params), healed)
        write_record(sources, source.folder, folder)
        results = RunResults.of(work)
        write_text(folder / CARD, render_card(params, source, edits, results))
        plain = not is_own_form(folder)
        # Load it as a user would, with the code file that was just written.
        pruned = Model(folder, folder.name, trust_remote_code=source.trust_remote_code or not plain)
        figures = verify_export(source, pruned, edits, Documents.load(work.documents), budget)
        try:
            exact = load_within_budget(pruned, choose_processor(params), "float32", obstacle=obstacle)
            save_reference(read_model(exact, pruned.tokenizer()), folder)
        except ParameterError as problem:  # float32 needs more memory than the proof had
            logger.warning("export: the reference for `replaceme verify` is not written (%s)", problem)
        broken = broken_patterns(pruned.config(), source.family())
        work.record_own_files(folder)
    if broken:
        logger.warning(
            "export: %s no longer follows the family's pattern: transformers and vLLM read it from the config, but programs "
            "that derive it from a layer's position, such as llama.cpp, would compute something else (docs/serving.md)",
            " and ".join(broken),
        )
    if not plain:
        logger.warning(
            "export: no class of transformers has the form of the result: it loads with trust_remote_code=True, from the file "
            "%s next to the weights",
            FILE,
        )
    write_json(work.metric("export"), round_floats({**counts, **figures}))
    logger.info(
        "export: %s, %.1f M of %.1f M parameters; state %s equals the unfused computation to %.1e, logits to %.1e",
        work.model, counts["parameters"] / 1e6, counts["parameters_dense"] / 1e6,
        "at the cut" if edits.removed_layers else "after the last layer",
        figures["hidden_error_max"], figures["logits_error"],
    )  # fmt: skip


STAGE = Stage(
    name="export",
    run=export,
    params=SETTINGS,
    reads=(
        Workspace.model_input, Workspace.tokenizer_input, Workspace.card_input, Workspace.dataset_input,
        Workspace.heal_dataset_input, Workspace.documents, Workspace.edits, Workspace.model_versions,
    ),
    writes=Workspace.model,
    metrics=("export",),
    figures=("solve", "heal", "check"),
    methods=METHODS,
)  # fmt: skip
