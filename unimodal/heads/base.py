"""What a head is to the rest of the house: what it reads, what it wants kept of an item, how it scores or writes, and a probe.

Those who use a model's heads call these methods and never ask which head it is; the table that builds heads (`unimodal.heads.building`) is
the only place that knows the kinds.

Legend: B images, M texts, P pairs, T tokens, L text length, N queries, D backbone width, W bridge width, V vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unimodal.layers import KeyValues
from unimodal.states import ImageState, TextState

LAYERS = ("bridge.layers.*", "bridge.norm.*")
WORDS = ("bridge.*embedding.*",)  # the bridge's own embeddings of words


class Body(Protocol):
    """What a head may use of the model that it belongs to."""

    backbone: Any
    bridge: Any
    system: Any
    heads: nn.ModuleDict


class Reads(NamedTuple):
    """Patterns over a model's parameter names: what image tokens, text tokens, raw features and only the backbone's own embedding depend
    on."""

    images: tuple[str, ...]
    texts: tuple[str, ...]
    features: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def bridged(self) -> tuple[str, ...]:
        """What the bridge's image queries depend on."""
        return (*self.images, *LAYERS, "bridge.query_sets.image")


class MatchingHead(nn.Module):
    """A head that says whether a text describes an image.

    Attributes:
        whole: whether query and document are read together, as one conversation; otherwise pairs are scored from what is kept of each.
        text_kept: what is kept of a text, by its name in an exported model.
    """

    whole = False
    text_kept = "text_tokens"

    def memory(self, body: Body, tokens: Tensor, mask: Tensor) -> KeyValues | None:
        """Keys and values of image tokens [B, T, D] that the head reads of every pair, projected once."""
        return None

    def image_kept(self, image: ImageState) -> tuple[Tensor, Tensor | None]:
        """What an index keeps of images, [B, T, ...], and which rows of it are real [B, T]; None where all are."""
        raise NotImplementedError

    def kept_of_text(self, text: TextState) -> Tensor:
        """What an index keeps of texts, [M, L, ...], padded as `text.mask` says."""
        raise NotImplementedError

    def restored(
        self, image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor
    ) -> tuple[ImageState, TextState]:
        """States that `match` reads, from what was kept."""
        raise NotImplementedError

    def match(self, body: Body, image: ImageState, text: TextState, image_index: Tensor, text_index: Tensor) -> Tensor:
        """Match logits [P] of pairs (image_index[p], text_index[p])."""
        raise NotImplementedError

    def rows(self, body: Body, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Match logits [P] of P images with P texts, row by row, from what was kept of them."""
        raise NotImplementedError

    def probe(self, body: Body, pixels: Any, image: ImageState, text: TextState) -> Tensor:
        """Match logits [B] of fixed images with as many texts, which show whether the head computes the same."""
        row = torch.arange(len(text.ids), device=text.ids.device)
        return self.match(body, image, text, row, row)

    def path(self, reads: Reads) -> tuple[str, ...]:
        """What its output depends on, as patterns over the model's parameter names."""
        raise NotImplementedError


class CaptioningHead(nn.Module):
    """A head that writes about images.

    Attributes:
        whole: whether it writes after a whole conversation, and not from what was read of an image.
        own_words: whether it reads and writes in the ids of a tokenizer of its own.
        sources: where parts of it came from, as `Backbone.sources`.
    """

    whole = False
    own_words = False

    def cache(self) -> KeyValues | None:
        """Where the bridge leaves the keys and values that the head looks back at; None where it looks at none."""
        return None

    def start(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] of texts as the head is fed them."""
        return ids

    def targets(self, ids: Tensor) -> Tensor:
        """The classes [B, L] that `logits` scores for token ids [B, L]."""
        return ids

    def logits(self, body: Body, image: ImageState, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Next-token logits [B, L, V] of captions [B, L] under teacher forcing."""
        raise NotImplementedError

    def write(self, body: Body, image: ImageState, **options: Any) -> list[list[int]]:
        """Token ids of a caption per image."""
        raise NotImplementedError

    def probe(self, body: Body, pixels: Any, image: ImageState, ids: Tensor) -> Tensor:
        """Logits for fixed images and token ids, which show whether the head computes the same."""
        return self.logits(body, image, ids, None)

    def example(self, body: Body, pixels: Any, image: ImageState, length: int) -> dict[str, Tensor]:
        """What a checkpoint keeps of the head's output for fixed images: captions of up to `length` tokens, padded by -1."""
        written = [torch.tensor(ids, dtype=torch.long) for ids in self.write(body, image, max_new_tokens=length)]
        return {"caption": nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=-1)}

    def path(self, reads: Reads) -> tuple[str, ...]:
        """What its output depends on, as patterns over the model's parameter names."""
        raise NotImplementedError


class Embedder:
    """How a model embeds images and texts; its weights are the bridge's heads or the backbone's.

    Attributes:
        by_backbone: whether raw features are all that it reads.
    """

    by_backbone = False

    def vectors(self, body: Body) -> int:
        """The number of vectors of an image, of which the best counts; 0 where an image has a single one."""
        return 0

    def own_image(self, body: Body, features: Tensor, mask: Tensor | None) -> Tensor | None:
        """What the backbone itself makes of raw image features, for `ImageState.own`."""
        return None

    def own_text(self, body: Body, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor | None:
        """What the backbone itself makes of raw text features, for `TextState.own`."""
        return None

    def image(self, body: Body, state: ImageState) -> Tensor:
        """Unit vectors [B, E], or [B, N, E]."""
        raise NotImplementedError

    def text(self, body: Body, state: TextState) -> Tensor:
        """Unit vectors [M, E]."""
        raise NotImplementedError

    def path(self, reads: Reads) -> tuple[str, ...]:
        """What it depends on, as patterns over the model's parameter names."""
        raise NotImplementedError
