"""What a published design knows of a tokenizer: its special tokens, and the ids of the texts that the design holds."""

from collections.abc import Sequence

from unimodal.config import WordsConfig
from unimodal.data.processor import Processor


def words_of(processor: Processor, texts: Sequence[str] = ()) -> WordsConfig:
    """What a system knows of a processor's tokenizer.

    Args:
        processor: the model's.
        texts: what the system holds by heart.
    """
    tokenizer = processor.tokenizer
    ids, mask = processor.texts(["a", *texts])
    rows = [tuple(row[kept].tolist()) for row, kept in zip(ids, mask)]
    special = set(tokenizer.all_special_ids)
    around = [token for token in rows[0] if token in special]
    start = rows[0][0] if rows[0][0] in special else None
    end = next((token for token in around if token != start), None)
    pad = tokenizer.pad_token_id or 0
    # A tokenizer without a mask token hides a word by its unknown word, or by the start, which stands nowhere else in a text.
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in (pad, start, end) else None
    mask_id = next((token for token in (tokenizer.mask_token_id, unknown, start) if token is not None), None)
    return WordsConfig(
        pad_id=pad,
        start_id=start,
        end_id=end,
        mask_id=mask_id,
        known=dict(zip(texts, rows[1:])),
    )
