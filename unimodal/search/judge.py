"""Queries and documents through a vision-language model that reads each pair as one conversation, and says whether they match.

Conversations begin alike: all of them with the same instruction, those of one query with the query, too. What the rows of a batch share
is read once and kept (its keys and values), also for the next batch; only the rest is read for every pair.

Legend: P pairs, B pairs of a batch, L tokens.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor

from unimodal.backbones import Prefix, move_pixels
from unimodal.data.conversation import ConversationProcessor, Row
from unimodal.data.items import Item, picture_key
from unimodal.model import UnimodalModel
from unimodal.onednn import inference


class Judge:
    """The matching head of a vision-language model, with what it read last of the start of conversations.

    Args:
        model: a model whose matching head has the kind `backbone`.
        processor: its processor.
    """

    def __init__(self, model: UnimodalModel, processor: ConversationProcessor) -> None:
        self.model, self.processor = model, processor
        self.keys: list[Any] = []
        self.read: Prefix | None = None

    @inference()
    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Match logits [B], float32, of conversations."""
        start = common(rows) if len(rows) > 1 else common([rows[0].keys, self.keys])
        whole = self._place(self.processor.batch(rows, "left", patches=False))
        positions = self.model.backbone.positions(whole)  # [3, B, L]
        first = positions[:, :1, positions.shape[2] - len(rows[0].ids) :]
        self._read(rows[0], start, first)
        rest = self._place(self.processor.batch([row.part(start) for row in rows], "left"))
        return self.model.judge(rest, positions=positions[:, :, start:], prefix=self.read).float().cpu()

    def _read(self, row: Row, stop: int, positions: Tensor) -> None:
        """Keep what was read of the first `stop` tokens of a row, and read what is missing of them."""
        known = common([row.keys[:stop], self.keys], rest=0)
        before = None if not known or self.read is None else [(k[:, :, :known], v[:, :, :known]) for k, v in self.read]
        self.keys, self.read = row.keys[:stop], before
        if stop > known:
            part = self._place(self.processor.batch([row.part(known, stop)], "left"))
            self.read = self.model.backbone.prefix(part, positions[:, :, known:stop], before)

    def _place(self, conversations: dict[str, Tensor]) -> Any:
        return move_pixels(conversations, self.model.log_scale.device, self.model.log_scale.dtype)


def common(rows: Sequence[Any], rest: int = 1) -> int:
    """How many tokens all rows (or lists of keys) have in common at their start, so that `rest` remain of each and no picture is cut."""
    keys = [row.keys if isinstance(row, Row) else row for row in rows]
    shortest = min(len(of_row) for of_row in keys) - rest
    count = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, list(zip(*keys))[: max(shortest, 0)]))
    for of_row in keys:
        beyond = {key for key in of_row[count:] if isinstance(key, tuple)}
        count = next((i for i, key in enumerate(of_row[:count]) if key in beyond), count)
    return count


def plan(pairs: Sequence[tuple[Item, Item]], batch_size: int, expected: Callable[[Item], float]) -> list[list[int]]:
    """Places of pairs in batches: those of one query together, and within a query by length, so that little is padding."""
    of_query: dict[Any, list[int]] = {}
    for place, (query, _) in enumerate(pairs):
        of_query.setdefault((query.text, picture_key(query.images), picture_key(query.video)), []).append(place)
    alone = [place for places in of_query.values() if len(places) == 1 for place in places]
    groups = [places for places in of_query.values() if len(places) > 1] + [alone]
    lengths = [expected(query) + expected(document) for query, document in pairs]
    ordered = [sorted(group, key=lambda place: lengths[place]) for group in groups]
    return [group[i : i + batch_size] for group in ordered for i in range(0, len(group), batch_size)]
