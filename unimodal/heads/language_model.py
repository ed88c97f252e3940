"""The captioning head that lets a published language model write (BLIP-2, Li et al. 2023, arXiv 2301.12597, second stage).

A linear layer turns what the bridge read into embeddings that the language model finds before its text, as if they were words. A model
with an encoder (Flan-T5) finds them before the prompt there, and its decoder writes the caption. The model itself is transformers' own, and
so is the search for the caption.

Legend: B images, N bridged tokens, W bridge width, H embedding width of the language model, P prompt length, L text length, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal import arguments
from unimodal.draws import Generators, drawing_from, own_generators
from unimodal.heads.base import Body, CaptioningHead, Reads
from unimodal.layers import init_weights
from unimodal.states import ImageState

OBJECTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


class LanguageModelCaptioner(CaptioningHead):
    """Bridged tokens, projected, before the text of a language model: prompt and caption of a decoder-only one, the prompt of one that
    reads with an encoder.

    Args:
        language_model: a transformers model with `generate`; its configuration names the end token, and whether it has an encoder.
        width: W.
        sources: where the language model came from, as `Backbone.sources`.

    Raises:
        ValueError: an end or a start token lies outside of the vocabulary.
    """

    own_words = True

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
        self.encodes: bool = settings.is_encoder_decoder
        starts = [self.bos_id, *([settings.decoder_start_token_id] if self.encodes else [])]
        if not 0 <= max(*starts, *self.end_ids) < self.vocab_size:
            raise ValueError(
                f"the language model starts with {starts} and ends with {self.end_ids}, outside of its vocabulary of "
                f"{self.vocab_size}; set bos_token_id, decoder_start_token_id of an encoder-decoder, and eos_token_id in "
                "captioning.language_model.kwargs"
            )
        self.positions: int | None = getattr(settings, "max_position_embeddings", None)
        self.projection = nn.Linear(width, hidden)
        self.projection.apply(init_weights)
        self.language_model = language_model

    def forward(self, ids: Tensor, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prompt and caption [B, L], padded on the right; bridged tokens [B, N, W] -> logits [B, L, V].

        Position i predicts token i + 1. No token of a decoder looks to its right, so padding needs no mask.

        Args:
            ids: prompt and caption, as `Writer.captions` gives them.
            images: bridged tokens.
            mask: True from the prompt's last token on [B, L], which tells an encoder what is its own; None is a prompt of one token. Logits
                before that token are zeros where there is an encoder: nothing writes a prompt.

        Raises:
            ValueError: prompts of several lengths, for an encoder; more tokens than positions.
        """
        if self.encodes:
            length = 1 if mask is None else _prompt_length(mask)
            caption = ids[:, length - 1 :].clone()  # [B, L - P + 1]
            caption[:, 0] = self.language_model.config.decoder_start_token_id
            inputs = self._before(images, ids[:, :length], 0)  # [B, N + P, H]
            logits = self.language_model(inputs_embeds=inputs, decoder_input_ids=caption, use_cache=False).logits
            return F.pad(logits, (0, 0, length - 1, 0))
        inputs = self._before(images, ids, 0)  # [B, N + L, H]
        return self.language_model(inputs_embeds=inputs, use_cache=False).logits[:, images.shape[1] :]

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        *,
        prompt: tuple[Tensor, Tensor] | None = None,
        generator: Generators = None,
        **settings: Any,
    ) -> list[list[int]]:
        """One caption per image, or `num_return_sequences` one after another: ids without prompt and end.

        Args:
            images: bridged tokens [B, N, W].
            prompt: ids and mask [B, P], or [1, P] for all, padded as `unimodal.data.writer.Writer` does; None is the start token.
            generator: what the draws follow from: a source for all images, or one for each, see `unimodal.draws`.
            settings: all that transformers' `generate` takes (`max_new_tokens`, `num_beams`, `do_sample`, `repetition_penalty`, ...).
                Penalties see the start token in the picture's place, or only the caption where an encoder read the rest.

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
        more = 0 if self.encodes else settings.get("max_new_tokens") or 0
        read = {
            "inputs_embeds": self._before(images, ids, more),  # [B, N + P, H]
            "attention_mask": torch.cat([mask.new_ones(count, queries), mask], 1).long(),
        }
        if not self.encodes:
            read["input_ids"] = torch.cat([start.expand(count, queries), ids], 1)  # what was written goes on from there
        written: list[Tensor] = []
        if settings.get("do_sample"):  # one by one: the draws of a batch come from one source
            for i, own in enumerate(own_generators(generator, count)):
                with drawing_from(own, device):
                    one = {name: value[i : i + 1] for name, value in read.items()}
                    written += arguments.passed_on(self.language_model.generate, one, settings, "caption")
        else:
            written += arguments.passed_on(self.language_model.generate, read, settings, "caption")
        ends = settings.get("eos_token_id", self.end_ids)
        ends = ends if isinstance(ends, list) else [ends]
        rows = [row[1 if self.encodes else queries + ids.shape[1] :].tolist() for row in written]
        return [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in rows]

    def logits(self, body: Body, image: ImageState, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self(ids, image.bridged, mask)

    def write(self, body: Body, image: ImageState, **options: Any) -> list[list[int]]:
        return self.generate(image.bridged, **options)

    def probe(self, body: Body, pixels: Any, image: ImageState, ids: Tensor) -> Tensor:
        """Logits for ids that its vocabulary has."""
        return self(ids % self.vocab_size, image.bridged)

    def path(self, reads: Reads) -> tuple[str, ...]:
        return (*reads.bridged, "heads.captioning.*")

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


def _prompt_length(mask: Tensor) -> int:
    """Tokens before a caption, its mask [B, L] being True from the last of them on."""
    lengths = (mask.int().argmax(1) + 1).unique().tolist()
    if len(lengths) > 1:
        raise ValueError(
            f"caption: prompts of {', '.join(map(str, lengths))} tokens in one batch; a language model with an encoder learns from one "
            "prompt at a time: give all captions of a batch the same"
        )
    return int(lengths[0])
