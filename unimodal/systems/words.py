"""Masked words: which to hide, and what it costs not to find them (Devlin et al. 2018, arXiv 1810.04805).

Legend: M texts, L text length, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.distributed import random_rows, sum_over_ranks, world_size
from unimodal.systems.base import Encoders

NOT_ASKED = -100  # target of a place where no word is asked for


def hide_words(ids: Tensor, mask: Tensor, encoders: Encoders, *, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """Hide a share of the words, at least one in each text: ids with holes [M, L], and the words that were there [M, L] (`NOT_ASKED`
    elsewhere).

    Of the chosen words eight in ten become the mask token, one a random word and one stays; start, end and padding are never chosen.
    """
    special = torch.tensor(encoders.special_ids, device=ids.device)
    words = mask & ~torch.isin(ids, special)
    draw, fate, word = (random_rows(ids.shape, ids.device) for _ in range(3))
    draw = draw.masked_fill(~words, 2.0)
    chosen = (draw < share) | (draw == draw.amin(1, keepdim=True)) & words
    random = (word * encoders.vocab_size).long()
    holes = torch.where(chosen & (fate < 0.8), encoders.mask_id, ids)
    holes = torch.where(chosen & (fate >= 0.9), random, holes)
    return holes, ids.masked_fill(~chosen, NOT_ASKED)


@torch.no_grad()
def write_words(
    next_word: Callable[[Tensor], Tensor],
    count: int,
    encoders: Encoders,
    *,
    device: torch.device | None = None,
    draws: Tensor | None = None,
    top_p: float = 0.9,
) -> list[list[int]]:
    """The likeliest word at a time: ids of `count` texts without start and end.

    Args:
        next_word: logits [M, V] of the word after what is written, ids [M, L].
        count: M.
        encoders: whose ids they are; a text is at most `max_length` long.
        device: where the ids are, by default the CPU.
        draws: numbers between 0 and 1, one for each word that may be written [M, `max_length`]: words are drawn by them instead, each from
            the fewest likely words whose probabilities sum to `top_p` (Holtzman et al. 2019, arXiv 1904.09751).
        top_p: see there.
    """
    ids = torch.full((count, 1), encoders.start_id, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    while ids.shape[1] < encoders.max_length and not ended.all():
        logits = next_word(ids).float()
        word = logits.argmax(-1) if draws is None else _drawn(logits, top_p, draws[:, ids.shape[1] - 1])
        ids = torch.cat([ids, torch.where(ended, encoders.end_id, word)[:, None]], 1)
        ended |= word == encoders.end_id
    rows = [row[1:] for row in ids.tolist()]
    return [row[: row.index(encoders.end_id)] if encoders.end_id in row else row for row in rows]


def _drawn(logits: Tensor, top_p: float, draw: Tensor) -> Tensor:
    """A word [M] of each row's nucleus, from logits [M, V] and a number between 0 and 1 for each row [M]."""
    likely, words = logits.softmax(-1).sort(-1, descending=True)
    likely = likely.masked_fill(likely.cumsum(-1) - likely >= top_p, 0)
    reached = likely.cumsum(-1)
    place = torch.searchsorted(reached, (draw * reached[:, -1])[:, None], right=True)
    return words.gather(1, place.clamp(max=words.shape[1] - 1))[:, 0]


class WordHead(nn.Module):
    """Hidden states -> words: a layer, then one logit for each word.

    Args:
        width: W.
        vocab_size: V.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.words = nn.Linear(width, vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., W] -> [..., V]."""
        return self.words(self.transform(hidden))

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the words asked for: hidden [M, L, W], targets [M, L], the mean over those of all ranks; zero where none is.
        Logits are made for those alone."""
        asked = targets != NOT_ASKED
        total = F.cross_entropy(self.logits(hidden[asked]).float(), targets[asked], reduction="sum")
        return total * world_size() / sum_over_ranks(asked.sum()).clamp(min=1)
