"""Runs under transformers 4.57: read exported folders, and write what each computes beside its weights.

``python reader.py FOLDER…``: of each, ``ids.safetensors`` is read, and ``read.safetensors`` is written.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEXT = "the old river runs near a town, and people walk to market"

if __name__ == "__main__":
    assert transformers.__version__.startswith("4.57."), transformers.__version__
    for folder in map(Path, sys.argv[1:]):
        # Its sdpa leaves out the caps of Gemma 2's attention, in any Gemma 2.
        capped = getattr(AutoConfig.from_pretrained(folder), "attn_logit_softcapping", None)
        attention = {"attn_implementation": "eager"} if capped else {}
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, **attention).eval()
        with torch.no_grad():
            logits = model(load_file(folder / "ids.safetensors")["ids"]).logits
        words = torch.tensor(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])
        save_file({"logits": logits, "words": words}, folder / "read.safetensors")
