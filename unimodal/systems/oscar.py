"""OSCAR: object tags as anchors between the words of a caption and an image (Li et al. 2020, arXiv 2004.06165).

One stream reads `[CLS] caption [SEP] tags [SEP]` and image tokens after it; token type 0 is the caption, 1 the tags, and image tokens have
neither type nor position. The frozen text encoder stands for BERT's word and position embeddings: it reads caption and tags apart, so that
an image's tags are read once and not for every caption. The paper's tags come from a detector; ours are an interface, `TagProvider`.

Legend: B images, M texts, P pairs, T image tokens, L caption length, G length of the tags, N nouns, C width of an encoder's tokens,
W width.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.distributed import gather, gather_padded, local_rows, shared
from unimodal.layers import init_weights, key_mask_to_bias
from unimodal.losses import matching_loss, sample_hard_negatives
from unimodal.systems.base import Batch, Encoders, Images, State, System, Texts
from unimodal.systems.cca import CanonicalCorrelation
from unimodal.systems.towers import Layer
from unimodal.systems.words import WordHead, hide_words

# fmt: off
NOUNS = (  # shapes and colours of drawn scenes, and what everyday photographs show
    "circle", "square", "triangle", "cross", "diamond", "ring", "red", "green", "blue", "yellow", "purple", "orange",
    "black", "white", "man", "woman", "boy", "girl", "child", "baby", "people", "crowd", "dog", "cat", "horse",
    "bird", "cow", "ball", "bicycle", "motorcycle", "car", "bus", "train", "boat", "plane", "surfboard", "skateboard",
    "snowboard", "frisbee", "stick", "water", "beach", "snow", "grass", "field", "sand", "rock", "mountain", "tree",
    "flower", "street", "building", "house", "room", "bench", "fence", "table", "food", "hat", "shirt", "guitar",
    "sky",
)
# fmt: on


class TagProvider(Protocol):
    """Names what an image shows."""

    def prepare(self, batches: Iterator[Batch]) -> None:
        """What is fitted on the training split before any stage."""

    def learn_words(self) -> None:
        """Called when the encoders have another tokenizer than before."""

    def __call__(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens [B, T, C] and their mask [B, T] -> ids of the tags' word pieces [B, G], without start and end, and their mask."""


class NounTags(nn.Module):
    """The nouns of a fixed list that lie nearest to an image in the common space of a CCA between mean image and mean text tokens.

    Args:
        encoders: the shared ones.
        nouns: to choose from.
        count: how many an image has, nearest first.

    Raises:
        ValueError: for fewer nouns than an image has, or tags that may be longer than the text encoder reads.
    """

    def __init__(self, encoders: Encoders, nouns: Sequence[str] = NOUNS, count: int = 5) -> None:
        super().__init__()
        if not 0 < count <= len(nouns):
            raise ValueError(f"tags: got {len(nouns)} nouns and {count} of them an image; expected 1 up to all of them")
        self.count = count
        self._encoders = (encoders,)
        self.cca, self.nouns = CanonicalCorrelation(encoders), nouns
        self.learn_words()
        self.register_buffer("vectors", torch.zeros(len(nouns), self.cca.dim))

    def learn_words(self) -> None:
        """Read the nouns in the tokens of the encoders' tokenizer.

        Raises:
            ValueError: tags may be longer than the text encoder reads.
        """
        encoders, count, device = self._encoders[0], self.count, self.cca.get_buffer("correlations").device
        ids, mask = (x.to(device) for x in encoders.tokenise(self.nouns))
        words = mask & ~torch.isin(ids, ids.new_tensor(encoders.special_ids))
        if (longest := count * int(words.sum(1).max()) + 2) > encoders.max_length:
            raise ValueError(
                f"tags: {count} nouns may take {longest} tokens, the text encoder reads {encoders.max_length}; lower count"
            )
        for name, value in (("ids", ids), ("mask", mask), ("words", words)):
            self.register_buffer(name, value, persistent=False)  # follows from the settings

    def prepare(self, batches: Iterator[Batch]) -> None:
        self.cca.prepare(batches)
        read = self._encoders[0].read_texts(self.get_buffer("ids"), self.get_buffer("mask"))
        self.get_buffer("vectors").copy_(self.cca.embed_texts(read))

    @torch.no_grad()
    def nearest(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Places in the list [B, count], nearest first."""
        similarity = self.cca.embed_images(Images(tokens, mask)) @ self.get_buffer("vectors").T  # [B, N]
        return similarity.topk(self.count, 1).indices

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        nearest = self.nearest(tokens, mask)
        return self.get_buffer("ids")[nearest].flatten(1), self.get_buffer("words")[nearest].flatten(1)


def any_other(image_id: Tensor) -> Tensor:
    """For each row a row [B] that shows another image, all alike likely."""
    alike = torch.zeros(len(image_id), len(image_id), device=image_id.device)
    return sample_hard_negatives(alike, image_id, image_id)[0]


def mixed_tags(image_id: Tensor) -> Tensor:
    """Whose tags each row gets [B]: its own, or with probability 0.5 those of another image."""
    own = torch.arange(len(image_id), device=image_id.device)
    return torch.where(torch.rand(len(own), device=own.device) < 0.5, own, any_other(image_id))


def random_negatives(image_id: Tensor) -> tuple[Tensor, Tensor]:
    """One wrong pair for each true one, rows of its image [B] and of its caption [B]: with probability 0.5 row b keeps its image and gets a
    wrong caption, otherwise it keeps its caption and gets a wrong image."""
    own, other = torch.arange(len(image_id), device=image_id.device), any_other(image_id)
    wrong_caption = torch.rand(len(own), device=own.device) < 0.5
    return torch.where(wrong_caption, own, other), torch.where(wrong_caption, other, own)


class OSCAR(System):
    """A single stream over caption, tags and image tokens, read by its class token.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout: of the stream.
        tags: names what images show; by default `NounTags`.
        tag_count: how many nouns an image has.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 2,
        heads: int = 8,
        dropout: float = 0.1,
        tags: TagProvider | None = None,
        tag_count: int = 5,
    ) -> None:
        super().__init__(encoders)
        self.tags = NounTags(encoders, count=tag_count) if tags is None else tags
        self.text_project, self.image_project = (
            nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width)) for c in (encoders.text_width, encoders.image_width)
        )
        self.types = nn.Embedding(2, width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.words = WordHead(width, encoders.vocab_size)
        self.own_tags, self.match = (
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)) for _ in range(2)
        )
        self.apply(init_weights)

    def prepare(self, batches: Iterator[Batch]) -> None:
        self.tags.prepare(batches)

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        if stage == "pretrain":
            return self._pretrain(batch)
        image, text = gather_padded(*self.image_state(batch.images)), gather_padded(*self.text_state(batch.texts))
        ids = gather(batch.image_id)
        wrong_image, wrong_text = (local_rows(shared(rows)) for rows in random_negatives(ids))
        true = local_rows(torch.arange(len(ids), device=ids.device))
        rows, columns = torch.cat([true, wrong_image]), torch.cat([true, wrong_text])
        # A state holds an image together with its tags: who replaces the one replaces the other.
        logits = self.score_pairs(tuple(x[rows] for x in image), tuple(x[columns] for x in text))
        labels = torch.arange(len(logits), device=logits.device) < len(true)
        return {"itm": matching_loss(logits, labels)}

    def _pretrain(self, batch: Batch) -> dict[str, Tensor]:
        """Hidden words of caption and tags, and whether the tags are the image's own: with probability 0.5 they are another's."""
        rows = shared(mixed_tags(gather(batch.image_id)))
        own = local_rows(rows == torch.arange(len(rows), device=rows.device))
        ids, mask = (x[local_rows(rows)] for x in gather_padded(*self.read_tags(batch.images)))
        tag_holes, tag_words = hide_words(ids, mask, self.encoders)
        holes, words = hide_words(batch.texts.ids, batch.texts.mask, self.encoders)
        first = len(self.encoders.frame[0])  # the start stands before the caption
        hidden = self._stream(
            self._embed_text(self.encoders.read_texts(holes, batch.texts.mask), 0),
            batch.texts.mask,
            self._embed_text(self.encoders.read_texts(tag_holes, mask), 1)[:, first:],
            mask[:, first:],
            self.image_project(batch.images.tokens),
            batch.images.mask,
        )
        asked = torch.cat([words, tag_words[:, first:]], 1)  # [B, L + G]
        return {
            "mlm": self.words.loss(hidden[:, : asked.shape[1]], asked),
            "tags": F.binary_cross_entropy_with_logits(self.own_tags(hidden[:, 0])[:, 0].float(), own.float()),
        }

    def read_tags(self, images: Images) -> tuple[Tensor, Tensor]:
        """The tags of images as a text of their own, start and end around them: ids [B, G + 2] and mask, padding last."""
        ids, mask = self.tags(images.tokens, images.mask)
        start, end = (ids.new_tensor(tokens).expand(len(ids), -1) for tokens in self.encoders.frame)
        ids = torch.cat([start, ids, end], 1)
        mask = F.pad(mask, (start.shape[1], end.shape[1]), value=True)
        order = (~mask).long().argsort(dim=1, stable=True)  # word pieces close up over the padding of shorter tags
        order = order[:, : self.encoders.max_length]  # what is beyond is padding: `NounTags` has seen to it
        return ids.gather(1, order).masked_fill(~mask.gather(1, order), self.encoders.pad_id), mask.gather(1, order)

    @classmethod
    def known_texts(cls, settings: Mapping[str, Any]) -> Sequence[str]:
        return NOUNS

    def learn_words(self) -> None:
        self.tags.learn_words()

    def image_state(self, images: Images) -> State:
        """Image tokens [B, T, W], their mask, the image's tags [B, G, W] and theirs."""
        ids, mask = self.read_tags(images)
        first = len(self.encoders.frame[0])  # the start stands before the caption
        tags = self._embed_text(self.encoders.read_texts(ids, mask), 1)[:, first:]
        return self.image_project(images.tokens), images.mask, tags, mask[:, first:]

    def text_state(self, texts: Texts) -> State:
        """Caption tokens [M, L, W] and their mask."""
        return self._embed_text(texts, 0), texts.mask

    def score_pairs(self, images: State, texts: State) -> Tensor:
        """Logits [P] of "match"."""
        image, image_mask, tags, tag_mask = images
        caption, mask = texts
        return self.match(self._stream(caption, mask, tags, tag_mask, image, image_mask)[:, 0])[:, 0]

    def _embed_text(self, texts: Texts, kind: int) -> Tensor:
        return self.text_project(texts.tokens) + self.types.weight[kind]

    def _stream(
        self, caption: Tensor, mask: Tensor, tags: Tensor, tag_mask: Tensor, image: Tensor, image_mask: Tensor
    ) -> Tensor:
        """[P, L, W], [P, G, W] and [P, T, W] as one sequence -> [P, L + G + T, W]."""
        x = torch.cat([caption, tags, image], 1)
        bias = key_mask_to_bias(torch.cat([mask, tag_mask, image_mask], 1))
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)
