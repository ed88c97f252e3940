"""Qwen3-VL-Embedding and Qwen3-VL-Reranker: one causal reader for images and texts, led by an instruction (arXiv 2601.04720).

The embedder reads an instruction and one item, and is read at the last position. The reranker reads an instruction, a query and a
document, and answers yes or no there. Where the report trains a language model by LoRA, ours trains a small reader over the tokens of the
shared encoders.

An inferred design is what the report leaves open: how a vector becomes one bit (its signs, with the gradient passed straight through), that
models merge by a plain average of weights, and every number of the recipe: rates, batches, temperature, the widths that are trained and
the thresholds of mining; of the reranker, how wrong pairs are drawn.

Legend: B pairs, M texts, P pairs, T item tokens, G instruction tokens, S positions of a sequence, W width, E embedding width, K candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.distributed import gather, gather_padded, gather_with_grad, local_rows, shared, world_size
from unimodal.layers import HIDDEN, init_weights, key_mask_to_bias, unit
from unimodal.losses import (
    Mined,
    Wrong,
    cosent_loss,
    distillation_loss,
    in_batch_matching,
    listwise_loss,
    masked_info_nce,
    matryoshka,
    mine_negatives,
    quantised,
)
from unimodal.merge import merge_weights
from unimodal.retrieval import similarity
from unimodal.systems.base import Batch, Encoders, Images, State, System, Texts
from unimodal.systems.momentum import Teacher
from unimodal.systems.towers import Layer, Scale

DEFAULT = "Represent the user's input."
FIND = "Find the image that the text describes."
RERANK = "Given a search query, retrieve relevant candidates that answer the query."
FIRST_STEP = 0.1  # of int8, in units of the root mean square coordinate
NEGATIVES = 7  # candidates beside the right one
Part = tuple[Tensor, Tensor]  # states [B, S, W] and their mask [B, S]


class Reader(nn.Module):
    """A causal transformer over parts of a sequence, read at its last position, which is an end token.

    Positions count real tokens only, so that padding, left, right or between, changes nothing.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout: of the transformer.
        instructions: what may stand before items, by a name.
        parts: how many items a sequence may hold.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        instructions: Mapping[str, str],
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.project = nn.ModuleDict(
            {
                side: nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width))
                for side, c in (("image", encoders.image_width), ("text", encoders.text_width))
            }
        )
        self._encoders, self.instructions = (encoders,), dict(instructions)
        self.learn_words(encoders)
        self.end = nn.Parameter(torch.zeros(width))
        places = encoders.max_length + parts * max(encoders.image_tokens, encoders.max_length) + 1
        self.places = nn.Embedding(places, width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(init_weights)

    def learn_words(self, encoders: Encoders) -> None:
        """Read the instructions in the ids of the encoders' tokenizer."""
        device = self.project["text"][1].weight.device  # type: ignore[index]
        for name, words in self.instructions.items():
            for part, value in zip(("ids", "mask"), encoders.tokenise([words])):  # [1, G]
                self.register_buffer(f"{name}_{part}", value.to(device), persistent=False)  # follows from the settings

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Results of a survey before 2026-12 hold the instructions' tokens, and fewer places."""
        for name in self.instructions:
            state.pop(prefix + name, None)
        places = state.get(f"{prefix}places.weight")
        if places is not None and len(places) < len(self.places.weight):
            beyond = self.places.weight.detach()[len(places) :].to(places)
            state[f"{prefix}places.weight"] = torch.cat([places, beyond])
        super()._load_from_state_dict(state, prefix, *rest)

    def _instruction(self, name: str) -> Tensor:
        """The instruction of that name as the text encoder makes it, which may train, [1, G, W]."""
        ids, mask = self.get_buffer(f"{name}_ids"), self.get_buffer(f"{name}_mask")
        return self.project["text"](self._encoders[0].read_texts(ids, mask).tokens)

    def item(self, side: str, tokens: Tensor, mask: Tensor) -> Part:
        """The encoder's tokens of one side as a part."""
        return self.project[side](tokens), mask

    def forward(self, instruction: str, *items: Part) -> Tensor:
        """The instruction of that name, items, end token -> the state there, [B, W]."""
        rows = len(items[0][0])
        led = self._instruction(instruction).expand(rows, -1, -1)
        x = torch.cat([led, *(states for states, _ in items), self.end.expand(rows, 1, -1)], 1)  # [B, S, W]
        mask = torch.cat([mask.new_ones(rows, led.shape[1]) for mask in (items[0][1],)] + [m for _, m in items], 1)
        mask = F.pad(mask, (0, 1), value=True)
        x = x + self.places((mask.cumsum(1) - 1).clamp(min=0))
        length = x.shape[1]
        causal = torch.full((length, length), HIDDEN, device=x.device).triu_(1)
        padding = key_mask_to_bias(mask)
        assert padding is not None
        for layer in self.layers:
            x = layer(x, padding + causal)
        return self.norm(x[:, -1])


class QwenReranker(System):
    """Yes or no, of a query and a document read together: the logit of "yes" less that of "no", by one row w_yes - w_no without a bias.

    The report's training sets both words against the whole vocabulary; this reader has no other words to write.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout: of the reader.
        instruction: what the reader is told.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 2,
        heads: int = 8,
        dropout: float = 0.1,
        instruction: str = RERANK,
    ) -> None:
        super().__init__(encoders)
        self.reader = Reader(encoders, width, layers, heads, dropout, {"rerank": instruction}, parts=2)
        self.answer = nn.Linear(width, 1, bias=False)

    def learn_words(self) -> None:
        self.reader.learn_words(self.encoders)

    @classmethod
    def known_texts(cls, settings: Mapping[str, Any]) -> Sequence[str]:
        return (settings.get("instruction", RERANK),)

    def image_state(self, images: Images) -> State:
        """The document: projected tokens [B, T, W] and their mask."""
        return self.reader.item("image", images.tokens, images.mask)

    def text_state(self, texts: Texts) -> State:
        """The query: projected tokens [M, L, W] and their mask."""
        return self.reader.item("text", texts.tokens, texts.mask)

    def score_pairs(self, images: State, texts: State) -> Tensor:
        return self.answer(self.reader("rerank", (texts[0], texts[1]), (images[0], images[1])))[:, 0]

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        """Wrong pairs are drawn at random: alone it has no embedder that could mine them."""
        pairs = world_size() * len(batch.image_id)
        return {"answer": self.judged(batch, torch.zeros(pairs, pairs, device=batch.image_id.device))}

    def judged(self, batch: Batch, scores: Tensor) -> Tensor:
        """The loss on true pairs and on wrong ones, drawn by an embedder's scores [image, text] of the pairs of all ranks."""
        images, texts = (
            gather_padded(*state) for state in (self.image_state(batch.images), self.text_state(batch.texts))
        )

        def score(i: Tensor, j: Tensor) -> Tensor:
            return self.score_pairs(tuple(x[i] for x in images), tuple(x[j] for x in texts))

        return in_batch_matching(score, scores, gather(batch.image_id))


class Order(NamedTuple):
    """Images that each text is compared with, its own first, which of them are there, and what the reranker says: [M, 1 + K] each."""

    candidates: Tensor
    given: Tensor
    teacher: Tensor


class QwenEmbedding(System):
    """The embedder, with the reranker that teaches it in its last stage.

    Stages: `pretrain`, contrast that also pushes queries from queries and documents from documents; `finetune`, contrast without that and
    with mined negatives, labels as documents, graded likeness of captions by shared categories, and the reranker beside, on wrong pairs
    that the embedder finds likely; `distil`, the order that the reranker gives; when it is over, the weights before and after it are
    averaged. Every loss of the embedder is taken on every width and in every precision.

    Texts are queries, told what to find, images and labels are documents. A search by image compares the same two vectors.

    Negatives are mined in the batch, which the configuration makes a group of images that the embedder of the first stage finds alike. Its
    halves are each other's pool: a query meets the documents of its own half, and of the other those that were mined for it, so that none
    counts twice.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout: of both readers.
        dim: E.
        query_instruction, instruction: what the embedder is told of queries, and of documents.
        dims: widths that are trained besides E; those below it count.
        category_names: documents of the labels, where the data has any.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 2,
        heads: int = 8,
        dropout: float = 0.1,
        dim: int = 256,
        query_instruction: str = FIND,
        instruction: str = DEFAULT,
        dims: Sequence[int] = (64, 128),
        category_names: Sequence[str] = (),
    ) -> None:
        super().__init__(encoders)
        self.dims = [*(d for d in dims if d < dim), dim]
        told = {"query": query_instruction, "document": instruction}
        self.reader = Reader(encoders, width, layers, heads, dropout, told)
        self.projection = nn.Linear(width, dim)
        self.scale = Scale(20.0)
        self.step = nn.Parameter(torch.tensor(FIRST_STEP))
        self.category_names = list(category_names)
        self._hold_labels()
        self.reranker = QwenReranker(encoders, width, layers, heads, dropout)
        self.before = Teacher(self._embedder())

    def learn_words(self) -> None:
        for reader in (self.reader, self.reranker.reader):
            reader.learn_words(self.encoders)
        self._hold_labels()

    def _hold_labels(self) -> None:
        if self.category_names:
            for part, value in zip(("ids", "mask"), self.encoders.tokenise(self.category_names)):  # [K, L]
                device = self.projection.weight.device
                self.register_buffer(f"label_{part}", value.to(device), persistent=False)  # follows from the settings

    @classmethod
    def known_texts(cls, settings: Mapping[str, Any]) -> Sequence[str]:
        told = (settings.get("query_instruction", FIND), settings.get("instruction", DEFAULT))
        return (*told, RERANK, *settings.get("category_names", ()))

    def _embedder(self) -> nn.ModuleList:
        return nn.ModuleList([self.reader, self.projection])

    def embed_images(self, images: Images) -> Tensor:
        return self._embed("document", self.reader.item("image", images.tokens, images.mask))

    def embed_texts(self, texts: Texts) -> Tensor:
        return self._embed("query", self.reader.item("text", texts.tokens, texts.mask))

    def _embed(self, role: str, item: Part) -> Tensor:
        return unit(self.projection(self.reader(role, item)))

    def start_stage(self, stage: str) -> None:
        if stage == "distil":
            self.before.start(self._embedder())

    def end_stage(self, stage: str) -> None:
        if stage == "distil":
            now = self._embedder()
            after = {name: p.detach().clone() for name, p in now.named_parameters()}
            with self.before.acting(now):
                earlier = {name: p.detach().clone() for name, p in now.named_parameters()}
            merged = merge_weights([earlier, after], [0.5, 0.5])
            now.load_state_dict(merged, strict=False)

    def after_step(self, stage: str) -> None:
        self.scale.clamp()

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        # From here on the embeddings are those of all ranks, and every loss of the embedder is that of the global batch.
        image, text = gather_with_grad(self.embed_images(batch.images)), gather_with_grad(self.embed_texts(batch.texts))
        if stage == "distil":
            order = self._order(batch, text, image)
            return {"distil": self._every_form(partial(self._distilled, order=order), text, image)}
        out = {
            name: self._every_form(self._contrast(query, document, gather(batch.image_id), stage), query, document)
            for name, query, document in (("t2i", text, image), ("i2t", image, text))
        }
        if stage == "finetune":
            likely = self.scale().detach() * similarity(image.detach(), text.detach())
            out["answer"] = self.reranker.judged(batch, likely)
            if batch.labels is not None:
                labels = gather(batch.labels)
                out["sts"] = self._every_form(partial(self._graded, labels=labels), text)
                if self.category_names:
                    out["classification"] = self._classified(image, labels)
        return out

    def _contrast(self, query: Tensor, document: Tensor, ids: Tensor, stage: str) -> Callable[..., Tensor]:
        """What the stage asks of queries and their documents, as a function of both in any form."""
        if stage == "pretrain":
            return partial(masked_info_nce, ids=ids, scale=self.scale(), within=True, gather=False)
        half = _first_half(ids)
        right, pool = ids[:, None] == ids[None], half[:, None] != half[None]
        mined = mine_negatives(similarity(query, document), right, pool, count=NEGATIVES)
        return partial(self._half_by_half, ids=ids, mined=mined)

    def _half_by_half(self, query: Tensor, document: Tensor, *, ids: Tensor, mined: Mined) -> Tensor:
        """Contrast within each half of the batch, with what was mined for each query from the other; the mean over the queries kept."""
        half, total = _first_half(ids), query.sum() * 0.0
        for part in (half, ~half):
            rows = (part & mined.kept).nonzero()[:, 0]
            if len(rows):
                wrong = Wrong(document[mined.documents[rows]], mined.given[rows])
                part_of = query[rows], document[rows], ids[rows]
                total = total + len(rows) * masked_info_nce(*part_of, scale=self.scale(), wrong=wrong, gather=False)
        return total / mined.kept.sum().clamp(min=1)

    def _every_form(self, loss: Callable[..., Tensor], *embeddings: Tensor) -> Tensor:
        """A loss on every width and in every precision."""
        return matryoshka(partial(quantised, loss, step=self.step), *embeddings, dims=self.dims)

    def _graded(self, text: Tensor, *, labels: Tensor) -> Tensor:
        """Captions are the more alike the more categories their images share: CoSENT over neighbours in the batch."""
        other = torch.arange(len(text), device=text.device).roll(1)
        alike = (labels * labels[other]).sum(1) / (labels + labels[other]).clamp(max=1).sum(1).clamp(min=1)
        return cosent_loss((text * text[other]).sum(1), alike, scale=self.scale(), gather=False)

    def _classified(self, image: Tensor, labels: Tensor) -> Tensor:
        """Each picture finds one of its own labels among labels that are wrong for it, and no other item of the batch."""
        held = self.encoders.read_texts(self.get_buffer("label_ids"), self.get_buffer("label_mask"))
        label = self.reader.item("text", held.tokens, held.mask)
        documents = self._embed("document", label)  # [categories, E]
        wrong = (1 - labels).sum(1)
        known = (labels.sum(1) > 0) & (wrong >= 1)
        count = int(wrong[known].min().clamp(max=NEGATIVES)) if known.any() else 0
        if not count:
            return image.sum() * 0.0
        right = shared(torch.multinomial(labels[known], 1))
        others = shared(torch.multinomial(1 - labels[known], count))
        chosen = torch.cat([right, others], 1)  # [B, 1 + K]

        def listwise(image: Tensor, documents: Tensor) -> Tensor:
            return listwise_loss(self.scale() * torch.einsum("be,bke->bk", image, documents[chosen]))

        return self._every_form(listwise, image[known], documents)

    @torch.no_grad()
    def _order(self, batch: Batch, text: Tensor, image: Tensor) -> Order:
        """The reranker's scores of each text's image and of the images that the embedder finds most like it, of all ranks."""
        scores = similarity(image, text).T  # [text, image]
        ids = gather(batch.image_id)
        same = ids[:, None] == ids[None]
        wrong = scores.masked_fill(same, -2.0).topk(min(NEGATIVES, len(text) - 1), 1).indices
        own = torch.arange(len(text), device=text.device)
        candidates = torch.cat([own[:, None], wrong], 1)
        given = torch.cat([torch.ones_like(own[:, None], dtype=torch.bool), ~same.gather(1, wrong)], 1)
        # Each rank asks the reranker about its own texts.
        asked = local_rows(candidates)
        images, texts = gather_padded(*self.reranker.image_state(batch.images)), self.reranker.text_state(batch.texts)
        teacher = self.reranker.score_pairs(
            tuple(x[asked.flatten()] for x in images),
            tuple(x.repeat_interleave(asked.shape[1], 0) for x in texts),
        )
        return Order(candidates, given, gather(teacher.view_as(asked)))

    def _distilled(self, text: Tensor, image: Tensor, *, order: Order) -> Tensor:
        student = self.scale() * torch.einsum("be,bke->bk", text, image[order.candidates])
        return distillation_loss(student, order.teacher, order.given)


def _first_half(ids: Tensor) -> Tensor:
    """Which rows [B] are in the first half of a batch."""
    return torch.arange(len(ids), device=ids.device) < (len(ids) + 1) // 2
