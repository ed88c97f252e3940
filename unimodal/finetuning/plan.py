"""What a fine-tuning trains, and by which losses: from a model, the jobs it is to do better, and how much of it may move."""

import fnmatch
from dataclasses import dataclass, replace
from typing import Literal, get_args

from unimodal import arguments, stages
from unimodal.config import AdapterConfig, ModelConfig
from unimodal.model import UnimodalModel
from unimodal.tasks import ITC, ITG, ITM, Objective, OptimizerSettings, SigmoidITC

Job = Literal["embedding", "matching", "captioning"]
Train = Literal["heads", "lora", "all"]
ADAPTER = "finetuned"
RATES: dict[str, float] = {"heads": 1e-3, "lora": 5e-4, "all": 2e-4}
TOWERS = 0.1  # learning-rate factor of towers that train whole
SCALARS = ("log_scale", "pair_bias", "int8_step")  # of the embedding


@dataclass(frozen=True)
class Plan:
    """The model to train, by its configuration, with losses by name, learning-rate factors by parameter, and optimizer settings."""

    config: ModelConfig
    objectives: dict[str, Objective]
    trainable: dict[str, float]
    optimizer: OptimizerSettings


def choose_jobs(model: UnimodalModel, jobs: list[str] | None, name: str) -> tuple[str, ...]:
    """The jobs to train; by default all that the model has of those that pairs can teach.

    Raises:
        ValueError: a job that pairs cannot teach, or whose head the model lacks.
    """
    known = get_args(Job)
    if jobs is None:
        if not (own := tuple(job for job in known if job in model.jobs)):
            raise ValueError(f"{name} has no head that pairs can train; it has: {', '.join(model.jobs)}")
        return own
    for job in jobs:
        arguments.choice(job, "jobs", known)
        if job not in model.jobs:
            bridge = "" if model.bridge is not None else " and bridge: {}"
            raise ValueError(
                f"jobs: {name} has no {job} head; it has: {', '.join(model.jobs)}. Leave {job} out, or add the head by a recipe: "
                f"model.init_args with init_from: {name} and, in config, {job}: {{}}{bridge} (`unimodal fit`)"
            )
    return tuple(job for job in known if job in jobs)


def make_plan(model: UnimodalModel, jobs: tuple[str, ...], train: str, learning_rate: float | None) -> Plan:
    """What trains.

    `heads` trains what stands behind the towers, and leaves as it is what a head outside of `jobs` reads, too. `lora` adds low-rank
    matrices to the towers' layers. `all` trains everything that the jobs depend on, the towers at a tenth of the rate.

    Raises:
        ValueError: the model cannot carry LoRA, or nothing would train.
    """
    config = model.config
    if train == "lora":
        config = replace(config, adapters={ADAPTER: _lora(model)})
    trainable = dict.fromkeys(_behind_towers(model, jobs, shared=train == "all"), 1.0)
    if train == "lora":
        trainable[f"adapters.{ADAPTER}"] = 1.0
    if train == "all":
        trainable |= dict.fromkeys(_in_towers(model, jobs), TOWERS)
    if not trainable:
        raise ValueError(
            f"nothing trains: behind its towers this model has nothing that only {' and '.join(jobs)} depends on; take lora or all, or "
            "more jobs"
        )
    objectives: dict[str, Objective] = {}
    if "embedding" in jobs:
        prefixes = bool(model.embedding.matryoshka)
        sigmoid = model.embedding.bias is not None
        objectives["itc"] = SigmoidITC(matryoshka=prefixes) if sigmoid else ITC(matryoshka=prefixes)
    if "matching" in jobs:
        objectives["itm"] = ITM()
    if "captioning" in jobs:
        objectives["itg"] = ITG(label_smoothing=0.1)
    rate = RATES[train] if learning_rate is None else learning_rate
    return Plan(config, objectives, trainable, OptimizerSettings(lr=rate, weight_decay=0.1, warmup=0.1))


def _lora(model: UnimodalModel) -> AdapterConfig:
    if model.config.adapters:
        raise ValueError(
            f"train: lora puts adapters on the towers, and this model has some already ({', '.join(model.config.adapters)}); fold "
            "them into the weights first (UnimodalModel.merge_adapters), or take heads or all"
        )
    target = tuple(f"{prefix}*" for part, prefix in model.parts.items() if part != "language_model")
    return AdapterConfig(kind="lora", target=target, r=8, alpha=16.0, dropout=0.05)


def _is_tower(model: UnimodalModel, name: str) -> bool:
    """Whether a parameter is of a tower, before its own embedding."""
    own = any(fnmatch.fnmatch(name, f"backbone.{pattern}") for pattern in model.backbone.own)
    return name.startswith(tuple(model.parts.values())) and not own


def _on_path(model: UnimodalModel, jobs: tuple[str, ...] | list[str]) -> set[str]:
    """Names of the parameters that the heads of these jobs depend on."""
    paths = stages.paths(model)
    patterns = [pattern for job in jobs for pattern in paths[job]] + (list(SCALARS) if "embedding" in jobs else [])
    names = [name for name, _ in model.named_parameters()]
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def _behind_towers(model: UnimodalModel, jobs: tuple[str, ...], *, shared: bool) -> list[str]:
    """What the jobs depend on outside of the towers; with `shared` also what other heads read."""
    kept = set() if shared else _on_path(model, [job for job in model.jobs if job not in jobs])
    return sorted(name for name in _on_path(model, jobs) - kept if not _is_tower(model, name))


def _in_towers(model: UnimodalModel, jobs: tuple[str, ...]) -> list[str]:
    language = model.parts.get("language_model", "\0")
    return sorted(name for name in _on_path(model, jobs) if _is_tower(model, name) and not name.startswith(language))
