"""Random numbers of which each result has its own, so that a result does not depend on what else is in its batch.

Result i of several is drawn from a generator whose seed is the next number of the i-th generator that was given; where one generator was
given for all, its numbers are handed out in order. So a picture or a caption follows its own seed, alone and in a batch of any size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
)  # settings of draws, which a search for the likeliest has no use for

Generators = torch.Generator | Sequence[torch.Generator | None] | None


def one_each(generator: Generators, count: int) -> list[torch.Generator | None]:
    """The generator of each of `count` results: those that were given, or the given one for all; None is torch's own."""
    return [generator] * count if generator is None or isinstance(generator, torch.Generator) else list(generator)


def own_generators(generator: Generators, count: int) -> list[torch.Generator]:
    """A new generator for each of `count` results, see above."""
    return [torch.Generator().manual_seed(_next_seed(one)) for one in one_each(generator, count)]


@contextmanager
def drawing_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """A block whose draws from torch's own random state follow from `generator`; that state is as before afterwards."""
    seed = _next_seed(generator)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _next_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))
