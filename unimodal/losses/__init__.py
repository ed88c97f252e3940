"""Losses: pure functions of tensors, one idea per file. No model, no tokenizer, no logging inside.

| You have                                              | Use                                        |
|-------------------------------------------------------|--------------------------------------------|
| image and text embeddings, image ids                  | `info_nce`, or `sigmoid_loss`              |
| the same, and likely false negatives among them       | `masked_info_nce`                          |
| the same, and want to cut embeddings later            | `matryoshka` around any of these           |
| the same, and want to store them in few bits          | `quantised` around any of these            |
| similarities and a reranker's logits                  | `distillation_loss`                        |
| similarities, and want wrong pairs for a matching head| `sample_hard_negatives`                    |
| logits of pairs and whether they match                | `matching_loss`                            |
| logits of a caption decoder                           | `caption_loss`                             |
| a predicted velocity and the true one                 | `flow_matching_loss`                       |
| bridge outputs and states of a text encoder           | `conditioning_loss`                        |

Under data parallelism the mean over ranks is the loss of the global batch, in value and in gradient:
see `unimodal.distributed`.
"""

from unimodal.losses.contrastive import Wrong, info_nce, row_similarity, sigmoid_loss, similarity
from unimodal.losses.distillation import distillation_loss
from unimodal.losses.flow import conditioning_loss, flow_matching_loss
from unimodal.losses.language import caption_loss
from unimodal.losses.masked import masked_info_nce
from unimodal.losses.matching import matching_loss, sample_hard_negatives
from unimodal.losses.matryoshka import matryoshka
from unimodal.losses.quantisation import lsq, one_bit, quantised

__all__ = [
    "Wrong",
    "caption_loss",
    "conditioning_loss",
    "distillation_loss",
    "flow_matching_loss",
    "info_nce",
    "lsq",
    "masked_info_nce",
    "matching_loss",
    "matryoshka",
    "one_bit",
    "quantised",
    "row_similarity",
    "sample_hard_negatives",
    "sigmoid_loss",
    "similarity",
]
