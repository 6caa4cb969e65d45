"""Tiny random models and texts, made in code: no test needs a network, a GPU or a downloaded weight."""

import gc
import os
import random
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from replaceme.base.documents import Documents
from replaceme.base.parameters import Params, read_params
from replaceme.methods.registry import METHODS
from replaceme.models.families import FAMILIES, Family, family_of
from replaceme.models.model import Model
from replaceme.report.pictures import Picture
from replaceme.report.theme import LIGHT

# Models this small are read sooner than by a thread for each of their tensors.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
# A picture of one pixel.
DOT = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
VOCABULARY = "the a river mountain of runs near old town and people walk to market where bread fish wine are sold every day"
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "falcon": {"ffn_hidden_size": 48, "bias": True, "new_decoder_architecture": False, "multi_query": True},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {"n_inner": 48, "rotary_dim": 4},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2, "mlp_only_layers": [3],
    },
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "smollm3": {"use_sliding_window": True, "sliding_window": 8},
}  # fmt: skip
# Other forms of a family: its model_type, and what differs.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}),
    "falcon_sequential": ("falcon", {"parallel_attn": False, "alibi": True, "multi_query": False}),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
}
KINDS = [*FAMILY_CONFIGS, *FORMS]
WIDTH, LAYERS = 32, 6
# The tokens of a continuation.
WRITTEN = 8
# Files and rooms whose tests take longest.
LONG = ("test_pipeline.py", "pipeline", "golden", "training")
# Families without a description that are recognised by their structure, and their options.
_RECOGNISED: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0, "layer_norm_eps": 1e-5},
    "cohere2": {"sliding_window": 8, "layer_types": ["full_attention", *["sliding_attention"] * (LAYERS - 1)]},
    "gemma": {"head_dim": 8},
    "olmo": {},
    "stablelm": {"use_parallel_residual": False},
    "starcoder2": {"use_bias": True},
}
UNDESCRIBED = {kind: options for kind, options in _RECOGNISED.items() if kind not in FAMILIES}
# A family with each of the obstacles.
OBSTACLES = {"norm": Family(norm_offset=0.0), "experts": Family(experts=("experts",)), "undescribed": Family(detected=True)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first: one that begins last would keep the other cores waiting."""
    items.sort(key=lambda item: [place not in item.path.parts for place in LONG])


def pytest_collection_finish() -> None:
    """Spare the garbage collector, which stages call, the million objects of the libraries that are loaded by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Models this small are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture
def checkpoint_at_each_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is due whenever one can be written."""
    monkeypatch.setattr("replaceme.base.checkpoints.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("replaceme.base.checkpoints.SAVING_SHARE", 0)


@pytest.fixture(autouse=True, scope="session")
def _less_to_write() -> Iterator[None]:
    """Leave out what takes a good part of a small run: most of the text after the report's prompts, and the text of each config
    that transformers loads, which it makes for a log that nobody reads.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replaceme.evaluation.continuations.MAX_TOKENS", WRITTEN)
        patch.setattr("transformers.PreTrainedConfig.__repr__", object.__repr__)
        yield


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


def made_config(family: str = "llama", layers: int = LAYERS, **config: Any) -> Any:
    """Return the config of a tiny model of a family."""
    family, form = FORMS.get(family, (family, {}))
    options = {
        "vocab_size": 400, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": True,
    }  # fmt: skip
    return AutoConfig.for_model(family, **{**options, **FAMILY_CONFIGS.get(family, {}), **form, **config})


# PLAIN: the last linears can be solved for anew, since neither a norm nor experts follow them.
DESCRIBED = {kind: family_of(made_config(kind)) for kind in KINDS}
NORM_AFTER_MLP = [kind for kind, family in DESCRIBED.items() if family.norm_after_mlp]
EXPERTS = [kind for kind, family in DESCRIBED.items() if family.experts]
PLAIN = [kind for kind in KINDS if kind not in NORM_AFTER_MLP + EXPERTS]
# A family of each form that the code tells apart: sequential and parallel layers, norms with and without a mean, Conv1D, gate
# and up in one linear, an MLP without a module of its own, a scaled residual stream, a norm after the MLP, experts.
REPRESENTATIVES = ["llama", "gpt2", "phi", "phi3", "opt", "granite", "falcon", "gemma2", "olmo2", "mixtral"]
PLAIN_REPRESENTATIVES = [kind for kind in REPRESENTATIVES if kind in PLAIN]


def made_model(family: str = "llama", dtype: torch.dtype = torch.float32, layers: int = LAYERS, **config: Any) -> Any:
    """Return a random causal language model of a family."""
    torch.manual_seed(0)
    made = made_config(family, layers, **config)
    # The faster form of experts knows no float64.
    forms = {"experts_implementation": "eager"} if "num_experts_per_tok" in made.to_dict() else {}
    model = AutoModelForCausalLM.from_config(made, **forms).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, a bias is zero and a norm's weight the same everywhere, which would hide that they are left out.
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


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
     methods=METHODS)  # fmt: skip


def draw_dot(draw: Callable[..., Any], *arguments: Any) -> Picture | None:
    """Return a dot for a picture that has something to show: it is composed for one theme, and not drawn."""
    return Picture(DOT, DOT, (1, 1)) if draw(*arguments, LIGHT) else None


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make each picture a dot: drawing takes half of a small run. The report's tests draw them."""
    if request.path.parent.name != "report":
        monkeypatch.setattr("replaceme.report.pictures._draw_themes", draw_dot)
