"""Prompts and captions as the language model of a captioning head reads and writes them, by its own tokenizer.

Legend: B texts, P prompt length, L prompt and caption with the end token, in tokens.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from unimodal.data.texts import TruncationWarning, require_texts

WRITER_FOLDER = "language_model"  # of its tokenizer, inside a checkpoint


class Writer:
    """The tokenizer of a language model, and how a caption begins and ends.

    Args:
        tokenizer: it.
        vocab_size: of the language model.
        start_id: token before a caption without a prompt; a prompt begins as the tokenizer begins a text.
        end_id: token after a caption.
        encoded: the language model reads the prompt with an encoder, as a text of its own, and its decoder writes the caption.
        prompt: what stands before every caption in training.
        max_length: longest caption in tokens, without prompt, end included.

    Raises:
        ValueError: the tokenizer has tokens that the language model lacks, or not its end token, or closes every text that is to go on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        start_id: int,
        end_id: int,
        encoded: bool = False,
        prompt: str = "",
        max_length: int = 40,
    ) -> None:
        largest = max(tokenizer.get_vocab().values())
        if largest >= vocab_size or end_id > largest:
            raise ValueError(
                f"the language model has {vocab_size} tokens and ends with {end_id}, its tokenizer has tokens up to {largest}: they do not "
                "belong together; give the tokenizer that was released with the model"
            )
        words, closed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        if not encoded and closed[len(closed) - len(words) :] != words:
            raise ValueError(
                f"the tokenizer ends every text with {tokenizer.decode(closed[-1:])!r}, so a language model could not go on from a prompt; "
                "give the tokenizer of a model that writes from left to right"
            )
        self.tokenizer, self.start_id, self.end_id = tokenizer, start_id, end_id
        self.encoded, self.prompt, self.max_length = encoded, prompt, max_length

    def prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> ids [B, P] and their mask [B, P] (True = real token).

        They are padded on the left, since writing goes on at the right end; on the right for an encoder, which knows by its place how far
        a token is from the picture.

        Raises:
            TypeError: for anything but a list of strings.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts: expected a list of strings, got {prompts!r}")
        rows = [torch.tensor(self._before(prompt)) for prompt in prompts]
        side = "right" if self.encoded else "left"
        ids = pad_sequence(rows, batch_first=True, padding_value=self.end_id, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side).bool()
        return ids, mask

    def captions(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions for training -> ids [B, L], prompt, caption and end, padded on the right; and the mask [B, L] for `caption_loss`.

        The mask is True on the caption, its end, and the token before it, which predicts the first one: the prompt is read, not learned.

        Raises:
            TypeError, ValueError: as `Processor.texts`; ValueError for a prompt whose end melts into the caption's first token.
        """
        require_texts(captions)
        before = self._before(self.prompt)
        rows = [self._after(caption, before) for caption in captions]
        longer = [i for i, row in enumerate(rows) if len(row) >= self.max_length]
        if longer:
            warnings.warn(
                f"{len(longer)} of {len(rows)} captions are longer than {self.max_length} tokens and were cut, "
                f"first {captions[longer[0]][:60]!r}",
                TruncationWarning,
                stacklevel=2,
            )
        whole = [torch.tensor([*before, *row[: self.max_length - 1], self.end_id]) for row in rows]
        masks = [torch.arange(len(row)) >= len(before) - 1 for row in whole]
        return pad_sequence(whole, batch_first=True, padding_value=self.end_id), pad_sequence(masks, batch_first=True)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Token ids -> text, without special tokens."""
        return str(self.tokenizer.decode(torch.as_tensor(ids, dtype=torch.long), skip_special_tokens=True)).strip()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder of their own inside a checkpoint; all else is in the model's configuration."""
        self.tokenizer.save_pretrained(str(Path(folder) / WRITER_FOLDER))

    def _before(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"]) if prompt else [self.start_id]

    def _after(self, caption: str, before: list[int]) -> list[int]:
        """Ids of a caption as it continues the prompt: many tokenizers put the space before a word into the word's token."""
        if self.encoded or not self.prompt:
            return list(self.tokenizer(caption, add_special_tokens=False)["input_ids"])
        space = "" if self.prompt[-1].isspace() else " "
        whole = list(self.tokenizer(self.prompt + space + caption)["input_ids"])
        if whole[: len(before)] != before:
            raise ValueError(
                f"captioning.prompt {self.prompt!r}: its last token melts into the first word of {caption[:40]!r}; "
                "end the prompt with a word or a sign, without a space"
            )
        return whole[len(before) :]
