"""Load a model from its folder: config, tokenizer, weights, and the description of its family.

transformers loads the weights, in the dtype that most of them are stored in or in another. What it would do in silence is
refused here: fill a missing weight with random numbers, round a weight that is stored wider, compute with NaN.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from replaceme.base.errors import ModelError, ParameterError, excerpt, resource_failure
from replaceme.models.dtypes import FORMATS, dtype_name, is_finite, stored_dtype
from replaceme.models.families import FAMILIES, Family, family_of
from replaceme.models.model_files import GENERATION_CONFIG, ModelFiles, StoredTensor
from replaceme.models.own_form import KIND, own_classes
from replaceme.models.recognition import recognise_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_LIMIT = 1 << 30


class _Placeholder:
    """A tensor that stays in its file while transformers loads a model: the parameter stays on the meta device."""

    def __init__(self, shape: Sequence[int]):
        self.shape = shape

    def __getitem__(self, _: Any) -> _Placeholder:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Model(ModelFiles):
    """A model in a folder: loads its config, its tokenizer, its weights and the description of its family.

    Attributes:
        folder: local folder with config, safetensors and tokenizer.
        name: its name in cards and messages: a hub id, an embedded name or the folder's own name.
        commit: the hub commit in the folder; None for local and embedded models.
        disclosure: what is to be said of it wherever it is named; empty for a model that is what its name says.
        trust_remote_code: whether code from the folder may run; our own form (``replaceme.models.own_form``) loads without.
    """

    name: str
    commit: str | None = None
    trust_remote_code: bool = False
    disclosure: str = ""

    def classes(self) -> tuple[Any, Any]:
        """Return the classes that load the config and the model."""
        own = None if self.trust_remote_code else own_classes(self.folder)
        return own or (AutoConfig, AutoModelForCausalLM)

    def config(self) -> Any:
        """Return the model's configuration. Raises ModelError when it can't be read."""
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
        return recognise_family(self.skeleton(config))

    def skeleton(self, config: Any) -> Any:
        """Build the model on the meta device, without memory for its weights. Raises ModelError when it can't be built."""
        try:
            kind = self.classes()[1]
            with torch.device("meta"):
                if kind is not AutoModelForCausalLM:
                    return kind(config)
                return kind.from_config(config, trust_remote_code=self.trust_remote_code)
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
        self,
        dtype: str = "auto",
        device: str = "cpu",
        use_4bit: bool = False,
        device_map: str | None = None,
        config: dict[str, Any] | None = None,
        left_out: Collection[str] = (),
        check: bool = True,
    ) -> PreTrainedModel:
        """Load the weights, ready for inference.

        Args:
            dtype: a torch dtype's name, or auto for the one that most weights are stored in.
            device: where the weights go.
            use_4bit: quantize linears to NF4 while loading (bitsandbytes); never for weights that are exported.
            device_map: how accelerate places the weights, which must not be moved afterwards; None puts all on ``device``.
            config: entries of the config to change.
            left_out: names of tensors in the files that stay there; their parameters are on the meta device.
            check: whether weights that are not finite are refused.

        Raises:
            ModelError: the files can't be read, lack a weight, hold one that is not finite, or 4-bit linears don't work here.
            ParameterError: a weight is too large for ``dtype``.
            ResourceError: memory ran out or the disk is full.
        """
        options: dict[str, Any] = self._options_for_part(config or {}, left_out) if left_out else dict(config or {})
        if use_4bit or device_map:
            options["device_map"] = device_map or {"": device}
        if use_4bit:
            options["quantization_config"] = _nf4_config()
        try:
            # Not transformers' own auto: it takes the config's word, and would round weights that are stored wider.
            options["dtype"] = stored_dtype(self) if dtype == "auto" else getattr(torch, dtype)
            kind, folder = (type(self.skeleton(options["config"])), None) if left_out else (self.classes()[1], self.folder)
            model, report = kind.from_pretrained(
                folder,
                trust_remote_code=self.trust_remote_code,
                use_safetensors=True,
                # Code of a hub, which transformers 5.25 runs on a GPU where nothing says otherwise.
                use_kernels=False,
                output_loading_info=True,
                **options,
            )
            if left_out and (self.folder / GENERATION_CONFIG).is_file():
                model.generation_config = GenerationConfig.from_pretrained(self.folder)
            if use_4bit:
                _try_4bit(model)
        except ModelError:
            raise
        except Exception as failure:  # transformers, accelerate and bitsandbytes raise errors of many kinds
            key = "use_4bit" if use_4bit else "device_map" if device_map else "model_path"
            advice = "; use false" if use_4bit else "; use null" if device_map else ""
            error = ModelError(f"{key}: {self.name} could not be loaded ({_reason(failure)}){advice}.")
            raise resource_failure(failure) or error from failure
        self._check_complete(report)
        # A streamed model's layers can't be moved, and it is loaded on the processor.
        model = (model if "device_map" in options or device == "cpu" else model.to(device)).eval()
        # Quantized or offloaded weights don't show it.
        if check and (use_4bit or device_map or not is_finite(*model.parameters())):
            self.check_finite(dtype_name(model.dtype))
        return model

    def load_stored(self, left_out: Collection[str] = ()) -> PreTrainedModel:
        """Load each weight in the dtype that it is stored in: to change, compare or save the model, not to run it.

        Args:
            left_out: as of ``load``.

        Raises:
            ModelError: as ``load``, or transformers converts a weight that is stored in another dtype than most.
        """
        model, stored = self.load(left_out=left_out, check=False), self.stored
        names, held = self.match_names(model, stored), model.state_dict()
        for name, own in names.items():
            format = FORMATS.get(stored[own].format)
            if format and held[name].dtype not in (format, torch.bool):
                path, _, leaf = name.rpartition(".")
                getattr(model.get_submodule(path), leaf).data = (
                    torch.empty(stored[own].shape, dtype=format, device="meta") if own in left_out else stored[own].read(own)
                )
        return model

    def match_names(self, model: Any, stored: dict[str, StoredTensor]) -> dict[str, str]:
        """Return which tensors transformers loads without a conversion: name in the model → name in the files.

        Args:
            model: the model or its skeleton.
            stored: the tensors in the files.

        Raises:
            ModelError: transformers converts a weight that is stored in another dtype than most, and would round or widen it.
        """
        in_model, prefix, names = model.state_dict().keys(), f"{model.base_model_prefix}.", {}
        for in_files in stored:
            candidates = (in_files, prefix + in_files, in_files.removeprefix(prefix))
            if name := next((name for name in candidates if name in in_model), None):
                names[name] = in_files
        if {name for name, _ in model.named_parameters()} <= names.keys():
            return names
        # Older files hold tensors that no model loads any more.
        unused = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), "inv_freq"]))
        usual = stored_dtype(self)
        for in_files in sorted(stored.keys() - names.values()):
            dtype = FORMATS.get(stored[in_files].format, usual)
            if dtype != usual and not unused.search(in_files):
                raise ModelError(
                    f"model_path: {in_files} of {self.name} is stored in {dtype_name(dtype)}, most weights in "
                    f"{dtype_name(usual)}, and transformers converts it while loading; store all weights in one of the two."
                )
        return names

    def _options_for_part(self, entries: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
        """Return transformers' options to load a model from tensors instead of a folder, some of which stay in their files."""
        config = self.config()
        for name, value in entries.items():
            setattr(config, name, value)
        tensors = {
            name: _Placeholder(tensor.shape) if name in left_out else tensor.read(name) for name, tensor in self.stored.items()
        }
        return {"config": config, "state_dict": tensors}

    def _check_complete(self, report: dict[str, Any]) -> None:
        """Raise ModelError if transformers' report names a weight that the files lack; such are filled with random numbers."""
        missing = sorted(report["missing_keys"]) + sorted(str(entry[0]) for entry in report["mismatched_keys"])
        if missing:
            raise ModelError(
                f"model_path: {missing[0]} ({len(missing)} in all) is missing from the weights of {self.name}, "
                "or has another shape than its config.json says."
            )

    def check_finite(self, dtype: str) -> None:
        """Raise the error for the first weight that holds NaN or infinity, in the files or after a cast to ``dtype``."""
        overflowing = None
        for name, stored in self.stored.items():
            tensor = stored.read(name)
            if not is_finite(tensor):
                raise ModelError(
                    f"model_path: the weight {name} in {stored.file.name} of {self.name} holds NaN or infinity; give a model "
                    "whose weights are finite."
                )
            if overflowing is None and tensor.is_floating_point() and not is_finite(tensor.to(getattr(torch, dtype))):
                overflowing = name
        if overflowing:
            raise ParameterError(
                f"dtype: the weight {overflowing} of {self.name} overflows in {dtype}; use bfloat16 or float32."
            )


def positions_of(config: Any) -> int:
    """Return the largest number of tokens that a model takes; ``NO_LIMIT`` if its config doesn't say."""
    return int(getattr(config, "max_position_embeddings", 0) or NO_LIMIT)


def layer_count(model: Model) -> int:
    """Return the number of decoder layers."""
    return int(model.config().num_hidden_layers)


def parameter_count(model: Any) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def embedding_count(model: Any) -> int:
    """Return the number of parameters of the embedding and of an untied head; they don't shrink with the layers."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(module.weight): module.weight.numel() for module in modules if module is not None}
    return sum(weights.values())


def _nf4_config() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _try_4bit(model: Any) -> None:
    """Run one 4-bit linear: only this shows whether it works on this device and in this dtype."""
    linear = next((module for module in model.modules() if type(module).__name__ == "Linear4bit"), None)
    if linear is not None:
        linear(torch.zeros(1, linear.in_features, dtype=model.dtype, device=linear.weight.device))


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {excerpt(failure, 150)}"
