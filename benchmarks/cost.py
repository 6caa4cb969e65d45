"""Cost of each step, in bare forward passes over the same tokens.

``python -m benchmarks.cost [documents]`` uses the model, text, dtype, batch size and threads of params.yaml, and its
dataset_size unless ``documents`` (at least 5) is given. A bare pass runs the decoder on the same batches without computing
logits. The steps run in turn, in several rounds, and their medians are compared.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from replaceme.base.parameters import Params, read_params
from replaceme.base.plan import Plan
from replaceme.base.progress import silence_libraries
from replaceme.calibration.draw import draw_documents
from replaceme.calibration.find import find_datasets
from replaceme.calibration.sources import list_sources
from replaceme.edits.edits import Edits
from replaceme.methods.registry import METHODS, criterion_of
from replaceme.models.context import ModelContext
from replaceme.models.devices import resolve_device, use_processor
from replaceme.models.families import decoder_of
from replaceme.models.find import find_model
from replaceme.repair.repair import STEPWISE, repair_layers
from replaceme.repair.resume import Checkpoints
from replaceme.selection.blocks import smallest_blocks
from replaceme.selection.criteria import allowed_starts
from replaceme.selection.cut_loss import SHORTLIST, cut_losses
from replaceme.statistics.cut_statistics import take_statistics
from replaceme.statistics.profile import profile_model
from replaceme.training.distillation import LogitDistillation, plan_steps
from replaceme.training.training import train

ROUNDS = 3
LIMITS = {"profile, activations and solve of a map": 2.2, "choice by loss": 1.5, "repair": 2.5}


def main(size: int | None) -> None:
    """Measure and print."""
    silence_libraries()
    params = read_params(Path("params.yaml"))
    size = size or params.dataset_size
    use_processor(params.threads)
    source = find_model(params)
    model, family = source.load(params.dtype, resolve_device(params.device)), source.family()
    corpora = [dataset.open(params.seed) for dataset in find_datasets(params) if dataset]
    documents, _ = draw_documents(corpora, source.tokenizer(), params.model_copy(update={"dataset_size": size}))
    context = ModelContext(model, family, documents, params.batch_size)
    profiled = profile_model(context)
    starts = allowed_starts(params, len(context.layers), criterion_of(params))
    cuts = smallest_blocks(profiled["residual"], starts, params.layers_to_skip, SHORTLIST)
    block = cuts[0]

    def bare() -> None:
        base = decoder_of(model)
        with torch.inference_mode():
            for batch in documents.batches(params.batch_size, str(model.device)):
                base(input_ids=batch.input_ids, use_cache=False)

    def fit(setting: Params) -> None:
        method = METHODS[setting.method]
        taken = take_statistics(context, block, method.statistics(setting))
        solved = method.solve(setting, block, taken.__getitem__)
        if setting.repair or setting.transform in STEPWISE:
            solved.edits.removed_layers = [*block.layers]
            plan = Plan((block,), method.statistics(setting))
            with tempfile.TemporaryDirectory() as folder:
                repair_layers(setting, context, solved.edits, plan, Checkpoints(Path(folder), ""))

    settings = {
        transform: params.model_copy(update={"method": "lstsq", "transform": transform, "repair": False})
        for transform in ("dense", "refit", "joint", "channels")
    }

    def heal() -> None:
        task = LogitDistillation(context, Edits("", [*block.layers]), block.layer_before_cut)
        shares = [source.share for source in list_sources(params)]
        steps = plan_steps(documents, shares, documents.token_count, params.heal_tokens_per_step, params.heal_learning_rate)
        with tempfile.TemporaryDirectory() as folder:
            train(task, task.trainable_parameters(), steps, Path(folder), "")

    steps: dict[str, Callable[[], object]] = {
        "bare forward pass": bare,
        "profile": lambda: profile_model(context),
        "fit of a map": lambda: fit(settings["dense"]),
        "fit of a refit": lambda: fit(settings["refit"]),
        "fit of a joint": lambda: fit(settings["joint"]),
        "fit of channels": lambda: fit(settings["channels"]),
        "fit of a map, repair": lambda: fit(settings["dense"].model_copy(update={"repair": True})),
        "losses of maps": lambda: cut_losses(context, cuts, "map"),
        "losses of refits": lambda: cut_losses(context, cuts, "refit"),
        "losses of joint fits": lambda: cut_losses(context, cuts, "joint"),
        "healing on as many tokens": heal,
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = medians["bare forward pass"]
    print(
        f"{documents.token_count} tokens, {params.dtype}, batch {params.batch_size}, {params.threads} threads, "
        f"median of {ROUNDS}"
    )
    for name, median in medians.items():
        print(f"{name:<24} {median:8.2f} s  {median / reference:6.3f} x  {documents.token_count / median:8.0f} tokens/s")
    sums = (
        medians["profile"] + medians["fit of a map"],
        max(median for name, median in medians.items() if name.startswith("losses")),
        medians["fit of a map, repair"] - medians["fit of a map"],
    )
    for (name, limit), total in zip(LIMITS.items(), sums, strict=True):
        print(f"{name}: {total / reference:.3f} x (limit {limit})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
