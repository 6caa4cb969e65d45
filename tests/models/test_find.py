"""Model folders that can't be used are refused in one sentence, whatever their files hold."""

import os
from pathlib import Path

import pytest

from replaceme.base.errors import ModelError
from replaceme.base.parameters import read_params
from replaceme.models.find import check_weights, find_model
from replaceme.models.model import Model

DEEP = "[" * 100_000


@pytest.mark.parametrize("index", [DEEP, "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}'])
def test_an_index_of_weights_that_is_none_is_named(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ModelError, match=r"model_path: model\.safetensors\.index\.json of mine can't be read"):
        check_weights(Model(tmp_path, "mine"))


def test_a_shard_with_a_long_name_is_cut(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{"x" * 200}"}}}}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"model_path: mine lacks x+ … x+, which model"):
        check_weights(Model(tmp_path, "mine"))


@pytest.mark.parametrize("config", [DEEP, '{"model_type": ' + DEEP + "]" * 100_000 + "}", "[]", "3", "\0"])
def test_a_config_that_is_none_is_named(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ModelError, match=r"model_path: the config\.json of mine can't be read") as caught:
        Model(tmp_path, "mine").config()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["~nobody-here/model", "../../etc/passwd-of-nobody", "[1]*", "a::b", "x" * 200])
def test_a_path_is_taken_literally(name: str) -> None:
    with pytest.raises(ModelError, match="model_path: "):
        find_model(read_params(None, {"model_path": name}))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_folder_with_a_pipe_is_refused_without_waiting(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=rf"model_path: {name} of \S+ is no regular file; put the file itself there\."):
        find_model(read_params(None, {"model_path": str(tmp_path)}))
