"""Tiny random models and texts, made in code: no test needs a network, a GPU or a downloaded weight."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from replaceme.documents import Documents
from replaceme.models import Model
from replaceme.params import Params, read_params

VOCABULARY = "the a river mountain of runs near old town and people walk to market where bread fish wine are sold every day"
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"head_dim": 16},
}
WIDTH, LAYERS = 32, 6


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Models this small are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the remembered sums of test files out of the user's cache."""
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _online_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a test switches off for the whole process when it meets no hub."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def made_text(sentences: int, seed: int = 0) -> str:
    """Return prose of made-up sentences, in paragraphs."""
    chance = random.Random(seed)
    made = [" ".join(chance.choices(VOCABULARY.split(), k=chance.randint(6, 18))).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(made[start : start + 8]) for start in range(0, sentences, 8))


def made_tokenizer(bos: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on made-up text; with ``bos``, it starts each text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([made_text(50)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def made_model(family: str = "llama", dtype: torch.dtype = torch.float32, layers: int = LAYERS, **config: Any) -> Any:
    """Return a random causal language model of a family."""
    torch.manual_seed(0)
    options = {
        "vocab_size": 400, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": True,
    }  # fmt: skip
    made = AutoConfig.for_model(family, **{**options, **FAMILY_CONFIGS[family], **config})
    model = AutoModelForCausalLM.from_config(made).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero after initialisation, which would hide a bias left unfolded
                parameter.normal_(std=0.2)
    return model


def passing(model: Any, layer: int, documents: Documents) -> dict[str, np.ndarray]:
    """Return what passes in a layer, by plain hooks: all tokens, document by document without padding.

    ``input``; ``A`` and ``G``, which enter the linears that end attention and MLP; ``attention`` and ``M``, which these add;
    ``middle``, the state between them; ``output``. Each is (tokens, width) float64.
    """
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("input", "A", "attention", "G", "M", "output")}
    module = model.model.layers[layer]
    hooks = [
        module.register_forward_pre_hook(lambda _, args: kept["input"].append(args[0][0])),
        module.self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept["A"].append(args[0][0])),
        module.self_attn.register_forward_hook(lambda _m, _a, output: kept["attention"].append(output[0][0])),
        module.mlp.down_proj.register_forward_pre_hook(lambda _, args: kept["G"].append(args[0][0])),
        module.mlp.register_forward_hook(lambda _m, _a, output: kept["M"].append(output[0])),
        module.register_forward_hook(lambda _m, _a, output: kept["output"].append(output[0])),
    ]
    with torch.no_grad():
        for document in documents.documents:
            model(document[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    found = {name: torch.cat(parts).double().numpy() for name, parts in kept.items()}
    return found | {"middle": found["input"] + found["attention"]}


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """Return a function that saves a tiny model with its tokenizer, once for each set of arguments."""
    made: dict[str, Model] = {}

    def save(family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Model:
        key = f"{family}-{dtype}-{sorted(config.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / family
            made_model(family, dtype, **config).save_pretrained(folder)
            made_tokenizer().save_pretrained(folder)
            made[key] = Model(folder, family)
        return made[key]

    return save


@pytest.fixture(scope="session")
def tiny(save_tiny: Callable[..., Model]) -> Model:
    """A saved tiny Llama in float32."""
    return save_tiny()


@pytest.fixture
def documents() -> Documents:
    """Documents of different lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(1)
    return Documents([torch.randint(2, 400, (length,), generator=generator) for length in (40, 7, 23, 40, 31, 12, 18, 29, 3)])


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A .txt file of made-up prose."""
    path = tmp_path / "text.txt"
    path.write_text(made_text(600), encoding="utf-8")
    return path


@pytest.fixture
def params(tiny: Model, text_file: Path) -> Params:
    """A setting that prunes the tiny model on the text file."""
    return read_params(
        None,
        {
            "model_path": str(tiny.folder), "dataset": str(text_file), "dataset_size": 20, "max_length": 48, "dtype": "float32",
            "layers_to_skip": 2, "tasks": (str(text_file),), "eval_tokens": 600, "eval_dtype": "float32", "device": "cpu",
            "threads": 1,
        },
    )  # fmt: skip
