"""Losses: pure functions of tensors, one idea per file. No model, no tokenizer, no logging inside.

| You have                                              | Use                                        |
|-------------------------------------------------------|--------------------------------------------|
| image and text embeddings, image ids                  | `info_nce`, or `sigmoid_loss`              |
| the same, and likely false negatives among them       | `masked_info_nce`                          |
| similarities, and want wrong documents for that       | `mine_negatives`                           |
| the same, and those of a slow teacher and its queue     | `momentum_contrast`                        |
| the same, and want to cut embeddings later            | `matryoshka` around any of these           |
| the same, and want to store them in few bits          | `quantised` around any of these            |
| similarities and a reranker's logits                  | `distillation_loss`                        |
| similarities, and want wrong pairs for a matching head| `sample_hard_negatives`                    |
| the same, and a function that scores pairs            | `in_batch_matching`                        |
| logits of pairs and whether they match                | `matching_loss`                            |
| scores of pairs of any kind, and want a yes or no     | `pairwise_sigmoid`                         |
| logits of queries with their candidates               | `listwise_loss`                            |
| text embeddings, several captions of an image         | `text_to_text_loss`                        |
| cosines of pairs that are rated for likeness          | `cosent_loss`                              |
| scores of all pairs of a batch, and want a margin     | `triplet_loss`                             |
| the same, and some samples matter more than others    | `gravitation_loss` by `masses`             |
| embeddings, and pairs that share a category           | `category_loss`                            |
| logits of a caption decoder                           | `caption_loss`                             |
| captions that it drew, and a reward for each          | `self_critical_loss`                       |
| a predicted velocity and the true one                 | `flow_matching_loss`                       |
| bridge outputs and states of a text encoder           | `conditioning_loss`                        |

Under data parallelism the mean over ranks is the loss of the global batch, in value and in gradient:
see `unimodal.distributed`.
"""

from unimodal.losses.category import category_loss
from unimodal.losses.contrastive import Wrong, info_nce, pairwise_sigmoid, sigmoid_loss
from unimodal.losses.cosent import cosent_loss
from unimodal.losses.distillation import distillation_loss
from unimodal.losses.flow import conditioning_loss, flow_matching_loss
from unimodal.losses.gravitation import gravitation_loss, masses
from unimodal.losses.language import caption_loss
from unimodal.losses.masked import Mined, masked_info_nce, mine_negatives
from unimodal.losses.matching import in_batch_matching, listwise_loss, matching_loss, sample_hard_negatives
from unimodal.losses.matryoshka import matryoshka
from unimodal.losses.momentum import momentum_contrast
from unimodal.losses.quantisation import lsq, one_bit, quantised
from unimodal.losses.reward import self_critical_loss
from unimodal.losses.text_to_text import text_to_text_loss
from unimodal.losses.triplet import triplet_loss

__all__ = [
    "Mined",
    "Wrong",
    "caption_loss",
    "category_loss",
    "conditioning_loss",
    "cosent_loss",
    "distillation_loss",
    "flow_matching_loss",
    "gravitation_loss",
    "in_batch_matching",
    "info_nce",
    "listwise_loss",
    "lsq",
    "masked_info_nce",
    "masses",
    "matching_loss",
    "matryoshka",
    "mine_negatives",
    "momentum_contrast",
    "one_bit",
    "pairwise_sigmoid",
    "quantised",
    "sample_hard_negatives",
    "self_critical_loss",
    "sigmoid_loss",
    "text_to_text_loss",
    "triplet_loss",
]
