"""The folder of a fine-tuning: the checkpoint it ends with, its table, and in `training` what it goes on from.

<out>/                         the checkpoint
<out>/finetune.json            the table, and how it came about
<out>/training/settings.json   what decides the weights, written before the first step
<out>/training/losses.jsonl    every step's losses
"""

import json
from pathlib import Path
from typing import Any

from unimodal import files
from unimodal.hub.folder import is_checkpoint_file

REPORT, TRAINING, SETTINGS, LOCK = "finetune.json", "training", "settings.json", "run.lock"


def finished(out: Path) -> dict[str, Any] | None:
    """The report of a fine-tuning that ended; None where none did."""
    if not (out / "config.json").is_file():
        return None
    return _read(out / REPORT)


def require_free(out: Path, inputs: list[str | Path]) -> None:
    """Refuse a folder that holds anything of another origin under the names that are written, before there is any work.

    Raises:
        ValueError: it is what is read.
        FileExistsError, NotADirectoryError: what is there stays as it is.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give a folder")
    for one in inputs:
        if out.exists() and Path(one).exists() and out.samefile(one):
            raise ValueError(f"{out} is what is read; give another folder")
    if not out.is_dir() or _read(out / TRAINING / SETTINGS) is not None:
        return
    held = sorted(
        path.name for path in out.iterdir() if path.name in (REPORT, TRAINING) or is_checkpoint_file(path.name)
    )
    if held:
        raise FileExistsError(f"{out} holds {', '.join(held[:5])}, which no fine-tuning left; give another folder")


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Write down what decides the weights, or see that an earlier start wrote the same.

    Raises:
        FileExistsError: the folder holds a fine-tuning of other settings, which are named.
    """
    settings = json.loads(json.dumps(settings))
    earlier = _read(out / TRAINING / SETTINGS)
    if earlier is None:
        files.write_json(out / TRAINING / SETTINGS, settings)
    elif earlier != settings:
        differing = [
            f"{name} {earlier.get(name)!r} there, {settings.get(name)!r} here"
            for name in dict.fromkeys([*earlier, *settings])
            if earlier.get(name) != settings.get(name)
        ]
        raise FileExistsError(
            f"{out} holds a fine-tuning of other settings: {'; '.join(differing)}; give another folder, or remove this one to begin anew"
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None
