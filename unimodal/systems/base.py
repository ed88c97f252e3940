"""What every system of the survey is: something that reads what frozen encoders made of images and texts, has losses, and scores pairs.

All systems read the same encoders, so that a difference between two of them is one of the systems. A system's file holds what only it has;
losses, layers, towers, momentum and scoring rules are shared.

Legend: B images, M texts, P pairs, T image tokens, L text length, C width of an encoder's tokens, E embedding width, K categories.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unimodal.config import ScoringRule
from unimodal.retrieval import row_similarity


class Images(NamedTuple):
    """What the image encoder made of B images: raw tokens [B, T, C], their mask [B, T], and the pixels where a system asks for them."""

    tokens: Tensor
    mask: Tensor
    pixels: Tensor | None = None

    def select(self, index: Tensor) -> "Images":
        """Rows `index` [P]."""
        return Images(self.tokens[index], self.mask[index], None if self.pixels is None else self.pixels[index])


class Texts(NamedTuple):
    """What the text encoder made of M texts: token ids [M, L], their mask [M, L] and raw tokens [M, L, C]."""

    ids: Tensor
    mask: Tensor
    tokens: Tensor

    def select(self, index: Tensor) -> "Texts":
        """Rows `index` [P]."""
        return Texts(self.ids[index], self.mask[index], self.tokens[index])


class Batch(NamedTuple):
    """B pairs: image b and one of its captions, the image's id [B] (equal for rows that show the same image) and its categories [B, K]
    where the data has any."""

    images: Images
    texts: Texts
    image_id: Tensor
    labels: Tensor | None = None


class Encoders(Protocol):
    """What a system reads by: a model's backbone (`BackboneEncoders`), or frozen encoders that several systems share.

    Attributes:
        image_width, text_width: C of each.
        image_tokens: T; the most where pictures differ.
        vocab_size: of the text encoder's ids; `pad_id`, `start_id`, `end_id` and `mask_id` are among them.
        max_length: longest text in tokens.
        backbone: the encoders themselves, for a system that trains them: `unimodal.backbones.Backbone`.
    """

    image_width: int
    text_width: int
    image_tokens: int
    vocab_size: int
    max_length: int
    backbone: Any

    @property
    def pad_id(self) -> int: ...

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """What stands before every text and what stands after it, as far as the tokenizer has any."""

    @property
    def special_ids(self) -> list[int]:
        """Tokens that stand for no word: padding, start and end, as far as there are any."""

    @property
    def start_id(self) -> int: ...

    @property
    def end_id(self) -> int: ...

    @property
    def mask_id(self) -> int: ...

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids [M, L] and mask [M, L]."""

    def read_texts(self, ids: Tensor, mask: Tensor) -> Texts:
        """What the text encoder makes of these ids."""

    def unplaced(self, tokens: Tensor) -> Tensor:
        """Image tokens [B, T, C] without the positions that were added to them."""


State = tuple[Tensor, ...]


class System(nn.Module):
    """One published way to match images and texts, on shared frozen encoders.

    A subclass has embeddings (`embed_images` and `embed_texts`), pair scores (`image_state`, `text_state` and `score_pairs`), or both; its
    configuration says which of them ranks first and which reranks (`Scoring`).

    Args:
        encoders: what it reads by. They are not part of it: neither trained nor saved with it.

    Attributes:
        needs_pixels: whether it reads pixels beside the encoder's tokens.
        towers: the shared encoders whose tokens it reads; one that reads ids by itself has no use for the text tower.
        stage_towers: the towers whose tokens a stage reads, by the stage's name; a stage that is not named reads all of `towers`.
        looks: patterns over the names of the layers by which texts look at image tokens, `Attention` or an `nn.Softmax` of such scores:
            a key for each image token, after those of class tokens.
    """

    needs_pixels = False
    towers: tuple[str, ...] = ("image", "text")
    stage_towers: Mapping[str, tuple[str, ...]] = {}
    looks: tuple[str, ...] = ()

    def __init__(self, encoders: Encoders) -> None:
        super().__init__()
        self._encoders = (encoders,)  # in a tuple, or the backbone's weights would count as the system's

    @classmethod
    def known_texts(cls, settings: Mapping[str, Any]) -> Sequence[str]:
        """The texts that a system of these settings holds by heart: instructions, nouns, names of categories."""
        return ()

    @property
    def embeds(self) -> bool:
        """Whether it has an embedding."""
        return type(self).embed_images is not System.embed_images

    @property
    def writes(self) -> bool:
        """Whether it writes captions."""
        return type(self).write is not System.write

    @property
    def scores_pairs(self) -> bool:
        """Whether it has a pair score."""
        return type(self).score_pairs is not System.score_pairs

    @property
    def encoders(self) -> Encoders:
        return self._encoders[0]

    def learn_words(self) -> None:
        """Called when the encoders have another tokenizer than before: read anew what is held of texts.

        Raises:
            ValueError: it writes captions, and the tokenizer neither begins nor ends texts.
        """
        if self.writes:
            _ = self.encoders.start_id, self.encoders.end_id  # each says what is missing

    def prepare(self, batches: Iterator[Batch]) -> None:
        """What is fitted once, in closed form, before any stage: reads the training split in order, every caption once."""

    def untrained(self) -> Iterator[Tensor]:
        """Numbers that it ranks by and no stage trains: what `prepare` fitted, or what the encoders have beside their towers."""
        return iter(())

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        """The losses of a training step by name; they are summed.

        Args:
            batch: what to learn from.
            stage: name of the stage of the system's configuration.
            progress: how far the stage is, from 0 to 1.
        """
        raise NotImplementedError(f"{type(self).__name__} does not train; give it no stages, or implement losses")

    def start_stage(self, stage: str) -> None:
        """Called before the first step of each stage: to start a teacher from the student, for example."""

    def end_stage(self, stage: str) -> None:
        """Called after the last step of each stage: to merge weights, for example."""

    def after_step(self, stage: str) -> None:
        """Called after every optimizer step: averages, queues, clamps."""

    def embed_images(self, images: Images) -> Tensor:
        """Unit vectors [B, E], or [B, N, E] of which the best counts."""
        raise NotImplementedError(f"{type(self).__name__} has no embedding: it scores pairs")

    def embed_texts(self, texts: Texts) -> Tensor:
        """Unit vectors [M, E]."""
        raise NotImplementedError(f"{type(self).__name__} has no embedding: it scores pairs")

    def image_state(self, images: Images) -> State:
        """What a pair score needs of images, computed once for each: tensors with B rows."""
        return images.tokens, images.mask

    def text_state(self, texts: Texts) -> State:
        """What a pair score needs of texts, computed once for each: tensors with M rows."""
        return texts.ids, texts.mask, texts.tokens

    def score_pairs(self, images: State, texts: State) -> Tensor:
        """Scores [P] of P images with P texts, row by row."""
        raise NotImplementedError(f"{type(self).__name__} has no pair score: it compares embeddings")

    def score_matrix(self, images: State, texts: State) -> Tensor:
        """Scores [B, M] of every image with every text."""
        count, others = len(images[0]), len(texts[0])
        index = torch.arange(count * others, device=images[0].device)
        pairs = self.score_pairs(tuple(x[index // others] for x in images), tuple(x[index % others] for x in texts))
        return pairs.view(count, others)

    def findings(self) -> dict[str, float]:
        """What the system learned about its training data, by name, for the results."""
        return {}

    def write(self, images: Images) -> list[list[int]]:
        """A caption of each image, the likeliest word at a time: ids without start and end."""
        raise NotImplementedError(f"{type(self).__name__} writes no captions")

    def score(self, images: Images, texts: Texts) -> Tensor:
        """What the system says of P images with P texts, row by row, differentiable in their tokens: [P]. By pair score where it has
        one, else by cosine."""
        if self.scores_pairs:
            return self.score_pairs(self.image_state(images), self.text_state(texts))
        return row_similarity(self.embed_images(images), self.embed_texts(texts)[:, None])[:, 0]


@dataclass(frozen=True)
class Stage:
    """One stage of a system's training.

    Args:
        trainable: learning-rate factor by name pattern; the last that matches decides, what none matches is frozen.
        share: of the system's budget.
        lr: learning rate, after a warm-up over the first tenth and before a cosine to zero.
        weight_decay: of matrices.
        batch_size: pairs in a step.
        captions_per_image: rows of a batch that show the same image, each with another caption.
        noise: share of this stage's captions that are corrupted on purpose: the noisy data that it learns to live with.
        order: `random`, or `hard`: each batch is a group of images that the system's own embedding finds alike, written to a file
            before the stage and read from there in its order.
        clip: longest gradient.
    """

    trainable: dict[str, float] = field(default_factory=lambda: {"*": 1.0})
    share: float = 1.0
    lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 64
    captions_per_image: int = 1
    noise: float = 0.0
    order: Literal["random", "hard"] = "random"
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Scoring(ScoringRule):
    """How a system ranks. A system without pair scores scores nothing again, whatever `k` says.

    Args:
        shortlist: the name of another system of the survey, whose embedding ranks first for a system that can only afford to score pairs.
        metric: `recall` of the true item, or `category`: mean average precision of items of the same category (CDISA).
    """

    shortlist: str | None = None
    metric: Literal["recall", "category"] = "recall"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortlist is not None and (self.first != "embed" or not self.k):
            raise ValueError(
                f"scoring.shortlist is {self.shortlist!r}, another system, whose first candidates this one scores again: set scoring.k "
                "above 0 and scoring.first to 'embed'"
            )


@dataclass(frozen=True)
class Published:
    """A result that was published for the system; never compared with ours, which stand on another data set, budget and encoder.

    Args:
        setting: data set, gallery and how the model was made.
        source: where the numbers stand.
        i2t: R@1, R@5 and R@10 of image to text, in percent; None where one is not given.
        t2i: the same of text to image.
    """

    setting: str
    source: str
    i2t: list[float | None] | None = None
    t2i: list[float | None] | None = None
