"""LLM-Streamline (arXiv 2403.19135): train one lightweight layer in the place of a window of layers.

The window ``[b, b + n]`` is the one whose entering state h_{b−1} and leaving state h_{b+n} have the highest mean cosine ("layer
pruning"). Its first layer stays and is trained to map h_{b−1} to h_{b+n} ("layer replacement", by the mean squared error); the
n layers after it go. So the block is ``[b + 1, b + n]``, its host is the trained layer, and b may be 0, where the embedding
enters.

The replacement is the whole decoder layer, or only its MLP and the norm before it (``llm_streamline_form``). No class of
transformers has layers without an attention; with ``plain``, the attention stays and adds nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from replaceme.base.combinations import Settings, Use, Values
from replaceme.methods.method import Bench, Method, drop
from replaceme.selection.criteria import WINDOW

if TYPE_CHECKING:
    from torch import Tensor

    from replaceme.models.families import Family

TITLES = {"layer": "LLM-Streamline (a trained layer)", "mlp": "LLM-Streamline (a trained MLP)"}


class Training(Settings):
    """Parameters of the trained layer."""

    llm_streamline_form: Annotated[Literal["layer", "mlp"], Use(("repair",))] = "layer"
    """What is trained in the block's place: the whole layer before it, or only the MLP of that layer, without an attention."""
    llm_streamline_learning_rate: Annotated[float, Use(("repair",))] = Field(2e-4, gt=0)
    """AdamW's peak learning rate."""
    llm_streamline_epochs: Annotated[int, Use(("repair",))] = Field(1, ge=1)
    """Passes over the documents, batch_size documents per step."""


def work(bench: Bench) -> dict[str, Any]:
    """Train the host, add its weights to the edits, and return figures of the training."""
    from replaceme.base.compute import require_resident
    from replaceme.methods.layer_lesson import LayerLesson
    from replaceme.training.checkpoints import checkpoints_in, key_of
    from replaceme.training.curves import write_curves
    from replaceme.training.training import Course, entering_and_leaving, figures_of, settings_of, train

    own = Training.of(bench.params)
    params, model, family = bench.params, bench.model, bench.family
    (block,) = bench.plan.blocks
    host = family.decoder_layers(model)[block.host]
    require_resident({block.host: host}, "which is to be trained")
    bare = (family.attention, family.attention_norm) if own.llm_streamline_form == "mlp" else None
    folder = checkpoints_in(bench.folder)
    course = Course(
        own.llm_streamline_learning_rate, own.llm_streamline_epochs, params.batch_size, "llm_streamline_learning_rate"
    )
    inputs, targets = entering_and_leaving(
        model, family, bench.documents, block.host, block.end - 1,
        batch_size=params.batch_size, folder=bench.folder, description="walking to the cut",
    )  # fmt: skip
    lesson = LayerLesson(model, family, block.host, bench.documents, inputs, targets, bare or ())
    settings = {
        **settings_of(course, next(host.parameters()).device),
        "config": model.config.to_json_string(),
        "layer": block.host,
        "form": own.llm_streamline_form,
        "documents": [len(document) for document in bench.documents.documents],
    }
    key = key_of(settings, [*bench.documents.documents, inputs, targets, *host.parameters()])
    parameters, curves = train(lesson, lesson.learners(), course, folder, key)
    write_curves(bench.output, curves)
    _edit(bench, block.host, parameters, bare)
    return figures_of(curves, parameters)


def _edit(bench: Bench, host: int, parameters: dict[str, Tensor], bare: tuple[str, str] | None) -> None:
    """Add the trained weights, and a removed attention, to the edits."""
    import torch

    from replaceme.models.families import in_torch_layout, parameter_of

    edits, layer = bench.edits, bench.family.decoder_layers(bench.model)[host]
    edits.title = TITLES[Training.of(bench.params).llm_streamline_form]
    for name, value in parameters.items():
        edits.parameters[host, name] = in_torch_layout(layer, name, value.detach().cpu())
    if bare and bench.params.plain:
        for name in bench.family.ends(layer, "attention_output"):
            edits.parameters[host, name] = torch.zeros_like(parameter_of(layer, name), dtype=torch.float32, device="cpu")
    elif bare:
        edits.without_attention[host] = bare


def refuses(values: Values, kind: str, family: Family | None) -> list[str]:
    """Refuse a bare MLP where it is not derived: attention and MLP in parallel, or a norm after the MLP."""
    if family is None or values["llm_streamline_form"] != "mlp":
        return []
    problems = []
    if family.parallel:
        problems.append(
            f"llm_streamline_form: mlp is not derived for the family '{kind}', whose attention and MLP are parallel; use layer."
        )
    if family.obstacle and family.obstacle != "experts":
        problems.append(f"llm_streamline_form: mlp is not derived for {family.obstacle_words(kind)}; use layer.")
    return problems


METHOD = Method(
    settings=Training,
    shared={"plain": Use(("repair",), "llm_streamline_form", ("mlp",))},
    # A fitted map predicts the loss with a trained layer better than an empty cut does.
    stand_in=lambda params: "map",
    solve=drop("LLM-Streamline"),
    criterion=WINDOW,
    work=work,
    plain=lambda params: Training.of(params).llm_streamline_form == "layer" or params.plain,
    trained=True,
    words="trains one layer in the place of one block",
    selections=("angular", "residual", "loss"),
    several=False,
    repairs=False,
    packed=False,
    refuses=refuses,
)
