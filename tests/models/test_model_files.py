"""Which files of a model's folder count: fingerprinted, copied to the pruned model, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from replaceme.base.errors import ModelError
from replaceme.base.files import read_json
from replaceme.base.parameters import Params, read_params
from replaceme.base.workspace import Workspace
from replaceme.edits.edits import Edits
from replaceme.export.save import save_pruned
from replaceme.models import hub
from replaceme.models.find import find_model
from replaceme.models.model import Model
from replaceme.pipeline.inputs import inspect_inputs

CODE = {
    "tokenization_own.py": "from transformers import PreTrainedTokenizerFast\nfrom .parts import PLACE\n\n\n"
    "class OwnTokenizer(PreTrainedTokenizerFast):\n    place = PLACE\n",
    "parts.py": "from .deeper import PLACE\n",
    "deeper.py": "PLACE = 'deep'\n",
}
VOCABULARIES = ("tekken.json", "own.tiktoken", "spm.model", "own_vocab_v2.txt", "vocab.bpe", "merges.v2.txt")


def changed(file: Path, **entries: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **entries}), encoding="utf-8")


@pytest.fixture
def folder(tiny: Model, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "dense"))


@pytest.fixture
def coded(folder: Path) -> Path:
    """A model whose tokenizer has code and vocabularies of its own, beside code that is not the tokenizer's."""
    for name in VOCABULARIES:
        (folder / name).write_text("words", encoding="utf-8")
    for name, text in {**CODE, "unrelated.py": "1 / 0\n"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    changed(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]})
    return folder


def test_code_and_vocabularies_of_a_tokenizer_are_copied_to_the_pruned_model(coded: Path, tmp_path: Path) -> None:
    source = Model(coded, "coded", trust_remote_code=True)
    save_pruned(source, Edits("test", [2]), tmp_path / "pruned")
    for name in (*CODE, *VOCABULARIES):
        assert (tmp_path / "pruned" / name).read_bytes() == (coded / name).read_bytes(), name
    assert not (tmp_path / "pruned" / "unrelated.py").exists()
    shutil.rmtree(coded)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert (type(tokenizer).__name__, tokenizer.place) == ("OwnTokenizer", "deep")


def test_code_and_vocabularies_of_a_tokenizer_are_downloaded(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot(name: str, commit: str, patterns: tuple[str, ...], ignored: tuple[str, ...]) -> Path:
        asked.extend(
            filter_repo_objects(
                [*CODE, *VOCABULARIES, "sub/tekken.json"], allow_patterns=list(patterns), ignore_patterns=list(ignored)
            )
        )
        return coded

    monkeypatch.setattr(hub, "resolve_commit", lambda *_: "1" * 40)
    monkeypatch.setattr(hub, "snapshot", snapshot)
    find_model(read_params(None, {"model_path": "owner/name"}))
    assert asked == [*CODE, *VOCABULARIES]


@pytest.mark.parametrize("name", [*CODE, *VOCABULARIES])
def test_another_content_of_a_tokenizers_file_is_noticed(name: str, coded: Path, params: Params, tmp_path: Path) -> None:
    params, work = params.model_copy(update={"model_path": str(coded)}), Workspace(tmp_path / "run")
    inspect_inputs(params, work)
    before = read_json(work.tokenizer_input)
    assert "unrelated.py" not in before["sha256"]
    with (coded / name).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    inspect_inputs(params, work)
    after = read_json(work.tokenizer_input)
    assert {each for each, digest in after["sha256"].items() if digest != before["sha256"][each]} == {name}


@pytest.mark.parametrize("reference", ["../outside.Own", "/etc/passwd.Own", "nowhere.Own", "", 3])
def test_an_auto_map_that_names_no_file_of_the_folder_adds_none(reference: Any, folder: Path, tiny: Model) -> None:
    (folder.parent / "outside.py").write_text("", encoding="utf-8")
    changed(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": reference})
    names = [path.name for path in Model(folder, "dense").tokenizer_files()]
    assert names == [path.name for path in tiny.tokenizer_files()]


REMOTE = {"config.json": {"AutoConfig": "other/code--configuration_x.X"}, "tokenizer_config.json": ["other/code--t.Slow", None]}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", list(REMOTE))
def test_code_of_another_repository_is_refused(name: str, trusted: bool, folder: Path) -> None:
    changed(folder / name, auto_map=REMOTE[name])
    with pytest.raises(ModelError) as caught:
        find_model(read_params(None, {"model_path": str(folder), "trust_remote_code": trusted}))
    said = str(caught.value)
    assert said.startswith(f"model_path: auto_map in {name} of dense names code of another repository (other/code--")
    assert len(said) <= 300


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Return a function that puts the model into a hub cache, as the hub's client does: as links to blobs."""
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put() -> Path:
        repository = tmp_path / "hub" / "models--owner--name"
        snapshot = repository / "snapshots" / ("1" * 40)
        for place in (repository / "blobs", repository / "refs", snapshot):
            place.mkdir(parents=True)
        (repository / "refs" / "main").write_text("1" * 40, encoding="utf-8")
        for number, path in enumerate(sorted(folder.iterdir())):
            shutil.copyfile(path, repository / "blobs" / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        return snapshot

    return put


def test_code_of_another_repository_is_refused_in_a_hub_model(folder: Path, cached: Callable[[], Path]) -> None:
    changed(folder / "config.json", auto_map=REMOTE["config.json"])
    cached()
    with pytest.raises(ModelError, match=r"auto_map in config\.json of owner/name names code of another repository"):
        find_model(read_params(None, {"model_path": "owner/name"}))


@pytest.mark.parametrize("by_name", [False, True])
def test_the_links_of_a_hub_snapshot_are_followed(
    by_name: bool, folder: Path, cached: Callable[[], Path], tmp_path: Path
) -> None:
    (folder / "LICENSE").write_text("theirs", encoding="utf-8")
    snapshot = cached()
    source = find_model(read_params(None, {"model_path": "owner/name" if by_name else str(snapshot)}))
    save_pruned(source, Edits("test", [2]), tmp_path / "pruned")
    for name in ("LICENSE", "tokenizer.json"):
        assert (tmp_path / "pruned" / name).read_bytes() == (folder / name).read_bytes()
        assert not (tmp_path / "pruned" / name).is_symlink()


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "tokenizer_secret", "README.md"])
@pytest.mark.parametrize("in_the_hubs_cache", [False, True])
def test_a_link_out_of_the_folder_is_refused(
    name: str, in_the_hubs_cache: bool, folder: Path, cached: Callable[[], Path], tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    place = cached() if in_the_hubs_cache else folder
    (place / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=rf"model_path: {name} of .* is a link out of the model's folder"):
        find_model(read_params(None, {"model_path": str(place)}))


def test_links_within_a_folder_and_linked_weights_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "TERMS").write_text("theirs", encoding="utf-8")
    (folder / "LICENSE").symlink_to("TERMS")
    shutil.move(folder / "model.safetensors", tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    (tmp_path / "link").symlink_to(folder)
    source = find_model(read_params(None, {"model_path": str(tmp_path / "link")}))
    save_pruned(source, Edits("test", [2]), tmp_path / "pruned")
    assert (tmp_path / "pruned" / "LICENSE").read_text(encoding="utf-8") == "theirs"
