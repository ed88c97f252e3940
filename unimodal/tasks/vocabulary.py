"""A small decoder's own vocabulary: the tokens that captions use most."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor


def frequent_tokens(head: Any, processor: Processor, pairs: Pairs, size: int) -> Tensor:
    """The `size` most frequent token ids of a split's captions, special tokens among them: a decoder's subset vocabulary.

    Args:
        head: the decoder (`unimodal.heads.CaptionDecoder`).
        processor: the model's tokenizer.
        pairs: the split.
        size: how many.

    Raises:
        ValueError: the captions use fewer tokens.
    """
    counts: Counter[int] = Counter()
    for i in range(len(pairs)):
        ids, mask = processor.texts(pairs.captions(i))
        counts.update(ids[mask].tolist())
    special = {head.bos_id, head.eos_id, head.unk_id}
    frequent = [token for token, _ in counts.most_common() if token not in special][: size - len(special)]
    if len(frequent) + len(special) < size:
        raise ValueError(
            f"captioning.vocabulary is {size}, but the training captions use only {len(frequent) + len(special)} tokens; lower it"
        )
    return torch.tensor(sorted(special | set(frequent)))
