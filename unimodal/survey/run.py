"""The survey: each system trained and scored alike, a folder for each, and the page of all that are there.

    OUT/NAME/result.json         what was measured, with its protocol and settings
    OUT/NAME/system.safetensors  the trained system, and its configuration in system.yaml
    OUT/NAME/trained.json        what its training was, written when the system is saved and before it is scored
    OUT/NAME/ranks.safetensors   the rank of every query, for `unimodal compare`
    OUT/index.html               the two tables

Runs with corrupted captions or few examples lie in OUT/SETTING/NAME. A system whose
result is there is not run again; a file of other data, budget or encoders is refused.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimodal.files import locked, replacing, write_json, write_text
from unimodal.metrics import (
    DirectionMetrics,
    Interval,
    Protocol,
    Ranks,
    bootstrap_interval,
    relevance_metrics,
    save_ranks,
)
from unimodal.onednn import inference
from unimodal.retrieval import similarity
from unimodal.survey.data import SurveyData
from unimodal.survey.encoders import SharedEncoders
from unimodal.survey.explain import deletion_test
from unimodal.survey.hallucination import hallucination_on
from unimodal.survey.score import ITEMS, Ranking, embeddings, rank, scored_again, states
from unimodal.survey.specs import Spec, read_spec
from unimodal.survey.train import Budget, Precision, train
from unimodal.systems import Images, System, Texts

RESULT, TRAINED, CONFIG, WEIGHTS = "result.json", "trained.json", "system.yaml", "system.safetensors"
RANKS, LOCK = "ranks.safetensors", ".unimodal.run.lock"
TIMED = 20  # queries whose time is taken
EXPLAINED = 16  # pairs of the deletion test
KS = (1, 5, 10)


@dataclass(frozen=True)
class Run:
    """What all systems of a survey have in common.

    Attributes:
        data: what they learn from and rank.
        budget: what each may spend on training.
        out: folder of the results.
        seed: of the first weights and of all draws.
        setting: what is special about the training data (noise, few shots), for the results; empty where nothing is.
        precision: of training; everything is ranked in float32.
        zero_shot: whether other data is ranked than is learned from.
    """

    data: SurveyData
    budget: Budget
    out: Path
    seed: int = 0
    setting: str = ""
    precision: Precision = "float32"
    zero_shot: bool = False


def run_system(name: str, config: Path, run: Run, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and score one system, or read what was measured; the JSON file's content.

    A system that another process trains at the moment is waited for. One that was trained and could not be scored is scored.

    Args:
        name: the system's, which its files are called by.
        config: its YAML file; another system that it takes its shortlist from lies beside it.
        run: what all have in common.
        say: takes lines on how far it is.

    Raises:
        ValueError: the folder holds results of the name under other settings.
    """
    spec = read_spec(config)
    settings = _settings(spec, config, run)
    folder = run.out / name
    if (known := _measured(folder, settings)) is not None:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, f"{folder}: the system {name}", timeout=-1):
        if (known := _measured(folder, settings)) is not None:  # by the process that was waited for
            return known
        before = _before(spec, config)
        embedder = None if before is None else _trained(before, run, say)
        system, trained = _train(name, spec, config, settings, run, say)
        result = _measure(name, spec, system, trained, embedder, settings, run, say)
        write_json(folder / RESULT, result)
        return result


def _measured(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured of a system under these settings; None where nothing was."""
    known = _read(folder / RESULT)
    if known is not None and known["settings"] != settings:
        differ = sorted(key for key in settings if known["settings"].get(key) != settings[key])
        raise ValueError(
            f"{folder / RESULT} was measured under other settings ({', '.join(differ)}); give another --out, or move it away"
        )
    return known


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where it is not there, or where a kill or a full disk left no whole one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _train(
    name: str, spec: Spec, config: Path, settings: dict[str, Any], run: Run, say: Callable[[str], None]
) -> tuple[System, dict[str, Any]]:
    """The trained system, saved before anything else can fail, and what its training was; as it was saved, where it was before."""
    folder, start = run.out / name, time.monotonic()
    system = _built(spec, run.data.encoders, run.data.categories, run.seed)
    trained = _read(folder / TRAINED)
    if trained is not None and trained["settings"] == settings:
        with suppress(FileNotFoundError, SafetensorError):  # weights that were lost or cut are trained again
            system.load_state_dict(load_file(folder / WEIGHTS))
            return system.eval(), trained
    say(f"{spec.title}: trains on {run.budget}")
    (folder / TRAINED).unlink(missing_ok=True)
    system.prepare(run.data.in_order())
    stages = train(
        system,
        spec.stages,
        lambda stage, what: _batches(system, name, stage, what, run),
        run.budget,
        precision=run.precision,
    )
    trained = {
        "settings": settings,
        "stages": stages,
        "findings": system.findings(),
        "training_seconds": time.monotonic() - start,
    }
    write_text(folder / CONFIG, config.read_text(encoding="utf-8"))
    with replacing(folder / WEIGHTS) as unfinished:
        save_file({key: value.contiguous() for key, value in system.state_dict().items()}, unfinished)
    write_json(folder / TRAINED, trained)
    return system, trained


def _measure(
    name: str,
    spec: Spec,
    system: System,
    trained: dict[str, Any],
    embedder: System | None,
    settings: dict[str, Any],
    run: Run,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that is measured of a trained system; its ranks are written."""
    say(f"{spec.title}: ranks")
    images, texts, image_id, text_image_id = run.data.gallery(
        pixels=system.needs_pixels or embedder is not None and embedder.needs_pixels
    )
    start = time.monotonic()
    shortlist = None if embedder is None else embeddings(embedder, images, texts)
    ranking = rank(system, spec.scoring, images, texts, image_id, text_image_id, shortlist=shortlist)
    ranked_for = time.monotonic() - start
    protocol = _protocol(run)
    stages = trained["stages"]
    result = {
        "name": name,
        "title": spec.title,
        "paper": spec.paper,
        "interaction": spec.interaction,
        "inferred": spec.inferred,
        "setting": run.setting,
        "corrupted": run.data.corrupted,
        "settings": settings,
        "scoring": asdict(spec.scoring),
        "encoders": run.data.encoders.source,
        "grid": run.data.encoders.grid,
        "categories": run.data.categories,
        "regime": _regime(system, spec, run),
        "protocol": {"first": protocol.label(), "reranked": None},
        "stages": stages,
        "parameters": _own_size(system),
        "shared": sum(run.data.encoders.sizes[kind] for kind in system.towers),
        "trained": len(spec.stages) and max(stage["trained"] for stage in stages.values()),
        "findings": trained["findings"],
        "training_seconds": trained["training_seconds"],
        "ranking_seconds": ranked_for,
        "milliseconds": _milliseconds(system, spec, images, texts, run.data.encoders, embedder),
        "index_bytes": _index_bytes(system, spec, images, embedder),
        "published": [asdict(row) for row in spec.published],
    }
    result |= _accuracy(system, spec, run, ranking, protocol, images, texts, image_id, text_image_id)
    say(f"{spec.title}: explains")
    explained = EXPLAINED // 2 if system.needs_pixels else EXPLAINED  # there each token removed is a picture read again
    result["deletion"] = deletion_test(system, images, texts, image_id, text_image_id, pairs=explained, seed=run.seed)
    if type(system).write is not System.write:
        result["captions"] = hallucination_on(_captions(system, images, run), run.data.val)
    if spec.scoring.metric == "recall":
        _save_ranks(run.out / name / RANKS, ranking, spec, protocol, image_id, text_image_id)
    return result


@inference()
def _captions(system: System, images: Images, run: Run) -> list[str]:
    ids = [row for rows in torch.arange(len(images.tokens)).split(ITEMS) for row in system.write(images.select(rows))]
    return [run.data.encoders.processor.decode(row) for row in ids]


def load_system(folder: Path, encoders: SharedEncoders | None = None) -> tuple[Spec, System, SharedEncoders]:
    """A system that `run_system` trained, its configuration, and the encoders that it reads by.

    Args:
        folder: OUT/NAME.
        encoders: those it was trained on, where they are loaded already; otherwise they are loaded from where they were.

    Raises:
        FileNotFoundError: the folder holds no trained system.
    """
    if not (folder / RESULT).exists():
        raise FileNotFoundError(f"{folder} holds no system that `unimodal survey` trained; give OUT/NAME of one")
    result = json.loads((folder / RESULT).read_text())
    spec = read_spec(folder / CONFIG)
    encoders = encoders or SharedEncoders(result["encoders"], result["grid"])
    system = _built(spec, encoders, result["categories"], seed=0)
    system.load_state_dict(load_file(folder / WEIGHTS))
    return spec, system.eval(), encoders


def _built(spec: Spec, encoders: SharedEncoders, categories: Sequence[str], seed: int) -> System:
    """The system with its first weights; one that learns categories is told which there are."""
    torch.manual_seed(seed)
    told = {"categories": len(categories), "category_names": list(categories)}
    accepted = spec.system.keywords  # type: ignore[attr-defined]  # of a partial: all that the class takes
    return spec.system(encoders, **{key: value for key, value in told.items() if key in accepted})


def _batches(system: System, name: str, stage: str, settings: Any, run: Run) -> Any:
    order = None
    if settings.order == "hard":
        order = run.out / name / f"{stage}.batches.json"
        system.eval()
        with torch.no_grad():
            found = torch.cat([system.embed_images(images) for images in run.data.training_images()])
        if found.ndim == 3:  # of several vectors of an image their mean
            found = F.normalize(found.mean(1), dim=-1)
        run.data.write_hard_batches(order, found, settings.batch_size)
    return run.data.batches(stage, settings, pixels=system.needs_pixels, order=order)


def _before(spec: Spec, config: Path) -> Path | None:
    """The file of the system whose first candidates this one scores; None where it ranks by itself."""
    first = spec.scoring.shortlist
    return None if first is None else config.parent / f"{first}.yaml"


def _trained(config: Path, run: Run, say: Callable[[str], None]) -> System:
    """Another system of the run, which is trained now where it was not."""
    run_system(config.stem, config, run, say)
    return load_system(run.out / config.stem, run.data.encoders)[1]


def _own_size(system: System) -> int:
    """The numbers of a system beside the shared towers, whether a stage trains them or not."""
    fixed = (x for module in system.modules() if isinstance(module, System) for x in module.untrained())
    return sum(x.numel() for some in (system.parameters(), fixed) for x in some)


def _regime(system: System, spec: Spec, run: Run) -> str:
    """What a system saw of the data it is asked about."""
    train = run.data.train
    if not spec.stages and type(system).prepare is System.prepare:
        return "as it comes, nothing learned"
    return f"{'zero-shot from' if run.zero_shot else 'tuned on'} {train.name} {train.split}"


def _settings(spec: Spec, config: Path, run: Run) -> dict[str, Any]:
    """What a result depends on."""
    data = run.data
    before = _before(spec, config)
    files = config.read_bytes() + (b"" if before is None else before.read_bytes())
    return {
        "system": hashlib.sha256(files).hexdigest()[:16],
        "budget": str(run.budget),
        "encoders": data.features.images.store.about["backbone"] if data.features.images else "",
        "image_tokens": data.encoders.image_tokens,
        "train": f"{data.train.name} {data.train.split} [{data.train.fingerprint()}], {len(data.rows)} images",
        "ranked": f"{data.val.name} {data.val.split} [{data.val.fingerprint()}]",
        "setting": run.setting,
        "precision": run.precision,
        "seed": run.seed,
    }


def _protocol(run: Run) -> Protocol:
    val = run.data.val
    counts = {len(val.captions(i)) for i in range(len(val))}
    return Protocol(
        dataset=val.name,
        split=val.split,
        fingerprint=val.fingerprint(),
        images=len(val),
        captions=sum(len(val.captions(i)) for i in range(len(val))),
        captions_per_image=counts.pop() if len(counts) == 1 else None,
    )


def _accuracy(
    system: System,
    spec: Spec,
    run: Run,
    ranking: Ranking,
    protocol: Protocol,
    images: Images,
    texts: Texts,
    image_id: Tensor,
    text_image_id: Tensor,
) -> dict[str, Any]:
    """Recalls with their intervals first and reranked, or mean average precision by category."""
    if spec.scoring.metric == "category":
        return {"map": _by_category(system, run, protocol, images, texts)}
    out: dict[str, Any] = {
        "accuracy": {"first": _recalls(ranking.t2i, ranking.i2t, protocol, image_id, text_image_id, run.seed)}
    }
    if ranking.t2i_reranked is not None:
        again = protocol.reranked(spec.scoring.k, spec.scoring.combine, spec.scoring.scale)
        out["accuracy"]["reranked"] = _recalls(
            ranking.t2i_reranked, ranking.i2t_reranked, again, image_id, text_image_id, run.seed
        )
        out["protocol"] = {"first": protocol.label(), "reranked": again.label()}
    return out


def _recalls(
    t2i: Tensor, i2t: Tensor | None, protocol: Protocol, image_id: Tensor, text_image_id: Tensor, seed: int
) -> dict[str, dict[str, float] | None]:
    """Of ranks [C] and [I]: recalls, median rank and mean recall of each direction, and both together (`both`), with intervals over images:
    captions of one image are no independent queries."""

    def measured(values: np.ndarray, groups: Tensor, statistic: Callable[[np.ndarray], float] = np.mean) -> Interval:
        return bootstrap_interval(values, protocol, seed=seed, groups=groups, statistic=statistic)

    out: dict[str, dict[str, float] | None] = {"t2i": None, "i2t": None, "both": None}
    hits = {}
    for way, found, groups in (("t2i", t2i, text_image_id), ("i2t", i2t, image_id)):
        if found is None:
            continue
        hits[way] = 100.0 * (found[:, None] <= torch.tensor(KS)).double()  # [queries, 3]
        intervals = {f"r{k}": measured(column.numpy(), groups) for k, column in zip(KS, hits[way].T)}
        intervals["mr"] = measured(hits[way].mean(1).numpy(), groups)
        intervals["medr"] = measured(found.double().numpy(), groups, np.median)
        numbers = DirectionMetrics.from_ranks(found)
        out[way] = {**asdict(numbers), "mr": numbers.mr} | _ends(intervals)
    if i2t is not None:
        of_texts = torch.stack([hits["t2i"][text_image_id == i].mean(0) for i in image_id])
        together = torch.cat([of_texts, hits["i2t"]], 1)  # [I, 6]
        intervals = {
            "mr": measured(together.mean(1).numpy(), image_id),
            "rsum": measured(together.sum(1).numpy(), image_id),
        }
        rsum = float(hits["t2i"].mean(0).sum() + hits["i2t"].mean(0).sum())
        out["both"] = {"rsum": rsum, "mr": rsum / 6} | _ends(intervals)
    return out


def _ends(intervals: dict[str, Interval]) -> dict[str, float]:
    return {f"{name}_{end}": getattr(found, end) for name, found in intervals.items() for end in ("low", "high")}


def _by_category(system: System, run: Run, protocol: Protocol, images: Images, texts: Texts) -> dict[str, Any]:
    """Mean average precision over the whole gallery, both ways; what has no category is neither query nor answer."""
    data = run.data
    image, text = embeddings(system, images, texts)
    owners = torch.tensor([i for i in range(len(data.val)) for _ in data.val.captions(i)])
    shown = data.val_labels.any(1)
    spoken = shown[owners]
    known = Protocol(
        dataset=protocol.dataset,
        split=protocol.split,
        fingerprint=protocol.fingerprint,
        images=int(shown.sum()),
        captions=int(spoken.sum()),
    )
    image, text = image[shown], text[spoken]
    image_labels, text_labels = data.val_labels[shown], data.val_labels[owners][spoken]
    t2i = relevance_metrics(text, image, text_labels, image_labels, direction="t2i", protocol=known)
    i2t = relevance_metrics(image, text, image_labels, text_labels, direction="i2t", protocol=known)
    return {
        "t2i": t2i.values["map"],
        "i2t": i2t.values["map"],
        "categories": len(data.categories),
        "protocol": t2i.protocol.label(),
    }


@inference()
def _milliseconds(
    system: System, spec: Spec, images: Images, texts: Texts, encoders: SharedEncoders, embedder: System | None
) -> dict[str, float | None]:
    """One text query at a time against all images, from its token ids: first stage and reranked, in milliseconds."""
    pairs, k = spec.scoring.first == "pair", scored_again(system, spec.scoring)
    first_stage = embedder or system
    needs_state = pairs or k
    image_state = states(system, images, texts.select(torch.arange(1)))[0] if needs_state else ()
    gallery = None
    if not pairs:
        gallery = embeddings(first_stage, images, texts.select(torch.arange(1)))[0]
    first, again = 0.0, 0.0
    count = min(TIMED, len(texts.ids))
    for row in range(count):
        query = texts.select(torch.tensor([row]))
        start = time.perf_counter()
        if "text" in {*system.towers, *first_stage.towers}:
            query = encoders.read_texts(query.ids, query.mask)
        if pairs:
            scores = system.score_matrix(image_state, system.text_state(query))[:, 0]
        else:
            text = first_stage.embed_texts(query)
            assert gallery is not None
            scores = similarity(gallery, text)[:, 0]
        top = scores.topk(min(max(k, 1), len(scores))).indices
        first += time.perf_counter() - start
        if k:
            start = time.perf_counter()
            one = system.text_state(query)
            system.score_pairs(tuple(x[top] for x in image_state), tuple(x.expand(len(top), *x.shape[1:]) for x in one))
            again += time.perf_counter() - start
    return {"first": 1000 * first / count, "reranked": 1000 * (first + again) / count if k else None}


@torch.no_grad()
def _index_bytes(system: System, spec: Spec, images: Images, embedder: System | None) -> int:
    """What is kept of one image to answer queries, as it is in memory: its embedding, and its state where pairs are scored."""
    one = images.select(torch.arange(1))
    kept: list[Tensor] = []
    if spec.scoring.first != "pair":
        kept.append((embedder or system).embed_images(one))
    if spec.scoring.first == "pair" or scored_again(system, spec.scoring):
        kept.extend(system.image_state(one))
    return sum(x.numel() * x.element_size() for x in kept)


def _save_ranks(
    path: Path, ranking: Ranking, spec: Spec, protocol: Protocol, image_id: Tensor, text_image_id: Tensor
) -> None:
    if ranking.i2t is None:
        return  # `compare` reads both directions
    rows = (text_image_id[:, None] == image_id[None]).long().argmax(1)
    stages = {"first": Ranks(protocol, ranking.t2i, ranking.i2t, rows)}
    if ranking.t2i_reranked is not None and ranking.i2t_reranked is not None:
        again = protocol.reranked(spec.scoring.k, spec.scoring.combine, spec.scoring.scale)
        stages["reranked"] = Ranks(again, ranking.t2i_reranked, ranking.i2t_reranked, rows)
    save_ranks(path, stages)


def configs(folder: Path, names: Sequence[str] | None) -> dict[str, Path]:
    """The YAML files of these systems, or of all in a folder; a name may be the path of a YAML file.

    Raises:
        ValueError: there is no system of a name, or there are two; the message has all there are.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if names is None:
        return known
    out: dict[str, Path] = {}
    for given in names:
        name = Path(given).stem if given.endswith(".yaml") else given
        if name in out:
            raise ValueError(
                f"two systems are called {name!r}: {out[name]} and {given}; rename one file, its name is that of its results"
            )
        if given.endswith(".yaml"):
            out[name] = Path(given)
        elif name in known:
            out[name] = known[name]
        else:
            raise ValueError(f"no system {name!r}; there are {', '.join(known)}, and any YAML file by its path")
    return out
