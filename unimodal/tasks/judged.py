"""COCO's 5K test split under later judgements: the finds of an evaluation by COCO's ids, for `unimodal.metrics.judged`."""

from typing import Any

import torch

from unimodal.data.pairs import Pairs
from unimodal.data.readers import Listed
from unimodal.metrics import JudgedMetrics, first_stage, judged_metrics, require_judged
from unimodal.metrics.judged import DEPTH
from unimodal.tasks.evaluation import Evaluation, EvaluationSettings


def coco_ids(pairs: Pairs) -> tuple[list[int], list[int]]:
    """COCO's ids of all images and of all captions of a split, in its order.

    Raises:
        ValueError: the data have none.
    """
    if not isinstance(pairs, Listed):
        raise ValueError(
            f"{pairs.name} {pairs.split} has no COCO ids; Karpathy's file of COCO, dataset_coco.json, and COCO's own, "
            "captions_val2017.json, have them"
        )
    ids = [pairs.coco_ids(i) for i in range(len(pairs))]
    return [image for image, _ in ids], [caption for _, captions in ids for caption in captions]


def require_judgeable(pairs: Pairs, settings: EvaluationSettings) -> None:
    """Refuses what cannot be judged, before any of it is read.

    Raises:
        ImportError: eccv-caption is not installed.
        ValueError: folds, data without COCO's ids, or without a query that was judged.
    """
    if settings.folds > 1:
        raise ValueError(f"got folds={settings.folds}; the judgements are of COCO's 5K test split as a whole, give 1")
    images, captions = coco_ids(pairs)
    require_judged(set(captions), set(images))


def judged_retrieval(evaluation: Evaluation, results: dict[str, Any]) -> dict[str, dict[str, JudgedMetrics]]:
    """ECCV Caption's and CxC's numbers of each stage.

    Args:
        evaluation: has read the whole split.
        results: what its `retrieval` returned.

    Returns:
        {"eccv_caption" or "cxc": {"first" or "reranked": numbers}}.

    Raises:
        ImportError, ValueError: as `require_judgeable`.
    """
    require_judgeable(evaluation.pairs, evaluation.settings)
    images, captions = coco_ids(evaluation.pairs)
    deep = first_stage(
        torch.cat(evaluation.image_embeddings),
        torch.cat(evaluation.text_embeddings),
        torch.cat(evaluation.text_image_ids),
        image_id=torch.cat(evaluation.image_ids),
        k=DEPTH,
    )
    found = results["candidates"]
    out: dict[str, dict[str, JudgedMetrics]] = {"eccv_caption": {}, "cxc": {}}
    for stage, ranks in results["ranks"].items():
        ranked = {}
        for name, first, queries, gallery in zip(("t2i", "i2t"), deep, (captions, images), (images, captions)):
            top = first.index[:, :0]
            if stage == "reranked":
                best = found[f"{name}_final"].argsort(dim=1, descending=True, stable=True)
                top = found[name].index.gather(1, best)
            rows = [dict.fromkeys([*a, *b]) for a, b in zip(top.tolist(), first.index.tolist())]
            ranked[name] = {query: [gallery[row] for row in some] for query, some in zip(queries, rows)}
        judged = judged_metrics(ranked["t2i"], ranked["i2t"], ranks.protocol)
        out["eccv_caption"][stage], out["cxc"][stage] = judged
    return out
