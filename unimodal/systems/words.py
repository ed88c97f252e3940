"""Masked words: which to hide, and what it costs not to find them (Devlin et al. 2018, arXiv 1810.04805).

Legend: M texts, L text length, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.systems.base import Encoders

NOT_ASKED = -100  # target of a place where no word is asked for


def hide_words(
    ids: Tensor, mask: Tensor, encoders: Encoders, *, share: float = 0.15, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Hide a share of the words, at least one in each text: ids with holes [M, L], and the words that were there [M, L] (`NOT_ASKED`
    elsewhere).

    Of the chosen words eight in ten become the mask token, one a random word and one stays; start, end and padding are never chosen.
    """
    special = torch.tensor(encoders.special_ids, device=ids.device)
    words = mask & ~torch.isin(ids, special)
    draw = torch.rand(ids.shape, generator=generator).to(ids.device).masked_fill(~words, 2.0)
    chosen = (draw < share) | (draw == draw.amin(1, keepdim=True)) & words
    fate = torch.rand(ids.shape, generator=generator).to(ids.device)
    random = torch.randint(encoders.vocab_size, ids.shape, generator=generator).to(ids.device)
    holes = torch.where(chosen & (fate < 0.8), encoders.mask_id, ids)
    holes = torch.where(chosen & (fate >= 0.9), random, holes)
    return holes, ids.masked_fill(~chosen, NOT_ASKED)


@torch.no_grad()
def write_words(
    next_word: Callable[[Tensor], Tensor],
    count: int,
    encoders: Encoders,
    *,
    top_p: float | None = None,
    device: torch.device | None = None,
) -> list[list[int]]:
    """The likeliest word at a time: ids of `count` texts without start and end.

    Args:
        next_word: logits [M, V] of the word after what is written, ids [M, L].
        count: M.
        encoders: whose ids they are; a text is at most `max_length` long.
        top_p: draw from the fewest words whose probabilities sum to this instead (Holtzman et al. 2019, arXiv 1904.09751).
        device: of the ids.
    """
    ids = torch.full((count, 1), encoders.start_id, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    while ids.shape[1] < encoders.max_length and not ended.all():
        logits = next_word(ids).float()
        word = logits.argmax(-1) if top_p is None else _drawn(logits, top_p)
        ids = torch.cat([ids, torch.where(ended, encoders.end_id, word)[:, None]], 1)
        ended |= word == encoders.end_id
    rows = [row[1:] for row in ids.tolist()]
    return [row[: row.index(encoders.end_id)] if encoders.end_id in row else row for row in rows]


def _drawn(logits: Tensor, top_p: float) -> Tensor:
    """A word [M] of each row's nucleus, from logits [M, V]."""
    likely, words = logits.softmax(-1).sort(-1, descending=True)
    likely = likely.masked_fill(likely.cumsum(-1) - likely >= top_p, 0)
    return words.gather(1, torch.multinomial(likely, 1))[:, 0]


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
        """Cross-entropy of the words asked for: hidden [M, L, W], targets [M, L]; zero where none is. Logits are made for those alone."""
        asked = targets != NOT_ASKED
        if not asked.any():
            return hidden.sum() * 0.0
        return F.cross_entropy(self.logits(hidden[asked]).float(), targets[asked])
