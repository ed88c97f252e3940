"""ALBEF: align before fuse (Li et al. 2021, arXiv 2107.07651): two towers, a fusion on top, a momentum teacher, queues and soft targets.

The match head has one logit, "match" over "no match", where the paper's has two and ranks by that of "match": a softmax over two depends on
their difference alone.

Legend: B pairs, M texts, P pairs, L text length, T image tokens, W width, E embedding width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.distributed import gather, gather_padded
from unimodal.layers import unit
from unimodal.losses import in_batch_matching, momentum_contrast
from unimodal.losses.numerics import mean_over_real
from unimodal.retrieval import similarity
from unimodal.systems.base import Batch, Encoders, Images, State, System, Texts
from unimodal.systems.momentum import Queue, Teacher
from unimodal.systems.towers import Fusion, Tower
from unimodal.systems.words import NOT_ASKED, WordHead, hide_words

TEMPERATURES = (0.001, 0.5)  # between which the learned one is held


class FusionEncoder(System):
    """Image tower, text tower and a fusion in which texts look at images: embeddings from the towers, a match logit from the fusion.

    Args:
        encoders: the shared ones.
        width, heads, dropout: of all parts.
        layers: of each tower.
        fusion_layers: of the fusion.
        dim: E.
    """

    looks = ("fusion.layers.*.cross_attention",)

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 1,
        heads: int = 8,
        dropout: float = 0.1,
        fusion_layers: int = 1,
        dim: int = 256,
    ) -> None:
        super().__init__(encoders)
        self.image_tower = Tower(encoders.image_width, width, layers, heads, dropout)
        self.text_tower = Tower(encoders.text_width, width, layers, heads, dropout)
        self.image_projection, self.text_projection = (nn.Linear(width, dim) for _ in range(2))
        self.fusion = Fusion(width, fusion_layers, heads, dropout)
        self.itm_head = nn.Linear(width, 1)

    def image_state(self, images: Images) -> State:
        """Hidden states [B, 1 + T, W] and their mask."""
        return self.image_tower(images.tokens, images.mask)

    def text_state(self, texts: Texts) -> State:
        """Hidden states [M, 1 + L, W] and their mask."""
        return self.text_tower(texts.tokens, texts.mask)

    def image_embedding(self, state: State) -> Tensor:
        """Unit vectors [B, E] of a state."""
        return unit(self.image_projection(state[0][:, 0]))

    def text_embedding(self, state: State) -> Tensor:
        """Unit vectors [M, E] of a state."""
        return unit(self.text_projection(state[0][:, 0]))

    def embed_images(self, images: Images) -> Tensor:
        return self.image_embedding(self.image_state(images))

    def embed_texts(self, texts: Texts) -> Tensor:
        return self.text_embedding(self.text_state(texts))

    def score_pairs(self, images: State, texts: State) -> Tensor:
        """Logits [P] of a match."""
        return self.itm_head(self.fusion(*texts, *images)[:, 0])[:, 0]

    def matching(
        self, image: State, text: State, similarity: Tensor, image_id: Tensor, own: Tensor | None = None
    ) -> Tensor:
        """The matching loss of the batch of all ranks, hard wrong pairs drawn by `similarity` [R * B, R * B]; `own` as in
        `in_batch_matching`."""

        def score(i: Tensor, j: Tensor) -> Tensor:
            return self.score_pairs(tuple(x[i] for x in image), tuple(x[j] for x in text))

        return in_batch_matching(score, similarity, image_id, own)


class ALBEF(FusionEncoder):
    """Contrast with a momentum teacher and queues, matching with hard negatives, masked words with the image at hand.

    Stages: `joint`, all three; `retrieval`, contrast and matching, the paper's fine-tuning. All captions of an image are right in both,
    those in the queue too. The paper's pre-training takes a pair's own partner alone for right, but its queue is a small part of its data,
    where ours may hold an image many times. At each stage the teacher starts from the student and the queue, which holds what the teacher
    made, from nothing. That is an inferred design: the paper does not say what fine-tuning keeps of either.

    Args:
        encoders: the shared ones.
        width, layers, heads, dropout, fusion_layers, dim: as `FusionEncoder`.
        queue: places of the queue.
        momentum: what remains of the teacher in one step.
        alpha: the teacher's share in all targets, reached over the first `ramp` of the stage.
        ramp: see there.
    """

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 1,
        heads: int = 8,
        dropout: float = 0.1,
        fusion_layers: int = 1,
        dim: int = 256,
        queue: int = 1024,
        momentum: float = 0.995,
        alpha: float = 0.4,
        ramp: float = 0.2,
    ) -> None:
        super().__init__(encoders, width, layers, heads, dropout, fusion_layers, dim)
        self.alpha, self.ramp = alpha, ramp
        self.words = WordHead(width, encoders.vocab_size)
        self.temperature = nn.Parameter(torch.tensor(0.07))  # it divides, where CLIP's scale multiplies
        self.queue = Queue(queue, dim)
        self.teacher = Teacher(self, momentum)

    def start_stage(self, stage: str) -> None:
        """Teacher and queue start anew together: features of another teacher would be compared with those of this one."""
        self.teacher.start(self)
        self.queue.start()

    def after_step(self, stage: str) -> None:
        self.teacher.follow(self)
        with torch.no_grad():
            self.temperature.clamp_(*TEMPERATURES)

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        alpha = self.alpha * min(1.0, progress / self.ramp)
        with self.teacher.acting(self):
            slow = self.image_state(batch.images)
            slow_image, slow_text = self.image_embedding(slow), self.embed_texts(batch.texts)
        image, text = self.image_state(batch.images), self.text_state(batch.texts)
        image_embedding, text_embedding = self.image_embedding(image), self.text_embedding(text)
        ita = momentum_contrast(
            image_embedding,
            text_embedding,
            slow_image,
            slow_text,
            self.queue.image,
            self.queue.text,
            batch.image_id,
            self.queue.ids,
            temperature=self.temperature,
            alpha=alpha,
        )
        likely = similarity(gather(image_embedding), gather(text_embedding)) / self.temperature.detach()
        itm = self.matching(gather_padded(*image), gather_padded(*text), likely, gather(batch.image_id))
        out = {"ita": ita, "itm": itm}
        if stage == "joint":
            out["mlm"] = self._hidden_words(batch.texts, image, slow, alpha)
        self.queue.push(slow_image, slow_text, batch.image_id)
        return out

    def _hidden_words(self, texts: Texts, image: State, slow: State, alpha: float) -> Tensor:
        """What it costs to miss hidden words, `alpha` of it against the teacher's guess from its own image state `slow`."""
        holes, asked = hide_words(texts.ids, texts.mask, self.encoders)
        hidden = self.encoders.read_texts(holes, texts.mask)
        with self.teacher.acting(self):
            soft = self._word_logits(slow, hidden, asked).softmax(-1)
        logits = self._word_logits(image, hidden, asked)
        hard = F.cross_entropy(logits, asked[asked != NOT_ASKED], reduction="sum")
        total = (1 - alpha) * hard - alpha * (soft * logits.log_softmax(-1)).sum()
        return mean_over_real(total, asked != NOT_ASKED)

    def _word_logits(self, image: State, holes: Texts, asked: Tensor) -> Tensor:
        """Logits [words asked for, V] of hidden words, of the image at hand."""
        fused = self.fusion(*self.text_state(holes), *image)[:, 1:]  # without the class token
        return self.words.logits(fused[asked != NOT_ASKED]).float()
