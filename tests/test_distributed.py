"""Proves that ranks together are one process: for every loss, a model under DistributedDataParallel on 2 and on 3 real
gloo ranks gets the value and the gradients that one process gets on the whole batch. Three ranks, because around a ring
of two both directions are the same."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import start
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unimodal import distributed as ours
from unimodal.chunks import by_chunks
from unimodal.losses import (
    Wrong,
    caption_loss,
    conditioning_loss,
    distillation_loss,
    flow_matching_loss,
    info_nce,
    masked_info_nce,
    matching_loss,
    matryoshka,
    quantised,
    sample_hard_negatives,
    sigmoid_loss,
)
from unimodal.retrieval import row_similarity, similarity

ROWS, WIDTH, QUERIES, LENGTH, VOCABULARY = 6, 5, 3, 4, 7


class TwoTowers(nn.Module):
    """A toy model whose forward is one of the losses below, so that DDP sees the graph of exactly that loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(WIDTH, QUERIES * WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH)
        self.words = nn.Linear(WIDTH, LENGTH * VOCABULARY)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))
        self.int8_step = nn.Parameter(torch.tensor(0.14))
        self.double()

    def forward(self, case: str, batch: dict[str, Tensor]) -> Tensor:
        return CASES[case](self, batch)

    def queries(self, batch: dict[str, Tensor]) -> Tensor:
        return F.normalize(self.image(batch["image"]).unflatten(1, (QUERIES, WIDTH)), dim=-1)  # [B, N, E]

    def vectors(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return F.normalize(self.queries(batch).mean(dim=1), dim=-1), F.normalize(self.text(batch["text"]), dim=-1)


def whole_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return {
        "image": image,
        "text": text,
        "target": torch.randn(ROWS, QUERIES, WIDTH, generator=generator, dtype=torch.float64),
        "wrong": torch.randn(ROWS, 2, WIDTH, generator=generator, dtype=torch.float64),
        "wrong_mask": torch.tensor([[1, 1], [0, 0], [1, 0], [0, 1], [0, 0], [0, 0]]).bool(),  # some ranks have none
        "image_id": torch.tensor([4, 2, 9, 4, 2, 7]),  # the same image on several ranks
        "ids": torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator),
        # The first rank has long captions, the last one short ones.
        "mask": torch.arange(LENGTH)[None, :] < torch.tensor([4, 4, 3, 3, 2, 2])[:, None],
        "query_mask": torch.arange(QUERIES)[None, :] < torch.tensor([3, 3, 3, 2, 1, 1])[:, None],
    }


def softmax_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    scale = model.logit_scale.exp()
    return info_nce(*model.vectors(batch), batch["image_id"], scale=scale, label_smoothing=0.1)


def per_query_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    return info_nce(model.queries(batch), model.vectors(batch)[1], batch["image_id"], scale=model.logit_scale.exp())


def pairwise_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    scale, bias = model.logit_scale.exp(), model.logit_bias
    return sigmoid_loss(*model.vectors(batch), batch["image_id"], scale=scale, bias=bias)


def hard_negatives(model: TwoTowers, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws from the global batch and keeps the rows of this rank; the seed is the same on all ranks."""
    image, text = model.vectors(batch)
    image_id = ours.gather(batch["image_id"])
    scores = model.logit_scale.exp() * similarity(ours.gather(image), ours.gather(text))
    drawn = sample_hard_negatives(scores, image_id, image_id, torch.Generator().manual_seed(3))
    wrong_text, wrong_image = (ours.local_rows(index) for index in drawn)
    return image, text, ours.gather_with_grad(text)[wrong_text], ours.gather_with_grad(image)[wrong_image]


def pair_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    image, text, wrong_text, wrong_image = hard_negatives(model, batch)
    logits = torch.cat([(image * text).sum(1), (image * wrong_text).sum(1), (wrong_image * text).sum(1)])
    labels = torch.tensor([1, 0, 0]).repeat_interleave(len(image))
    return matching_loss(logits * model.logit_scale.exp() + model.logit_bias, labels)


def next_word_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    logits = model.words(model.vectors(batch)[0]).unflatten(1, (LENGTH, VOCABULARY))
    return caption_loss(logits, batch["ids"], batch["mask"])


def prefix_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    base = partial(info_nce, image_id=batch["image_id"], scale=model.logit_scale.exp())
    return matryoshka(base, *model.vectors(batch), dims=[2, WIDTH])


def wrong_items(model: TwoTowers, batch: dict[str, Tensor]) -> Wrong:
    return Wrong(F.normalize(model.text(batch["wrong"]), dim=-1), batch["wrong_mask"])


def explicit_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    wrong, scale = wrong_items(model, batch), model.logit_scale.exp()
    both = {"wrong_text": wrong, "wrong_image": wrong}
    return info_nce(*model.vectors(batch), batch["image_id"], scale=scale, rows=2, **both)


def explicit_pairwise_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    wrong, settings = wrong_items(model, batch), {"scale": model.logit_scale.exp(), "bias": model.logit_bias}
    return sigmoid_loss(*model.vectors(batch), batch["image_id"], wrong_text=wrong, rows=2, **settings)


def masked_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    settings = {"scale": model.logit_scale.exp(), "within": True, "wrong": wrong_items(model, batch)}
    return masked_info_nce(*model.vectors(batch), batch["image_id"], **settings)


def distilled_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    image, text = model.vectors(batch)
    wrong = wrong_items(model, batch)
    logits = model.logit_scale.exp() * row_similarity(image, torch.cat([text[:, None], wrong.embedding], dim=1))
    given = torch.cat([torch.ones_like(wrong.given[:, :1]), wrong.given], dim=1)
    return distillation_loss(logits, batch["target"][..., 0], given)


def few_bits_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    base = partial(info_nce, image_id=batch["image_id"], scale=model.logit_scale.exp())
    return quantised(base, *model.vectors(batch), step=model.int8_step)


def chunked_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    """GradCache: the towers read a row at a time, and once more inside the backward."""
    image = by_chunks(lambda x: model.vectors({"image": x, "text": x})[0], batch["image"], size=1)
    text = by_chunks(lambda x: model.vectors({"image": x, "text": x})[1], batch["text"], size=1)
    scale, bias = model.logit_scale.exp(), model.logit_bias
    soft = info_nce(image, text, batch["image_id"], scale=scale, rows=2)
    return soft + sigmoid_loss(image, text, batch["image_id"], scale=scale, bias=bias, rows=1)


def velocity_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    return flow_matching_loss(model.queries(batch), batch["target"], weight=batch["image_id"].double())


def state_loss(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    return conditioning_loss(model.queries(batch), batch["target"], batch["query_mask"])


CASES = {
    "info_nce": softmax_loss,
    "info_nce per query": per_query_loss,
    "sigmoid": pairwise_loss,
    "matching with hard negatives": pair_loss,
    "caption": next_word_loss,
    "matryoshka": prefix_loss,
    "info_nce with wrong items": explicit_loss,
    "sigmoid with wrong items": explicit_pairwise_loss,
    "masked": masked_loss,
    "distillation": distilled_loss,
    "quantised": few_bits_loss,
    "by chunks": chunked_loss,
    "flow": velocity_loss,
    "conditioning": state_loss,
}


def value_and_gradients(model: nn.Module, case: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(case, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"value": loss.detach(), **gradients}


# --- What one rank does; results go into a file -----------------------------------------------------------------------


def error_of(function, *arguments) -> str:
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return "no error"


def run_rank(index: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=world)
    share = ROWS // world
    mine = slice(index * share, (index + 1) * share)
    batch = {name: x[mine] for name, x in whole_batch().items()}
    model = TwoTowers()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    losses = {case: value_and_gradients(parallel, case, batch) for case in CASES}
    uneven = torch.zeros(share + index, WIDTH)
    torch.save(
        {
            "losses": losses,
            "texts": [x.detach() for x in hard_negatives(model, batch)[2:]],
            "place": (ours.rank(), ours.world_size()),
            "gathered": {name: ours.gather(x) for name, x in batch.items()},
            "own": ours.local_rows(ours.gather(batch["image"])),
            "ring": [(int(a), b.tolist()) for a, b in ours.ring_exchange(torch.tensor(index), batch["image_id"])],
            "sum": ours.sum_over_ranks(torch.tensor(index + 1)),
            "uneven gather": error_of(ours.gather, uneven),
            "uneven ring": error_of(lambda: list(ours.ring_exchange(uneven))),
        },
        folder / f"{index}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request, tmp_path_factory) -> list[dict]:
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    start(run_rank, folder, world=world)
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(world)]


# --- What the ranks must have found -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(ranks, case):
    expected = value_and_gradients(TwoTowers(), case, whole_batch())
    assert len(expected) > 1
    found = [rank["losses"][case] for rank in ranks]
    value = torch.stack([rank["value"] for rank in found]).mean()
    torch.testing.assert_close(value, expected["value"], rtol=0, atol=1e-10)
    for rank in found:  # DDP has averaged, so every rank holds the same gradients
        assert {name.removeprefix("module.") for name in rank} == set(expected)
        for name, gradient in rank.items():
            if name != "value":
                torch.testing.assert_close(gradient, expected[name.removeprefix("module.")], rtol=0, atol=1e-10)


def test_info_nce_has_the_global_value_on_every_rank(ranks):
    values = [rank["losses"]["info_nce"]["value"] for rank in ranks]
    assert all(torch.equal(value, values[0]) for value in values)


def test_hard_negatives_are_those_of_one_process(ranks):
    expected = hard_negatives(TwoTowers(), whole_batch())[2:]
    for which in range(2):
        torch.testing.assert_close(torch.cat([rank["texts"][which] for rank in ranks]), expected[which])


def test_gather_keeps_rank_order_values_and_types(ranks):
    for index, rank in enumerate(ranks):
        assert rank["place"] == (index, len(ranks))
        for name, x in whole_batch().items():
            assert torch.equal(rank["gathered"][name], x) and rank["gathered"][name].dtype == x.dtype
        assert torch.equal(rank["own"], whole_batch()["image"].chunk(len(ranks))[index])


def test_ring_visits_every_rank_once_and_starts_at_home(ranks):
    blocks = [block.tolist() for block in whole_batch()["image_id"].chunk(len(ranks))]
    for index, rank in enumerate(ranks):
        assert rank["ring"] == [(k % len(ranks), blocks[k % len(ranks)]) for k in range(index, index - len(ranks), -1)]


def test_every_rank_has_the_sum(ranks):
    assert all(rank["sum"] == sum(range(1, len(ranks) + 1)) for rank in ranks)


def test_uneven_batches_raise_on_every_rank_and_name_both_shapes(ranks):
    share = ROWS // len(ranks)
    for rank in ranks:
        for exchange in ("uneven gather", "uneven ring"):
            assert f"Rank 0 brought shape ({share}, 5), rank 1 brought ({share + 1}, 5)" in rank[exchange]
            assert "drop_last=True" in rank[exchange] and "pad all to one length" in rank[exchange]


def test_without_a_process_group_everything_is_local():
    x = torch.randn(3, 2, requires_grad=True)
    assert (ours.rank(), ours.world_size()) == (0, 1)
    assert ours.gather_with_grad(x) is x
    assert torch.equal(ours.gather(x), x) and not ours.gather(x).requires_grad
    assert torch.equal(ours.local_rows(x), x) and torch.equal(ours.sum_over_ranks(x), x)
    assert [block for (block,) in ours.ring_exchange(x)] == [x]
