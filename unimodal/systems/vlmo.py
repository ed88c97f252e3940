"""VLMo: self-attention for all, feed-forward experts for each modality (Bao et al. 2022, arXiv 2111.02358).

One stack of layers reads images, texts, or both at once. Attention is shared; norm and feed-forward network behind it are the expert of a
token's modality, and in the top layers of a joint sequence one expert of vision and language serves all tokens. Words are hidden piece by
piece, where the paper hides whole words: the shared tokenizer does not say which pieces are one word.

Legend: B pairs, L text length, T image tokens, W width, E embedding width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.distributed import gather, gather_padded
from unimodal.layers import MLP, Attention, init_weights, key_mask_to_bias, unit
from unimodal.losses import in_batch_matching, info_nce
from unimodal.retrieval import similarity
from unimodal.systems.base import Batch, Encoders, Images, System, Texts
from unimodal.systems.mim import Restorer
from unimodal.systems.towers import Scale
from unimodal.systems.words import WordHead, hide_words

Mode = Literal["image", "text", "both"]
LAYER_SCALE = 0.1
MLM_WEIGHT = 0.25
HIDDEN_TOKENS = 0.4  # share of the image tokens that stage `vision` hides


class StochasticDepth(nn.Module):
    """In training a share of the samples goes without what a residual branch adds (Huang et al. 2016, arXiv 1603.09382)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, W] -> the same; what stays is larger in proportion."""
        if not self.training or not self.share:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.share
        return x * kept / (1 - self.share)


class Expert(nn.Module):
    """Norm, feed-forward network and the scale of what they add."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.scale = nn.Parameter(torch.full((width,), LAYER_SCALE))
        self.depth = StochasticDepth(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.depth(self.scale * self.mlp(self.norm(x)))


class MultiwayLayer(nn.Module):
    """Shared attention, then each token's expert.

    Args:
        width: W.
        heads: attention heads.
        top: whether a joint sequence is served by one expert of both modalities.
        dropout: share of the samples that go without what attention adds, and without what their expert does.
    """

    def __init__(self, width: int, heads: int, *, top: bool, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.attention_scale = nn.Parameter(torch.full((width,), LAYER_SCALE))
        self.depth = StochasticDepth(dropout)
        self.image, self.text = Expert(width, dropout), Expert(width, dropout)
        self.both = Expert(width, dropout) if top else None

    def forward(self, x: Tensor, bias: Tensor | None, mode: Mode, words: int) -> Tensor:
        """x [B, words + T, W], of which the first are text in a joint sequence."""
        y = self.attention_norm(x)
        x = x + self.depth(self.attention_scale * self.attention(y, *self.attention.project(y), bias))
        if mode == "both":
            if self.both is not None:
                return self.both(x)
            return torch.cat([self.text(x[:, :words]), self.image(x[:, words:])], 1)
        return self.image(x) if mode == "image" else self.text(x)


class VLMo(System):
    """A stack of `MultiwayLayer` that ranks as a dual encoder.

    Stages: `vision`, image tokens restored, in the place of a start from BEiT; `text`, words restored; `joint`, contrast, matching and
    words with the image at hand; `retrieval`, contrast alone. Contrast in `joint` is taken twice, of what each side's own experts make of
    it and of what those of both modalities do in the top layers, each with projections and a scale of its own.

    Args:
        encoders: the shared ones.
        width, heads, dropout: of all layers.
        layers: of which the last has an expert of both modalities.
        dim: E.
    """

    stage_towers = {"vision": ("image",), "text": ("text",)}

    def __init__(
        self,
        encoders: Encoders,
        width: int = 256,
        layers: int = 2,
        heads: int = 8,
        dropout: float = 0.1,
        dim: int = 256,
    ) -> None:
        super().__init__(encoders)
        self.project = nn.ModuleDict(
            {
                side: nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width))
                for side, c in (("image", encoders.image_width), ("text", encoders.text_width))
            }
        )
        self.first = nn.ParameterDict({side: nn.Parameter(torch.zeros(width)) for side in ("image", "text")})
        self.layers = nn.ModuleList(
            MultiwayLayer(width, heads, top=i == layers - 1, dropout=dropout) for i in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.image_projection, self.text_projection = (nn.Linear(width, dim, bias=False) for _ in range(2))
        self.top_image_projection, self.top_text_projection = (nn.Linear(width, dim, bias=False) for _ in range(2))
        self.words = WordHead(width, encoders.vocab_size)
        self.itm_head = nn.Linear(width, 1)
        self.restorer = Restorer(encoders, width, HIDDEN_TOKENS)
        self.apply(init_weights)
        self.scale, self.top_scale = Scale(), Scale()

    def _tokens(self, side: str, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A class token and projected tokens [B, 1 + T, W], and their mask."""
        x = self.project[side](tokens)
        x = torch.cat([self.first[side].expand(len(x), 1, -1), x], 1)
        return x, F.pad(mask, (1, 0), value=True)

    def read(self, images: Images | None, texts: Texts | None) -> Tensor:
        """Images, texts, or both row by row -> hidden states [B, 1 + L + 1 + T, W] of what there is, texts first."""
        parts = []
        if texts is not None:
            parts.append(self._tokens("text", texts.tokens, texts.mask))
        if images is not None:
            parts.append(self._tokens("image", images.tokens, images.mask))
        mode: Mode = "both" if len(parts) == 2 else "text" if texts is not None else "image"
        x, mask = torch.cat([x for x, _ in parts], 1), torch.cat([m for _, m in parts], 1)
        bias, words = key_mask_to_bias(mask), parts[0][0].shape[1]
        for layer in self.layers:
            x = layer(x, bias, mode, words)
        return self.norm(x)

    def read_twice(self, side: Literal["image", "text"], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Class states of one side alone, by its own expert to the top and by that of both modalities in the top layer: [B, W] each."""
        x, mask = self._tokens(side, tokens, mask)
        bias, words = key_mask_to_bias(mask), x.shape[1]
        *below, top = self.layers
        for layer in below:
            x = layer(x, bias, side, words)
        own, both = top(x, bias, side, words), top(x, bias, "both", words)
        return self.norm(own[:, 0]), self.norm(both[:, 0])

    def embed_images(self, images: Images) -> Tensor:
        return unit(self.image_projection(self.read(images, None)[:, 0]))

    def embed_texts(self, texts: Texts) -> Tensor:
        return unit(self.text_projection(self.read(None, texts)[:, 0]))

    def after_step(self, stage: str) -> None:
        self.scale.clamp()
        self.top_scale.clamp()

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        ids = batch.image_id
        if stage == "vision":
            return {"mim": self.restorer(batch.images, lambda images: self.read(images, None)[:, 1:])}
        if stage == "text":
            return {"mlm": self._masked_words(None, batch.texts)}
        if stage == "retrieval":
            image, text = self.embed_images(batch.images), self.embed_texts(batch.texts)
            return {"itc": info_nce(image, text, ids, scale=self.scale())}
        image, top_image = self.read_twice("image", *batch.images[:2])
        text, top_text = self.read_twice("text", batch.texts.tokens, batch.texts.mask)
        image, text = unit(self.image_projection(image)), unit(self.text_projection(text))
        top_image = unit(self.top_image_projection(top_image))
        top_text = unit(self.top_text_projection(top_text))
        own = info_nce(image, text, ids, scale=self.scale())
        itc = (own + info_nce(top_image, top_text, ids, scale=self.top_scale())) / 2
        scores = self.scale().detach() * similarity(gather(image), gather(text))
        images, texts = Images(*gather_padded(*batch.images[:2])), Texts(*gather_padded(*batch.texts))

        def match(i: Tensor, j: Tensor) -> Tensor:
            return self.itm_head(self.read(images.select(i), texts.select(j))[:, 0])[:, 0]

        itm = in_batch_matching(match, scores, gather(ids))
        return {"itc": itc, "itm": itm, "mlm": MLM_WEIGHT * self._masked_words(batch.images, batch.texts)}

    def _masked_words(self, images: Images | None, texts: Texts) -> Tensor:
        holes, asked = hide_words(texts.ids, texts.mask, self.encoders)
        hidden = self.read(images, self.encoders.read_texts(holes, texts.mask))
        return self.words.loss(hidden[:, 1 : 1 + asked.shape[1]], asked)
