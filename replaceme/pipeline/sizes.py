"""How many layers: a share of them where nobody says; and what each number costs and saves, to choose by looking.

For each number of layers, the best blocks by the profile are left out of a short pass over held-out text, with nothing in their
place:

    rise = loss without the block − loss of the dense model      nats per token; of a typical domain (``Losses.rise_over``)
    perplexity ratio = e^rise
    speed of decoding = weights that a token reads / those of them that stay

Decoding one text at a time is bound by reading the weights, so that its speed is expected, and not measured. What takes the
block's place wins a part of the rise back: the table says where to begin, and the scores of the result what it became.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from replaceme.base.documents import excerpts_of, split_documents
from replaceme.base.errors import ParameterError, ReplaceMeError
from replaceme.base.files import new_folder, read_json, round_floats
from replaceme.base.parameters import Params
from replaceme.base.plan import Block
from replaceme.base.progress import align, logger, progress
from replaceme.base.ranks import rank
from replaceme.edits.edits import Edits
from replaceme.models.context import ModelContext
from replaceme.models.devices import use_processor
from replaceme.models.find import calibration_context, find_model, recorded_model
from replaceme.models.model import Model, embedding_count, layer_count
from replaceme.report.theme import LIGHT, WIDTH, drawing, set_grid, set_log_scale, to_png
from replaceme.running.stage import PASS, Stage
from replaceme.running.workspace import Workspace
from replaceme.selection.blocks import removable_range, smallest_of_each, starts_between
from replaceme.selection.budget import Sizes
from replaceme.selection.candidate_evaluation import CandidateEvaluation, batches_of, next_token_losses
from replaceme.statistics.walk import forward_passes

# The share of the layers that goes where nobody says how much: 4 of the demo's 30; and at most where only a loss is tolerated.
DEFAULT_SHARE, MOST_SHARE = 0.13, 0.5
# Tokens of each pass, and blocks of each size by each ranking.
TOKENS, CANDIDATES = 2048, 2
# The largest rise at which to start: 4 of the demo's 30 layers. And the one that ends the search, at ten times the perplexity.
START_RISE, LAST_RISE = 0.5, 2.3


def apply_default_size(params: Params) -> Params:
    """Return the parameters with a share of the model's layers to remove, with ``tolerated_loss`` the most that may go."""
    try:
        layers = layer_count(find_model(params))
    except ReplaceMeError:  # the first stage says what is wrong with the model, and with everything else
        return params
    tolerates = params.tolerated_loss is not None
    share = MOST_SHARE if tolerates else DEFAULT_SHARE
    room = (params.max_distance_layer or layers) - (params.min_distance_layer or 1)
    count = max(min(round(share * layers), room) // params.num_A, 1)
    logger.info(
        "layers: %d of %d go%s (%.0f %%), as nothing says how many; --layers N does (replaceme profile shows the cost)",
        count * params.num_A, layers, " at most" if tolerates else "", 100 * share,
    )  # fmt: skip
    return params.model_copy(update={"layers_to_skip": count})


def measure_sizes(params: Params, work: Workspace) -> None:
    """Measure what each number of layers costs and saves, and write ``sizes.csv`` and ``sizes.png``.

    The columns: ``layers`` that go, from the layer ``start`` on; ``rise`` of the loss, in nats per token, and ``ratio`` of the
    perplexities; ``gigabytes`` of the weights in bfloat16, with embedding and head; ``share`` of the dense model's parameters;
    ``speedup`` that is expected of decoding, empty with experts, of which a token reads only some.
    """
    use_processor(params.threads)
    source, profile = recorded_model(params, work.model_input), read_json(work.profile / "profile.json")
    context = calibration_context(params, work)
    best = _measure_rises(context, _list_candidates(params, [profile["angular_distance"], profile["residual"]]))
    if rank():
        return
    sizes = _weigh_sizes(source, best).map(round_floats)
    with new_folder(work.artifact("sizes")) as folder:
        sizes.to_csv(folder / "sizes.csv", index=False)
        (folder / "sizes.png").write_bytes(to_png(draw_sizes(sizes)))


def choose_start(sizes: pd.DataFrame) -> int | None:
    """Return the most layers whose removal, with nothing in their place, raises the loss by ``START_RISE`` at most, or None."""
    within = sizes.loc[(sizes["layers"] > 0) & (sizes["rise"] <= START_RISE), "layers"]
    return int(within.max()) if len(within) else None


def print_sizes(work: Workspace) -> None:
    """Print the table of the measured sizes."""
    sizes = pd.read_csv(work.artifact("sizes") / "sizes.csv")
    start = choose_start(sizes)
    rows = [("layers less", "removed", "GB", "parameters", "loss", "perplexity", "decoding", "")]
    for size in sizes.itertuples():
        last = size.start + size.layers - 1
        removed = "none" if not size.layers else str(last) if size.layers == 1 else f"{size.start}–{last}"
        speedup = "" if math.isnan(size.speedup) else f"× {size.speedup:.2f}"
        mark = f"start here: {size.layers}" * (size.layers == start)
        weights = f"{size.gigabytes:.3g}", f"{100 * size.share:.1f} %"
        rows.append((str(size.layers), removed, *weights, f"{size.rise:+.3f}", f"× {size.ratio:.2f}", speedup, mark))
    print(align(rows))
    logger.info(
        "loss (nats a token) and perplexity: on this text, with nothing in the layers' place; GB: of the weights in bfloat16; "
        "decoding: as expected from the weights that a token reads"
    )
    if start is None:
        logger.info("each of these sizes raises the loss by more than %g nats: begin with the smallest", START_RISE)


def _list_candidates(params: Params, rankings: Sequence[list[list[float]]]) -> list[list[Block]]:
    """Return the best few blocks of each number of layers, up to half of them, by each ranking."""
    layers = len(rankings[0])
    first, end = removable_range(params, layers)
    most = min(layers // 2, len(starts_between(params.model_copy(update={"layers_to_skip": 1}), first, end))) or 1
    return [smallest_of_each(rankings, range(first, end - count + 1), count, CANDIDATES) for count in range(1, most + 1)]


def _measure_rises(context: ModelContext, candidates: Sequence[Sequence[Block]]) -> dict[int, tuple[float, int]]:
    """Return number of layers → the lowest rise of the loss among its candidates, and that block's start; to ``LAST_RISE``."""
    weights, (_, held_out) = context.documents.tokens_by_domain, split_documents(context.documents)
    # Nothing is fitted here: of too few documents to hold one out, any will do.
    excerpts = next(filter(len, (excerpts_of(text, TOKENS) for text in (held_out, context.documents))), None)
    if excerpts is None:
        raise ParameterError("dataset: no document has two tokens, so that no loss can be measured; take longer texts.")
    context = context.with_documents(excerpts)
    with forward_passes(context, batches_of(context), None) as batches:
        dense = next_token_losses(context, batches)
    evaluation = CandidateEvaluation.before_cuts(context, chain(*candidates))
    best: dict[int, tuple[float, int]] = {}
    for blocks in progress(candidates, "measuring the sizes", "sizes"):
        rises = []
        for block in blocks:
            with evaluation.candidate(Edits("", [*block.layers]), block.layer_before_cut) as batches:
                rises.append((next_token_losses(context, batches).rise_over(dense, weights), block.start))
        best[len(blocks[0])] = min(rises)
        if best[len(blocks[0])][0] > LAST_RISE:
            break
    return {count: lowest for count, lowest in best.items() if math.isfinite(lowest[0])}


def _weigh_sizes(source: Model, best: Mapping[int, tuple[float, int]]) -> pd.DataFrame:
    """Return the sizes of a model, the dense one's first; ``best`` is as from ``_measure_rises``."""
    skeleton, layers, total = source.skeleton(source.config()), Sizes.of(source).layers, Sizes.of(source).total
    head = skeleton.get_output_embeddings()
    # Of an embedding that is not the head as well, a token reads one row.
    read = total - embedding_count(skeleton) + (head.weight.numel() if head is not None else 0)
    rows = []
    for count, (rise, start) in sorted({0: (0.0, 0), **best}.items()):
        gone = sum(layers[start : start + count])
        speedup = math.nan if source.family().experts else read / (read - gone)
        rows.append((count, start, rise, math.exp(rise), 2e-9 * (total - gone), 1 - gone / total, speedup))
    return pd.DataFrame(rows, columns=["layers", "start", "rise", "ratio", "gigabytes", "share", "speedup"])


def draw_sizes(sizes: pd.DataFrame) -> Figure:
    """Draw the ratio of the perplexities (left) and the size of the model (right) against the layers that go."""
    start = choose_start(sizes)
    with drawing(LIGHT, 0.66 * WIDTH) as figure:
        axes = figure.add_subplot()
        weights = axes.twinx()
        if start is not None:
            axes.axvline(start, color=LIGHT.mark, lw=1.2)
            where: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"start here: {start}", (start, 1), (0, 3), color=LIGHT.mark, **where)
        (ratio,) = axes.plot(sizes["layers"], sizes["ratio"], color=LIGHT.pruned, marker="o", ms=4.5, lw=1.6)
        (size,) = weights.plot(sizes["layers"], sizes["gigabytes"], color=LIGHT.series[1], marker="s", ms=3.5, lw=1.2, ls="--")
        axes.set(xlabel="layers less", ylabel="perplexity (times dense)")
        weights.set(ylabel="size in bfloat16 (GB)", ylim=(0, None))
        set_log_scale(axes, "y", sizes["ratio"])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        set_grid(axes)
        weights.tick_params(length=0)
        figure.legend(
            [ratio, size], ["perplexity, nothing in their place", "size"], loc="outside lower center", ncols=2, frameon=False
        )
    return figure


STAGE = Stage(
    name="sizes",
    run=measure_sizes,
    params=("min_distance_layer", "max_distance_layer", *PASS),
    reads=(Workspace.profile, Workspace.model_input, Workspace.documents, Workspace.model_versions),
    writes="sizes",
    shared=lambda params, work: True,
)
