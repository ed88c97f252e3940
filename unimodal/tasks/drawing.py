"""What is asked of drawn scenes: pictures for captions, judged by a checker that reads pixels, which no head has a say in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unimodal.candidates import draw_candidates
from unimodal.data.processor import Processor
from unimodal.data.scenes import Scenes, checker_arguments, parse_caption
from unimodal.metrics.generation import SceneReport, check_picture
from unimodal.model import UnimodalModel

AT_A_TIME = 64  # captions


@dataclass(frozen=True)
class Drawn:
    """Pictures for captions, and what the checker found in them.

    Attributes:
        prompts: the captions, N.
        pictures: [N, 3, S, S] in [0, 1].
        checks: one per picture.
    """

    prompts: list[str]
    pictures: Tensor
    checks: list[SceneReport]

    @property
    def accuracy(self) -> float:
        """Share of pictures with everything right."""
        return sum(check.all_right for check in self.checks) / len(self.checks)


def draw_scenes(
    model: UnimodalModel,
    processor: Processor,
    scenes: Scenes,
    count: int,
    *,
    candidates: int,
    match_scale: float,
    num_inference_steps: int,
    guidance_scale: float,
) -> tuple[Drawn, Drawn]:
    """Pictures for the first caption of each of the first `count` scenes: the first one drawn of each, and the best of `candidates`.

    The best is the one that the model's own embedding and matching heads prefer, see `unimodal.candidates`.
    """
    device = model.log_scale.device
    prompts = [scenes.captions(i)[0] for i in range(min(count, len(scenes)))]
    first, best = [], []
    for start in range(0, len(prompts), AT_A_TIME):
        ids, mask = processor.texts(prompts[start : start + AT_A_TIME])
        pictures, agreement = draw_candidates(
            model,
            processor,
            model.encode_text(ids.to(device), mask.to(device)),
            candidates,
            match_scale=match_scale,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator(device).manual_seed(start),
        )
        first.append(pictures[0])
        best.append(pictures[agreement.argmax(0), torch.arange(len(ids))])
    return _judge(prompts, torch.cat(first)), _judge(prompts, torch.cat(best))


def _judge(prompts: list[str], pictures: Tensor) -> Drawn:
    pictures = pictures.float().cpu()
    known = checker_arguments()
    # Asked is what the caption says, so a background that it leaves out may be any.
    checks = [
        check_picture(picture.permute(1, 2, 0).numpy(), parse_caption(prompt), **known)
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    return Drawn(prompts, pictures, checks)
