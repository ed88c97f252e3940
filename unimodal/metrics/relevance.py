"""Which items answer a query where it is categories that decide: an item of the same class, or with a label in common."""

import torch
from torch import Tensor


def relevance_by_label(query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """Whether a query and an item share a label, the ground truth of category-level retrieval (Rasiwasia et al. 2010).

    Q queries, G items, L labels. For many queries pass them in chunks: the answer has Q x G entries.

    Args:
        query_labels: bool or 0 and 1 [Q, L].
        gallery_labels: bool or 0 and 1 [G, L].

    Returns:
        bool [Q, G].

    Raises:
        ValueError: the two do not have the same labels, or hold something other than 0 and 1, such as class numbers.
    """
    if query_labels.ndim != 2 or gallery_labels.ndim != 2 or query_labels.shape[1] != gallery_labels.shape[1]:
        raise ValueError(
            f"got labels {list(query_labels.shape)} and {list(gallery_labels.shape)}; expected [Q, L] and [G, L] with one L"
        )
    for labels in (query_labels, gallery_labels):
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(
                "labels are 0 or 1 in a column for each label; torch.nn.functional.one_hot makes them of class numbers"
            )
    return torch.mm(query_labels.float(), gallery_labels.float().T) > 0.5
