"""The card of a fine-tuned checkpoint: what it came from, on what it was trained and how, under the licence of what it came from."""

from pathlib import Path
from typing import Any

import yaml

from unimodal.hub import Card, find_checkpoint
from unimodal.hub.card import LIMITS


def lineage(model: str, data: str, report: dict[str, Any]) -> Card:
    """The card of what was trained from `model` on `data`, whose `report` is given."""
    folder = find_checkpoint(model)
    earlier = _metadata(folder)
    name = Path(model).name
    images = report["images"]
    kept = f"step {report['best_step']}" if report["best_step"] else "the weights before the first step"
    training = (
        f"Fine-tuned from `{name}` by `unimodal finetune` (train {report['train']}, jobs {', '.join(report['jobs'])}) on "
        f"{images['train']} images of {data} (fingerprint {report['train data']}), batches of {report['batch_size']}, learning rate "
        f"{report['learning_rate']:g}, seed {report['seed']}. {images['val']} images (fingerprint {report['val data']}) chose {kept} of "
        f"{report['steps']} steps. What `{name}` was trained on before stands on its own card."
    )
    return Card(
        name=f"{name}, fine-tuned on {data}",
        summary=f"`{name}`, fine-tuned on pairs of {data}.",
        training=training,
        limits=f"Those of `{name}`, and those of the pairs it was fine-tuned on. {LIMITS}",
        license=str(earlier.get("license") or "other"),
        language=str(earlier.get("language") or "en"),
        base_model=None if Path(model).exists() else model,
    )


def _metadata(folder: Path) -> dict[str, Any]:
    """The metadata at the head of a card; nothing where there is none that can be read."""
    try:
        parts = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
