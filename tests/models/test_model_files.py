"""Which files of a model's folder count: copied to the pruned model, and fingerprinted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from replaceme.base.files import read_json
from replaceme.base.parameters import Params, read_params
from replaceme.edits.edits import Edits
from replaceme.export.save import save_pruned
from replaceme.models.find import find_model
from replaceme.models.model import Model
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.running.workspace import Workspace

CODE = {
    "tokenization_own.py": "from transformers import PreTrainedTokenizerFast\nfrom .parts import DEPTH\n\n\n"
    "class OwnTokenizer(PreTrainedTokenizerFast):\n    depth = DEPTH\n",
    "parts.py": "from .deeper import DEPTH\n",
    "deeper.py": "DEPTH = 'deep'\n",
}
VOCABULARIES = ("tekken.json", "own.tiktoken", "spm.model", "own_vocab_v2.txt", "vocab.bpe", "merges.v2.txt")


@pytest.fixture
def folder(tiny: Model, tmp_path: Path) -> Path:
    """A model whose tokenizer has code and vocabularies of its own, beside code that is not the tokenizer's."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "dense"))
    for name in VOCABULARIES:
        (folder / name).write_text("words", encoding="utf-8")
    for name, text in {**CODE, "unrelated.py": "1 / 0\n"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoTokenizer": ["nowhere.Own", "tokenization_own.OwnTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_code_and_vocabularies_of_a_tokenizer_are_copied_to_the_pruned_model(folder: Path, tmp_path: Path) -> None:
    save_pruned(Model(folder, "coded", trust_remote_code=True), Edits("test", [2]), tmp_path / "pruned")
    for name in (*CODE, *VOCABULARIES):
        assert (tmp_path / "pruned" / name).read_bytes() == (folder / name).read_bytes(), name
    assert not (tmp_path / "pruned" / "unrelated.py").exists()
    shutil.rmtree(folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert (type(tokenizer).__name__, tokenizer.depth) == ("OwnTokenizer", "deep")


def test_another_content_of_a_tokenizers_file_is_noticed(folder: Path, params: Params, tmp_path: Path) -> None:
    params, work = params.model_copy(update={"model_path": str(folder)}), Workspace(tmp_path / "run")
    inspect_inputs(params, work)
    before = read_json(work.tokenizer_input)["sha256"]
    assert "unrelated.py" not in before
    for name in (*CODE, *VOCABULARIES):
        with (folder / name).open("a", encoding="utf-8") as stream:
            stream.write("\n")
    inspect_inputs(params, work)
    after = read_json(work.tokenizer_input)["sha256"]
    assert {name for name, digest in after.items() if digest != before[name]} == {*CODE, *VOCABULARIES}


@pytest.mark.parametrize("by_name", [False, True])
def test_the_links_of_a_hub_snapshot_are_followed(
    by_name: bool, folder: Path, put_into_hub_cache: Callable[..., Path], tmp_path: Path
) -> None:
    (folder / "LICENSE").write_text("theirs", encoding="utf-8")
    snapshot = put_into_hub_cache(folder)
    source = find_model(read_params(None, {"model_path": "owner/name" if by_name else str(snapshot)}))
    save_pruned(source, Edits("test", [2]), tmp_path / "pruned")
    for name in ("LICENSE", "tokenizer.json"):
        assert (tmp_path / "pruned" / name).read_bytes() == (folder / name).read_bytes()
        assert not (tmp_path / "pruned" / name).is_symlink()
