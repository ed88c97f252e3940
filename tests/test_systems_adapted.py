"""The generic adaptations: what they leave alone, and masked images against a loop."""

import pytest
import torch
from toysurvey import ToyEncoders, toy_pairs

from unimodal.systems import Adapted, AsItComes, MaskedImages
from unimodal.systems.adapted import Method
from unimodal.systems.mim import hide_tokens, masked_image_loss


def test_encoders_as_they_come_are_their_own_embedding() -> None:
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    system = AsItComes(encoders)
    assert torch.equal(
        system.embed_images(pairs.images), encoders.backbone.image_embedding(pairs.images.tokens, pairs.images.mask)
    )
    encoders.backbone.embeds = None
    with pytest.raises(ValueError, match="no embedding of their own.*give --encoders a checkpoint"):
        AsItComes(encoders)


@pytest.mark.parametrize("method", ["context", "adapters", "lora"])
def test_an_adapter_sits_in_the_text_tower_of_a_copy(method: Method) -> None:
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    before = {name: tensor.clone() for name, tensor in encoders.backbone.state_dict().items()}
    system = Adapted(encoders, method, dim=8, rank=2, tokens=3)
    added = [name for name, _ in system.named_parameters() if ".survey" in name]
    assert added and all(name.startswith("backbone.text.") for name in added)
    if method != "context":  # both start as nothing added
        with torch.no_grad():
            ours = system.backbone.text_features(pairs.texts.ids, pairs.texts.mask)
            theirs = encoders.backbone.text_features(pairs.texts.ids, pairs.texts.mask)
        torch.testing.assert_close(ours[pairs.texts.mask], theirs[pairs.texts.mask])
    optimizer = torch.optim.SGD([p for n, p in system.named_parameters() if n in added], lr=1.0)
    system.losses(pairs, "contrast", 0.0)["itc"].backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoders.backbone.state_dict().items())


def test_full_fine_tuning_reads_pixels() -> None:
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    system = Adapted(encoders, "full", dim=8)
    other = pairs.images._replace(tokens=torch.zeros_like(pairs.images.tokens))
    assert torch.equal(system.embed_images(other), system.embed_images(pairs.images))


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
    system = MaskedImages(ToyEncoders(), width=16, heads=2, dropout=0.0, share=1.0)
    pairs = toy_pairs(4)
    other = pairs.images._replace(tokens=torch.randn_like(pairs.images.tokens))
    states = []
    for images in (pairs.images, other):  # with everything hidden, nothing of the picture is left
        holes = system.hole.expand_as(images.tokens)
        hidden = hide_tokens(images.mask, system.share)
        assert hidden.all()
        states.append(system.image_tower(torch.where(hidden[..., None], holes, images.tokens), images.mask)[0])
    assert torch.equal(*states)
    assert system.losses(pairs, "contrast", 0.0)["mim"] > 0
