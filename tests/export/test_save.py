"""The exported folder: it loads everywhere, and keeps the original's dtype, embeddings, tokenizer and other files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from replaceme.export import save as export
from replaceme.export.save import save_pruned
from replaceme.models.checks import check_weights
from replaceme.models.model import Model
from tests.conftest import LAYERS
from tests.helpers import edits_for, load_tensors

CHAT = [{"role": "user", "content": "where is the river"}]


def copied(source: Model, folder: Path) -> Model:
    return Model(Path(shutil.copytree(source.folder, folder)), source.name)


def test_the_pipeline_generates_from_text_and_chats(tiny: Model, tmp_path: Path) -> None:
    save_pruned(tiny, edits_for(2, 2), tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    assert generate("the river", max_new_tokens=4)[0]["generated_text"].startswith("the river")
    (*asked, answer) = generate(CHAT, max_new_tokens=4)[0]["generated_text"]
    assert asked == CHAT
    assert answer["role"] == "assistant"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_embeddings_are_unchanged(
    save_tiny: Callable[..., Model], tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    source = save_tiny(dtype=dtype, tie_word_embeddings=tied)
    save_pruned(source, edits_for(2, 2), tmp_path)
    assert {weight.dtype for weight in load_tensors(tmp_path).values()} == {dtype}
    assert ("lm_head.weight" in load_tensors(tmp_path)) != tied
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    original = source.load()
    for name in ("lm_head", "model.embed_tokens"):
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)


def test_tokenizer_chat_template_generation_config_and_licence_are_copied_byte_for_byte(tiny: Model, tmp_path: Path) -> None:
    source, result = copied(tiny, tmp_path / "source"), tmp_path / "result"
    # transformers would refuse to save such a generation config, or write it differently.
    config = '{"temperature": 0.7,\n "do_sample": false, "eos_token_id": [1, 5], "pad_token_id": 1}'
    made = {
        "generation_config.json": config,
        "LICENSE": "yours",
        "LICENSE.md": "yours",
        "NOTICE": "ours",
        "README.md": "card",
        "notes": "mine",
    }
    own = (source.folder / "tokenizer_config.json").read_text(encoding="utf-8")
    made["tokenizer_config.json"] = own.replace("TokenizersBackend", "PreTrainedTokenizerFast")
    for name, content in made.items():
        (source.folder / name).write_text(content, encoding="utf-8")
    save_pruned(source, edits_for(2, 2), result)
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    kept |= {"LICENSE", "LICENSE.md", "NOTICE", "README.md"}
    assert {path.name for path in result.iterdir()} == {*kept, "config.json", "model.safetensors"}
    for name in kept:
        assert (result / name).read_bytes() == (source.folder / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(result).generation_config.eos_token_id == [1, 5]
    ours, theirs = (AutoTokenizer.from_pretrained(each).apply_chat_template(CHAT) for each in (result, source.folder))
    assert ours == theirs


def test_a_sharded_model_is_saved_in_shards_with_the_weights_of_a_whole_one(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pruned(tiny, edits_for(2, 2), tmp_path / "whole")
    source = copied(tiny, tmp_path / "source")
    (source.folder / "model.safetensors").unlink()
    tiny.load().save_pretrained(source.folder, max_shard_size="50KB")
    monkeypatch.setattr(export, "SHARD_SIZE", "50KB")
    save_pruned(source, edits_for(2, 2), tmp_path / "sharded")
    for folder in (source.folder, tmp_path / "sharded"):
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        shards = {path.name for path in folder.glob("*.safetensors")}
        assert len(shards) > 2
        assert shards == set(index["weight_map"].values())
        check_weights(Model(folder, "sharded"))
    whole, sharded = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "sharded"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert Model(tmp_path / "sharded", "pruned").config().num_hidden_layers == LAYERS - 2
