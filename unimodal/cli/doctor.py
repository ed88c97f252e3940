"""`unimodal doctor`: what this installation and machine are, and whether a checkpoint still computes what it did."""

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table

from unimodal.hub import CheckpointError, verify_checkpoint

TIMEOUT = 5.0  # seconds that the Hub has to answer
GIB = 2**30


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
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (page * os.sysconf(name) / GIB for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    table.add_row("memory", f"{free:.1f} of {total:.1f} GiB free", "")
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
