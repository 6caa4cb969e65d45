"""Sentences of the report, generated from the run's own figures.

The functions ``*_words`` return the pictures' alternative texts, for readers who can't see them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from replaceme.base.plan import Block
from replaceme.report.tables import Figures, digits, number, seen_in

Distances = Sequence[Sequence[float]]


def outcome(evaluation: Figures) -> list[tuple[str, str]]:
    """Return the main results as pairs of a value and the words after it; what the unseen texts say comes first."""
    parts = []
    if "retention_percent" in evaluation:
        parts.append((f"{evaluation['retention_percent']:.1f} %", f"of the accuracy kept{_seen(evaluation, 'accuracy')}"))
    if "retention_above_chance_percent" in evaluation:
        kept = f"{evaluation['retention_above_chance_percent']:.1f} %".replace("-", "−")
        parts.append((kept, f"of the accuracy above chance kept{_seen(evaluation, 'accuracy')}"))
    # lm-eval's own texts have no perplexity per token.
    texts = evaluation.get("word_perplexity", {}) | evaluation.get("perplexity", {})
    unseen = evaluation.get("unseen", {})
    if "perplexity_ratio" in unseen:
        where = f"{unseen['texts']} unseen texts (geometric mean)" if unseen["texts"] > 1 else "an unseen text"
        parts.insert(0, (f"{digits(unseen['perplexity_ratio'], 3)} ×", f"the perplexity on {where}"))
    elif ratios := [task["ratio"] for task in texts.values()]:
        spread = digits(min(ratios), 3) + f" to {digits(max(ratios), 3)}" * (len(ratios) > 1) + " ×"
        parts.insert(0, (spread, f"the perplexity{_seen(evaluation, 'perplexity', 'word_perplexity')}"))
    if "parameters" in evaluation:
        parts.append((f"{evaluation['parameters']['removed_percent']:.1f} %", "smaller"))
    return parts


def _seen(evaluation: Figures, *groups: str) -> str:
    """Return words on the tasks of these groups that are scored on calibration text; an empty text if there are none."""
    tasks = {task for group in groups for task in evaluation.get(group, {})}
    seen = len(seen_in(evaluation, tasks))
    return f" ({'on' if seen == len(tasks) else 'in part on'} calibration text)" if seen else ""


def span(block: Block) -> str:
    """Name a block's layers: ``layers 11–18``."""
    return f"layers {block.start}–{block.end - 1}" if len(block) > 1 else f"layer {block.start}"


def cut_sentences(
    distances: Distances, residuals: Distances, blocks: Sequence[Block], words: str, selected: Figures
) -> list[str]:
    """Say how each block was chosen, and how it ranks among all blocks of its size.

    Args:
        distances: layers × layers, angular distances in half turns.
        residuals: layers × layers, relative residuals of a linear map in the block's place.
        blocks: the removed blocks; none where parts of layers were removed.
        words: the criterion, after "chosen by".
        selected: the figures of metrics/select.json.
    """
    sentences = [_cut_sentence(distances, residuals, block, words) for block in blocks]
    if losses := selected.get("losses"):
        measured = sorted(losses.items(), key=lambda pair: pair[1])
        listed = ", ".join(f"{loss:.2f} with {host.replace('host', 'host ')}" for host, loss in measured)
        if "dense_loss" in selected:
            listed += f"; the dense model has {selected['dense_loss']:.2f}"
        sentences.append(f"Next-token loss of the shortened model on held-out calibration text, in nats per token: {listed}.")
    if rises := selected.get("typical_rises"):
        listed = ", ".join(f"{rise:.3f} with {host.replace('host', 'host ')}" for host, rise in rises.items())
        sentences.append(f"The choice is by the typical rise over the kinds of text: {listed}.")
    if rises := selected.get("rises"):
        numbers = sorted((int(layers.removeprefix("layers")), rise) for layers, rise in rises.items())
        listed = ", ".join(f"{rise:.3f} without {count} layer{'s' * (count > 1)}" for count, rise in numbers)
        sentences.append(
            "The number of removed layers follows from tolerated_loss, with layers_to_skip as its maximum. With the best block "
            f"of each size, the loss rises by {listed}."
        )
    return sentences


def _cut_sentence(distances: Distances, residuals: Distances, block: Block, words: str) -> str:
    return (
        f"{span(block).capitalize()} (after host layer {block.host}) {'were' if len(block) > 1 else 'was'} removed, chosen by "
        f"{words}. The angular distance between the outputs of the host and of the block, in half turns, is "
        f"{_ranked(distances, block)}; the relative residual of a linear map in its place is {_ranked(residuals, block)}."
    )


def _ranked(values: Distances, block: Block) -> str:
    """Write a block's value, and its rank among all blocks of its size."""
    size, own = len(block), values[block.host][block.end - 1]
    same = [values[host][host + size] for host in range(len(values) - size)]
    return f"{own:.3f} (rank {1 + sum(value < own for value in same)} of {len(same)}, smallest first)"


def layer_sentences(layers: Mapping[str, Sequence[float]], blocks: Sequence[Block]) -> list[str]:
    """Compare the removed layers with the others, and say where the large norms arise."""
    influence, norms = layers["block_influence"], layers["max_norm"]
    removed = {layer for block in blocks for layer in range(block.start, block.end)}
    gone, kept = ([value for layer, value in enumerate(influence) if (layer in removed) == side] for side in (True, False))
    loudest = max(range(len(norms)), key=norms.__getitem__)
    apart = f"{_mean(gone):.3f} in the removed layers and {_mean(kept):.3f} in the others" if gone else f"{_mean(kept):.3f}"
    return [
        f"The mean block influence is {apart}.",
        f"The largest token norm, {number(norms[loudest])}, occurs after layer {loudest}, where the mean is "
        f"{number(layers['mean_norm'][loudest])}.",
        *(
            f"Across {span(block)} the largest norm changes from {number(norms[block.host])} to {number(norms[block.end - 1])}."
            for block in blocks
        ),
    ]


def fit_sentences(fits: Mapping[str, Figures]) -> list[str]:
    """Compare each fit with an empty place; no sentence for a method without a fit."""
    return [
        _refit_sentence(name, fit) if "weighted_residual_transform" in fit else _fit_sentence(name, fit)
        for name, fit in fits.items()
        if "weighted_residual_removed" in fit or "relative_residual" in fit
    ]


def repair_sentence(repaired: Figures) -> str:
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


def heal_sentence(healed: Figures) -> str:
    """Say what healing achieved; an empty text without healing."""
    if not healed:
        return ""
    held_out = "held_out_loss_first" in healed
    of, where = ("held_out_loss", "documents held out from it") if held_out else ("training_loss", "its own documents")
    return (
        f"Then {healed['trained_parameters']:,} weights from the first cut on were trained for {healed['training_steps']:,} "
        f"steps toward the original model's predictions. During this training, the KL divergence from them, on {where}, "
        f"went from {healed[f'{of}_first']:.3f} to {healed[f'{of}_last']:.3f} nats per token."
    )


def _refit_sentence(name: str, fit: Figures) -> str:
    left = fit.get("weighted_residual", fit.get("weighted_residual_joint", 0.0))
    bare, of_map = fit["weighted_residual_removed"], fit["weighted_residual_transform"]
    sentence = (
        f"{f'{name}: t' if name else 'T'}he host's new weights bring the relative residual (all tokens weighted equally) from "
        f"{bare:.3f} to {left:.3f}; a map alone would reach {of_map:.3f}."
    )
    if "weighted_residual_joint" in fit:
        sentence += " (If the new attention changes the MLP's inputs, the MLP is then solved again for these: see below.)"
    return sentence


def _fit_sentence(name: str, fit: Figures) -> str:
    kind, weighting = ("relative", "") if "relative_residual" in fit else ("weighted", " (all tokens weighted equally)")
    residual, bare = fit[f"{kind}_residual"], fit[f"{kind}_residual_removed"]
    cosine, bare_cosine = fit["mean_cosine"], fit["mean_cosine_removed"]
    sentence = (
        f"{f'{name}: t' if name else 'T'}he map brings the relative residual{weighting} from {bare:.3f} to {residual:.3f} and "
        f"the mean cosine from {bare_cosine:.3f} to {cosine:.3f}."
    )
    if residual < bare and cosine < bare_cosine:
        sentence += " The residual improves while the cosine gets worse, so a few tokens of very large norm dominate the fit."
    return sentence


def proof_sentence(export: Figures, blocks: Sequence[Block]) -> str:
    """Say how far the saved model is from the unfused computation: at the cut or, if no layer was removed, at the end."""
    place = "at the cut" if blocks else "after the last layer"
    return (
        f"The saved model was reloaded and compared with the unfused computation: the state {place} differs by "
        f"{export['hidden_error_mean']:.2g} on average and {export['hidden_error_max']:.2g} at most (relative), the logits by "
        f"{export['logits_error']:.2g}. Each layer by itself may differ by {export['tolerance']:g} on average, by rounding."
    )


def map_words(what: str, values: Sequence[Sequence[float]], blocks: Sequence[Block]) -> str:
    """Describe the heat map of a figure over all blocks."""
    pairs = [value for host, row in enumerate(values) for value in row[host + 1 :]]
    marked = "; ".join(f"{span(block)} at {values[block.host][block.end - 1]:.3f}" for block in blocks)
    return (
        f"Heat map of the {what} from each host layer to each last removed layer, "
        f"{min(pairs):.3f} to {max(pairs):.3f}.{f' Framed: {marked}.' if blocks else ''}"
    )


def layer_words(layers: Mapping[str, Sequence[float]], blocks: Sequence[Block]) -> str:
    """Describe the charts of the layers."""
    shaded = ", ".join(map(span, blocks))
    ranges = {key: f"{number(min(values))} to {number(max(values))}" for key, values in layers.items()}
    return (
        f"Two charts by layer on logarithmic axes: block influence, {ranges['block_influence']}; mean token norm, "
        f"{ranges['mean_norm']}, and largest token norm, {ranges['max_norm']}.{f' Shaded: {shaded}.' if blocks else ''}"
    )


def score_words(evaluation: Figures) -> str:
    """Describe the chart of the scores."""
    parts = [
        f"{kind} of {task}: dense {number(factor * pair['dense'])}, pruned {number(factor * pair['pruned'])}"
        for kind, factor in (("accuracy", 100), ("perplexity", 1))
        for task, pair in evaluation.get(kind, {}).items()
    ]
    return f"Scores of both models, with error bars of one standard error. {'; '.join(parts).capitalize()}."


def residual_words(rows: Sequence[tuple[float, float]], chosen: tuple[float, float]) -> str:
    """Describe the ridge path."""
    (first, low), (last, high) = min(rows), max(rows)
    return (
        f"Relative residual against α: from {low:.3f} at α = {first:g} to {high:.3f} at α = {last:g}; "
        f"this run, at α = {chosen[0]:g}, has {chosen[1]:.3f}."
    )


def curve_words(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """Describe lines of a picture by their ends and their lowest points."""
    parts = [
        f"{name}, from {number(pairs[0][1])} at {x} {pairs[0][0]:g} to {number(pairs[-1][1])} at {x} {pairs[-1][0]:g}, "
        f"lowest {number(min(value for _, value in pairs))}"
        for name, pairs in lines.items()
        if pairs
    ]
    return f"{y[:1].upper()}{y[1:]} by {x}: {'; '.join(parts)}."


def _mean(values: Sequence[Any]) -> float:
    return sum(values) / len(values)
