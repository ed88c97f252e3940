"""The model card: what a checkpoint is, how to use it, and what each number means.

Metadata as the Hub reads them (https://huggingface.co/docs/hub/model-cards); every result carries its protocol.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCardData

from unimodal.hub.contents import BackboneContents
from unimodal.model import UnimodalModel
from unimodal.tuning import adapter_of

TASKS = {  # the Hub's name of the task, and which heads it takes
    "any-to-any": {"captioning", "generation"},
    "text-to-image": {"generation"},
    "image-to-text": {"captioning"},
    "feature-extraction": set[str](),
}
USAGE = {  # one line per head
    "embedding": 'scores = model.similarity(model.encode_query("a red circle"), model.encode_document(["one.jpg"]))',
    "matching": 'ranking = model.rank("a red circle", ["one.jpg", "two.jpg"])',
    "captioning": 'captions = model.caption(["one.jpg", "two.jpg"])',
    "generation": 'pictures = model.generate_image(["a red circle"]).images',
}
WHOLE = ['model = unimodal.from_pretrained("this folder or its Hub id")']
BESIDE = [
    'model = unimodal.from_pretrained("the model with the backbone named below")',
    'model.set_adapter(model.load_adapter("this folder or its Hub id"))',
]
LIMITS = (
    "Trained on little data compared with published models. Its results are those of the protocols above and nothing "
    "more; it has not been examined for bias, and pictures or captions may be wrong."
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says beyond what the model says of itself.

    Args:
        name: the model's name.
        summary: what it is, in a sentence or two.
        training: data and procedure, in Markdown.
        cost: what training and use take, and on what machine, in Markdown; empty leaves it out.
        limits: what it should not be used for, in Markdown.
        datasets: Hub ids of training data.
        license: of the weights, as an SPDX name in lower case.
        language: of the texts.
        tags: further tags.
        base_model: Hub id of the model that it was trained from; None where that has none.
    """

    name: str = "unimodal"
    summary: str = "One vision-language model with a shared backbone and bridge and separate heads."
    training: str = "Not described."
    cost: str = ""
    limits: str = LIMITS
    datasets: tuple[str, ...] = ()
    license: str = "apache-2.0"
    language: str = "en"
    tags: tuple[str, ...] = ()
    base_model: str | None = None


class Measured(Protocol):
    """Numbers under a protocol: `unimodal.metrics.Result`."""

    @property
    def protocol(self) -> Any: ...

    def scores(self) -> dict[str, float]: ...


def render_card(
    model: UnimodalModel, backbone: BackboneContents, card: Card, metrics: Sequence[tuple[str, Measured]]
) -> str:
    """The README of a checkpoint: YAML metadata and a Markdown body."""
    heads = [head for head in USAGE if getattr(model.config, head) is not None]
    data = ModelCardData(
        library_name="unimodal",
        license=card.license,
        language=card.language,
        pipeline_tag=next(task for task, needs in TASKS.items() if needs <= set(heads)),
        tags=["unimodal", "image-text-retrieval", *heads, *card.tags],
        datasets=list(card.datasets) or None,
        model_name=card.name,
        base_model=card.base_model,
        eval_results=[result for name, measured in metrics for result in _eval_results(name, measured)] or None,
    )
    sections = [
        f"# {card.name}",
        card.summary,
        "## Use",
        "\n".join(
            ["```python", "import unimodal", "", *(WHOLE if backbone.included else BESIDE)]
            + [USAGE[head] for head in heads]
            + ["```"]
        ),
        "## Parts",
        _parts(model, backbone),
        "## Results",
        "\n\n".join(_table(name, measured) for name, measured in metrics) or "Not measured.",
        "## Training data",
        card.training,
        *(["## Cost", card.cost] if card.cost else []),
        "## Limits",
        card.limits,
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _eval_results(name: str, measured: Measured) -> list[EvalResult]:
    protocol = measured.protocol
    return [
        EvalResult(
            task_type="image-text-retrieval" if protocol.stage else "any-to-any",
            dataset_name=protocol.dataset,
            dataset_type=re.sub(r"\W+", "-", protocol.dataset.lower()),
            dataset_split=protocol.split,
            dataset_revision=protocol.fingerprint,
            metric_type=metric,
            metric_name=f"{name}: {metric} ({protocol.label()})",
            metric_value=value,
            metric_args=asdict(protocol),
        )
        for metric, value in measured.scores().items()
    ]


def _table(name: str, measured: Measured) -> str:
    scores = measured.scores()
    return "\n".join(
        [
            f"**{name}**. Protocol: {measured.protocol.label()}",
            "",
            f"| {' | '.join(scores)} |",
            "|" + " ---: |" * len(scores),
            f"| {' | '.join(f'{value:.4g}' for value in scores.values())} |",
        ]
    )


def _parts(model: UnimodalModel, backbone: BackboneContents) -> str:
    parts = {
        f"backbone: {model.config.backbone.label}": model.backbone,
        **({} if model.bridge is None else {"bridge": model.bridge}),
        **{f"head: {name}": head for name, head in model.heads.items()},
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    for adapter, settings in model.config.adapters.items():
        own = [p for name, p in model.named_parameters() if adapter_of(name) == adapter]
        counts[f"of these, adapter: {adapter} ({settings.kind})"] = sum(p.numel() for p in own)
    rows = [f"| {name} | {count:,} |" for name, count in counts.items()]
    origins = [
        f"- {part}, first weights: {source.source}"
        + (f" at {source.revision}" if source.revision else "")
        + f", sha256 {source.sha256}"
        for part, source in backbone.sources.items()
    ]
    if not backbone.included:
        origins.append(
            f"- the backbone is not in this folder; the fingerprint of its weights is {backbone.fingerprint}"
        )
    return "\n".join(["| Part | Parameters |", "| --- | ---: |", *rows, *([""] + origins if origins else [])])
