"""VL-GAP: two-stage generative alignment, an inferred design. No public text of the system was found: this is our reading of what a survey
says of it, in the lineage of ALBEF (arXiv 2107.07651) and BLIP (arXiv 2201.12086).

Stage `clean` learns contrast, matching and captions together. Stage `noisy` learns the same from captions that may be wrong: a slow teacher
says how much it trusts each pair, writes a caption of its own where it does not, and what neither convinces is left out of matching and
captions. Contrast keeps every pair, as its targets are soft. No pair of the clean stage comes back in the noisy one.

Legend: B pairs, L text length, W width, V vocabulary, K places of the buffer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.distributed import (
    gather,
    gather_padded,
    gather_with_grad,
    random_rows,
    rank,
    sum_over_ranks,
    world_size,
)
from unimodal.losses import caption_loss, distillation_loss, info_nce
from unimodal.losses.numerics import mean_over_real
from unimodal.retrieval import similarity
from unimodal.systems.albef import FusionEncoder
from unimodal.systems.base import Batch, Encoders, Images, State, Texts
from unimodal.systems.momentum import Teacher
from unimodal.systems.towers import Scale
from unimodal.systems.words import write_words

SMOOTHING = 0.1
NUCLEUS = 0.9
ENOUGH = 64  # pairs in the buffer before anything is judged by it


class Trust(NamedTuple):
    """How much the teacher trusts B pairs: probability of a match [B], and of the words, their geometric mean [B]."""

    match: Tensor
    words: Tensor


class VLGAP(FusionEncoder):
    """Towers, and a fusion in two roles: it judges pairs looking both ways, and writes looking back.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout, fusion_layers, dim: as `FusionEncoder`.
        momentum: what remains of the teacher in one step.
        keep: share of the pairs that are trusted, by a running threshold; 1 trusts all.
        beta: weight of the match against the words in a pair's trust.
        alpha: the teacher's share in the targets of contrast and words, reached over the first fifth of the stage.
        buffer: K, pairs over which trust is ranked.
    """

    seen: Tensor
    kept: Tensor
    rewritten: Tensor
    buffer: Tensor

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 1,
        heads: int = 8,
        dropout: float = 0.1,
        fusion_layers: int = 1,
        dim: int = 256,
        momentum: float = 0.995,
        keep: float = 0.7,
        beta: float = 0.5,
        alpha: float = 0.4,
        buffer: int = 1024,
    ) -> None:
        super().__init__(encoders, width, layers, heads, dropout, fusion_layers, dim)
        if not 0 < keep <= 1:
            raise ValueError(f"keep: expected a share of the pairs above 0 and at most 1, got {keep}")
        self.keep, self.beta, self.alpha = keep, beta, alpha
        self.words = nn.Embedding(encoders.vocab_size, width)
        self.places = nn.Embedding(encoders.max_length, width)
        nn.init.normal_(self.words.weight, std=width**-0.5)
        nn.init.normal_(self.places.weight, std=width**-0.5)
        self.word_bias = nn.Parameter(torch.zeros(encoders.vocab_size))
        self.scale = Scale()
        for name in ("seen", "kept", "rewritten"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        self.register_buffer("buffer", torch.zeros(2, buffer))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.teacher = Teacher(self, momentum)

    @property
    def acceptance(self) -> float:
        """The share of the pairs of stage `noisy` that matching and captions learned from, with their own caption or the teacher's."""
        return float(self.kept) / max(1, int(self.seen))

    def findings(self) -> dict[str, float]:
        return {"acceptance": self.acceptance}

    def start_stage(self, stage: str) -> None:
        self.teacher.start(self)

    def after_step(self, stage: str) -> None:
        self.scale.clamp()
        if stage == "noisy":
            self.teacher.follow(self)

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        if stage == "clean":
            return self._learn(batch, torch.arange(len(batch.image_id), device=batch.image_id.device), 0.0)
        return self._learn(*self._trusted(batch), self.alpha * min(1.0, progress / 0.2))

    def _learn(self, batch: Batch, rows: Tensor, alpha: float) -> dict[str, Tensor]:
        """Contrast of all pairs, matching and captions of `rows`; `alpha` is the teacher's share in the targets."""
        image, text = self.image_state(batch.images), self.text_state(batch.texts)
        image_embedding, text_embedding = self.image_embedding(image), self.text_embedding(text)
        itc = info_nce(image_embedding, text_embedding, batch.image_id, scale=self.scale())
        ours = self.scale() * similarity(gather_with_grad(image_embedding), gather_with_grad(text_embedding))
        slow: State = ()
        if alpha:
            with self.teacher.acting(self):
                slow = self.image_state(batch.images)
                slow_image, slow_text = self.image_embedding(slow), self.embed_texts(batch.texts)
                theirs = self.scale() * similarity(gather(slow_image), gather(slow_text))
            apart = (distillation_loss(ours, theirs) + distillation_loss(ours.T, theirs.T)) / 2
            itc = (1 - alpha) * itc + alpha * apart
        learned = torch.zeros_like(batch.image_id, dtype=torch.bool).index_fill(0, rows, True)
        every = gather(learned).nonzero()[:, 0]  # [P], the rows of all ranks
        ids = gather(batch.image_id)[every]
        if len(ids.unique()) < 2:  # nothing to tell apart
            return {"itc": itc, "itm": itc * 0.0, "lm": itc * 0.0}
        own = (every // len(learned) == rank()).nonzero()[:, 0]
        images, texts = (tuple(x[every] for x in gather_padded(*state)) for state in (image, text))
        itm = self.matching(images, texts, ours.detach()[every][:, every], ids, own)
        image, slow = (tuple(x[rows] for x in state) for state in (image, slow))
        return {"itc": itc, "itm": itm, "lm": self._captions(batch.texts.select(rows), image, slow, alpha)}

    def _captions(self, texts: Texts, image: State, slow: State, alpha: float) -> Tensor:
        """What it costs to miss the words of captions, `alpha` of it against the teacher's guess from its own image state `slow`."""
        logits = self._word_logits(image, texts.ids, texts.mask)
        lm = caption_loss(logits, texts.ids, texts.mask, label_smoothing=SMOOTHING)
        if not alpha:
            return lm
        with self.teacher.acting(self):
            soft = self._word_logits(slow, texts.ids, texts.mask).softmax(-1)
        total = -(soft * logits.log_softmax(-1)).sum(-1)[:, :-1][texts.mask[:, 1:]].sum()
        return (1 - alpha) * lm + alpha * mean_over_real(total, texts.mask[:, 1:])

    # Trust.

    def trust(self, images: Images, texts: Texts) -> Trust:
        """What the weights at work say of pairs, row by row."""
        image = self.image_state(images)
        match = self.score_pairs(image, self.text_state(texts)).sigmoid()
        told = self._word_logits(image, texts.ids, texts.mask).log_softmax(-1)[:, :-1]
        words = told.gather(2, texts.ids[:, 1:, None])[..., 0].masked_fill(~texts.mask[:, 1:], 0)
        return Trust(match, (words.sum(1) / texts.mask[:, 1:].sum(1)).exp())

    @torch.no_grad()
    def _trusted(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch, where the teacher's own captions replace those that it does not trust, if it trusts its own; and the rows [P] of
        the pairs that it then trusts."""
        with self.teacher.acting(self):
            found = self.trust(batch.images, batch.texts)
            self.seen += world_size() * len(found.match)
            self._remember(found)
            accepted, texts = self._accepts(found), batch.texts
            doubtful = (~accepted).nonzero()[:, 0]
            if sum_over_ranks((~accepted).sum()):
                texts, better = self._rewritten(batch, doubtful)
                accepted[better] = True
        self.rewritten += sum_over_ranks(accepted[doubtful].sum())
        self.kept += sum_over_ranks(accepted.sum())
        return batch._replace(texts=texts), accepted.nonzero()[:, 0]

    def _rewritten(self, batch: Batch, doubtful: Tensor) -> tuple[Texts, Tensor]:
        """The texts, where the teacher's own captions replace those of the rows `doubtful`, if it trusts its own; and the rows that got
        one."""
        # All ranks draw for the words that are written, also one that has none to write.
        draws = random_rows((len(batch.image_id), self.encoders.max_length), batch.image_id.device)[doubtful]
        if not len(doubtful):
            return batch.texts, doubtful
        images = batch.images.select(doubtful)
        own = self._as_texts(self._write(images, draws), draws.device)
        trusted = self._accepts(self.trust(images, own)).nonzero()[:, 0]
        return _replaced(batch.texts, own, doubtful[trusted], trusted, self.encoders.pad_id), doubtful[trusted]

    def _remember(self, found: Trust) -> None:
        """Take in the trust of the pairs of all ranks, in rank order: the buffer is the same on each."""
        match, words = (gather(x.float()) for x in found)
        filled = self.get_buffer("filled")
        rows = (filled + torch.arange(len(match), device=match.device)) % self.buffer.shape[1]
        self.buffer[0, rows], self.buffer[1, rows] = match, words
        filled.add_(len(match))

    def _accepts(self, found: Trust) -> Tensor:
        """Which pairs [B] are among the trusted share, by the ranks of both values in the buffer."""
        known = self.buffer[:, : int(self.get_buffer("filled").clamp(max=self.buffer.shape[1]))]  # [2, K]
        if known.shape[1] < ENOUGH or self.keep == 1:
            return torch.ones_like(found.match, dtype=torch.bool)

        def confidence(match: Tensor, words: Tensor) -> Tensor:
            ranks = [
                torch.searchsorted(row.sort().values, x.float().contiguous(), right=True) / len(row)
                for row, x in zip(known, (match, words))
            ]
            return ranks[0] ** self.beta * ranks[1] ** (1 - self.beta)

        return confidence(*found) >= confidence(*known).quantile(1 - self.keep)

    # Words.

    def _word_logits(self, image: State, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, L, V] of the word after each, ids [B, L]."""
        x = self.words(ids) * self.words.embedding_dim**0.5 + self.places.weight[: ids.shape[1]]
        hidden = self.fusion(x, mask, *image, causal=True)
        return F.linear(hidden, self.words.weight, self.word_bias).float()

    def _write(self, images: Images, draws: Tensor | None = None) -> list[list[int]]:
        """A caption of each image: the likeliest words, or words drawn by `draws` as in `write_words`."""
        image = self.image_state(images)

        def next_word(ids: Tensor) -> Tensor:
            return self._word_logits(image, ids, torch.ones_like(ids, dtype=torch.bool))[:, -1]

        device = images.tokens.device
        return write_words(next_word, len(images.tokens), self.encoders, device=device, draws=draws, top_p=NUCLEUS)

    @torch.no_grad()
    def write(self, images: Images) -> list[list[int]]:
        return self._write(images)

    def _as_texts(self, rows: list[list[int]], device: torch.device) -> Texts:
        """What was written, with start and end, read by the encoders."""
        encoders = self.encoders
        whole = [[encoders.start_id, *row, encoders.end_id][: encoders.max_length] for row in rows]
        ids = torch.full((len(whole), max(map(len, whole))), encoders.pad_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(whole):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        return encoders.read_texts(ids.to(device), mask.to(device))


def _replaced(texts: Texts, other: Texts, rows: Tensor, by: Tensor, pad_id: int) -> Texts:
    """The texts with `rows` replaced by the rows `by` of others; both padded to the longer length."""
    length = max(texts.ids.shape[1], other.ids.shape[1])

    def padded(x: Tensor, value: float) -> Tensor:
        missing = length - x.shape[1]
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing), value=value)

    parts = []
    for a, b, value in zip(texts, other, (pad_id, 0, 0)):
        a = padded(a, value).clone()
        a[rows] = padded(b, value)[by].to(a.dtype)
        parts.append(a)
    return Texts(*parts)
