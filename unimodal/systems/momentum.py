"""A teacher that is a slow average of its student, and a queue of its earlier features (MoCo, He et al. 2019, arXiv 1911.05722).

Legend: B pairs of a batch, Q places of the queue, E embedding width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal import distributed


class Teacher(nn.Module):
    """The exponential average of a module's parameters, kept as buffers: no optimizer sees them and no gradient reaches them.

    Args:
        student: whose parameters are averaged, as they are when it is made or started anew.
        rate: what remains of the average in one step.
    """

    def __init__(self, student: nn.Module, rate: float = 0.995) -> None:
        super().__init__()
        self.rate = rate
        for name, parameter in student.named_parameters():
            self.register_buffer(_flat(name), parameter.detach().clone())

    @torch.no_grad()
    def start(self, student: nn.Module) -> None:
        """Become the student as it is now."""
        for name, parameter in student.named_parameters():
            self.get_buffer(_flat(name)).copy_(parameter)

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move by 1 - rate towards the student."""
        for name, parameter in student.named_parameters():
            self.get_buffer(_flat(name)).lerp_(parameter, 1 - self.rate)

    @contextmanager
    def acting(self, student: nn.Module) -> Iterator[None]:
        """Within, the student computes with the teacher's parameters, without gradient."""
        own = {name: parameter.data for name, parameter in student.named_parameters()}
        try:
            for name, parameter in student.named_parameters():
                parameter.data = self.get_buffer(_flat(name))
            with torch.no_grad():
                yield
        finally:
            for name, parameter in student.named_parameters():
                parameter.data = own[name]


def _flat(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name holds no dot


class Queue(nn.Module):
    """The last Q features of both sides with the ids of their images; random unit vectors at first, of no image. On several ranks it holds
    those of all and is the same on each.

    Args:
        places: Q.
        dim: E.
    """

    image: Tensor
    text: Tensor
    ids: Tensor
    place: Tensor

    def __init__(self, places: int, dim: int) -> None:
        super().__init__()
        for side in ("image", "text"):
            self.register_buffer(side, torch.empty(places, dim))
        self.register_buffer("ids", torch.empty(places, dtype=torch.long))
        self.register_buffer("place", torch.empty((), dtype=torch.long))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Forget what was pushed: random unit vectors of no image."""
        generator = torch.Generator().manual_seed(0)  # all ranks begin alike
        for features in (self.image, self.text):
            features.copy_(F.normalize(torch.randn(features.shape, generator=generator), dim=-1))
        self.ids.fill_(-1)
        self.place.zero_()

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Take in features [B, E] of this rank's pairs, and those of all others in rank order, with their ids [B] in place of the oldest;
        beyond the end it goes on at the start."""
        image, text, ids = map(distributed.gather, (image, text, ids))
        if not len(self.ids):
            return
        count = min(len(ids), len(self.ids))
        rows = (self.place + torch.arange(count, device=self.ids.device)) % len(self.ids)
        self.image[rows], self.text[rows], self.ids[rows] = image[-count:].float(), text[-count:].float(), ids[-count:]
        self.place.copy_((self.place + count) % len(self.ids))
