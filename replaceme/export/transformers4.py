"""Keys of transformers 4 beside those of transformers 5, so that programs with the older names read the same model.

transformers 5 writes ``rope_parameters``, ``dtype`` and the tokenizer class ``TokenizersBackend``. transformers 4.57, optimum
and mlx-lm know none of them, and silently take a rotary base of 10,000. ``add_older_keys`` says the same in the older keys, and
transformers 5 reads the result as before. ``transformers_4_obstacle`` says which model has no older keys; its card then asks
for transformers 5.
"""

from collections.abc import Mapping
from typing import Any

# The scalings that transformers 4.57 computes (modeling_rope_utils.ROPE_INIT_FUNCTIONS).
SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Family → its older names of the rotary base and of the share of a head that turns.
NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
USUAL_NAMES = ("rope_theta", "partial_rotary_factor")
# Family → other entries of its config that have an older name.
RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}}
FULL, SLIDING = "full_attention", "sliding_attention"
# Families with a rotary base of their own for sliding attention, and its older name.
LOCAL_BASE = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}
# Families that scale the rotary embedding of full attention alone.
SCALE_FULL_ALONE = ("olmo3", *LOCAL_BASE)
TOKENIZER_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}

Config = Mapping[str, Any]


def transformers_4_obstacle(config: Config) -> str | None:
    """Return why transformers 4 can't read a model, as the end of a sentence; None if it can.

    Args:
        config: the content of config.json as transformers 5 writes it.
    """
    rope, kind = config.get("rope_parameters") or {}, str(config.get("model_type"))
    each = _group_by_attention(rope)
    unknown = sorted({str(part.get("rope_type")) for part in each.values()} - {*SCALINGS, "None"})
    if unknown:
        return f"its rotary embedding is of the type {unknown[0]}"
    full, sliding = each.get(FULL, {}), each.get(SLIDING, {})
    if len({str(sorted(part.items())) for part in each.values()}) > 1 or (_is_scaled(sliding) and kind in SCALE_FULL_ALONE):
        said = kind in SCALE_FULL_ALONE and {*each} == {FULL, SLIDING} and not _is_scaled(sliding)
        same_base = full.get("rope_theta") == sliding.get("rope_theta")
        if not said or not (kind in LOCAL_BASE or same_base):
            return "its kinds of attention have rotary embeddings of their own"
    return None


def add_older_keys(config: Config) -> dict[str, Any]:
    """Return the content of config.json with the older keys added, as far as they can say it (``transformers_4_obstacle``)."""
    new, kind = dict(config), str(config.get("model_type"))
    renamed = {"dtype": "torch_dtype", **RENAMED.get(kind, {})}
    new |= {old: config[name] for name, old in renamed.items() if name in config}
    rope = config.get("rope_parameters")
    if not rope or transformers_4_obstacle(config):
        return new
    each = _group_by_attention(rope)
    main = each.get(FULL) or next(iter(each.values()))
    base, share = NAMES.get(kind, USUAL_NAMES)
    old = {base: main.get("rope_theta"), share: main.get("partial_rotary_factor")}
    new |= {name: value for name, value in old.items() if value is not None}
    if kind in LOCAL_BASE and SLIDING in each:
        new[LOCAL_BASE[kind]] = each[SLIDING]["rope_theta"]
    if _is_scaled(main):
        new["rope_scaling"] = _convert_scaling(main, kind)
    return new


def rename_tokenizer_keys(config: Config) -> dict[str, Any]:
    """Return the content of tokenizer_config.json with names that transformers 4 knows; transformers 5 reads both alike."""
    new, kind = dict(config), config.get("tokenizer_class")
    if isinstance(kind, str) and kind in TOKENIZER_CLASS:
        new["tokenizer_class"] = TOKENIZER_CLASS[kind]
    # There it is a dict of named tokens.
    if isinstance(config.get("extra_special_tokens"), list):
        new["additional_special_tokens"] = new.pop("extra_special_tokens")
    return new


def _group_by_attention(rope: Config) -> dict[str, Config]:
    """Return the parameters by the kind of attention; a model with one rotary embedding has one entry."""
    nested = {kind: part for kind, part in rope.items() if isinstance(part, Mapping)}
    return nested or ({"": rope} if rope else {})


def _is_scaled(part: Config) -> bool:
    return part.get("rope_type", "default") != "default"


def _convert_scaling(part: Config, kind: str) -> dict[str, Any]:
    if kind == "phi3":  # which checks that there are these three
        return {"type": part["rope_type"], "short_factor": part["short_factor"], "long_factor": part["long_factor"]}
    return {key: value for key, value in part.items() if key not in ("rope_theta", "partial_rotary_factor")}
