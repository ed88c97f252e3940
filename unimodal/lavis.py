"""`load_model_and_preprocess` as users of LAVIS know it (Li et al. 2022, arXiv 2209.09019), on a checkpoint of this library.

model, vis_processors, txt_processors = load_model_and_preprocess("checkpoints/demo/model")
image, text = vis_processors["eval"](picture)[None], txt_processors["eval"]("a red circle")
model.extract_features({"image": image, "text_input": [text]}, mode="image").image_embeds_proj[:, 0]
model({"image": image, "text_input": [text]}, match_head="itm").softmax(1)[:, 1]    # match probability
model.generate({"image": image})

Arguments and results are LAVIS's, and what a model of ours does not know is refused, never ignored. The numbers are those of
`unimodal.Unimodal`: `encode` for the projected features, `predict` for the match, `similarity` for the contrast, `caption` for captions.

Legend: B images, M texts, N queries, T image tokens, L text length, S image side, D backbone width, W bridge width, E embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.candidates import best_captions
from unimodal.data.images import load_image
from unimodal.draws import Generators
from unimodal.inference import Unimodal
from unimodal.model import ImageState, TextState
from unimodal.retrieval import similarity


@dataclass
class Features:
    """What `extract_features` returns; the mode says which are there, the others are None.

    Attributes:
        image_embeds: what the bridge read from the images [B, N, W]; without a bridge the backbone's tokens [B, T, D].
        image_embeds_proj: their embeddings, unit vectors [B, 1, E]; [B, N, E] where the model has one vector per query.
        text_embeds: what the bridge read from the texts [M, N, W]; without text queries the backbone's tokens [M, L, D].
        text_embeds_proj: their embeddings, unit vectors [M, 1, E].
        multimodal_embeds: embeddings of image b and text b together, shaped as the images': the normalised mean of the two.
    """

    image_embeds: Tensor | None = None
    image_embeds_proj: Tensor | None = None
    text_embeds: Tensor | None = None
    text_embeds_proj: Tensor | None = None
    multimodal_embeds: Tensor | None = None


class LavisModel(nn.Module):
    """A model with the methods of LAVIS's. `samples` is a dict with `image`, pixels [B, 3, S, S], and `text_input`, a text or a list."""

    def __init__(self, model: Unimodal) -> None:
        super().__init__()
        self.unimodal, self.model = model, model.model
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.unimodal.device

    @torch.no_grad()
    def extract_features(
        self, samples: dict[str, Any], mode: Literal["image", "text", "multimodal"] = "multimodal"
    ) -> Features:
        """Features of the images, of the texts, or of both and of each pair together.

        Raises:
            KeyError: the samples lack what the mode reads.
            ValueError: an unknown mode, or not as many texts as images where they are read together.
        """
        if mode not in ("image", "text", "multimodal"):
            raise ValueError(f"mode: expected 'image', 'text' or 'multimodal', got {mode!r}")
        found = Features()
        if mode != "text":
            image = self._images(samples)
            vector = self.model.image_embedding(image).float()
            found.image_embeds = image.bridged if image.bridged.ndim == 3 else image.tokens
            found.image_embeds_proj = vector if vector.ndim == 3 else vector[:, None]
        if mode != "image":
            text = self._texts(samples)
            found.text_embeds = text.bridged if text.bridged.ndim == 3 else text.tokens
            found.text_embeds_proj = self.model.text_embedding(text).float()[:, None]
        if found.image_embeds_proj is not None and found.text_embeds_proj is not None:
            _require_pairs(len(found.image_embeds_proj), len(found.text_embeds_proj))
            found.multimodal_embeds = F.normalize(found.image_embeds_proj + found.text_embeds_proj, dim=-1)
        return found

    def forward(self, samples: dict[str, Any], match_head: Literal["itm", "itc"] = "itm") -> Tensor:
        """How well texts describe images.

        Args:
            samples: as above.
            match_head: `itm` for the matching head's logits [B, 2] of image b with text b, "no match" and "match", whose softmax is the
                match probability; `itc` for the cosines [B, M] of every image with every text.

        Raises:
            ValueError: another match_head, not as many texts as images under `itm`, or a model without a matching head.
        """
        if match_head not in ("itm", "itc"):
            raise ValueError(f"match_head: expected 'itm' or 'itc', got {match_head!r}")
        image, text = self._images(samples), self._texts(samples)
        if match_head == "itc":
            return similarity(self.model.image_embedding(image).float(), self.model.text_embedding(text).float())
        _require_pairs(len(image.tokens), len(text.tokens))
        pair = torch.arange(len(text.tokens), device=self.device)
        logits = self.model.match(image, text, pair, pair).float()
        if (calibration := self.unimodal.encoder.calibration) is not None:
            logits = calibration.scale * logits + calibration.offset
        return torch.stack([torch.zeros_like(logits), logits], 1)

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
        generator: Generators = None,
    ) -> list[str]:
        """Captions of the images, those of the first image first.

        Args:
            samples: as above; read are `image` and, where a language model writes, `prompt`: what it continues, one text or one for each.
            use_nucleus_sampling: draw words by their probability; otherwise a beam search.
            num_beams: hypotheses that the beam search keeps.
            max_length: longest caption in tokens.
            min_length, repetition_penalty: only their defaults are known here.
            top_p: draw from the fewest words whose probabilities sum to this.
            num_captions: of each image; more than one are drawn.
            temperature: logits are divided by it before drawing.
            generator: what the draws follow from: a source for all images, or one for each, see `unimodal.draws`.

        Raises:
            ValueError: a setting out of range or unknown here, a model without a captioning head, or a prompt for a head that takes none.
        """
        if min_length or repetition_penalty != 1:
            raise ValueError(
                f"min_length={min_length}, repetition_penalty={repetition_penalty}: captions here have neither; leave them out"
            )
        if num_captions < 1 or (num_captions > 1 and not use_nucleus_sampling):
            raise ValueError(
                f"num_captions={num_captions}: a beam search gives its best caption; give use_nucleus_sampling=True for several, or 1"
            )
        drawn = {"do_sample": True, "top_p": top_p, "temperature": temperature}
        settings = drawn if use_nucleus_sampling else {"num_beams": num_beams}
        self.model.head("captioning")
        image, prompt = self._images(samples), samples.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        written = [
            best_captions(
                self.model,
                self.unimodal.processor,
                image,
                1,
                match_scale=0.0,
                prompts=prompts,
                generator=generator,
                max_new_tokens=max_length,
                **settings,
            )
            for _ in range(num_captions)
        ]
        return [caption for captions in zip(*written) for caption in captions]

    def _images(self, samples: dict[str, Any]) -> ImageState:
        pixels = _of(samples, "image")
        return self.model.encode_image(pixels.to(self.device, self.model.log_scale.dtype))

    def _texts(self, samples: dict[str, Any]) -> TextState:
        texts = _of(samples, "text_input")
        return self.unimodal.encoder.texts([texts] if isinstance(texts, str) else texts)


def load_model_and_preprocess(
    name: str | Path,
    model_type: str | None = None,
    is_eval: bool = True,
    device: str | torch.device = "cpu",
) -> tuple[LavisModel, dict[str, Callable[[Any], Tensor]], dict[str, Callable[[str], str]]]:
    """A checkpoint and its preprocessing, in LAVIS's form.

    Args:
        name: a checkpoint folder of this library or a Hub id; LAVIS's own models are not here.
        model_type: of a Hub id the branch, tag or commit.
        is_eval: True; models are trained by `unimodal fit`.
        device: where to put the model.

    Returns:
        The model; `vis_processors["eval"]`, a picture in any form that `load_image` takes -> pixels [3, S, S]; and
        `txt_processors["eval"]`, a text -> the text, since the model's own tokenizer takes it as it is.

    Raises:
        ValueError: is_eval=False, or a model_type for a folder.
        FileNotFoundError: no such checkpoint.
        unimodal.hub.CheckpointError: it cannot be read safely and completely.
    """
    if not is_eval:
        raise ValueError(
            "is_eval=False: models of this library are trained by `unimodal fit`; load them with is_eval=True"
        )
    if model_type is not None and Path(name).is_dir():
        raise ValueError(f"model_type={model_type!r}: {name} is a folder, which has one model; leave model_type out")
    model = Unimodal.from_pretrained(name, device=device, revision=model_type)

    def picture(image: Any) -> Tensor:
        pixels = model.processor.images([load_image(image)])
        if isinstance(pixels, dict):
            raise ValueError(
                "this model reads pictures in their own sizes, and LAVIS's pixels have one; use unimodal.from_pretrained"
            )
        return pixels[0]

    def text(caption: str) -> str:
        return caption

    return LavisModel(model), {"eval": picture}, {"eval": text}


def _of(samples: dict[str, Any], key: str) -> Any:
    if samples.get(key) is None:
        raise KeyError(f"samples lack {key!r}; got {', '.join(samples) or 'nothing'}")
    return samples[key]


def _require_pairs(images: int, texts: int) -> None:
    if images != texts:
        raise ValueError(
            f"{images} images but {texts} texts: pairs are row by row, repeat the one for each of the other"
        )
