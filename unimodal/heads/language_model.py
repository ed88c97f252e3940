"""The captioning head that lets a published language model write (BLIP-2, Li et al. 2023, arXiv 2301.12597, second stage).

A linear layer turns what the bridge read into embeddings that the language model finds before its text, as if they were words. The model
itself is transformers' own, and so is the search for the caption.

Legend: B images, N bridged tokens, W bridge width, H embedding width of the language model, P prompt length, L text length, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unimodal.layers import init_weights

OBJECTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


class LanguageModelCaptioner(nn.Module):
    """Bridged tokens, projected, before the text of a decoder-only language model.

    Args:
        language_model: a transformers model with `generate`; its configuration names the end token.
        width: W.
        sources: where the language model came from, as `Backbone.sources`.

    Raises:
        ValueError: the end or the start token lies outside of the vocabulary.
    """

    def __init__(
        self, language_model: Any, *, width: int, sources: dict[str, dict[str, str | None]] | None = None
    ) -> None:
        super().__init__()
        self.sources = sources or {}
        self.vocab_size, hidden = language_model.get_input_embeddings().weight.shape
        settings = language_model.config
        ends = settings.eos_token_id
        self.end_ids: list[int] = ends if isinstance(ends, list) else [ends]
        self.bos_id: int = self.end_ids[0] if settings.bos_token_id is None else settings.bos_token_id
        self.eos_id = self.end_ids[0]
        if not 0 <= max(self.bos_id, *self.end_ids) < self.vocab_size:
            raise ValueError(
                f"the language model starts with token {self.bos_id} and ends with {self.end_ids}, outside of its vocabulary of "
                f"{self.vocab_size}; set bos_token_id and eos_token_id in captioning.language_model.kwargs"
            )
        self.positions: int | None = getattr(settings, "max_position_embeddings", None)
        self.projection = nn.Linear(width, hidden)
        self.projection.apply(init_weights)
        self.language_model = language_model

    def forward(self, ids: Tensor, images: Tensor) -> Tensor:
        """Prompt and caption [B, L], padded on the right; bridged tokens [B, N, W] -> logits [B, L, V].

        Position i predicts token i + 1. No token looks to its right, so padding needs no mask.
        """
        inputs = self._before(images, ids, 0)  # [B, N + L, H]
        return self.language_model(inputs_embeds=inputs, use_cache=False).logits[:, images.shape[1] :]

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        *,
        prompt: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> list[list[int]]:
        """One caption per image, or `num_return_sequences` one after another: ids without prompt and end.

        Args:
            images: bridged tokens [B, N, W].
            prompt: ids and mask [B, P], or [1, P] for all, padded on the left (`unimodal.data.writer.Writer`); None is the start token.
            generator: what the draws follow from; None leaves them to torch's own random state.
            settings: all that transformers' `generate` takes (`max_new_tokens`, `num_beams`, `do_sample`, `repetition_penalty`, ...).
                Penalties see the start token in the picture's place.

        Raises:
            ValueError: a setting asks for more than captions.
        """
        if asked := [name for name in OBJECTS if settings.get(name)]:
            raise ValueError(
                f"{', '.join(asked)}: captions are all that is returned; call `generate` of head('captioning').language_model for more"
            )
        count, queries, device = len(images), images.shape[1], images.device
        start = torch.tensor([[self.bos_id]], device=device)
        ids, mask = prompt or (start, torch.ones_like(start, dtype=torch.bool))
        ids, mask = ids.expand(count, -1), mask.expand(count, -1)
        inputs = self._before(images, ids, settings.get("max_new_tokens") or 0)  # [B, N + P, H]
        ids = torch.cat([start.expand(count, queries), ids], 1)  # [B, N + P]
        mask = torch.cat([mask.new_ones(count, queries), mask], 1)
        with _draws(generator, device):
            out = self.language_model.generate(
                input_ids=ids,
                inputs_embeds=inputs,
                attention_mask=mask.long(),
                **settings,
            )
        ends = settings.get("eos_token_id", self.end_ids)
        ends = ends if isinstance(ends, list) else [ends]
        rows = out[:, ids.shape[1] :].tolist()
        return [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in rows]

    def _before(self, images: Tensor, ids: Tensor, more: int) -> Tensor:
        """The projected image [B, N, H], then the embedded text [B, L, H]; `more` tokens are to follow."""
        queries, length = images.shape[1], ids.shape[1] + more
        if self.positions is not None and queries + length > self.positions:
            raise ValueError(
                f"caption: {queries} tokens of the picture and {length} of text, but the language model has {self.positions} positions; "
                "shorten the prompt, the caption or max_new_tokens"
            )
        embedded = self.language_model.get_input_embeddings()(ids)
        return torch.cat([self.projection(images).to(embedded.dtype), embedded], 1)


@contextmanager
def _draws(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """A block whose draws follow from `generator`, and after which torch's own random state is as before."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
