"""BLIP-2: queries that read the image, in three tasks (Li et al. 2023, arXiv 2301.12597). Contrast takes the best query, matching the mean
over queries; captions look back at what the queries read.

Legend: B pairs, M texts, P pairs, N queries, L text length, T image tokens, W width, E embedding width.
"""

import torch
from torch import Tensor, nn

from unimodal.bridge import QFormer
from unimodal.distributed import gather, gather_padded, local_rows, world_size
from unimodal.layers import KeyValues, unit
from unimodal.losses import caption_loss, in_batch_matching, info_nce
from unimodal.retrieval import similarity
from unimodal.systems.base import Batch, Encoders, Images, State, System, Texts
from unimodal.systems.towers import Scale, Tower
from unimodal.systems.words import write_words

QUERIES = "image"
SMOOTHING = 0.1


class BLIP2(System):
    """The bridge of `unimodal.bridge` on the shared encoder's image tokens; texts are read by the bridge itself, from their ids.

    Stages: `represent`, all three tasks, where a pair's own partner alone is right; `retrieve`, the same, where all captions of an image
    are right in contrast and none of them is a wrong one in matching.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout: of the bridge; queries look at the image in every second layer.
        queries: N.
        dim: E.
        tower_layers: of the image tower; with none it is a projection and the norm that the paper trains behind its frozen encoder.
    """

    towers = ("image",)  # texts are read from their ids
    looks = ("bridge.layers.*.cross_attention",)

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 2,
        heads: int = 8,
        dropout: float = 0.1,
        queries: int = 16,
        dim: int = 256,
        tower_layers: int = 0,
    ) -> None:
        super().__init__(encoders)
        self.image_tower = Tower(encoders.image_width, width, tower_layers, heads, dropout)
        self.bridge = QFormer(
            width=width,
            layers=layers,
            heads=heads,
            intermediate=4 * width,
            memory_width=width,
            queries={QUERIES: queries},
            # One word more: it begins captions, where the start token begins texts to be read.
            vocab_size=encoders.vocab_size + 1,
            max_positions=encoders.max_length,
            dropout=dropout,
        )
        self.image_projection, self.text_projection = (nn.Linear(width, dim) for _ in range(2))
        self.itm_head = nn.Linear(width, 1)
        self.scale = Scale()

    def memory(self, images: Images) -> State:
        """What queries look at, [B, 1 + T, W], and its mask."""
        return self.image_tower(images.tokens, images.mask)

    def embed_images(self, images: Images) -> Tensor:
        """One vector for each query, [B, N, E]."""
        return self._embed_queries(self.bridge.read(QUERIES, *self.memory(images)))

    def _embed_queries(self, read: Tensor) -> Tensor:
        return unit(self.image_projection(read))

    def embed_texts(self, texts: Texts) -> Tensor:
        return unit(self.text_projection(self.bridge.text(texts.ids, texts.mask)[:, 0]))

    def image_state(self, images: Images) -> State:
        """As `memory`."""
        return self.memory(images)

    def text_state(self, texts: Texts) -> State:
        """Ids [M, L] and their mask."""
        return texts.ids, texts.mask

    def score_pairs(self, images: State, texts: State) -> Tensor:
        """Logits [P] of a match, the mean over queries."""
        return self.itm_head(self.bridge.match(QUERIES, *texts, *images)).mean((1, 2))

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        ids, mask = batch.texts.ids, batch.texts.mask
        # Before fine-tuning every row, of whatever rank, is an image of its own.
        rows = torch.arange(world_size() * len(ids), device=ids.device)
        image_id = batch.image_id if stage == "retrieve" else local_rows(rows)
        tokens = self.memory(batch.images)
        memory = self.bridge.project_memory(*tokens)
        cache = KeyValues()  # what the queries read, for the captions
        image = self._embed_queries(self.bridge.read(QUERIES, memory, cache=cache))
        text = self.embed_texts(batch.texts)
        itc = info_nce(image, text, image_id, scale=self.scale(), label_smoothing=SMOOTHING)
        scores = self.scale().detach() * similarity(gather(image), gather(text))
        # Other ranks' images and texts may be wrong ones of ours.
        memories = memory if world_size() == 1 else self.bridge.project_memory(*gather_padded(*tokens))
        every_ids, every_mask = gather_padded(ids, mask)

        def match(i: Tensor, j: Tensor) -> Tensor:
            read = self.bridge.match(QUERIES, every_ids[j], every_mask[j], memories.shared(i))
            return self.itm_head(read).mean((1, 2))

        itm = in_batch_matching(match, scores, gather(image_id))
        hidden = self.bridge.caption(QUERIES, self._as_caption(ids), cache=cache, text_mask=mask)
        itg = caption_loss(self.bridge.lm_logits(hidden), ids, mask, label_smoothing=SMOOTHING)
        return {"itc": itc, "itm": itm, "itg": itg}

    def _as_caption(self, ids: Tensor) -> Tensor:
        """Ids [B, L] that begin as captions do."""
        return torch.cat([torch.full_like(ids[:, :1], self.encoders.vocab_size), ids[:, 1:]], 1)

    @torch.no_grad()
    def write(self, images: Images) -> list[list[int]]:
        memory = self.bridge.project_memory(*self.memory(images))

        def next_word(ids: Tensor) -> Tensor:
            hidden = self.bridge.caption(QUERIES, self._as_caption(ids), memory)[:, -1]
            return self.bridge.lm_logits(hidden)[:, : self.encoders.vocab_size]

        return write_words(next_word, len(images.tokens), self.encoders, device=images.tokens.device)
