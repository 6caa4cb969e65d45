"""A model folder: its files, and loading its config, tokenizer, weights and the description of its family."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from replaceme.base.errors import ModelError, ParameterError, excerpt, resource_failure
from replaceme.base.files import read_json
from replaceme.models.families import FAMILIES, Family, family_of
from replaceme.models.own_form import KIND, own_classes
from replaceme.models.recognition import proposed_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors",)
ADAPTER = "adapter_config.json"
WEIGHT_FILES = (*WEIGHTS, "*.safetensors.index.json", "config.json", ADAPTER, "*.py")
CARD = "README.md"
# One of these is in every model's folder. The names are those of transformers' tokenizers, and of remote code's.
VOCABULARIES = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "*.bpe", "tekken.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    *VOCABULARIES, "merges*", "encoder.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    GENERATION_CONFIG,
)  # fmt: skip
CARD_FILES = (CARD, "LICENSE*", "NOTICE*")
COPIED_FILES = (*TOKENIZER_FILES, *CARD_FILES)
# What a pruned model was calibrated on (``replaceme.corpora.sources``).
TEXT_RECORD = "calibration_text.json"
ALL_FILES = (*WEIGHT_FILES, *COPIED_FILES, TEXT_RECORD)
RELATIVE_IMPORT = re.compile(r"(?m)^\s*(?:from|import)\s+\.(\w+)")
# Some repositories hold the weights a second time, in their author's own format.
LEFT_OUT = "consolidated*"
# Up to this size of the stored weights, comparisons run in float32.
FLOAT32_BYTES = 8 << 30
# The formats that weights can be computed in, by their names in safetensors.
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NO_LIMIT = 1 << 30
_LAYER_COUNT = re.compile(r"(num_(hidden_|decoder_)?|n_)layers?")
_SIZE = re.compile(r"num_(attention_|key_value_)?heads|n_head|hidden_size|n_embd|vocab_size|n_positions")


@dataclass(frozen=True)
class Stored:
    """A tensor in a weight file: the file, the dtype by its name in safetensors, and the shape."""

    file: Path
    format: str
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def read(self, name: str) -> Tensor:
        """Return the tensor, whose name in the file is ``name``. It is mapped: what is used of it is read then."""
        with safe_open(self.file, "pt") as weights:
            return weights.get_tensor(name)


class _Placeholder:
    """A tensor that stays in its file while transformers loads a model: the parameter stays on the meta device."""

    def __init__(self, shape: Sequence[int]):
        self.shape = shape

    def __getitem__(self, _: Any) -> _Placeholder:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Model:
    """A model's files.

    Attributes:
        folder: local folder with config, safetensors and tokenizer.
        name: its name in cards and messages: a hub id, an embedded name or the folder's own name.
        commit: the hub commit in the folder; None for local and embedded models.
        about: what is to be said of it wherever it is named; empty for a model that is what its name says.
        trust_remote_code: whether code from the folder may run; our own form (``replaceme.models.own_form``) loads without.
    """

    folder: Path
    name: str
    commit: str | None = None
    trust_remote_code: bool = False
    about: str = ""

    def classes(self) -> tuple[Any, Any]:
        """Return the classes that load the config and the model."""
        own = None if self.trust_remote_code else own_classes(self.folder)
        return own or (AutoConfig, AutoModelForCausalLM)

    def config(self) -> Any:
        """Return the model's configuration. Raises ModelError when it can't be read, or its sizes can't be true."""
        self._check_sizes()
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
    ) -> PreTrainedModel:
        """Load the weights, ready for inference.

        Args:
            dtype: a torch dtype's name, or auto for the one that most weights are stored in.
            device: where the weights go.
            use_4bit: quantize linears to NF4 while loading (bitsandbytes); never for weights that are exported.
            device_map: how accelerate places the weights, which must not be moved afterwards; None puts all on ``device``.
            config: entries of the config to change.
            left_out: names of tensors in the files that stay there; their parameters are on the meta device.

        Raises:
            ModelError: the files can't be read, lack a weight, hold one that is not finite, or 4-bit linears don't work here.
            ParameterError: a weight is too large for ``dtype``.
            ResourceError: memory ran out or the disk is full.
        """
        model = self._load(dtype, device, use_4bit, device_map, config, left_out)
        # Quantized or offloaded weights don't show it.
        if use_4bit or device_map or not all(map(is_finite, model.parameters())):
            self.check_finite(str(model.dtype).removeprefix("torch."))
        return model

    def load_stored(self, left_out: Collection[str] = ()) -> PreTrainedModel:
        """Load each weight in the dtype that it is stored in: to change, compare or save the model, not to run it.

        Args:
            left_out: as of ``load``.

        Raises:
            ModelError: as ``load``, or transformers converts a weight that is stored in another dtype than most.
        """
        model, stored = self._load("auto", left_out=left_out), self.stored()
        names, held = self.names_of(model, stored), model.state_dict()
        for name, own in names.items():
            format = FORMATS.get(stored[own].format)
            if format and held[name].dtype not in (format, torch.bool):
                path, _, leaf = name.rpartition(".")
                getattr(model.get_submodule(path), leaf).data = (
                    torch.empty(stored[own].shape, dtype=format, device="meta") if own in left_out else stored[own].read(own)
                )
        return model

    def names_of(self, model: Any, stored: dict[str, Stored]) -> dict[str, str]:
        """Return which tensors transformers loads without a conversion: name in the model → name in the files.

        Args:
            model: the model or its skeleton.
            stored: the tensors in the files.

        Raises:
            ModelError: transformers converts a weight that is stored in another dtype than most, and would round or widen it.
        """
        held, prefix, names = model.state_dict().keys(), f"{model.base_model_prefix}.", {}
        for own in stored:
            for name in (own, prefix + own, own.removeprefix(prefix)):
                if name in held:
                    names[name] = own
                    break
        if {name for name, _ in model.named_parameters()} <= names.keys():
            return names
        # Older files hold tensors that no model loads any more.
        left, usual = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), "inv_freq"])), stored_dtype(self)
        for own in sorted(stored.keys() - names.values()):
            if not left.search(own) and FORMATS.get(stored[own].format, usual) != usual:
                raise ModelError(
                    f"model_path: {own} of {self.name} is stored in {_words(FORMATS[stored[own].format])}, most weights in "
                    f"{_words(usual)}, and transformers converts it while loading; store all weights in one of the two."
                )
        return names

    def stored(self) -> dict[str, Stored]:
        """Return the tensors in the files that transformers loads, by name. Reads only headers."""
        found = {}
        for path in self._loaded_files():
            with safe_open(path, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    entry = weights.get_slice(name)
                    found[name] = Stored(path, entry.get_dtype(), tuple(entry.get_shape()))
        return found

    def _loaded_files(self) -> list[Path]:
        if (whole := self.folder / "model.safetensors").is_file():
            return [whole]
        for index in self.files(("model.safetensors.index.json",)):
            return sorted({self.folder / name for name in read_json(index)["weight_map"].values()})
        return self.files(WEIGHTS)

    def _load(
        self,
        dtype: str,
        device: str = "cpu",
        use_4bit: bool = False,
        device_map: str | None = None,
        config: dict[str, Any] | None = None,
        left_out: Collection[str] = (),
    ) -> PreTrainedModel:
        options: dict[str, Any] = self._options_for_part(config or {}, left_out) if left_out else dict(config or {})
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
            # Not transformers' own auto: it takes the config's word, and would round weights that are stored wider.
            options["dtype"] = stored_dtype(self) if dtype == "auto" else getattr(torch, dtype)
            kind, folder = (type(self.skeleton(options["config"])), None) if left_out else (self.classes()[1], self.folder)
            model, report = kind.from_pretrained(
                folder, trust_remote_code=self.trust_remote_code, use_safetensors=True, output_loading_info=True, **options
            )
            if left_out and (self.folder / GENERATION_CONFIG).is_file():
                model.generation_config = GenerationConfig.from_pretrained(self.folder)
            if use_4bit:
                _try_4bit(model)
        except ModelError:
            raise
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
        # A streamed model's layers can't be moved, and it is loaded on the processor.
        return (model if "device_map" in options or device == "cpu" else model.to(device)).eval()

    def _options_for_part(self, entries: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
        """Return transformers' options to load a model from tensors instead of a folder, some of which stay in their files."""
        config = self.config()
        for name, value in entries.items():
            setattr(config, name, value)
        tensors = {
            name: _Placeholder(place.shape) if name in left_out else place.read(name) for name, place in self.stored().items()
        }
        return {"config": config, "state_dict": tensors}

    def check_finite(self, dtype: str) -> None:
        """Raise the error for the first weight that holds NaN or infinity, in the files or after a cast to ``dtype``."""
        large = None
        for name, place in self.stored().items():
            tensor = place.read(name)
            if not is_finite(tensor):
                raise ModelError(
                    f"model_path: the weight {name} in {place.file.name} of {self.name} holds NaN or infinity; give a model "
                    "whose weights are finite."
                )
            if large is None and tensor.is_floating_point() and not is_finite(tensor.to(getattr(torch, dtype))):
                large = name
        if large:
            raise ParameterError(f"dtype: the weight {large} of {self.name} overflows in {dtype}; use bfloat16 or float32.")

    def _check_sizes(self) -> None:
        """Raise ModelError unless the config's number of layers is from 1 to that of stored tensors, and sizes are positive.

        It is checked before transformers reads the config, which makes lists of that many layers.
        """
        try:
            config, tensors = read_json(self.folder / "config.json"), len(self.stored())
        except Exception:  # the config and the weights have sentences of their own
            return
        for key, value in _numbers(config):
            most = tensors if _LAYER_COUNT.fullmatch(key) else math.inf if _SIZE.fullmatch(key) else None
            if most and not 1 <= value <= most:
                right = f"the number of layers that its {tensors} stored tensors make up" if most == tensors else "at least 1"
                raise ModelError(f"model_path: the config.json of {self.name} says {key}: {value}; it must be {right}.")

    def files(self, patterns: Iterable[str] = ALL_FILES) -> list[Path]:
        """Return the files of the folder that match any of ``patterns``, sorted."""
        return sorted(
            {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file() and not path.match(LEFT_OUT)}
        )

    def tokenizer_files(self) -> list[Path]:
        """Return the files of the tokenizer, sorted: with the code that its config names, and what that code imports."""
        code: set[Path] = set()
        modules = [each.split(".")[0] for each in self.code_references(TOKENIZER_CONFIG)]
        while modules:
            path = self.folder / f"{modules.pop()}.py"
            if path.parent == self.folder and path.is_file() and path not in code:
                code.add(path)
                modules += RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
        return sorted({*self.files(TOKENIZER_FILES), *code})

    def copied_files(self) -> list[Path]:
        """Return the files that the pruned model's folder gets unchanged, sorted; of the card, only the licence is kept."""
        return sorted({*self.tokenizer_files(), *self.files(CARD_FILES)})

    def code_references(self, name: str) -> list[str]:
        """Return the classes that ``auto_map`` in a config file names: ``module.Class``, or ``repository--module.Class``."""
        try:
            found = [json.loads((self.folder / name).read_text(encoding="utf-8")).get("auto_map")]
        except (OSError, ValueError, AttributeError, RecursionError):  # whoever loads the file says what is wrong with it
            return []
        references = []
        while found:
            each = found.pop()
            if isinstance(each, str):
                references.append(each)
            elif isinstance(each, dict | list):
                found += each.values() if isinstance(each, dict) else each
        return references


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


def stored_dtype(model: Model) -> torch.dtype:
    """Return the dtype that most weights are stored in, by their entries. Raises ModelError when torch can't compute in it."""
    entries: Counter[str] = Counter()
    for place in model.stored().values():
        # Old files also hold byte masks.
        if "F" in place.format:
            entries[place.format] += place.entries
    ((usual, _),) = entries.most_common(1) or [("none", 0)]
    if usual not in FORMATS:
        raise ModelError(
            f"model_path: most weights of {model.name} are stored in {usual}; give one in bfloat16, float16 or float32."
        )
    return FORMATS[usual]


def working_dtype(model: Model) -> str:
    """Return the dtype for comparisons of whole models: ``computed_dtype``, or the stored one from ``FLOAT32_BYTES`` on."""
    size = sum(path.stat().st_size for path in model.files(WEIGHTS))
    return _words(stored_dtype(model)) if size > FLOAT32_BYTES else computed_dtype(model)


def computed_dtype(model: Model) -> str:
    """Return the dtype that comparisons compute in: float32, or float64 for weights that are stored so."""
    return "float64" if stored_dtype(model) == torch.float64 else "float32"


def proof_dtypes(model: Model) -> tuple[str, str]:
    """Return the dtypes in which a streamed model is compared: of what is outside the layers, as stored, and of the layers."""
    return _words(stored_dtype(model)), computed_dtype(model)


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity. Its least and largest entry tell, much faster than isfinite."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    return all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist()))


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers in a config, and in configs within it, by name."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield key, value


def _try_4bit(model: Any) -> None:
    """Run one 4-bit linear: only this shows whether it works on this device and in this dtype."""
    linear = next((module for module in model.modules() if type(module).__name__ == "Linear4bit"), None)
    if linear is not None:
        linear(torch.zeros(1, linear.in_features, dtype=model.dtype, device=linear.weight.device))


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {excerpt(failure, 150)}"
