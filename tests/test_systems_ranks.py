"""Every system on two ranks is the system of one process on the global batch: losses, gradients, and what it keeps of its training.

The second rank's images and texts are shorter than the first's, both ranks show the same images, and each has random numbers of its own.
"""

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from test_systems import CONFIGS, built
from torch import Tensor
from toysurvey import END, PAD, ToyEncoders, part, toy_pairs

from unimodal import distributed, stages
from unimodal.losses import info_nce
from unimodal.systems import CLIP, VLGAP, Batch, System

WORLD, ROWS = 2, 8
STAGES = [(name, stage) for name in CONFIGS for stage in built(name)[0].stages]


def whole_batch(encoders: ToyEncoders) -> Batch:
    """Four images with two captions each: the first caption of every image, then the second of every image."""
    pairs = part(toy_pairs(4, encoders, captions=2), torch.arange(ROWS).view(4, 2).T.flatten())
    pairs.images.mask[4:, 7:] = False
    ids = pairs.texts.ids.clone()
    ids[4:, 4], ids[4:, 5:] = END, PAD
    return pairs._replace(texts=encoders.read_texts(ids, ids != PAD))


def share(batch: Batch, rank: int, world: int) -> Batch:
    """A rank's rows, no longer than the longest of them."""
    own = part(batch, torch.arange(ROWS).chunk(world)[rank])
    regions, words = int(own.images.mask.sum(1).max()), int(own.texts.mask.sum(1).max())
    images = own.images._replace(tokens=own.images.tokens[:, :regions], mask=own.images.mask[:, :regions])
    return own._replace(images=images, texts=type(own.texts)(*(x[:, :words] for x in own.texts)))


def learned(system: System, stage: str, batch: Batch) -> dict[str, Any]:
    """The second of two steps without the optimizer: losses, gradients and buffers."""
    for progress in (0.1, 0.9):
        losses = system.losses(batch, stage, progress)
    torch.stack(list(losses.values())).sum().backward()
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": {name: p.grad for name, p in system.named_parameters() if p.grad is not None},
        "buffers": dict(system.named_buffers()),
    }


def step(name: str, stage: str, rank: int = 0, world: int = 1) -> dict[str, Any]:
    labels = {"category_names": ["dog", "cat", "man", "ball"]} if name == "qwen_embedding" else {}
    spec, system = built(name, **labels)
    system.eval()  # no dropout, whose numbers differ between one process and two
    whole = whole_batch(system.encoders)  # type: ignore[arg-type]
    system.prepare(iter([toy_pairs(64, system.encoders)]))  # type: ignore[arg-type]
    stages.freeze(system, stages.rates(system, spec.stages[stage].trainable))
    system.start_stage(stage)
    if isinstance(system, VLGAP):  # so many known pairs that it trusts some of the batch and others not
        with torch.no_grad():
            system.buffer[:, :64] = torch.stack(system.trust(whole.images, whole.texts)).repeat(1, 64 // ROWS)
            system.get_buffer("filled").fill_(64)
    torch.manual_seed(rank)
    return learned(system, stage, share(whole, rank, world))


class Local(CLIP):
    """It compares the rows of its own rank alone."""

    def losses(self, batch: Batch, stage: str, progress: float) -> dict[str, Tensor]:
        image, text = self.embed_images(batch.images), self.embed_texts(batch.texts)
        return {"itc": info_nce(image, text, batch.image_id, scale=self.scale(), gather=False)}


def local_step(rank: int = 0, world: int = 1) -> dict[str, Any]:
    torch.manual_seed(0)
    system = Local(ToyEncoders(), width=16, heads=2, dim=8).eval()
    return learned(system, "", share(whole_batch(ToyEncoders()), rank, world))


def each(rank: int, world: int, folder: Path) -> None:
    """What each of the two processes does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found: dict[Any, Any] = {key: step(*key, rank, world) for key in STAGES}
    found["local"] = local_step(rank, world)
    torch.manual_seed(5 + rank)
    found["numbers"] = distributed.random_rows((2, 3 - rank), torch.device("cpu"))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks.start(each, folder, world=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def mean(found: list[dict[str, Any]], part: str) -> dict[str, Tensor]:
    """The mean over ranks."""
    return {name: torch.stack([one[part][name] for one in found]).mean(0) for name in found[0][part]}


@pytest.mark.timeout(900)  # two processes that import everything
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_two_ranks_are_one_process(name: str, stage: str, together: list[dict[Any, Any]]) -> None:
    found, one = [rank[name, stage] for rank in together], step(name, stage)
    torch.testing.assert_close(mean(found, "losses"), one["losses"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean(found, "gradients"), one["gradients"], atol=1e-5, rtol=1e-4)
    for rank in found:
        torch.testing.assert_close(rank["buffers"], one["buffers"], atol=1e-5, rtol=1e-5)


def test_a_loss_of_a_ranks_own_rows_is_found(together: list[dict[Any, Any]]) -> None:
    found, one = [rank["local"] for rank in together], local_step()
    assert abs(mean(found, "losses")["itc"] - one["losses"]["itc"]) > 0.1


def test_a_row_gets_the_numbers_of_one_process(together: list[dict[Any, Any]]) -> None:
    """Of the first rank's draw for both, whose rows have three numbers; the second rank asks for two of them."""
    torch.manual_seed(5)
    drawn = torch.rand(4, 3)
    first, second = (rank["numbers"] for rank in together)
    assert torch.equal(first, drawn[:2]) and torch.equal(second, drawn[2:, :2])


def test_the_queue_holds_the_batches_of_all_ranks_in_their_order(together: list[dict[Any, Any]]) -> None:
    for rank in together:
        ids = rank["albef", "joint"]["buffers"]["queue.ids"]
        assert (
            ids[: 2 * ROWS].tolist() == 2 * whole_batch(ToyEncoders()).image_id.tolist()
            and (ids[2 * ROWS :] == -1).all()
        )


def test_some_pairs_are_trusted_and_others_are_not(together: list[dict[Any, Any]]) -> None:
    """Of the batches above, or what VL-GAP does with either would not have been compared."""
    for rank in together:
        buffers = rank["vlgap", "noisy"]["buffers"]
        assert int(buffers["seen"]) == 2 * ROWS and 0 < int(buffers["kept"]) < 2 * ROWS
