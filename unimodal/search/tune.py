"""The cost curve of a two-stage search: what each depth, width and precision costs, and what it finds, on given pairs.

Everything is read once; match scores are kept, so that a deeper search scores only what a shallower one did not.

Legend: Q queries, G gallery items, E embedding width, k reranking depth.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unimodal.data.items import Item
from unimodal.data.pairs import Pairs
from unimodal.retrieval import Combine, ScoringRule, depth, rerank, rule_for
from unimodal.search.backends import open_backend
from unimodal.search.encoder import Encoder, batches, progress
from unimodal.search.first import FirstStage
from unimodal.search.quantise import int8_rows

DEPTHS = (0, 8, 16, 32, 64, 128)
TIMED = 15  # single queries behind each median


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to search, and what was measured of it.

    Attributes:
        precision, width: of the vectors that the first pass reads.
        k: candidates that the matching head scores; 0 for none.
        text_to_image, image_to_text: R@1, shares of queries.
        milliseconds: median of a single text query: reading it, first pass, reranking.
        memory: bytes per image that the first pass looks through.
        disk: bytes per image that candidates are scored by: embedding, and tokens where k is not 0.
    """

    precision: str
    width: int
    k: int
    text_to_image: float
    image_to_text: float
    milliseconds: float
    memory: float
    disk: float


@dataclass(frozen=True)
class Read:
    """What a model read of n items: embeddings [n, E] or [n, N, E], tokens as an index keeps them (int8 and back), bytes of them all."""

    embedding: Tensor
    tokens: list[Tensor]
    bytes: int


class Pairing:
    """The pictures and captions of a split as a model reads them, and the match scores of pairs, each computed once.

    Args:
        encoder: the model.
        pairs: the split.
        queries: at most so many queries of either kind, drawn with `seed`; all pictures and captions are the gallery.
        seed: of the draw.
        batch_size: items, and pairs, at a time.
        show: None shows a bar on a terminal.

    Raises:
        ValueError: a model without a matching head; also what reading a picture raises.
    """

    def __init__(
        self,
        encoder: Encoder,
        pairs: Pairs,
        *,
        queries: int = 1000,
        seed: int = 0,
        batch_size: int = 32,
        show: bool | None = None,
    ) -> None:
        encoder.model.head("matching")
        self.encoder, self.batch_size, self.show = encoder, batch_size, show
        captions = [(i, caption) for i in range(len(pairs)) for caption in pairs.captions(i)]
        self.texts = [caption for _, caption in captions]
        self.image_id = torch.tensor([pairs.image_id(i) for i in range(len(pairs))])
        self.text_image_id = torch.tensor([pairs.image_id(i) for i, _ in captions])
        self.image = self._read("Reading pictures", len(pairs), lambda i: Item(image=pairs.image(i)))
        self.text = self._read("Reading captions", len(captions), lambda i: Item(text=captions[i][1]))
        draw = torch.Generator().manual_seed(seed)
        self.rows = {
            side: torch.randperm(count, generator=draw)[:queries].sort().values
            for side, count in (("text", len(captions)), ("image", len(pairs)))
        }
        self.known = {
            side: torch.full((len(self.rows[side]), len(gallery.tokens)), torch.nan)
            for side, gallery in (("text", self.image), ("image", self.text))
        }

    def _read(self, what: str, count: int, item: Callable[[int], Item]) -> Read:
        embedding: list[Tensor] = []
        tokens: list[Tensor] = []
        size = 0
        for rows in progress(batches(count, self.batch_size), what, self.show):
            read = self.encoder.read([item(i) for i in range(count)[rows]])
            embedding.append(read.embedding.cpu())
            for one in read.tokens:
                kept = one.cpu()
                if one.is_floating_point():
                    codes, scale = int8_rows(kept.float().numpy())
                    kept, size = torch.from_numpy(codes * scale[:, None]), size + codes.nbytes + scale.nbytes
                else:
                    size += 4 * len(one)
                tokens.append(kept)
        joined = torch.cat(embedding)
        return Read(joined, tokens, size)

    def match(self, side: str, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Match logits [P] of (number of the query among `rows[side]`, gallery row)."""
        if not pairs:
            return torch.empty(0)
        query, row = torch.tensor(pairs).T
        known = self.known[side]
        new = known[query, row].isnan().nonzero()[:, 0]
        texts, images = self.text.tokens, self.image.tokens
        asked = self.rows[side][query]
        both = [
            (images[r], texts[q]) if side == "text" else (images[q], texts[r])
            for q, r in zip(asked[new].tolist(), row[new].tolist())
        ]
        known[query[new], row[new]] = self.encoder.match(both, self.batch_size, self.show)
        return known[query, row]

    def right(self, side: str) -> Tensor:
        """Which gallery items answer each query, [Q, G] bool."""
        ids = (self.text_image_id, self.image_id) if side == "text" else (self.image_id, self.text_image_id)
        return ids[0][self.rows[side]][:, None] == ids[1]


def cost_curve(
    pairing: Pairing,
    *,
    depths: Sequence[int] = DEPTHS,
    precisions: Sequence[str] = ("float32", "int8", "binary"),
    combine: Combine | None = None,
    match_scale: float | None = None,
) -> list[Setting]:
    """Measure every setting: depths x the model's Matryoshka widths x precisions, with the built-in exact first pass.

    Args:
        pairing: what was read.
        depths: values of k.
        precisions: of the first pass; `binary` is left out for widths that eight does not divide.
        combine, match_scale: as in `Index.search`; None is what the model's scoring rule says.
    """
    encoder = pairing.encoder
    embedding = encoder.model.embedding
    widths = sorted({*embedding.matryoshka, embedding.dim})
    texts, images = pairing.rows["text"].tolist(), len(pairing.image.tokens)
    reading = _median(lambda i: encoder.read([Item(text=pairing.texts[i])]), texts)
    matching = {k: _matching_time(pairing, k) for k in depths}
    settings = []
    for precision, width in product(precisions, widths):
        if precision == "binary" and width % 8:
            continue
        with tempfile.TemporaryDirectory() as folder:
            stages = {
                "text": _stage(pairing.image, Path(folder, "images"), precision, width),
                "image": _stage(pairing.text, Path(folder, "captions"), precision, width),
            }
            memory = sum(path.stat().st_size for path in Path(folder, "images").iterdir())
            for k in depths:
                rule = rule_for(encoder.model.config, k=k, combine=combine, scale=match_scale)
                recall = {side: _recall(pairing, side, stage, rule) for side, stage in stages.items()}
                find = partial(_find, stages["text"], pairing.text.embedding, max(k, 1))
                settings.append(
                    Setting(
                        precision=precision,
                        width=width,
                        k=k,
                        text_to_image=recall["text"],
                        image_to_text=recall["image"],
                        milliseconds=reading + _median(find, texts) + matching[k],
                        memory=memory / images,
                        disk=(4 * pairing.image.embedding.numel() + (pairing.image.bytes if k else 0)) / images,
                    )
                )
            for stage in stages.values():
                stage.backend.close()
    return settings


def _recall(pairing: Pairing, side: str, stage: FirstStage, rule: ScoringRule) -> float:
    """R@1 of the queries of one side."""
    read = pairing.text if side == "text" else pairing.image
    best = rerank(
        stage.candidates(read.embedding[pairing.rows[side]], max(rule.k, 1)),
        partial(pairing.match, side),
        rule,
        top_k=1,
    )
    rows = torch.tensor([some[0].row for some in best])
    return float(pairing.right(side).gather(1, rows[:, None]).float().mean())


def _find(stage: FirstStage, queries: Tensor, k: int, row: int) -> object:
    return stage.candidates(queries[row : row + 1], k)


def cheapest(settings: Sequence[Setting], recall: float) -> Setting | None:
    """The fastest setting whose text to image R@1 reaches `recall`, of equally fast ones the smallest; None where none does."""
    enough = [one for one in settings if one.text_to_image >= recall]
    return min(enough, key=lambda one: (one.milliseconds, one.memory), default=None)


def held_out_pairs(pairing: Pairing, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs that a text to image search would score: match logits, which are true, the image of the caption; [P] each.

    Args:
        pairing: what was read.
        k: depth of the search; None is what the model's scoring rule says.

    Raises:
        ValueError: a depth of 0.
    """
    rule = rule_for(pairing.encoder.model.config, k=k)
    if not (count := depth(rule, len(pairing.image.tokens))):
        raise ValueError("a search of depth 0 scores no pairs; give a depth of at least 1")
    width = pairing.encoder.model.embedding.dim
    with tempfile.TemporaryDirectory() as folder:
        stage = _stage(pairing.image, Path(folder), "float32", width)
        found = stage.candidates(pairing.text.embedding[pairing.rows["text"]], count)
        stage.backend.close()
    pairs = [(query, row) for query, some in enumerate(found) for row, _ in some]
    query, row = torch.tensor(pairs).T
    image_id = pairing.text_image_id[pairing.rows["text"]]
    return pairing.match("text", pairs), pairing.right("text")[query, row], image_id[query]


def _stage(read: Read, folder: Path, precision: str, width: int) -> FirstStage:
    count, each = len(read.tokens), read.embedding.shape[1] if read.embedding.ndim == 3 else 1
    backend = open_backend("exact", folder, width, precision)
    stage = FirstStage(
        backend,
        lambda rows: read.embedding[torch.from_numpy(rows)],
        np.arange(count),
        precision=precision,
        width=width,
        each=each,
    )
    vectors = stage.narrow(read.embedding.reshape(count * each, -1))
    backend.add(stage.keys(np.arange(count)), vectors, [{}] * len(vectors))
    return stage


def _matching_time(pairing: Pairing, k: int) -> float:
    """Median milliseconds of scoring k pictures for one text."""
    images = pairing.image.tokens[:k]
    if not images:
        return 0.0
    texts = pairing.text.tokens
    return _median(
        lambda i: pairing.encoder.match([(image, texts[i]) for image in images], pairing.batch_size),
        pairing.rows["text"].tolist(),
    )


def _median(work: Callable[[int], object], rows: Sequence[int]) -> float:
    """Median milliseconds of `work` on single rows; the first call is not counted."""
    times = []
    work(rows[0])
    for row in rows[:TIMED]:
        start = time.perf_counter()
        work(row)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
