"""`unimodal gather`: the weights of a training that has not ended, sharded or not, as a checkpoint folder.

A stage that ends leaves that folder by itself; this is for its `resume.ckpt`. What is read of the checkpoint, and what is
never executed: `unimodal.hub.training`.
"""

import argparse
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimodal.cli import between
from unimodal.cli.messages import ConfigError, short
from unimodal.cli.options import Parser
from unimodal.cli.output import require_free_folder, say
from unimodal.cli.schedule import stage_configs
from unimodal.cli.stage import save_stage
from unimodal.cli.train import Parts, quiet, read_schedule
from unimodal.files import in_words
from unimodal.hub.training import read_training_weights


def parser() -> argparse.ArgumentParser:
    """The parser of the verb; what it does not know overrides the recipe."""
    verb = Parser(
        prog="unimodal gather",
        description="Write the weights of a training checkpoint, as they are (not their average), as a checkpoint folder.",
    )
    verb.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="the file or folder that training left: resume.ckpt"
    )
    verb.add_argument(
        "--config",
        type=Path,
        action="append",
        required=True,
        help="the recipe of the run, with --key.key value as there",
    )
    verb.add_argument("--out", type=Path, required=True, help="the checkpoint goes into its folder model/")
    return verb


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, and the recipe's `overrides`."""
    options, overrides = parser().parse_known_args(arguments[1:])
    options.overrides = overrides
    return options


def run(arguments: Sequence[str]) -> int:
    """Read, merge and write; bad input becomes one line on standard error and status 1."""
    options = parse(arguments)
    quiet()
    try:
        require_free_folder(options.out, (), inputs=[options.checkpoint])
        if not (options.checkpoint.is_file() or options.checkpoint.is_dir()):
            raise FileNotFoundError(
                f"{options.checkpoint}: no such file or folder; give what training left: resume.ckpt"
            )
        weights = read_training_weights(options.checkpoint)
        parts = Parts(_configuration(options), run=False)
        task, data = parts.model, parts.datamodule
        data.feature_cache = None
        processor = task.bind(data)
        try:
            task.model.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(
                f"{options.checkpoint} does not hold the weights of this recipe's model: {error}"
            ) from error
        save_stage(task.model, processor, options.out, task.prompts)
    except (ArgumentError, OSError, ValueError) as error:
        say(f"unimodal gather: {short(in_words(error))}")
        return 1
    print(options.out / "model")
    return 0


def _configuration(options: argparse.Namespace) -> Any:
    """The configuration of the run, or of the stage, that left the checkpoint."""
    schedule = read_schedule(options.config, options.overrides)
    if schedule is None:
        return [*(word for file in options.config for word in ("--config", str(file))), *options.overrides]
    trained = [stage for stage in stage_configs(schedule) if between.kind(schedule["stages"][stage[0]]) is None]
    for _, folder, config in trained:
        if folder.resolve() == options.checkpoint.resolve().parent:
            return config
    raise ConfigError(
        f"{options.checkpoint} lies in no folder of this schedule's stages: {', '.join(str(folder) for _, folder, _ in trained)}; "
        "give --output as the run had it"
    )
