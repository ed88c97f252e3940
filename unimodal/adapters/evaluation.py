"""Our models as other evaluation programs expect theirs, unchanged: `mteb` (MIEB's image tasks too) and CLIP_benchmark.

mteb.evaluate(MtebModel(model, "me/mine"), tasks=mteb.get_tasks(["Flickr30kT2IRetrieval"]))

model, transform, tokenizer = clip_benchmark_model(model)      # in place of open_clip's three
zeroshot_retrieval.evaluate(model, dataloader, tokenizer, "cpu", amp=False)

Their command lines: see `unimodal.adapters.programs`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unimodal.inference import Unimodal


class MtebModel:
    """A model with the encoder protocol of mteb 2 (`mteb.models.EncoderProtocol`).

    Args:
        model: the model.
        name: what mteb's results are filed under, `owner/name`.
        revision: of the weights, for mteb's results.
    """

    def __init__(self, model: Unimodal, name: str, revision: str | None = None) -> None:
        self.model, self.name, self.revision = model, name, revision

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeddings [n, E], float32.

        Args:
            inputs: batches, each a dict of lists under `text`, `image` or both; both give the normalised mean.
            task_metadata, hf_split, hf_subset, kwargs: what mteb says of the task; nothing here depends on it.
            prompt_type: "query" or "document"; puts the model's prompt of that name before texts, where it has one.
            batch_size: items at a time.
            show_progress_bar: show one.

        Raises:
            ValueError: a batch has neither texts nor images.
        """
        name = getattr(prompt_type, "value", prompt_type)
        prompt = name if name in self.model.prompts else None
        parts = []
        for batch in inputs:
            kinds = [kind for kind in ("image", "text") if kind in batch]
            if not kinds:
                raise ValueError(f"got a batch of {sorted(batch)}; this model reads batches with `image` or `text`")
            items = [dict(zip(kinds, values)) for values in zip(*(batch[kind] for kind in kinds))]
            parts.append(self.model.encode(items, prompt, batch_size=batch_size, show_progress_bar=show_progress_bar))
        return np.concatenate(parts)

    def similarity(self, a: Any, b: Any) -> Tensor:
        """Cosines [A, B]."""
        return self.model.similarity(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> Tensor:
        """Cosines [A] of the rows of [A, E] and [A, E]."""
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(dim=-1)

    @cached_property
    def mteb_model_meta(self) -> Any:
        """What mteb files the results under; mteb sets it when it loads the model from its list.

        Raises:
            ImportError: mteb is not installed.
        """
        try:
            from mteb.models.model_meta import ModelMeta
        except ImportError as error:
            raise ImportError("mteb is not installed; pip install 'unimodal[mteb]'") from error
        about = {
            "name": self.name,
            "revision": self.revision,
            "modalities": ["image", "text"],
            "embed_dim": self.model.model.embedding.dim,
            "n_parameters": sum(p.numel() for p in self.model.model.parameters()),
            "similarity_fn_name": "cosine",
        }
        return ModelMeta.create_empty(about)


class ClipModel(nn.Module):
    """A model as open_clip's: tensors in, unit vectors out."""

    def __init__(self, model: Unimodal) -> None:
        super().__init__()
        self.model, self.pad = model.model, model.encoder.processor.tokenizer.pad_token_id or 0

    def encode_image(self, image: Tensor, normalize: bool = True) -> Tensor:
        """Pictures [B, 3, S, S], as the transform makes them -> [B, E]."""
        return self.model.image_embedding(self.model.encode_image(image))

    def encode_text(self, text: Tensor, normalize: bool = True) -> Tensor:
        """Token ids [B, L], as the tokenizer makes them -> [B, E]."""
        return self.model.text_embedding(self.model.encode_text(text, text != self.pad))


Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[str | Sequence[str]], Tensor]


def clip_benchmark_model(model: Unimodal) -> tuple[ClipModel, Transform, Tokenizer]:
    """(model, transform, tokenizer), as CLIP_benchmark's loaders return them.

    Raises:
        ValueError: the model keeps one vector per query for an image, where CLIP has one in all.
    """
    if model.model.embedding.pool == "query":
        raise ValueError(
            "this model has one vector per query for an image, and CLIP_benchmark multiplies single ones; use `unimodal evaluate`"
        )
    processor = model.encoder.processor

    def transform(image: Image.Image) -> Tensor:
        return processor.images([image])[0]

    def tokenizer(texts: str | Sequence[str]) -> Tensor:
        return processor.texts([texts] if isinstance(texts, str) else list(texts))[0]

    return ClipModel(model), transform, tokenizer
