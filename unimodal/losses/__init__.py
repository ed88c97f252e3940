"""Losses: pure functions of tensors, one idea per file. No model, no tokenizer, no logging inside.

| You have                                              | Use                                        |
|-------------------------------------------------------|--------------------------------------------|
| image and text embeddings, image ids                  | `info_nce`, or `sigmoid_loss`              |
| the same, and want to cut embeddings later            | `matryoshka` around either                 |
| similarities, and want wrong pairs for a matching head| `sample_hard_negatives`                    |
| logits of pairs and whether they match                | `matching_loss`                            |
| logits of a caption decoder                           | `caption_loss`                             |
| a predicted velocity and the true one                 | `flow_matching_loss`                       |
| bridge outputs and states of a text encoder           | `conditioning_loss`                        |

Under data parallelism the mean over ranks is the loss of the global batch, in value and in gradient:
see `unimodal.distributed`.
"""

from unimodal.losses.contrastive import info_nce, sigmoid_loss, similarity
from unimodal.losses.flow import conditioning_loss, flow_matching_loss
from unimodal.losses.language import caption_loss
from unimodal.losses.matching import matching_loss, sample_hard_negatives
from unimodal.losses.matryoshka import matryoshka

__all__ = [
    "caption_loss",
    "conditioning_loss",
    "flow_matching_loss",
    "info_nce",
    "matching_loss",
    "matryoshka",
    "sample_hard_negatives",
    "sigmoid_loss",
    "similarity",
]
