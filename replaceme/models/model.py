"""A model folder: its files, and loading its config, tokenizer, weights and the description of its family."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from replaceme.base.errors import ModelError, excerpt, resource_failure
from replaceme.models.families import FAMILIES, Family, family_of
from replaceme.models.own_form import KIND, own_classes
from replaceme.models.recognition import proposed_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors",)
WEIGHT_FILES = (*WEIGHTS, "*.safetensors.index.json", "config.json", "*.py")
CARD = "README.md"
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*",
    "chat_template*", "generation_config.json",
)  # fmt: skip
CARD_FILES = (CARD, "LICENSE*", "NOTICE*")
# Copied unchanged into the pruned model's folder, except the card: only its licence is kept.
COPIED_FILES = (*TOKENIZER_FILES, *CARD_FILES)
# Some repositories hold the weights a second time, in their author's own format.
LEFT_OUT = "consolidated*"
# Up to this size of the stored weights, comparisons run in float32.
FLOAT32_BYTES = 8 << 30


@dataclass(frozen=True)
class Model:
    """A model's files.

    Attributes:
        folder: local folder with config, safetensors and tokenizer.
        name: its name in cards and messages: a hub id, an embedded name or the folder's own name.
        commit: the hub commit in the folder; None for local and embedded models.
        trust_remote_code: whether code from the folder may run; our own form (``replaceme.models.own_form``) loads without.
    """

    folder: Path
    name: str
    commit: str | None = None
    trust_remote_code: bool = False

    def classes(self) -> tuple[Any, Any]:
        """Return the classes that load the config and the model."""
        own = None if self.trust_remote_code else own_classes(self.folder)
        return own or (AutoConfig, AutoModelForCausalLM)

    def config(self) -> Any:
        """Return the model's configuration."""
        try:
            return self.classes()[0].from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as failure:  # configs raise errors of many kinds
            raise ModelError(f"model_path: the config.json of {self.name} can't be read ({_reason(failure)}).") from failure

    def family(self) -> Family:
        """Return the description of the model's family. Raises ModelError when the model can't be pruned."""
        config = self.config()
        quantized = getattr(config, "quantization_config", None)
        if quantized:
            kind = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else type(quantized).__name__
            raise ModelError(
                f"model_path: the weights of {self.name} are quantized ({kind}); prune the original ones, with use_4bit: true "
                "if memory is short."
            )
        if config.model_type.startswith(KIND):
            raise ModelError(
                f"model_path: {self.name} was pruned into a form of its own; prune the model that it was made from."
            )
        if config.model_type in FAMILIES:
            return family_of(config)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model_path: {self.name} is an encoder-decoder ('{config.model_type}'), not a causal language model."
            )
        return proposed_family(self.skeleton(config))

    def skeleton(self, config: Any) -> Any:
        """Build the model on the meta device, without memory for its weights. Raises ModelError when it can't be built."""
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        except Exception as failure:  # models raise errors of many kinds
            raise ModelError(
                f"model_path: '{config.model_type}' is no causal language model that can be built here ({_reason(failure)})."
            ) from failure

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as failure:  # tokenizers too
            raise ModelError(f"model_path: the tokenizer of {self.name} can't be read ({_reason(failure)}).") from failure

    def load(
        self, dtype: str = "auto", device: str = "cpu", use_4bit: bool = False, device_map: str | None = None
    ) -> PreTrainedModel:
        """Load the weights, ready for inference.

        Args:
            dtype: a torch dtype's name, or auto for the stored one.
            device: where the weights go.
            use_4bit: quantize linears to NF4 while loading (bitsandbytes); never for weights that are exported.
            device_map: how accelerate places the weights, which must not be moved afterwards; None puts all on ``device``.

        Raises:
            ModelError: the files can't be read, lack a weight, or 4-bit linears don't work here.
            ResourceError: memory ran out or the disk is full.
        """
        options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        if use_4bit or device_map:
            options["device_map"] = device_map or {"": device}
        if use_4bit:
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        try:
            model, report = self.classes()[1].from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code, use_safetensors=True, output_loading_info=True, **options
            )
            if use_4bit:
                _try_4bit(model)
        except Exception as failure:
            if known := resource_failure(failure):
                raise known from failure
            key = "use_4bit" if use_4bit else "device_map" if device_map else "model_path"
            advice = "; use false" if use_4bit else "; use null" if device_map else ""
            raise ModelError(f"{key}: {self.name} could not be loaded ({_reason(failure)}){advice}.") from failure
        # transformers fills weights that a checkpoint lacks with random numbers.
        lacking = sorted(report["missing_keys"]) + sorted(str(entry[0]) for entry in report["mismatched_keys"])
        if lacking:
            raise ModelError(
                f"model_path: {lacking[0]} ({len(lacking)} in all) is missing from the weights of {self.name}, "
                "or has another shape than its config.json says."
            )
        return (model if "device_map" in options else model.to(device)).eval()

    def files(self, patterns: Iterable[str] = (*WEIGHT_FILES, *COPIED_FILES)) -> list[Path]:
        """Return the files of the folder that match any of ``patterns``, sorted."""
        return sorted(
            {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file() and not path.match(LEFT_OUT)}
        )


def layer_count(model: Model) -> int:
    """Return the number of decoder layers."""
    return int(model.config().num_hidden_layers)


def parameter_count(model: Any) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def stored_dtype(model: Model) -> torch.dtype:
    """Return the dtype of the stored weights: the first floating-point one, since old files also hold byte masks."""
    with safe_open(model.files(WEIGHTS)[0], "pt") as weights:
        return next(tensor.dtype for name in weights.keys() if (tensor := weights.get_tensor(name)).is_floating_point())  # noqa: SIM118


def working_dtype(model: Model) -> str:
    """Return the dtype for comparisons: float32, or the stored one if it is float64 or the weights exceed ``FLOAT32_BYTES``."""
    stored, size = stored_dtype(model), sum(path.stat().st_size for path in model.files(WEIGHTS))
    return str(stored).removeprefix("torch.") if stored == torch.float64 or size > FLOAT32_BYTES else "float32"


def _try_4bit(model: Any) -> None:
    """Run one 4-bit linear: only this shows whether it works on this device and in this dtype."""
    linear = next((module for module in model.modules() if type(module).__name__ == "Linear4bit"), None)
    if linear is not None:
        linear(torch.zeros(1, linear.in_features, dtype=model.dtype, device=linear.weight.device))


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {excerpt(failure, 150)}"
