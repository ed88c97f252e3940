"""The generic adaptations: what they leave alone, and masked images against a loop."""

from pathlib import Path

import pytest
import torch
from toysurvey import ToyEncoders, toy_pairs

from unimodal.stages import freeze, rates
from unimodal.survey.data import Shots, _shots
from unimodal.survey.specs import read_spec
from unimodal.systems import Adapted, AsItComes, MaskedImages
from unimodal.systems.adapted import Method
from unimodal.systems.mim import hide_tokens, masked_image_loss

CONFIGS = Path(__file__).parent.parent / "configs/systems"


def test_encoders_as_they_come_are_their_own_embedding() -> None:
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    system = AsItComes(encoders)
    assert torch.equal(
        system.embed_images(pairs.images), encoders.backbone.image_embedding(pairs.images.tokens, pairs.images.mask)
    )
    assert torch.equal(
        system.embed_texts(pairs.texts),
        encoders.backbone.text_embedding(pairs.texts.tokens, pairs.texts.ids, pairs.texts.mask),
    )
    assert not list(system.parameters()) and not read_spec(CONFIGS / "as_it_comes.yaml").stages  # zero-shot
    encoders.backbone.embeds = None
    with pytest.raises(ValueError, match="no embedding of their own.*give --encoders a checkpoint"):
        AsItComes(encoders)


@pytest.mark.parametrize("method", ["context", "adapters", "lora"])
def test_an_adapter_sits_in_the_text_tower_of_a_copy(method: Method) -> None:
    """What its stage trains is the adapter and the projections; both towers, images and the shared encoders stay."""
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    before = {name: tensor.clone() for name, tensor in encoders.backbone.state_dict().items()}
    system = Adapted(encoders, method, dim=8, rank=2, tokens=3)
    added = [name for name, _ in system.named_parameters() if ".survey" in name]
    assert added and all(name.startswith("backbone.text.") for name in added)
    factors = rates(system, read_spec(CONFIGS / f"{method}.yaml").stages["contrast"].trainable)
    own = {name for name in factors if name.startswith(("image_projection.", "text_projection.", "scale."))}
    assert {name for name, factor in factors.items() if factor} == {*added, *own}
    freeze(system, factors)

    def texts(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.text_features(pairs.texts.ids, pairs.texts.mask)[pairs.texts.mask]  # type: ignore[operator]

    first = texts(system.backbone)
    if method != "context":  # both start as nothing added
        torch.testing.assert_close(first, texts(encoders.backbone))
    optimizer = torch.optim.SGD([p for n, p in system.named_parameters() if n in added], lr=1.0)
    for _ in range(2):  # of LoRA and bottlenecks one half starts at zero, and holds back the other's gradient
        optimizer.zero_grad()
        system.losses(pairs, "contrast", 0.0)["itc"].backward()
        assert all(p.grad is None for n, p in system.named_parameters() if not factors[n])
        optimizer.step()
    assert not torch.allclose(texts(system.backbone), first, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoders.backbone.state_dict().items())
    kept = {
        name.replace(".base_layer.", "."): p for name, p in system.backbone.named_parameters() if ".survey" not in name
    }
    assert all(torch.equal(p, before[name]) for name, p in kept.items())


def test_learned_context_is_of_the_length_asked_for_and_read_as_a_token() -> None:
    encoders, pairs = ToyEncoders(), toy_pairs(3)
    system = Adapted(encoders, "context", dim=8, tokens=3)
    (context,) = [p for name, p in system.named_parameters() if ".survey" in name]  # of the one layer of the toy
    assert context.shape == (1, 3, encoders.text_width)
    with torch.no_grad():
        one, mask = system.embed_texts(pairs.texts), pairs.texts.mask
        assert system.backbone.text_features(pairs.texts.ids, mask).shape[:2] == mask.shape
        context.add_(torch.randn_like(context))
        assert not torch.allclose(system.embed_texts(pairs.texts), one, atol=1e-4)


def test_full_fine_tuning_reads_pixels() -> None:
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    system = Adapted(encoders, "full", dim=8)
    other = pairs.images._replace(tokens=torch.zeros_like(pairs.images.tokens))
    assert torch.equal(system.embed_images(other), system.embed_images(pairs.images))
    factors = rates(system, read_spec(CONFIGS / "full.yaml").stages["contrast"].trainable)
    assert all(factors.values())  # nothing is frozen; towers move slower than what is new
    assert {factor for name, factor in factors.items() if name.startswith("backbone.")} == {0.03}


def test_the_masked_image_loss_is_that_of_a_loop() -> None:
    tokens, predicted = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    hidden = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
    errors = []
    for b, t in hidden.nonzero().tolist():
        token = tokens[b, t].double()
        target = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
        errors += (predicted[b, t].double() - target).square().tolist()
    assert float(masked_image_loss(predicted, tokens, hidden)) == pytest.approx(sum(errors) / len(errors), abs=1e-5)


def test_hidden_tokens_are_real_and_not_seen() -> None:
    torch.manual_seed(0)
    mask = torch.ones(40, 9, dtype=torch.bool)
    mask[20:, 5:] = False
    hidden = hide_tokens(mask, 0.4)
    assert not (hidden & ~mask).any()
    assert hidden[:20].sum(1).unique().tolist() == [3] and hidden[20:].sum(1).unique().tolist() == [2]
    assert hidden[:20].float().mean(0).min() > 0.1  # every place has its turn


def test_the_tower_sees_holes_in_place_of_hidden_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    system, pairs = MaskedImages(ToyEncoders(), width=16, heads=2, dropout=0.0, share=0.5, weight=0.25), toy_pairs(4)
    hidden = torch.arange(9) % 2 == torch.arange(4)[:, None] % 2
    monkeypatch.setattr("unimodal.systems.mim.hide_tokens", lambda mask, share: hidden & mask if share == 0.5 else None)
    seen: list[torch.Tensor] = []
    system.image_tower.register_forward_pre_hook(lambda tower, args: seen.append(args[0]))
    found = system.losses(pairs, "contrast", 0.0)
    assert found.keys() == {"itc", "mim"}
    tokens, holes = pairs.images.tokens, system.restorer.hole
    read = next(x for x in seen if not torch.equal(x, tokens))
    for b in range(4):
        for t in range(9):
            assert torch.equal(read[b, t], holes[t] if hidden[b, t] else tokens[b, t])
    states = system.image_tower(read, pairs.images.mask)[0][:, 1:]
    expected = 0.25 * masked_image_loss(system.restorer.restore(states), tokens, hidden)
    torch.testing.assert_close(found["mim"], expected)
    assert len({tuple(hole.tolist()) for hole in holes}) == 9  # a hole says where it is


class Shelf:
    """A split of 60 images with 20 captions each."""

    name, split = "shelf", "train"

    def __len__(self) -> int:
        return 60

    def captions(self, row: int) -> list[str]:
        return [f"{row} {c}" for c in range(20)]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_few_examples_are_so_many_of_each_class_or_captions_of_each_pair(count: int) -> None:
    shelf, things = Shelf(), [frozenset({"abc"[row % 3]}) for row in range(60)]  # 20 images of each class

    def rows(places: list[list[tuple[int, int]]]) -> list[int]:
        return [some[0][0] for some in places]

    found = _shots(shelf, things, Shots(count, "class"), 0)  # type: ignore[arg-type]
    assert rows(found) == sorted(set(rows(found))) and found == [[(row, c) for c in range(20)] for row in rows(found)]
    assert [sum(name in things[row] for row in rows(found)) for name in "abc"] == [count] * 3
    fewer = _shots(shelf, things, Shots(max(1, count // 2), "class"), 0)  # type: ignore[arg-type]
    assert set(rows(fewer)) <= set(rows(found))  # more examples are those before and others
    assert rows(found) != rows(_shots(shelf, things, Shots(count, "class"), 1))  # type: ignore[arg-type]
    found = _shots(shelf, things, Shots(count, "pair"), 0)  # type: ignore[arg-type]
    assert rows(found) == list(range(60)) and all(len(set(some)) == count for some in found)
    assert all(row == i and 0 <= c < 20 for i, some in enumerate(found) for row, c in some)


@pytest.mark.parametrize(
    ("count", "of", "message"),
    [
        (21, "class", "shots: got 21 images of each category, but shelf train has at most 20; lower it"),
        (32, "pair", "shots: got 32 captions of each image, but shelf train has at most 20; lower it"),
    ],
)
def test_more_examples_than_there_are_are_refused(count: int, of: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _shots(Shelf(), [frozenset({"abc"[row % 3]}) for row in range(60)], Shots(count, of), 0)  # type: ignore[arg-type]


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="shots: expected at least 1 example of each class, got 0"):
        Shots(0)
