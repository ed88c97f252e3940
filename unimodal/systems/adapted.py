"""The generic adaptations of a pretrained pair of encoders: as they come, all weights, learned text context, adapters, LoRA.

Learned context: in the spirit of CoOp (Zhou et al. 2021, arXiv 2109.01134), here before every layer of the text tower. Adapters: Houlsby et
al. 2019 (arXiv 1902.00751). LoRA: Hu et al. 2021 (arXiv 2106.09685). These three leave the image tower frozen and read its
cached tokens; `full` reads pixels.

Legend: B images, M texts, T tokens, C width of an encoder, E embedding width.
"""

import copy
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from unimodal.config import AdapterConfig
from unimodal.layers import masked_mean, unit
from unimodal.losses import info_nce
from unimodal.systems.base import Batch, Encoders, Images, System, Texts
from unimodal.systems.towers import Scale
from unimodal.tuning import add_adapter, use_adapters

ADAPTER = "survey"
Method = Literal["full", "context", "adapters", "lora"]
KINDS: dict[str, Any] = {"context": "prompt", "adapters": "bottleneck", "lora": "lora"}


class AsItComes(System):
    """The encoders' own embedding, untrained.

    Raises:
        ValueError: the encoders have none.
    """

    def __init__(self, encoders: Encoders) -> None:
        super().__init__(encoders)
        if encoders.backbone.embeds is None:
            raise ValueError(
                "the shared encoders have no embedding of their own, so there is nothing to rank by as they come; leave this system "
                "out, or give --encoders a checkpoint whose backbone has one"
            )

    def untrained(self) -> Iterator[Tensor]:
        backbone = self.encoders.backbone
        return (
            p for name, p in backbone.named_parameters() if any(fnmatch.fnmatchcase(name, own) for own in backbone.own)
        )

    def embed_images(self, images: Images) -> Tensor:
        return self.encoders.backbone.image_embedding(self.encoders.unplaced(images.tokens), images.mask)

    def embed_texts(self, texts: Texts) -> Tensor:
        return self.encoders.backbone.text_embedding(texts.tokens, texts.ids, texts.mask)


class Adapted(System):
    """A copy of the shared text tower, or with `full` of both, that trains with a small network on each side's mean token, by contrast.

    Args:
        encoders: the shared ones, which stay as they are.
        method: what trains of the copy.
        dim: E.
        rank: of LoRA, and width of the adapters.
        tokens: of learned context in each layer.
    """

    def __init__(
        self, encoders: Encoders, method: Method = "lora", dim: int = 256, rank: int = 8, tokens: int = 8
    ) -> None:
        super().__init__(encoders)
        self.needs_pixels = method == "full"
        self.towers = () if self.needs_pixels else ("image",)  # the others are copies of its own
        self.backbone = copy.deepcopy(encoders.backbone)
        _keep_towers(self.backbone, [kind for kind in ("image", "text") if kind not in self.towers])
        if method != "full":
            target = tuple(f"backbone.{pattern}" for pattern in self.backbone.tower("text"))
            add_adapter(
                self,
                ADAPTER,
                AdapterConfig(kind=KINDS[method], target=target, r=rank, alpha=2.0 * rank, tokens=tokens),
            )
            use_adapters(self, [ADAPTER])
        self.image_projection, self.text_projection = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for width in (encoders.image_width, encoders.text_width)
        )
        self.scale = Scale()

    def train(self, mode: bool = True) -> "Adapted":
        """Batch normalisations keep the statistics of their first training: a survey's batches are too small for new ones."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def embed_images(self, images: Images) -> Tensor:
        if self.needs_pixels:  # its own tokens, as fine as the encoder makes them, whatever grid the other systems see
            mean = self.backbone.image_features(images.pixels).mean(1)
        else:
            mean = masked_mean(images.tokens, images.mask)
        return unit(self.image_projection(mean))

    def embed_texts(self, texts: Texts) -> Tensor:
        tokens = self.backbone.text_features(texts.ids, texts.mask)
        return unit(self.text_projection(masked_mean(tokens, texts.mask)))

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        image, text = self.embed_images(batch.images), self.embed_texts(batch.texts)
        return {"itc": info_nce(image, text, batch.image_id, scale=self.scale())}

    def after_step(self, stage: str) -> None:
        self.scale.clamp()


def _keep_towers(backbone: nn.Module, kinds: Sequence[str]) -> None:
    """Make buffers of all parameters but those of these towers, so that none is counted or trained."""
    patterns = [pattern for kind in kinds for pattern in backbone.tower(kind)]  # type: ignore[operator]
    for name, parameter in list(backbone.named_parameters()):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            place, _, last = name.rpartition(".")
            module = backbone.get_submodule(place)
            delattr(module, last)
            module.register_buffer(last, parameter.data)
