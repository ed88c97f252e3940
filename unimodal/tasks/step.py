"""A training step's reads of a batch, which its objectives share: token states and embeddings, each made once, when first asked for."""

from functools import cached_property
from typing import Any

from torch import Tensor

from unimodal.chunks import at, by_chunks
from unimodal.data.batch import Batch, image_inputs, text_inputs
from unimodal.losses import Wrong
from unimodal.model import ImageState, TextState, UnimodalModel


class Step:
    """One training step's reads of a batch, each made once, when an objective first asks for it.

    Args:
        model: what reads.
        batch: what is read.
        progress: how far the stage is, from 0 to 1.
        mini_batch_size: rows read at a time (GradCache, `unimodal.chunks`); None reads the whole batch at once.
        states: whether an objective asks for more than embeddings. If none does, chunks leave nothing but embeddings.
    """

    def __init__(
        self,
        model: UnimodalModel,
        batch: Batch,
        progress: float,
        mini_batch_size: int | None = None,
        states: bool = True,
    ) -> None:
        self.model, self.batch, self.progress = model, batch, progress
        self.mini_batch_size, self.states = mini_batch_size, states

    # Token states.

    def _read_image(self, pixels: Any, features: Tensor | None, mask: Tensor | None) -> ImageState:
        state = self.model.encode_image(pixels, features=features, mask=mask)
        # Keys and values of a whole batch would be the memory that chunks save: they are projected again where they are read.
        return state if self.mini_batch_size is None else state._replace(memory=None)

    def _read_text(self, ids: Tensor, mask: Tensor, features: Tensor | None) -> TextState:
        return self.model.encode_text(ids, mask, features=features)

    @cached_property
    def image(self) -> ImageState:
        return by_chunks(self._read_image, *self._images, size=self.mini_batch_size)

    @cached_property
    def text(self) -> TextState:
        return by_chunks(self._read_text, *self._texts, size=self.mini_batch_size)

    @cached_property
    def negative_text(self) -> TextState:
        """The false captions that are there, in the order of `negative_text_given`; at least one must be."""
        return by_chunks(self._read_text, *self._negative_texts, size=self.mini_batch_size)

    @cached_property
    def negative_image(self) -> ImageState:
        """The wrong pictures that are there, in the order of `negative_image_given`; at least one must be."""
        return by_chunks(self._read_image, *self._negative_images, size=self.mini_batch_size)

    # Embeddings.

    @cached_property
    def image_embedding(self) -> Tensor:
        return self._embed_images(self._images, "image")

    @cached_property
    def text_embedding(self) -> Tensor:
        return self._embed_texts(self._texts, "text")

    @cached_property
    def wrong_text(self) -> Wrong | None:
        """Embeddings [B, K, E] of the false captions of each picture; None where the batch has none."""
        given = self.negative_text_given
        if given is None or not given.any():
            return None if given is None else self._nothing_wrong(given, self.text_embedding)
        return _spread(self._embed_texts(self._negative_texts, "negative_text"), given)

    @cached_property
    def wrong_image(self) -> Wrong | None:
        """Embeddings [B, K, E] or [B, K, N, E] of the wrong pictures of each caption; None where the batch has none."""
        given = self.negative_image_given
        if given is None or not given.any():
            return None if given is None else self._nothing_wrong(given, self.image_embedding)
        return _spread(self._embed_images(self._negative_images, "negative_image"), given)

    @property
    def negative_text_given(self) -> Tensor | None:
        """Which false captions are there, [B, K]; None where the batch has no such key."""
        return self.batch["negative_mask"].any(dim=-1) if "negative_text" in self.batch else None

    @property
    def negative_image_given(self) -> Tensor | None:
        """Which wrong pictures are there, [B, K]; None where the batch has no such key."""
        return self.batch.get("negative_image_mask")

    # What is read: pixels, features and their mask of images; ids, mask and features of texts. None for what the batch has not.

    @property
    def _images(self) -> list[Any]:
        return list(image_inputs(self.batch).values())

    @property
    def _texts(self) -> list[Any]:
        return list(text_inputs(self.batch).values())

    @property
    def _negative_texts(self) -> list[Any]:
        keys = ("negative_text", "negative_mask", "negative_text_features")
        return [at(self.batch.get(key), self.negative_text_given) for key in keys]

    @property
    def _negative_images(self) -> list[Any]:
        keys = ("negative_image", "negative_image_features", "negative_image_features_mask")
        return [at(self.batch.get(key), self.negative_image_given) for key in keys]

    def _embed_images(self, inputs: list[Any], state: str) -> Tensor:
        if self.states:
            return self.model.image_embedding(getattr(self, state))
        return by_chunks(
            lambda pixels, features, mask: self.model.embed_images(pixels, features=features, mask=mask),
            *inputs,
            size=self.mini_batch_size,
        )

    def _embed_texts(self, inputs: list[Any], state: str) -> Tensor:
        if self.states:
            return self.model.text_embedding(getattr(self, state))
        return by_chunks(
            lambda ids, mask, features: self.model.embed_texts(ids, mask, features=features),
            *inputs,
            size=self.mini_batch_size,
        )

    def _nothing_wrong(self, given: Tensor, like: Tensor) -> Wrong:
        """No wrong item in any row: other ranks may have some, and all ranks exchange alike."""
        return Wrong(like.new_zeros(*given.shape, *like.shape[1:]), given)


def _spread(embedding: Tensor, given: Tensor) -> Wrong:
    """Rows [G, ...] to the G places that are True in `given` [B, K], zeros elsewhere."""
    out = embedding.new_zeros(*given.shape, *embedding.shape[1:])
    out[given] = embedding
    return Wrong(out, given)
