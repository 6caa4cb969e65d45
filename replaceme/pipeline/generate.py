"""generate: the dense model writes its own calibration text, where ``dataset`` names ``self``."""

from replaceme.base.files import new_folder, read_json, write_json
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.running.stage import Stage
from replaceme.running.workspace import Workspace


def generate(params: Params, work: Workspace) -> None:
    """Write the documents that the model wrote, and their number."""
    count = read_json(work.own_text_input)["documents"]
    with new_folder(work.own_text) as folder:
        # DVC does not track empty folders.
        write_json(folder / "count.json", {"documents": count})
        if not count:
            logger.info("generate: dataset has no text of the model's own")
            return
        # Torch takes seconds to load, and most runs need no such text.
        from replaceme.base.documents import Documents
        from replaceme.calibration.own_text import MAX_TOKENS, write_texts
        from replaceme.models.devices import use_processor
        from replaceme.models.find import recorded_model
        from replaceme.models.kv_cache import eager_attention_where_faster
        from replaceme.models.memory import load_within_budget

        use_processor(params.threads)
        tokenizer = recorded_model(params, work.tokenizer_input).tokenizer()
        source = recorded_model(params, work.model_input)
        model = load_within_budget(source, params, params.dtype, packed=params.use_4bit)
        with eager_attention_where_faster(model, source.family()):
            documents = Documents(write_texts(model, tokenizer, count, min(params.max_length, MAX_TOKENS), params.seed))
        documents.save(folder)
        logger.info("generate: the model wrote %d documents, %d tokens", len(documents), documents.token_count)


STAGE = Stage(
    name="generate",
    run=generate,
    params=("max_length", "seed", "dtype", "device", "device_map", "threads", "use_4bit", "trust_remote_code"),
    reads=(
        Workspace.model_input, Workspace.tokenizer_input, Workspace.own_text_input, Workspace.text_versions,
        Workspace.model_versions,
    ),
    writes=Workspace.own_text,
)  # fmt: skip
