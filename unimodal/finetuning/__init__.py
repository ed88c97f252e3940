"""Fine-tuning a model on own pairs without a recipe: one call, one folder, one table."""

from unimodal.finetuning.run import Finetuned, finetune
from unimodal.finetuning.table import Row

__all__ = ["Finetuned", "Row", "finetune"]
