"""`unimodal doctor`: what this installation and machine are, whether a checkpoint replays, and what a recipe trains and takes."""

import argparse
import os
import platform
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table

from unimodal.cli.forecast import GIB, available_memory, examine_recipe
from unimodal.cli.options import Parser
from unimodal.hub import CheckpointError, verify_checkpoint

TIMEOUT = 5.0  # seconds that the Hub has to answer


def parser() -> argparse.ArgumentParser:
    """The parser of the verb; what it does not know overrides the recipe."""
    verb = Parser(prog="unimodal doctor", description="Report on this machine, and what is asked for.")
    verb.add_argument("--model", type=Path, help="a checkpoint folder, whose stored example is computed again")
    verb.add_argument("--hub", action="store_true", help="also see whether the Hub answers")
    verb.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        help="a recipe, with --key.key value to change it: what it trains, and where its memory will not suffice",
    )
    return verb


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, and the recipe's `overrides`."""
    options, overrides = parser().parse_known_args(arguments[1:])
    if overrides and not options.config:
        parser().error(f"{overrides[0]} changes a recipe; give it with --config")
    options.overrides = overrides
    return options


def run(arguments: Sequence[str]) -> int:
    """Report on the machine, then on a recipe."""
    options = parse(arguments)
    status = examine(options.model, ask_hub=options.hub)
    if options.config:
        status = examine_recipe(options.config, options.overrides, Console()) or status
    return status


def examine(checkpoint: Path | None, *, ask_hub: bool = False) -> int:
    """Print the report; returns 1 when a package is missing, the Hub is silent or the checkpoint does not replay."""
    table = Table("", "found", "asked for", title=f"unimodal {version('unimodal')}", title_justify="left")
    healthy = True
    table.add_row("python", platform.python_version(), "")
    for line in requires("unimodal") or []:
        name, limits = re.findall(r"^([\w.-]+)(?:\[\w+\])?([^;]*)", line)[0]
        if "extra ==" not in line:
            found = _version(name)
            healthy &= found is not None
            table.add_row(name, found or "missing", limits)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    table.add_row("device", device, "")
    table.add_row("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors", "")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table.add_row("memory", f"{available_memory() / GIB:.1f} of {total / GIB:.1f} GiB free", "")
    table.add_row("disk here", f"{shutil.disk_usage('.').free / GIB:.1f} GiB free", "")
    if ask_hub:
        answer = _ask_hub()
        healthy &= answer.startswith("answers")
        table.add_row(constants.ENDPOINT, answer, "")
    if checkpoint is not None:
        answer = _replay(checkpoint)
        healthy &= answer.startswith("replays")
        table.add_row(str(checkpoint), answer, "")
    Console().print(table)
    return 0 if healthy else 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ask_hub() -> str:
    try:
        urlopen(constants.ENDPOINT, timeout=TIMEOUT).close()
    except HTTPError as error:  # a server that has no such page is there all the same
        return f"answers with status {error.code}"
    except OSError as error:
        return f"does not answer: {error}"
    return "answers"


def _replay(checkpoint: Path) -> str:
    try:
        found = verify_checkpoint(checkpoint)
    except (CheckpointError, OSError) as error:
        return f"does not replay: {error}"
    return f"replays: {', '.join(f'{name} within {difference:.1g}' for name, difference in found.items())}"
