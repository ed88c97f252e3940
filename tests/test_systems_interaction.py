"""OSCAR, ELIP, CDISA and CIMN: what is told apart from its neighbours by more than learning 64 pairs by heart."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toysurvey import END, PAD, START, ToyEncoders, part, toy_pairs

from unimodal import stages
from unimodal.losses import category_loss, gravitation_loss, masses, triplet_loss
from unimodal.survey.score import rank
from unimodal.survey.specs import Spec, read_spec
from unimodal.systems import BLIP2, CDISA, CIMN, ELIPB, ELIPC, ELIPS, OSCAR, Batch, Images, NounTags, System
from unimodal.systems import elip as elip_module
from unimodal.systems.cdisa import Interaction
from unimodal.systems.cimn import GraphPool, drop_nodes, neighbourhood
from unimodal.systems.elip import every_pair, sample_spared_negatives, text_to_image_loss
from unimodal.systems.oscar import mixed_tags, random_negatives

CONFIGS = Path(__file__).parent.parent / "configs/systems"
SMALL: dict[str, Any] = {"width": 48, "heads": 4, "dropout": 0.0}
PROMPTED = {"elip_c": ELIPC, "elip_s": ELIPS, "elip_b": ELIPB}


def spec_of(name: str) -> Spec:
    return read_spec(CONFIGS / f"{name}.yaml")


def small(system: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return system(ToyEncoders(), **{**SMALL, **settings}).eval()


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


# OSCAR


class FixedTags:
    """Tags that are given: ids [B, G] and mask for images in the order of their first token's first entry."""

    def __init__(self, first: Tensor, ids: Tensor, mask: Tensor) -> None:
        self.first, self.ids, self.mask = first, ids, mask

    def prepare(self, batches: Iterator[Batch]) -> None:
        raise AssertionError("fitted twice")

    def __call__(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rows = (tokens[:, 0, :1] == self.first).long().argmax(1)
        return self.ids[rows], self.mask[rows]


def tagged(pairs: Batch, length: int = 3) -> OSCAR:
    """An OSCAR whose image b has the tags 4 + b, 5 + b, ..."""
    ids = 4 + torch.arange(len(pairs.image_id))[:, None] + torch.arange(length)
    return small(OSCAR, tags=FixedTags(pairs.images.tokens[:, 0, 0], ids, torch.ones_like(ids, dtype=torch.bool)))


def test_oscar_reads_the_tags_of_the_image() -> None:
    pairs = toy_pairs(2)
    system = tagged(pairs)
    tokens, mask, tags, tag_mask = system.image_state(pairs.images)
    text = system.text_state(pairs.texts)
    with torch.no_grad():
        own = system.score_pairs((tokens, mask, tags, tag_mask), text)
        swapped = system.score_pairs((tokens, mask, tags.flip(0), tag_mask.flip(0)), text)
    assert ((own - swapped).abs() > 1e-4).all()


def test_oscar_runs_without_any_tag() -> None:
    pairs = toy_pairs(6)
    system = tagged(pairs, length=0)
    ids, mask = system.read_tags(pairs.images)
    assert ids.tolist() == [[START, END]] * 6 and mask.all()
    assert system.score(pairs.images, pairs.texts).isfinite().all()
    for stage in ("pretrain", "retrieval"):
        assert all(loss.isfinite() for loss in system.losses(pairs, stage, 0.0).values())


def test_tags_close_up_between_start_and_end() -> None:
    pairs = toy_pairs(2)
    ids = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    system = small(OSCAR, tags=FixedTags(pairs.images.tokens[:, 0, 0], ids, mask))
    ids, mask = system.read_tags(pairs.images)
    assert ids.tolist() == [[START, 7, 9, END, PAD, PAD], [START, 14, END, PAD, PAD, PAD]]
    assert mask.sum(1).tolist() == [4, 3]


def test_a_wrong_image_brings_its_own_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = toy_pairs(8, captions=2)
    system = tagged(pairs)
    image, text = system.image_state(pairs.images), system.text_state(pairs.texts)
    seen = []
    score = OSCAR.score_pairs
    monkeypatch.setattr(OSCAR, "score_pairs", lambda self, i, t: seen.append((i, t)) or score(self, i, t))
    system.losses(pairs, "retrieval", 0.0)
    (tokens, _, tags, _), (caption, _) = seen[0]
    rows = [int((image[0] == x).flatten(1).all(1).nonzero()[0, 0]) for x in tokens]
    of_tags = [int((image[2] == x).flatten(1).all(1).nonzero()[0, 0]) for x in tags]
    of_text = [int((text[0] == x).flatten(1).all(1).nonzero()[0, 0]) for x in caption]
    ids = pairs.image_id
    assert ids[rows].tolist() == ids[of_tags].tolist()
    assert (ids[rows] == ids[of_text]).tolist() == [True] * 16 + [False] * 16


def test_random_negatives_are_a_wrong_caption_or_a_wrong_image() -> None:
    torch.manual_seed(0)
    ids = torch.arange(200).repeat_interleave(2)
    image, text = random_negatives(ids)
    own = torch.arange(400)
    assert (ids[image] != ids[text]).all()
    assert ((image == own) ^ (text == own)).all()
    assert 0.4 < (image == own).float().mean() < 0.6
    tags = mixed_tags(ids)
    assert 0.4 < (tags == own).float().mean() < 0.6
    assert (ids[tags] != ids)[tags != own].all()


def test_pretraining_hides_words_of_caption_and_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = toy_pairs(6)
    system = tagged(pairs)
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(system.words, "loss", lambda hidden, asked: seen.append((hidden, asked)) or hidden.sum() * 0)
    monkeypatch.setattr("unimodal.systems.oscar.mixed_tags", lambda image_id: image_id.roll(1))
    system.losses(pairs, "pretrain", 0.0)
    hidden, asked = seen[0]
    length = pairs.texts.ids.shape[1]
    assert hidden.shape[:2] == asked.shape == (6, length + 4)  # three tags and their end
    caption, tags = asked[:, :length], asked[:, length:]
    assert ((caption != -100).any(1) & (tags != -100).any(1)).all()
    assert (caption == pairs.texts.ids)[caption != -100].all()
    given = torch.cat([system.read_tags(pairs.images)[0][:, 1:]]).roll(1, 0)  # those of the image before
    assert (tags == given)[tags != -100].all()


def test_image_tokens_have_neither_type_nor_position_and_tags_another_type_than_captions() -> None:
    pairs = toy_pairs(4)
    system = tagged(pairs)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    tokens, mask, tags, tag_mask = system.image_state(pairs.images)
    text = system.text_state(pairs.texts)
    with torch.no_grad():
        score = system.score_pairs((tokens, mask, tags, tag_mask), text)
        shuffled = system.score_pairs((tokens[:, order], mask, tags, tag_mask), text)
        expected = system.text_project(system.encoders.read_texts(*system.read_tags(pairs.images)).tokens)[:, 1:]
    torch.testing.assert_close(score, shuffled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tags, expected + system.types.weight[1])
    torch.testing.assert_close(text[0], system.text_project(pairs.texts.tokens) + system.types.weight[0])


def test_noun_tags_are_the_nearest_nouns_of_the_cca() -> None:
    encoders = ToyEncoders()
    nouns = ["dog", "man", "ball", "tree", "car", "hat"]  # of different ids here
    ids, mask = encoders.tokenise(nouns)
    assert len(set(ids[:, 1].tolist())) == len(nouns)
    tags = NounTags(encoders, nouns, count=2)
    # Images whose mean is a linear map of their text's: an image of a noun's text has this noun.
    pairs = toy_pairs(200)
    turn = torch.randn(encoders.text_width, encoders.image_width, generator=torch.Generator().manual_seed(3))

    def seen(texts: Any) -> Images:
        mean = (texts.tokens * texts.mask[..., None]).sum(1) / texts.mask.sum(1, keepdim=True)
        return Images((mean @ turn)[:, None].expand(-1, 9, -1), torch.ones(len(mean), 9, dtype=torch.bool))

    tags.prepare(iter([Batch(seen(pairs.texts), pairs.texts, pairs.image_id)]))
    shown = seen(encoders.read_texts(ids, mask))
    found = tags.nearest(shown.tokens, shown.mask)
    assert found[:, 0].tolist() == list(range(6))
    # The rest by cosines computed one by one.
    fitted = tags.cca.fitted
    for row, mean in enumerate(shown.tokens[:, 0].double()):
        vector = ((mean - fitted.image_mean) @ fitted.image_map * fitted.correlations**fitted.power).tolist()
        cosines = []
        for noun in tags.vectors.double().tolist():
            product = sum(a * b for a, b in zip(vector, noun))
            cosines.append(product / math.hypot(*vector) / math.hypot(*noun))
        assert found[row].tolist() == sorted(range(6), key=lambda i: -cosines[i])[:2]
    pieces, real = tags(shown.tokens, shown.mask)
    assert pieces[real].view(6, 2).tolist() == ids[found][..., 1].tolist()  # the words, without start and end


def test_noun_tags_refuse_what_the_text_encoder_cannot_read() -> None:
    with pytest.raises(ValueError, match="lower count"):
        NounTags(ToyEncoders(), ["a man", "a dog", "a ball", "a car", "a tree", "a hat"], count=6)
    with pytest.raises(ValueError, match="got 1 nouns and 2"):
        NounTags(ToyEncoders(), ["dog"], count=2)


def test_oscar_reranks_candidates_of_cca() -> None:
    scoring = spec_of("oscar").scoring
    assert (scoring.first, scoring.shortlist, scoring.k, scoring.combine) == ("embed", "cca", 32, "replace")


# ELIP


def unprompted(system: Any, images: Images, text: Any) -> Tensor:
    """Scores of true pairs by the base alone."""
    if isinstance(system, ELIPB):
        return BLIP2.score_pairs(system, system.memory(images), (text.ids, text.mask))
    return (system.embed_images(images) * system.embed_texts(text)).sum(-1)


@pytest.mark.parametrize("name", PROMPTED)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_without_prompts_elip_is_its_base(name: str) -> None:
    pairs = toy_pairs(6)
    with torch.no_grad():
        for prompts, same in ((0, True), (3, False)):
            system = small(PROMPTED[name], prompts=prompts)
            base, score = unprompted(system, pairs.images, pairs.texts), system.score(pairs.images, pairs.texts)
            assert torch.allclose(base, score, atol=1e-6) == same


@pytest.mark.parametrize("name", PROMPTED)
def test_gradients_of_elip_reach_the_mapper_alone(name: str) -> None:
    spec, system = spec_of(name), small(PROMPTED[name])
    stages.freeze(system, stages.rates(system, spec.stages["elip"].trainable))
    sum(system.losses(toy_pairs(8), "elip", 0.0).values()).backward()
    reached = {key.split(".")[0] for key, p in system.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == ({"mapper", "itm_head"} if name == "elip_b" else {"mapper"})


@pytest.mark.parametrize("name", PROMPTED)
def test_elip_reranks_texts_candidates_and_keeps_recall_at_k(name: str) -> None:
    spec, system, pairs = spec_of(name), small(PROMPTED[name]), toy_pairs(48)
    assert spec.stages["elip"].order == "hard"
    found = rank(system, spec.scoring, pairs.images, pairs.texts, pairs.image_id, pairs.image_id)
    k = spec.scoring.k
    assert found.t2i_reranked is not None
    assert ((found.t2i <= k) == (found.t2i_reranked <= k)).all() and not torch.equal(found.t2i, found.t2i_reranked)
    assert 0 < (found.t2i <= k).sum() < 48
    assert found.i2t is None and found.i2t_reranked is None


@pytest.mark.parametrize("name", ["elip_c", "elip_s"])
def test_the_training_matrix_in_chunks_is_the_one_pair_by_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, pairs = small(PROMPTED[name]), toy_pairs(7)
    matrices: list[Tensor] = []
    gradients = []
    loss = type(system).prompted_loss
    monkeypatch.setattr(
        type(system), "prompted_loss", lambda self, scores, ids: matrices.append(scores) or loss(self, scores, ids)
    )
    for at_once in (1024, 5):
        monkeypatch.setattr(elip_module, "every_pair", lambda *parts, a=at_once: every_pair(*parts, at_once=a))
        system.zero_grad()
        system.losses(pairs, "elip", 0.0)["elip"].backward()
        gradients.append(system.mapper.layers[0].weight.grad.clone())
    with torch.no_grad():
        for i in range(7):
            for j in range(7):
                alone = system.score(pairs.images.select(torch.tensor([i])), pairs.texts.select(torch.tensor([j])))
                for matrix in matrices:
                    torch.testing.assert_close(matrix[i, j].detach(), alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(matrices[0][0, 1], matrices[0][1, 0])


def test_the_loss_of_elip_c_by_plain_loops() -> None:
    scores, ids = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 0, 2])
    expected = 0.0
    for j in range(4):
        images = [i for i in range(4) if i == j or ids[i] != ids[j]]
        expected -= math.log(math.exp(5 * float(scores[j, j])) / sum(math.exp(5 * float(scores[i, j])) for i in images))
    assert text_to_image_loss(scores, ids, scale=5.0).item() == pytest.approx(expected / 4, abs=1e-10)
    # Text to image alone: what is added to all images of a text changes nothing, what is added to all texts of an image does.
    one_text, one_image = scores.clone(), scores.clone()
    one_text[:, 1] += 0.3
    one_image[1] += 0.3
    assert text_to_image_loss(one_text, ids, scale=5.0).item() == pytest.approx(expected / 4, abs=1e-10)
    assert abs(text_to_image_loss(one_image, ids, scale=5.0).item() - expected / 4) > 1e-3


def test_the_negatives_of_elip_b_spare_the_three_most_similar() -> None:
    torch.manual_seed(0)
    similarity = torch.tensor([[9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 8.0]]).expand(7, 7).T.contiguous()  # [image, text]
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 0])  # 0 and 6 show the same image
    drawn = torch.stack([sample_spared_negatives(similarity, ids) for _ in range(2000)])
    # Text 0: 0 and 6 are its own, 1, 2 and 3 are spared. Text 5: its own is 5; 0, 6 and 1 are spared.
    assert set(drawn[:, 0].tolist()) == {4, 5}
    share = (drawn[:, 0] == 4).float().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)  # softmax of 2 and 1
    assert set(drawn[:, 5].tolist()) == {2, 3, 4}
    with pytest.raises(ValueError, match="raise the batch size"):
        sample_spared_negatives(torch.rand(4, 4), torch.arange(4))
    assert len(sample_spared_negatives(torch.rand(5, 5), torch.arange(5))) == 5


def test_the_queries_of_elip_b_never_see_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    system, pairs = small(ELIPB, prompts=4), toy_pairs(3)
    seen: list[tuple[Tensor, Tensor]] = []
    match = system.bridge.match

    def watch(name: str, ids: Tensor, mask: Tensor, *image: Any) -> Tensor:
        if len(image) == 2:  # the prompts are made without one
            seen.append((image[0], image[1]))
        return match(name, ids, mask, *image)

    monkeypatch.setattr(system.bridge, "match", watch)
    with torch.no_grad():
        system.score(pairs.images, pairs.texts)
        prompts = system.mapper(system.condition(pairs.texts))
        hidden, _ = system.image_tower(*pairs.images[:2], prompts)
    image, mask = seen[0]
    assert image.shape[1] == mask.shape[1] == 10  # class token and tokens
    torch.testing.assert_close(image, torch.cat([hidden[:, :1], hidden[:, 5:]], 1))


@torch.no_grad()
def test_prompts_of_elip_b_are_made_of_the_first_query_beside_the_text_without_an_image() -> None:
    """Against the bridge's layers one by one, of each text without its padding."""
    system, pairs = small(ELIPB, layers=3), toy_pairs(4)
    found, bridge = system.condition(pairs.texts), system.bridge
    for row in range(4):
        ids = pairs.texts.ids[row : row + 1, pairs.texts.mask[row]]
        read = bridge.norm(bridge.query_sets["image"])[None]
        text = bridge.norm(bridge.token_embedding(ids) + bridge.position_embedding.weight[: ids.shape[1]])
        for layer in bridge.layers:
            both = torch.cat([read, text], 1)
            x = layer.attention_norm(both + layer.attention(both, *layer.attention.project(both)))
            read, text = x[:, : read.shape[1]], x[:, read.shape[1] :]
            read = layer.query_mlp_norm(read + layer.query_mlp(read))
            text = layer.text_mlp_norm(text + layer.text_mlp(text))
        expected = F.normalize(system.text_projection(read[0, 0]), dim=-1)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)
    moved = system.condition(toy_pairs(4, seed=1).texts)
    assert not torch.allclose(moved, found, atol=1e-3)


@pytest.mark.parametrize("name", PROMPTED)
def test_an_image_is_read_anew_for_each_text(name: str) -> None:
    """What is kept of an image has met neither attention nor prompts."""
    system, pairs = small(PROMPTED[name]), toy_pairs(3)
    tokens, mask = system.image_state(pairs.images)
    assert torch.equal(tokens, system.image_tower.project(pairs.images.tokens)) and mask is pairs.images.mask
    seen = []
    system.image_tower.layers[0].register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
    system.score_matrix((tokens, mask), system.text_state(pairs.texts))
    assert sum(seen) == 9


# CDISA


def test_category_loss_by_plain_loops() -> None:
    image, text = unit(5, 6), unit(5, 6, seed=1)
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]).double()
    ids = torch.tensor([0, 1, 2, 3, 3])
    positive = [[0, 1], [0, 1, 2], [1, 2], [3, 4], [3, 4]]  # 0 and 2 share none; nothing but the image joins 3 and 4
    expected = 0.0
    for a, b in ((image, text), (text, image)):
        for i, partners in enumerate(positive):
            logits = [4 * float(a[i] @ b[j]) for j in range(5)]
            norm = math.log(sum(map(math.exp, logits)))
            expected -= sum(logits[j] - norm for j in partners) / len(partners) / 10
    found = category_loss(image, text, labels, ids, scale=4.0)
    assert found.item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found, category_loss(image, text, labels[:, [2, 0, 1]], ids, scale=4.0))
    with pytest.raises(ValueError, match=r"expected \[B, E\] twice"):
        category_loss(image, text, labels[:4], ids, scale=4.0)


def test_pairs_of_one_category_attract_each_other() -> None:
    image, text = unit(4, 6), unit(4, 6, seed=1)
    labels, ids = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), torch.arange(4)
    before = category_loss(image, text, labels, ids, scale=1.0)
    for partners, nearer in (([1, 0, 3, 2], True), ([2, 3, 0, 1], False)):
        moved = F.normalize(image + 0.05 * text[partners], dim=-1)
        assert (category_loss(moved, text, labels, ids, scale=1.0) < before) == nearer


def test_the_order_of_categories_changes_nothing() -> None:
    pairs, system = toy_pairs(12), small(CDISA)
    before = system.losses(pairs, "align", 0.0)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        system.classifier.weight.copy_(system.classifier.weight[order])
        system.classifier.bias.copy_(system.classifier.bias[order])
    assert pairs.labels is not None
    after = system.losses(pairs._replace(labels=pairs.labels[:, order]), "align", 0.0)
    for name in before:
        torch.testing.assert_close(before[name], after[name])


@pytest.mark.parametrize("kind", [CDISA, CIMN])
def test_a_vector_depends_on_its_own_item_alone(kind: type[System]) -> None:
    pairs = toy_pairs(8)
    system = small(kind) if kind is CDISA else cimn()
    with torch.no_grad():
        image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
        for i in range(8):
            alone = part(pairs, torch.tensor([i]))
            torch.testing.assert_close(system.embed_images(alone.images)[0], image[i], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(system.embed_texts(alone.texts)[0], text[i], atol=1e-6, rtol=1e-5)


def test_the_interaction_teaches_and_is_not_taught_by_the_vector() -> None:
    system, pairs = small(CDISA), toy_pairs(8)
    for name, reached in (("teach", False), ("bcm", False), ("inv", False), ("cls", True)):
        system.zero_grad()
        system.losses(pairs, "align", 0.0)[name].backward()
        assert any(p.grad is not None and p.grad.any() for p in system.interactions.parameters()) == reached, name
        assert system.shared[0].weight.grad.any(), name


def test_interaction_by_plain_loops() -> None:
    torch.manual_seed(0)
    layer = Interaction(6, 2, 0.0).double()
    x, y = torch.randn(1, 3, 6).double(), torch.randn(1, 4, 6).double()
    x_mask, y_mask = torch.tensor([[True, True, False]]), torch.tensor([[True, True, True, False]])
    with torch.no_grad():
        found_x, found_y = layer(x, x_mask, y, y_mask)
        fx, fy = layer.attend(x[0]), layer.attend(y[0])

        def compared(own: Tensor, own_f: Tensor, others: Tensor, other_f: Tensor) -> Tensor:
            read = torch.zeros(6).double()
            for head in (slice(0, 3), slice(3, 6)):
                weight = [math.exp(float(own_f[head] @ f[head]) / math.sqrt(3)) for f in other_f]
                read[head] = sum(w * o[head] for w, o in zip(weight, others)) / sum(weight)
            return layer.norm(own + layer.compare(torch.cat([own, read, own - read, own * read])))

        for i in range(2):
            torch.testing.assert_close(found_x[0, i], compared(x[0, i], fx[i], y[0, :3], fy[:3]))
        for j in range(3):
            torch.testing.assert_close(found_y[0, j], compared(y[0, j], fy[j], x[0, :2], fx[:2]))


def test_cdisa_asks_for_its_categories() -> None:
    pairs = toy_pairs(4)
    with pytest.raises(ValueError, match="built for 4, the data has none"):
        small(CDISA).losses(pairs._replace(labels=None), "align", 0.0)
    with pytest.raises(ValueError, match="built for 7, the data has 4"):
        small(CDISA, categories=7).losses(pairs, "align", 0.0)


def test_cdisa_is_measured_by_category() -> None:
    assert spec_of("cdisa").scoring.metric == "category"


@pytest.mark.parametrize("name", ["cdisa", "cimn"])
def test_an_inferred_design_says_so(name: str) -> None:
    assert spec_of(name).inferred == "inferred design, no public reference" and not spec_of(name).published


# CIMN


def cimn() -> CIMN:
    torch.manual_seed(0)
    return CIMN(ToyEncoders(), width=48, dropout=0.0, image_nearest=4).eval()


def test_the_order_of_image_nodes_changes_nothing_but_that_of_words_does() -> None:
    system, pairs = cimn(), toy_pairs(6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    images = pairs.images._replace(tokens=pairs.images.tokens[:, order])
    with torch.no_grad():
        torch.testing.assert_close(system.embed_images(images), system.embed_images(pairs.images), atol=1e-5, rtol=1e-4)
    words, order = pairs.texts.tokens[:1, :4].double(), [2, 0, 3, 1]
    mask = torch.ones(1, 4, dtype=torch.bool)
    for sequence in (False, True):
        encoder = system.text.double()
        for layer in encoder.relations:
            layer.sequence, layer.nearest = sequence, 2
        with torch.no_grad():
            moved = (encoder(words, mask) - encoder(words[:, order], mask)).abs().max()
        assert (moved > 1e-6) == sequence and (moved < 1e-12) != sequence  # words have neighbours in their sequence


def test_padding_nodes_change_nothing_of_cimn() -> None:
    system, pairs = cimn(), toy_pairs(6)
    padding = 100 * torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(2))
    images = Images(torch.cat([pairs.images.tokens, padding], 1), F.pad(pairs.images.mask, (0, 5)))
    with torch.no_grad():
        torch.testing.assert_close(system.embed_images(images), system.embed_images(pairs.images), atol=1e-5, rtol=1e-4)


def test_pooling_keeps_the_better_half_of_the_real_nodes() -> None:
    torch.manual_seed(0)
    pool = GraphPool(6, nearest=3).double()
    nodes = torch.randn(3, 7, 6).double()
    mask = torch.arange(7) < torch.tensor([[7], [5], [1]])
    kept, kept_mask = pool(nodes, mask)
    assert kept.shape[1] == 4 and kept_mask.sum(1).tolist() == [4, 3, 1]
    assert not kept[~kept_mask].any()
    near = neighbourhood(nodes, mask, 3)
    for b, count in enumerate((7, 5, 1)):
        scores = []
        for i in range(count):
            read = sum(float(near[b, i, j]) * pool.convolve(nodes[b, j]) for j in range(count))
            scores.append(math.tanh(float(read @ pool.direction) / float(pool.direction.norm())))
        order = sorted(range(count), key=lambda i: -scores[i])[: math.ceil(count / 2)]
        torch.testing.assert_close(
            kept[b][kept_mask[b]], nodes[b, order] * torch.tensor([scores[i] for i in order])[:, None]
        )


def test_neighbourhoods_by_plain_loops() -> None:
    nodes = unit(1, 6, 4) * 3
    mask = torch.tensor([[True] * 5 + [False]])
    for sequence in (False, True):
        found = neighbourhood(nodes, mask, 2, sequence=sequence)[0]
        for i in range(5):
            cosines = {j: float(nodes[0, i] @ nodes[0, j]) / 9 for j in range(5)}
            kept = set(sorted(cosines, key=lambda j: -cosines[j])[:2]) | (
                {i - 1, i + 1} & set(range(5)) if sequence else set()
            )
            assert i in kept
            total = sum(math.exp(10 * cosines[j]) for j in kept)
            expected = [math.exp(10 * cosines[j]) / total if j in kept else 0.0 for j in range(6)]
            assert found[i].tolist() == pytest.approx(expected, abs=1e-9)


def test_a_second_view_lacks_some_real_nodes_and_never_all() -> None:
    torch.manual_seed(0)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]]).repeat(500, 1)
    view = drop_nodes(mask)
    assert not (view & ~mask).any() and view.any(1).all()
    assert 0.15 < 1 - view[::3].float().mean().item() < 0.25


def test_gravitation_loss_by_hand() -> None:
    """Two pairs: with one negative each, all weights are 1. Hinges at margin 0.5: rows 0.5 + 0.5 - 0.9 = 0.1 and 0.5 + 0.2 - 0.6 = 0.1,
    columns 0.5 + 0.2 - 0.9 < 0 and 0.5 + 0.5 - 0.6 = 0.4; times masses 2 and 1 of rows, 1 and 0.5 of columns.

    Three, softening 0.25, all masses 1: row 0 is drawn by 1 / (0.5^2 + 0.25) = 2 and by 1 / (1^2 + 0.25) = 0.8, weights 1 and 0.4."""
    scores = torch.tensor([[0.9, 0.5], [0.2, 0.6]])
    found = gravitation_loss(scores, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.5]), margin=0.5, softening=0.25)
    assert found.item() == pytest.approx(2 * 0.1 + 1 * 0.1 + 1 * 0 + 0.5 * 0.4, abs=1e-6)
    scores = torch.tensor([[0.6, 0.5, 0.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    found = gravitation_loss(scores, torch.ones(3), torch.ones(3), margin=0.7, softening=0.25)
    assert found.item() == pytest.approx(1 * 0.6 + 0.4 * 0.1 + 1 * 0.2, abs=1e-6)  # the last: column 1, 0.7 + 0.5 - 1


@pytest.mark.parametrize("hardest", [False, True])
def test_gravitation_loss_by_plain_loops(hardest: bool) -> None:
    scores = (unit(5, 4) @ unit(5, 4, seed=1).T).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    rows, columns = (0.5 + torch.rand(2, 5, generator=generator, dtype=torch.float64)).unbind()
    ids = torch.tensor([0, 1, 1, 2, 3])
    expected = torch.zeros((), dtype=torch.float64)
    for s, own, other in ((scores, rows, columns), (scores.T, columns, rows)):
        for i in range(5):
            wrong = [j for j in range(5) if ids[i] != ids[j]]
            force = {j: float(own[i] * other[j] / ((1 - s[i, j].detach()) ** 2 + 0.1)) for j in wrong}
            pulls = [force[j] / max(force.values()) * (0.2 + s[i, j] - s[i, i]).clamp(min=0) for j in wrong]
            expected = expected + own[i] * (max(pulls) if hardest else sum(pulls))
    found = gravitation_loss(scores, rows, columns, ids, hardest=hardest)
    torch.testing.assert_close(found, expected)
    # No gradient flows through the weights either.
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in (found, expected)))


@pytest.mark.parametrize("hardest", [False, True])
def test_equal_masses_and_attraction_give_the_triplet_loss(hardest: bool) -> None:
    scores, ids, one = unit(6, 4) @ unit(6, 4, seed=1).T, torch.tensor([0, 1, 2, 2, 3, 4]), torch.ones(6)
    found = gravitation_loss(scores, one, one, ids, softening=1e9, hardest=hardest)
    torch.testing.assert_close(found, triplet_loss(scores, ids, hardest=hardest), atol=1e-7, rtol=1e-7)
    near = gravitation_loss(scores, one, one, ids, hardest=hardest)
    assert near < found or hardest  # attraction weighs far negatives less


def test_masses_by_plain_loops_and_without_gradient() -> None:
    image, text = unit(4, 3).requires_grad_(), unit(4, 3, seed=1).requires_grad_()
    found = torch.cat(masses(image, text, neighbours=3, kappa=2.0))
    items = torch.cat([image, text]).detach()
    raw = []
    for i in range(8):
        nearest = sorted((float(items[i] @ items[j]) for j in range(8) if j != i), reverse=True)[:3]
        raw.append(1 + 2 * sum(nearest) / 3)
    mean = sum(raw) / 8
    assert found.tolist() == pytest.approx([min(2.0, max(0.5, mass / mean)) for mass in raw], abs=1e-9)
    assert not found.requires_grad
    heavy = torch.ones(4, dtype=torch.float64).requires_grad_()
    scores = image @ text.T
    gravitation_loss(scores, heavy, heavy).backward()
    assert heavy.grad is None and image.grad is not None


def test_gravitation_loss_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="true pairs on the diagonal"):
        gravitation_loss(torch.rand(2, 3), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"expected \[B\] each"):
        gravitation_loss(torch.rand(3, 3), torch.ones(2), torch.ones(3))
