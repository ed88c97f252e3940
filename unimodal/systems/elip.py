"""ELIP: a text leads the image encoder's eye, by prompts that are made of it (arXiv 2502.15682).

A small network maps a text's embedding to a few tokens, which stand between class token and tokens of the frozen image tower; the first
candidates of a text are read again with its prompts. On a dual encoder (ELIP-C on CLIP, ELIP-S on SigLIP) the score is the cosine with the
prompted image; on a matching model (ELIP-B on BLIP-2) it is the logit of a match.

Ours differ from the paper in one thing: the mapper has the cheaper form of the authors' code, one hidden width for all prompts. An inferred
design: that ELIP-C has prompts at the tower's input alone, as the paper describes them; the public code does not tell whether its released
weights have others at every layer.

Legend: B pairs, I images, M texts, P pairs, m prompts, T image tokens, L text length, E embedding width, W width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unimodal.distributed import gather, gather_padded, gather_with_grad, local_rows, shared
from unimodal.layers import at_least_float32, unit
from unimodal.losses import matching_loss, pairwise_sigmoid
from unimodal.retrieval import similarity
from unimodal.systems.base import Batch, Encoders, Images, State, Texts
from unimodal.systems.blip2 import BLIP2, QUERIES
from unimodal.systems.clip import CLIP, DualEncoder, SigLIP

BIAS = -10.0  # of ELIP-S, fixed, whatever the base has learned
AT_ONCE = 1024  # prompted images read at a time in training
SPARED = 3  # most similar images of a text that are likely to fit it, too


class Mapper(nn.Module):
    """A text's embedding -> its prompts: three linear layers, GELU between.

    Args:
        dim: E, of the unit vectors it reads.
        width: W, of the image tower.
        prompts: m.
        hidden: width of the hidden layers; the paper has 1024 for each prompt.
        dropout: of prompts' entries; ELIP-C alone has it.
    """

    def __init__(self, dim: int, width: int, prompts: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.prompts, self.width = prompts, width
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, prompts * width)
        )
        self.dropout = nn.Dropout(dropout)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, text: Tensor) -> Tensor:
        """Unit vectors [M, E] -> [M, m, W]."""
        return self.dropout(self.layers(text).view(len(text), self.prompts, self.width))


def every_pair(
    score: Callable[[Tensor, Tensor], Tensor], images: Tensor, texts: Tensor, *, at_once: int = AT_ONCE
) -> Tensor:
    """Scores [B, M] of all images of rows `images` [B] with all texts of rows `texts` [M], by a function of image rows [P] and text rows
    [P], `at_once` pairs at a time; what a part needs for its gradient is computed again, not kept."""
    rows, columns = images.repeat_interleave(len(texts)).split(at_once), texts.repeat(len(images)).split(at_once)
    if len(rows) == 1:
        return score(rows[0], columns[0]).view(len(images), len(texts))
    scores = [checkpoint(score, i, j, use_reentrant=False) for i, j in zip(rows, columns)]
    return torch.cat(scores).view(len(images), len(texts))


def text_to_image_loss(scores: Tensor, image_id: Tensor, *, scale: Tensor | float) -> Tensor:
    """Cross-entropy of each text's own image among all images of the batch, prompted by the text; a scalar.

    | Inputs   | Shape  | Meaning                                                                       |
    |----------|--------|-------------------------------------------------------------------------------|
    | scores   | [B, B] | cosines of image i, prompted by text j, with text j                           |
    | image_id | [B]    | other rows of the same image are no negatives                                 |
    | scale    | scalar | inverse temperature                                                           |
    """
    own = torch.arange(len(scores), device=scores.device)
    same = (image_id[:, None] == image_id[None]) & (own[:, None] != own[None])
    return F.cross_entropy((scale * at_least_float32(scores)).masked_fill(same, float("-inf")).T, own)


class PromptedDualEncoder(DualEncoder):
    """A dual encoder that reads images again with a text's prompts; what its stages train is the configuration's.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout, dim: of the dual encoder.
        prompts: m.
        hidden: of the mapper.

    Attributes:
        prompt_dropout: of the mapper.
    """

    prompt_dropout = 0.0

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 1,
        heads: int = 8,
        dropout: float = 0.1,
        dim: int = 256,
        prompts: int = 10,
        hidden: int = 512,
    ) -> None:
        super().__init__(encoders, width=width, layers=layers, heads=heads, dropout=dropout, dim=dim)
        self.mapper = Mapper(dim, width, prompts, hidden, self.prompt_dropout)

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        if stage == "base":
            return super().losses(batch, stage, progress)
        image, (text,) = self.image_state(batch.images), self.text_state(batch.texts)
        # Prompts are made once for each text: all its images, whatever rank holds them, are read with the same.
        text, prompts = gather_padded(text, self.mapper(text))
        ids = gather(batch.image_id)

        def score(i: Tensor, j: Tensor) -> Tensor:
            return self._cosine(tuple(x[i] for x in image), text[j], prompts[j])

        texts = torch.arange(len(ids), device=ids.device)
        images = texts[: len(batch.image_id)]
        return {"elip": self.prompted_loss(gather_with_grad(every_pair(score, images, texts)), ids)}

    def prompted_loss(self, scores: Tensor, image_id: Tensor) -> Tensor:
        """What the cosines [B, B] of prompted images with texts cost, of all ranks together."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of prompted images; implement prompted_loss")

    def image_state(self, images: Images) -> State:
        """Projected tokens [B, T, W], before any prompt, and their mask."""
        return self.image_tower.project(images.tokens), images.mask

    def text_state(self, texts: Texts) -> State:
        """Embeddings [M, E]: what is mapped, and what is compared."""
        return (self.embed_texts(texts),)

    def score_pairs(self, images: State, texts: State) -> Tensor:
        """Cosines [P] of each text with its image, read again with the text's prompts."""
        return self._cosine(images, texts[0], self.mapper(texts[0]))

    def _cosine(self, images: State, text: Tensor, prompts: Tensor) -> Tensor:
        image = self.image_projection(self.image_tower.read(images[0], images[1], prompts)[0][:, 0])
        return (F.normalize(image, dim=-1) * text).sum(-1)


class ELIPC(PromptedDualEncoder, CLIP):
    """ELIP on CLIP: softmax over the images of a text, in this direction alone, by the base's frozen scale."""

    prompt_dropout = 0.1

    def prompted_loss(self, scores: Tensor, image_id: Tensor) -> Tensor:
        return text_to_image_loss(scores, image_id, scale=self.scale())


class ELIPS(PromptedDualEncoder, SigLIP):
    """ELIP on SigLIP: pairwise sigmoid, by the base's frozen scale and a fixed bias."""

    def prompted_loss(self, scores: Tensor, image_id: Tensor) -> Tensor:
        same = image_id[:, None] == image_id[None]
        return pairwise_sigmoid(scores, same, scale=self.scale(), bias=BIAS) / len(scores)


@torch.no_grad()
def sample_spared_negatives(similarity: Tensor, image_id: Tensor, *, spared: int = SPARED) -> Tensor:
    """A wrong image for each text [B], drawn by softmax over what is left after the text's own image and its most similar others, which
    are likely false negatives.

    | Inputs     | Shape  | Meaning                                                 |
    |------------|--------|---------------------------------------------------------|
    | similarity | [B, B] | logits of image i and text j, without prompts           |
    | image_id   | [B]    | rows of equal ids are never drawn                       |
    | spared     | number | how many of the most similar are left out               |

    Raises ValueError where nothing is left of a text's batch.
    """
    same = image_id[:, None] == image_id[None]
    if (left := int((~same).sum(0).min()) - spared) < 1:
        raise ValueError(
            f"a text has {left + spared} wrong images in its batch, and the {spared} most similar are left out; expected more than "
            f"{spared}: raise the batch size, or draw captions of different images"
        )
    logits = at_least_float32(similarity).masked_fill(same, float("-inf")).T  # [text, image]
    logits = logits.scatter(1, logits.topk(spared, 1).indices, float("-inf"))
    return torch.multinomial(logits.softmax(1), 1)[:, 0]


class ELIPB(BLIP2):
    """ELIP on BLIP-2: prompts lead the image tower, are taken out of what it hands on, and the Q-Former judges the pair.

    Stages: those of the base, and `elip`, matching alone, of each text with its image and one wrong one.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout, queries, dim, tower_layers: of the base, whose image tower attends, or prompts would lead nothing.
        prompts: m.
        hidden: of the mapper.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 2,
        heads: int = 8,
        dropout: float = 0.1,
        queries: int = 16,
        dim: int = 256,
        tower_layers: int = 1,
        prompts: int = 10,
        hidden: int = 512,
    ) -> None:
        super().__init__(encoders, width, layers, heads, dropout, queries, dim, tower_layers)
        self.mapper = Mapper(dim, width, prompts, hidden)

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        if stage != "elip":
            return super().losses(batch, stage, progress)
        with torch.no_grad():
            image, text = self.embed_images(batch.images), self.embed_texts(batch.texts)
            wrong = sample_spared_negatives(
                self.scale() * similarity(gather(image), gather(text)), ids := gather(batch.image_id)
            )
        true = local_rows(torch.arange(len(ids), device=ids.device))
        rows = torch.cat([true, local_rows(shared(wrong))])
        images, texts = gather_padded(*self.image_state(batch.images)), self.text_state(batch.texts)
        logits = self.score_pairs(
            tuple(x[rows] for x in images), tuple(x.repeat(2, *[1] * (x.ndim - 1)) for x in texts)
        )
        return {"itm": matching_loss(logits, torch.arange(len(logits), device=logits.device) < len(true))}

    def image_state(self, images: Images) -> State:
        """Projected tokens [B, T, W], before any prompt, and their mask."""
        return self.image_tower.project(images.tokens), images.mask

    def text_state(self, texts: Texts) -> State:
        """Ids [M, L], their mask, and the vectors [M, E] of which prompts are made."""
        return texts.ids, texts.mask, self.condition(texts)

    def condition(self, texts: Texts) -> Tensor:
        """Unit vectors [M, E]: the Q-Former's first position where it reads queries and text and no image, which is the first query's."""
        read = self.bridge.match(QUERIES, texts.ids, texts.mask, None)
        return unit(self.text_projection(read[:, 0]))

    def score_pairs(self, images: State, texts: State) -> Tensor:
        """Logits [P] of a match, each image read again with its text's prompts, which the Q-Former does not see."""
        *text, condition = texts
        hidden, mask = self.image_tower.read(images[0], images[1], self.mapper(condition))
        first, _, rest = hidden.tensor_split([1, 1 + self.mapper.prompts], 1)
        return super().score_pairs((torch.cat([first, rest], 1), mask[:, self.mapper.prompts :]), tuple(text))
