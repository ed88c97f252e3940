"""From a finished schedule to its results: the final scores on held-out data, `report.json`, the shareable checkpoint and the page."""

import json
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from unimodal.data.pairs import Pairs
from unimodal.files import replacing_contents, write_json
from unimodal.metrics.generation import SceneReport, summarise
from unimodal.model import UnimodalModel
from unimodal.report import Caption, Drawing, Hit, Metric, Report, Score, Search, Stage, Swap, write_report
from unimodal.tasks.evaluation import MEASURES, Evaluation

REPORT, PAGE = "report.json", "index.html"
DRAWN = {
    "drawn": "generation_by_attribute",
    "chosen": "generation_by_attribute_chosen",
    "known": "generation_by_attribute_known",
}


def protocols(evaluation: Evaluation, results: dict[str, Any]) -> dict[str, str]:
    """One line per number on what it means."""
    settings = evaluation.settings
    split = evaluation.protocol()
    where = f"{split.dataset} {split.split} [{split.fingerprint}]"
    out = {}
    for stage in ("first", "reranked"):
        if f"retrieval_{stage}" in results:
            label = results[f"retrieval_{stage}"].protocol.label()
            out[f"t2i_r1_{stage}"] = f"R@1, caption to image; {label}"
            out[f"i2t_r1_{stage}"] = f"R@1, image to caption; {label}"
    if "swaps" in results:
        count = len(results["swaps"])
        for name, judge in (("embed", "cosine of the embeddings"), ("match", "match logit")):
            out[f"swap_accuracy_{name}"] = (
                f"{where}; {count} pairs of a true caption and one with one attribute or relation swapped; share where the true one scores "
                f"higher by the {judge}, ties wrong"
            )
    if "captions" in results:
        captions = results["captions"].protocol
        out["caption_exact_attributes"] = (
            f"{where}; {captions.images} images, {captions.decoding}; share of captions, parsed back to symbols, with every object's "
            "shape, colour, size and texture and the relation right and nothing invented"
        )
        for name in ("cider_d", "bleu_4"):
            out[name] = captions.label()
    if "drawn" in results:
        judged = (
            f"for the first caption of each of {len(results['drawn'].prompts)} scenes, {settings.steps} steps, guidance "
            f"{settings.guidance_scale:g}; share of pictures in which a checker that reads pixels finds every asked attribute "
            "(two objects with shape, colour, size, texture; relation; background where the caption names it)"
        )
        out["generation_attribute_accuracy"] = f"{where}; one picture {judged}"
        if "chosen" in results:
            out["generation_attribute_accuracy_chosen"] = (
                f"{where}; the best of {settings.drawings} pictures by the model's own cosine + {evaluation.rule.scale:g} match logit "
                + judged
            )
        if "known" in results:
            known = evaluation.known
            assert known is not None
            out["generation_attribute_accuracy_known"] = (
                f"{known.name} {known.split} [{known.fingerprint()}], scenes that no stage trained on, of pairs of shape and colour that "
                f"training showed; one picture {judged}"
            )
    return out


def write_results(
    output: Path,
    model: UnimodalModel,
    pairs: Pairs,
    evaluation: Evaluation,
    results: dict[str, Any],
    history: dict[str, dict[str, Any]],
    about: dict[str, str],
    aims: dict[str, float],
) -> dict[str, Any]:
    """Write `report.json` and `index.html` into `output`; returns the report's content.

    Args:
        output: the schedule's folder.
        model: what the last stage left.
        pairs: the split that `results` are about.
        evaluation: the finished evaluation.
        results: what it measured.
        history: each stage's `done.json`.
        about: `title` and `summary` of the page.
        aims: what the schedule hopes for, by the name of the number.
    """
    numbers = evaluation.numbers(results)
    lines = protocols(evaluation, results)
    wall = sum(stage["seconds"] for stage in history.values()) + results["seconds"]
    memory = max([stage["peak_memory_mb"] for stage in history.values()] + [results["peak_memory_mb"]])
    content = {
        "metrics": {name: numbers[name] for name in MEASURES if name in numbers},
        "protocol": {name: lines[name] for name in numbers},
        "wall_seconds": round(wall, 1),
        "peak_memory_mb": round(memory, 1),
        "more": _more(results),
        "stages": {
            name: {"steps": stage["steps"], "seconds": round(stage["seconds"], 1), "validation": stage["scores"]}
            for name, stage in history.items()
        },
    }
    page = Report(
        title=about["title"],
        summary=about["summary"],
        facts=_facts(model, pairs),
        wall_seconds=wall,
        peak_memory_mb=memory,
        metrics=_metrics(numbers, lines, aims),
        stages=[_stage(output, name, stage) for name, stage in history.items()],
        scores=_scores(history),
        searches=_searches(pairs, results),
        swaps=_swaps(pairs, results),
        captions=_captions(pairs, results),
        drawings=_drawings(results),
    )
    with replacing_contents(output, {REPORT, PAGE}.__contains__) as fresh:  # both of one run, whatever happens
        write_json(fresh / REPORT, content)
        write_report(fresh / PAGE, page)
    return content


def _more(results: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for stage in ("first", "reranked"):
        if f"retrieval_{stage}" in results:
            out[f"retrieval_{stage}"] = results[f"retrieval_{stage}"].scores()
    if "captions" in results:
        out["captions"] = results["captions"].scores()
    for key, name in DRAWN.items():
        if key in results:
            out[name] = summarise(results[key].checks)
    return out


def _facts(model: UnimodalModel, pairs: Pairs) -> dict[str, str]:
    backbone, bridge = model.config.backbone, model.config.bridge
    count = sum(p.numel() for p in model.parameters())
    reader = "" if bridge is None else f", Q-Former of {bridge.layers} x {bridge.width}"
    return {
        "Model": f"{count / 1e6:.1f} M parameters: {backbone.label}{reader}",
        "Heads": ", ".join(model.jobs),
        "Data": f"{pairs.name}: scored on {len(pairs)} held-out images of the {pairs.split} split",
    }


NAMES = {
    "t2i_r1": "Text to image R@1",
    "i2t_r1": "Image to text R@1",
    "swap_accuracy": "Swapped captions told apart",
    "caption_exact_attributes": "Captions with everything right",
    "generation_attribute_accuracy": "Pictures with everything right",
    "generation_attribute_accuracy_chosen": "Pictures that the model chose itself",
    "generation_attribute_accuracy_known": "Pictures of combinations that training showed",
    "cider_d": "Captions, CIDEr-D / 100",
    "bleu_4": "Captions, BLEU-4 / 100",
}


def unit(measure: str) -> Literal["share", "number"]:
    """How a measure is shown: CIDEr-D has no upper end at 1, so it is no percentage."""
    return "number" if measure == "cider_d" else "share"


def _metrics(numbers: dict[str, float], lines: dict[str, str], aims: dict[str, float]) -> list[Metric]:
    rows: list[Metric] = []
    for name, title in NAMES.items():
        pair = (f"{name}_first", f"{name}_reranked") if name.endswith("r1") else (f"{name}_embed", f"{name}_match")
        row: dict[str, Any] = {"name": title, "unit": unit(name)}
        for key, column in ((pair[0], "first"), (pair[1], "reranked"), (name, "value")):
            if key in numbers:
                row[column] = numbers[key]
                row["protocol"] = lines[key]
                if key in aims:
                    row.setdefault("aims", {})[column] = aims[key]
        if "protocol" in row:
            rows.append(cast(Metric, row))
    return rows


def _stage(output: Path, name: str, stage: dict[str, Any]) -> Stage:
    losses: dict[str, list[tuple[int, float]]] = {}
    log = output / name / "losses.jsonl"
    rows = (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    )  # it may train nothing
    span = max(1, len(rows) // 120)  # mean of so many steps per point of the curve
    for start in range(0, len(rows), span):
        part = rows[start : start + span]
        for key in part[0]:
            if key != "step" and "/" not in key:
                losses.setdefault(key, []).append((part[-1]["step"], float(np.mean([row[key] for row in part]))))
    untouched = ", ".join(stage.get("untouched_heads", ())) or "none"
    return Stage(
        name=name,
        goal=stage["about"],
        trained={row["part"]: row["trained"] for row in stage["parts"] if row["trained"]},
        frozen={
            row["part"]: row["parameters"] - row["trained"]
            for row in stage["parts"]
            if row["trained"] < row["parameters"]
        },
        proof=stage.get(
            "proof", f"frozen tensors bit-identical at the end; heads with bit-identical outputs: {untouched}"
        ),
        steps=stage["steps"],
        seconds=stage["seconds"],
        losses=losses,
    )


def _scores(history: dict[str, dict[str, Any]]) -> list[Score]:
    measures = dict.fromkeys(key for stage in history.values() for key in stage["scores"])
    return [
        Score(name=measure, after=[stage["scores"].get(measure) for stage in history.values()], unit=unit(measure))
        for measure in measures
    ]


def _picture(pairs: Pairs, i: int) -> np.ndarray:
    return np.asarray(pairs.image(i))


def _searches(pairs: Pairs, results: dict[str, Any], count: int = 6, shown: int = 5) -> list[Search]:
    found = results["candidates"]
    if "t2i_match" not in found:
        return []
    first, match = found["t2i"], found["t2i_match"]
    captions = [(i, caption) for i in range(len(pairs)) for caption in pairs.captions(i)]
    # Queries that reranking changed come first: the others look the same twice.
    changed = (first.rank != found["t2i_reranked_rank"]).nonzero().flatten().tolist()
    queries = (changed[:: max(1, len(changed) // count)] + list(range(0, len(captions), 7)))[:count]
    rows = []
    for query in queries:
        right, text = captions[query]

        def hits(order: torch.Tensor, scores: torch.Tensor, right: int = right, query: int = query) -> list[Hit]:
            return [
                Hit(
                    score=float(scores[j]),
                    right=(image := int(first.index[query, j])) == right,
                    picture=_picture(pairs, image),
                )
                for j in order[:shown].tolist()
            ]

        by_match = match[query].argsort(descending=True)
        probability = match[query].sigmoid()
        rows.append(
            Search(
                text=text,
                first=hits(torch.arange(first.index.shape[1]), first.scores[query]),
                reranked=hits(by_match, probability),
            )
        )
    return rows


def _swaps(pairs: Pairs, results: dict[str, Any], count: int = 9) -> list[Swap]:
    rows = [row for row in results.get("swaps", []) if "match" in row]
    wrong = [row for row in rows if row["match"][0] <= row["match"][1]][:2]  # failures are shown, too
    kinds: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["image"] not in {r["image"] for r in kinds.values()}:
            kinds.setdefault(row["kind"], row)
    return [
        Swap(
            picture=_picture(pairs, row["image"]),
            true=row["true"],
            false=row["false"],
            embedding=row["embed"],
            matching=row["match"],
        )
        for row in [*list(kinds.values())[: count - len(wrong)], *wrong]
    ]


def _captions(pairs: Pairs, results: dict[str, Any], count: int = 12) -> list[Caption]:
    rows = []
    for i, text in enumerate(results.get("written", [])[:count]):
        row = Caption(picture=_picture(pairs, i), text=text, reference=pairs.captions(i)[0])
        if "caption_right" in results:
            row["right"] = results["caption_right"][i]
        rows.append(row)
    return rows


def _verdict(check: SceneReport) -> str:
    """What the checker of pixels found wrong, in words."""
    wrong = [name for name, right in vars(check).items() if right < 1]
    return f"wrong: {', '.join(wrong)}" if wrong else "everything right"


def _drawings(results: dict[str, Any], count: int = 40) -> list[Drawing]:
    if "drawn" not in results:
        return []
    drawn = results["drawn"]
    return [
        Drawing(
            text=text,
            picture=(picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8),
            right=check.all_right,
            verdict=_verdict(check),
        )
        for text, picture, check in list(zip(drawn.prompts, drawn.pictures, drawn.checks, strict=True))[:count]
    ]
