"""Finding a model: its revision, the files that are downloaded, and folders that are refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from replaceme.base.errors import ModelError
from replaceme.base.parameters import read_params
from replaceme.models import hub
from replaceme.models.checks import check_weights
from replaceme.models.find import find_model
from replaceme.models.model import Model
from tests.helpers import TEXT


def find(**options: Any) -> Model:
    return find_model(read_params(None, options))


@pytest.mark.parametrize(("revision", "kind"), [(None, "llama"), ("v2", "qwen3"), ("2" * 40, "qwen3")])
def test_the_named_revision_is_loaded(
    revision: str | None, kind: str, save_tiny: Callable[..., Model], put_into_hub_cache: Callable[..., Path]
) -> None:
    put_into_hub_cache(save_tiny("llama").folder, "main", "1" * 40)
    put_into_hub_cache(save_tiny("qwen3").folder, "v2", "2" * 40)
    model = find(model_path="owner/name", revision=revision)
    assert (model.name, model.commit) == ("owner/name", ("2" if revision else "1") * 40)
    with torch.inference_mode():
        assert torch.equal(model.load()(TEXT).logits, save_tiny(kind).load()(TEXT).logits)


def test_a_missing_revision_is_refused(tiny: Model, put_into_hub_cache: Callable[..., Path]) -> None:
    put_into_hub_cache(tiny.folder)
    with pytest.raises(ModelError, match="model_path: owner/name is no local path, and the hub can't be reached"):
        find(model_path="owner/name", revision="v3")


def test_the_files_of_the_model_alone_are_downloaded(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = ["config.json", "model.safetensors", "tokenization_own.py", "vocab.bpe", "tekken.json", "LICENSE"]
    left = ["consolidated.safetensors", "sub/tekken.json", "pytorch_model.bin", "picture.png"]
    asked: list[str] = []

    def snapshot(name: str, commit: str, patterns: tuple[str, ...], ignored: tuple[str, ...]) -> Path:
        asked.extend(filter_repo_objects([*taken, *left], allow_patterns=[*patterns], ignore_patterns=[*ignored]))
        return tiny.folder

    monkeypatch.setattr(hub, "resolve_commit", lambda *_: "1" * 40)
    monkeypatch.setattr(hub, "snapshot", snapshot)
    find(model_path="owner/name")
    assert asked == taken


REMOTE = {"config.json": {"AutoConfig": "other/code--configuration_x.X"}, "tokenizer_config.json": ["other/code--t.Slow", None]}


@pytest.mark.parametrize(("name", "cached", "trusted"), [("config.json", True, False), ("tokenizer_config.json", False, True)])
def test_code_of_another_repository_is_refused(
    name: str, cached: bool, trusted: bool, tiny: Model, put_into_hub_cache: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "dense"))
    config = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**config, "auto_map": REMOTE[name]}), encoding="utf-8")
    if cached:
        put_into_hub_cache(folder)
    with pytest.raises(ModelError, match=rf"model_path: auto_map in {name} of \S+ names code of another repository \(other/"):
        find(model_path="owner/name" if cached else str(folder), trust_remote_code=trusted)


def test_a_mistyped_path_and_a_file_are_refused(tiny: Model) -> None:
    with pytest.raises(ModelError, match=r"model_path: there is no folder ~nobody-here/model; give a model folder"):
        find(model_path="~nobody-here/model")
    with pytest.raises(ModelError, match=r"model_path: \S+config.json is a file; give the model's folder\."):
        find(model_path=str(tiny.folder / "config.json"))


@pytest.mark.parametrize("index", ["", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_of_weights_that_is_none_is_named(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ModelError, match=r"model_path: model\.safetensors\.index\.json of mine can't be read"):
        check_weights(Model(tmp_path, "mine"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"model_path: mine lacks model-00001-of-00002.safetensors, which model.safetensors.i"):
        check_weights(Model(tmp_path, "mine"))


@pytest.mark.parametrize("config", ["", "[]", "3", "\0"])
def test_a_config_that_is_none_is_named(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ModelError, match=r"model_path: the config\.json of mine can't be read"):
        Model(tmp_path, "mine").config()
