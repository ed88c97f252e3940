"""Stages of a schedule that train nothing: mining hard negatives with the weights so far, and merging earlier stages' weights."""

import inspect
from pathlib import Path
from typing import Any, Literal

from unimodal.cli.messages import ConfigError
from unimodal.config import nearest
from unimodal.data.negatives import write_negatives
from unimodal.hub import find_prompts, load_checkpoint, save_checkpoint
from unimodal.merge import merge_weights
from unimodal.search import Encoder, mine_negatives

NEGATIVES = "negatives.jsonl"
MINING = tuple(name for name in inspect.signature(mine_negatives).parameters if name not in ("encoder", "pairs"))


def kind(stage: dict[str, Any]) -> Literal["mine", "merge"] | None:
    """What a stage does other than training."""
    return "mine" if "mine" in stage else "merge" if "merge" in stage else None


def check(stages: dict[str, dict[str, Any]]) -> None:
    """Refuse stages that cannot do what they are asked to.

    Raises:
        ConfigError: names the stage and what is wrong.
    """
    models: list[str] = []  # earlier stages that leave weights
    mined: list[str] = []
    for name, stage in stages.items():
        what, where = kind(stage), f"schedule stage {name!r}"
        given = stage.get("data", {}).get("negatives")
        if given in stages and given not in mined:
            raise ConfigError(f"{where}: data.negatives names stage {given!r}, which is no earlier stage that mines")
        if what is None:
            models.append(name)
            continue
        if other := [key for key in stage if key not in ("about", what)]:
            raise ConfigError(f"{where}: it trains nothing, so {other[0]!r} has no meaning beside {what!r}")
        if not models:
            raise ConfigError(f"{where}: {what} needs the weights of an earlier stage, and there is none")
        if not isinstance(stage[what], dict):
            raise ConfigError(f"{where}: {what} is {stage[what]!r}; expected a mapping of settings")
        if what == "mine":
            mined.append(name)
            for key in stage[what]:
                if key not in MINING:
                    raise ConfigError(f"{where}: mine has no setting {key!r}; {nearest(key, MINING)}")
            continue
        for source, weight in stage[what].items():
            if source not in models:
                raise ConfigError(
                    f"{where}: merge names {source!r}, which is no earlier stage with weights: {', '.join(models)}"
                )
            if not isinstance(weight, int | float) or weight < 0:
                raise ConfigError(f"{where}: merge gives {source!r} the weight {weight!r}; expected a number from 0")
        if not any(stage[what].values()):
            raise ConfigError(f"{where}: merge gives no stage a weight above 0")
        models.append(name)
    if what == "mine":
        raise ConfigError(f"{where}: the last stage must leave weights to score; train or merge after mining")


def merge_stages(weights: dict[str, float], folder: Path) -> None:
    """Write the weighted average of the stages beside `folder`, by name, as its `model`."""
    loaded = [load_checkpoint(folder.parent / name / "model") for name in weights]
    for model, _ in loaded:
        model.merge_adapters()  # the mean of two products is not the product of two means
    model, processor = loaded[0]
    model.load_state_dict(merge_weights([one.state_dict() for one, _ in loaded], list(weights.values())))
    prompts = find_prompts(folder.parent / next(iter(weights)) / "model")
    save_checkpoint(model, processor, folder / "model", prompts=prompts)


def mine_stage(settings: dict[str, Any], cli: Any, folder: Path) -> dict[str, str]:
    """Write the hard negatives of the training split of what `cli` built; returns for how many queries there are some."""
    task, data = cli.model, cli.datamodule
    processor = task.bind(data)
    encoder = Encoder(task.model.to(cli.trainer.strategy.root_device), processor)
    header, rows = mine_negatives(encoder, data.train, **settings)
    write_negatives(folder / NEGATIVES, header, rows)
    return header["kept"]
