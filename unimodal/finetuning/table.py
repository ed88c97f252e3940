"""The table of a fine-tuning: what a model could do before and after, with intervals and the paired test, image by image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unimodal.data.batch import Batch
from unimodal.data.module import PairData
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.metrics import Interval, PairedTest, bootstrap_interval, cider_d, compare, paired_test
from unimodal.model import UnimodalModel
from unimodal.onednn import inference
from unimodal.tasks import Evaluation, EvaluationSettings

BATCH = 32  # images that are read at a time


@dataclass(frozen=True)
class Row:
    """One measure, in points, of both models on the same images; intervals of 95 %."""

    stage: str
    measure: str
    before: float
    before_interval: tuple[float, float]
    after: float
    after_interval: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    p_value: float

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Row":
        """From the values of `dataclasses.asdict`, in which JSON has lists for intervals."""
        plain: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
        return cls(**plain)


def evaluation_settings(jobs: tuple[str, ...], captions: int) -> EvaluationSettings:
    """How these jobs are measured: by the model's own scoring rule, and on so many captioned images."""
    rerank_k = None if "matching" in jobs else 0
    return EvaluationSettings(rerank_k=rerank_k, captions=captions if "captioning" in jobs else 0, pictures=0)


@inference()
def measure(
    models: Sequence[UnimodalModel],
    processor: Processor,
    pairs: Pairs,
    settings: EvaluationSettings,
    device: Any,
    *,
    same_towers: bool,
) -> list[dict[str, Any]]:
    """What `Evaluation.results` gives of a split for each model; towers that all have alike read it once."""
    first = models[0]
    data = PairData(test=pairs, batch_size=BATCH)
    data.bind(first.config, first.backbone, first.language_captioner, processor)
    evaluations = [Evaluation(model.to(device).eval(), processor, pairs, settings) for model in models]
    for step in data.test_dataloader():
        batch = data.transfer_batch_to_device(step, device, 0)
        if same_towers:
            batch = _read_by_towers(first, batch)
        for evaluation in evaluations:
            evaluation.add(batch)
    return [evaluation.results() for evaluation in evaluations]


def _read_by_towers(model: UnimodalModel, batch: Batch) -> Batch:
    """A batch with what the towers make of its pictures and texts in place of the pictures."""
    out = {name: value for name, value in batch.items() if name != "image"}
    pixels = batch["image"]
    out["image_features"] = model.backbone.image_features(pixels)
    out["image_features_mask"] = model.backbone.image_mask(pixels)
    if "text" in model.backbone.modalities:
        out["text_features"] = model.backbone.text_features(batch["text"], batch["text_mask"])
    return out


def score(results: dict[str, Any], jobs: tuple[str, ...]) -> float:
    """What chooses the best step: the mean over the jobs of how well each is done.

    Retrieval counts by the mean reciprocal rank of both directions, which moves where R@1 of few images stands still, captions by CIDEr-D.
    """
    values = []
    for job, stage in (("embedding", "first"), ("matching", "reranked")):
        if job in jobs and stage in results.get("ranks", {}):
            ranks = results["ranks"][stage]
            both = (ranks.text_to_image, ranks.image_to_text)
            values.append(float(np.mean([(1 / rank.double()).mean().item() for rank in both])))
    if "captioning" in jobs and "captions" in results:
        values.append(results["captions"].cider_d / 100)
    return float(np.mean(values))


def table(before: dict[str, Any], after: dict[str, Any], pairs: Pairs, seed: int) -> list[Row]:
    """Every measure that both have."""
    rows: list[Row] = []
    for stage, ranks in after.get("ranks", {}).items():
        earlier = before["ranks"][stage]
        ours, theirs = earlier.intervals(seed=seed), ranks.intervals(seed=seed)
        tests = compare(earlier, ranks, seed=seed)
        rows += [_row(stage, name, ours[name], theirs[name], test) for name, test in tests.items()]
    return [*rows, *_captions(before, after, pairs, seed)]


def _captions(before: dict[str, Any], after: dict[str, Any], pairs: Pairs, seed: int) -> Iterator[Row]:
    if "captions" not in before or "captions" not in after:
        return
    protocol = after["captions"].protocol
    references = [pairs.captions(i) for i in range(protocol.images)]
    earlier, later = (cider_d(results["written"], references) for results in (before, after))
    intervals = [bootstrap_interval(one, protocol, seed=seed) for one in (earlier, later)]
    yield _row(
        "captions", "cider_d", intervals[0], intervals[1], paired_test(earlier, later, (protocol, protocol), seed=seed)
    )


def _row(stage: str, name: str, before: Interval, after: Interval, test: PairedTest) -> Row:
    return Row(
        stage=stage,
        measure=name,
        before=before.value,
        before_interval=(before.low, before.high),
        after=after.value,
        after_interval=(after.low, after.high),
        difference=test.difference,
        interval=(test.low, test.high),
        p_value=test.p_value,
    )
