"""Sentences of the page, generated from the run's own figures."""

from collections.abc import Sequence

from replaceme.base.plan import Block
from replaceme.evaluation.tables import find_contaminated_tasks
from replaceme.export.card import name_layers
from replaceme.report.formatting import Figures, format_digits, format_percent

# layers × layers, by the layer before a block and the block's last layer.
BlockFigures = Sequence[Sequence[float]]


def list_outcomes(evaluation: Figures, speed: Figures | None = None) -> list[tuple[str, str]]:
    """Return the main results as pairs of a value and the words after it; what the unseen texts say comes first.

    Args:
        evaluation: the content of metrics/evaluation.json.
        speed: measured times, as in ``render``.
    """
    parts = []
    # lm-eval's own texts have no perplexity per token.
    ratios = [task["ratio"] for task in (evaluation.get("word_perplexity", {}) | evaluation.get("perplexity", {})).values()]
    unseen = evaluation.get("unseen", {})
    if "perplexity_ratio" in unseen:
        where = f"{unseen['texts']} unseen texts (geometric mean)" if unseen["texts"] > 1 else "an unseen text"
        parts.append((f"{format_digits(unseen['perplexity_ratio'], 3)} ×", f"the perplexity on {where}"))
    elif ratios:
        spread = format_digits(min(ratios), 3) + f" to {format_digits(max(ratios), 3)}" * (len(ratios) > 1) + " ×"
        parts.append((spread, f"the perplexity{_describe_contamination(evaluation, 'perplexity', 'word_perplexity')}"))
    for key, words in (("retention", "accuracy"), ("retention_above_chance", "accuracy above chance")):
        if f"{key}_percent" in evaluation:
            kept = format_percent(evaluation[f"{key}_percent"], scale=1)
            parts.append((f"{kept} %", f"of the {words} kept{_describe_contamination(evaluation, 'accuracy')}"))
    if "parameters" in evaluation:
        parts.append((f"{evaluation['parameters']['removed_percent']:.1f} %", "smaller"))
    if speed:
        prefill, decoding = (speed[key]["speedup"] for key in ("prefill_seconds", "decode_seconds_per_token"))
        parts.append((f"{decoding:.2f} ×", f"as fast per new token ({prefill:.2f} × in the prefill)"))
    return parts


def _describe_contamination(evaluation: Figures, *kinds: str) -> str:
    """Say that tasks of these kinds are scored on calibration text; an empty text if none is."""
    tasks = {task for kind in kinds for task in evaluation.get(kind, {})}
    contaminated = tasks.intersection(find_contaminated_tasks(evaluation))
    return f" ({'on' if contaminated == tasks else 'in part on'} calibration text)" if contaminated else ""


def describe_cut(
    distances: BlockFigures, residuals: BlockFigures, blocks: Sequence[Block], words: str, selected: Figures
) -> list[str]:
    """Say how each block was chosen, and how it ranks among all blocks of its size.

    Args:
        distances: angular distances in half turns.
        residuals: relative residuals of a linear map fitted instead of the block.
        blocks: the removed blocks; none where parts of layers were removed.
        words: the criterion, after "chosen by".
        selected: the figures of metrics/select.json.
    """
    sentences = [
        f"{name_layers([*block.layers]).capitalize()} (after layer {block.start - 1}) {'were' if len(block) > 1 else 'was'} "
        f"removed, chosen by {words}. The angular distance between the states before and after the block, in half turns, is "
        f"{_format_rank(distances, block)}; the relative residual of a linear map in its place is "
        f"{_format_rank(residuals, block)}."
        for block in blocks
    ]
    if losses := selected.get("losses"):
        listed = ", ".join(_format_cut(key, f"{loss:.2f}") for key, loss in sorted(losses.items(), key=lambda pair: pair[1]))
        if "dense_loss" in selected:
            listed += f"; the dense model has {selected['dense_loss']:.2f}"
        sentences.append(f"Next-token loss of the shortened model on held-out calibration text, in nats per token: {listed}.")
    if rises := selected.get("typical_rises"):
        listed = ", ".join(_format_cut(key, f"{rise:.3f}") for key, rise in rises.items())
        sentences.append(f"The choice is by the typical rise over the kinds of text: {listed}.")
    if rises := selected.get("rises"):
        counts = sorted((int(key.removeprefix("layers")), rise) for key, rise in rises.items())
        listed = ", ".join(f"{rise:.3f} without {count} layer{'s' * (count > 1)}" for count, rise in counts)
        sentences.append(
            "The number of removed layers follows from tolerated_loss, with layers_to_skip as its maximum. With the best block "
            f"of each size, the loss rises by {listed}."
        )
    return sentences


def _format_cut(key: str, value: str) -> str:
    """Name a block of metrics/select.json, whose key is ``host11`` for a cut after layer 11."""
    return f"{value} with the cut after layer {key.removeprefix('host')}"


def _format_rank(values: BlockFigures, block: Block) -> str:
    """Write a block's figure, and its rank among all blocks of its size."""
    own, size = values[block.start - 1][block.end - 1], len(block)
    same = [values[before][before + size] for before in range(len(values) - size)]
    return f"{own:.3f} (rank {1 + sum(value < own for value in same)} of {len(same)}, smallest first)"


def describe_repair(repaired: Figures) -> str:
    """Say what the repair achieved; an empty text without a repair."""
    if not repaired.get("corrected_linears"):
        return ""
    chosen = ""
    if total := repaired.get("mlp_channels"):
        others = total - repaired["own_mlp_channels"]
        chosen = f"Of the {total:,} MLP channels kept at the cut, {others:,} come from the removed layers. "
    return (
        f"{chosen}Then {repaired['corrected_linears']} linears were solved again on the inputs that the shortened model gives "
        f"them. After the last one, the state differs from the dense model's by {repaired['last_residual']:.3f} "
        "(relative, all tokens weighted equally)."
    )


def describe_healing(healed: Figures) -> str:
    """Say what healing achieved; an empty text without healing."""
    if not healed:
        return ""
    is_held_out = "held_out_loss_first" in healed
    loss, where = ("held_out_loss", "documents held out from it") if is_held_out else ("training_loss", "its own documents")
    if healed.get("kept_step") == 0:
        return (
            f"A training of {healed['trained_parameters']:,} weights toward the original model's predictions raised the KL "
            f"divergence from them, on {where}, from {healed[f'{loss}_first']:.3f} to {healed[f'{loss}_last']:.3f} nats per "
            "token: the weights from before it were kept."
        )
    return (
        f"Then {healed['trained_parameters']:,} weights were trained on {healed['training_tokens']:,} tokens of other text, "
        f"toward the original model's predictions. During this training, the KL divergence from them, on {where}, "
        f"went from {healed[f'{loss}_first']:.3f} to {healed[f'{loss}_last']:.3f} nats per token."
    )


def describe_proof(export: Figures, blocks: Sequence[Block]) -> str:
    """Say how far the saved model is from the unfused computation: at the cut or, if no layer was removed, at the end."""
    where = "at the cut" if blocks else "after the last layer"
    return (
        f"The saved model was reloaded and compared with the unfused computation: the state {where} differs by "
        f"{export['hidden_error_mean']:.2g} on average and {export['hidden_error_max']:.2g} at most (relative), the logits by "
        f"{export['logits_error']:.2g}. Each layer by itself may differ by {export['tolerance']:g} on average, by rounding."
    )
