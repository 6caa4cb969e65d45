"""How well each criterion predicts the cost of a cut: rank correlation with the outcome, over all cuts of a size.

``python -m benchmarks.criteria [sizes]`` (default ``4,8,10``) uses the model, documents and profile of the pipeline's last run.
The outcome of a cut is the perplexity on held-out text of the embedded task ``wikipedia`` (8192 tokens), with ReplaceMe's lstsq
map in the block's place, fitted to all calibration tokens.
"""

import math
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr

from replaceme.base.documents import Documents
from replaceme.base.entries import Task
from replaceme.base.files import read_json
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block
from replaceme.base.progress import align, silence_libraries
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.evaluation.perplexity import compute_perplexities, score_windows
from replaceme.evaluation.tasks import task_texts
from replaceme.evaluation.windows import cut_windows
from replaceme.models.context import ModelContext
from replaceme.models.devices import resolve_device, use_processor
from replaceme.models.find import recorded_model
from replaceme.running.workspace import Workspace
from replaceme.selection.cut_loss import cut_losses, dense_losses
from replaceme.solvers.ridge import solve_ridge
from replaceme.statistics.cut_statistics import Gram
from replaceme.statistics.walk import walk

TEST_TOKENS = 8192


def main(sizes: list[int]) -> None:
    """Measure and print."""
    silence_libraries()
    params, work = read_params(Path("params.yaml")), Workspace()
    use_processor(params.threads)
    source, documents = recorded_model(params, work.model_input), Documents.load(work.documents)
    model, family = source.load(params.dtype, resolve_device(params.device)), source.family()
    windows = cut_windows("test", task_texts(Task("wikipedia")), source.tokenizer(), TEST_TOKENS)
    profile = read_json(work.profile / "profile.json")
    layers = len(profile["residual"])
    context = ModelContext(model, family, documents, params.batch_size)
    dense, shares = dense_losses(context), documents.tokens_by_domain
    for size in sizes:
        blocks = [Block(start, start + size) for start in range(1, layers - size + 1)]
        grams = [Gram(block) for block in blocks]
        walk(context, grams, description="observing activations")
        outcomes = []
        for block, gram in zip(blocks, grams, strict=True):
            sums = gram.tensors()
            transform = solve_ridge(sums["gram"], sums["cross"], 0.0).transform
            with unfused(model, family, Edits("", [*block.layers], {block.layer_before_cut: transform})):
                losses = score_windows(model, windows, params.eval_batch_size, f"host {block.layer_before_cut}")["losses"]
            outcomes.append(compute_perplexities(losses, windows).get("token", math.inf))
        criteria = {
            name: [profile[key][block.layer_before_cut][block.end - 1] for block in blocks]
            for name, key in (("angular", "angular_distance"), ("residual", "residual"))
        }
        measured = cut_losses(context, blocks, "map")
        criteria["loss"] = [cut.rise_over(dense, shares) for cut in measured]
        print(f"\n{size} of {layers} layers, {len(blocks)} cuts: best perplexity {min(outcomes):.1f}")
        rows = [("criterion", "rank correlation", "its choice: host", "perplexity", "place")]
        for name, values in criteria.items():
            chosen = values.index(min(values))
            place = 1 + sum(outcome < outcomes[chosen] for outcome in outcomes)
            rank = float(spearmanr(values, outcomes).statistic)
            host, perplexity = str(blocks[chosen].layer_before_cut), f"{outcomes[chosen]:.1f}"
            rows.append((name, f"{rank:.2f}", host, perplexity, f"{place} of {len(blocks)}"))
        print(align(rows), flush=True)
        order = sorted(range(len(blocks)), key=outcomes.__getitem__)[:8]
        print("best cuts: " + ", ".join(f"host {blocks[n].layer_before_cut} {outcomes[n]:.1f}" for n in order), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main([int(size) for size in sys.argv[1].split(",")] if len(sys.argv) > 1 else [4, 8, 10])
