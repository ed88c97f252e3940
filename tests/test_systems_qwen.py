"""OmniBridge and the two of Qwen3-VL: pools, gates, padding, instructions, stages, and two losses against loops."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toysurvey import ToyEncoders, endless, toy_pairs

from unimodal.losses import Mined, cosent_loss, masked_info_nce, matryoshka, mine_negatives, text_to_text_loss
from unimodal.stages import rates
from unimodal.survey.specs import read_spec
from unimodal.survey.train import Budget, train
from unimodal.systems import OmniBridge, QwenEmbedding, QwenReranker, Stage, qwen
from unimodal.systems.qwen import Reader

SMALL = {"width": 16, "heads": 2, "dropout": 0.0}
CONFIGS = Path(__file__).parent.parent / "configs/systems"


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# Losses.


def test_cosent_is_that_of_a_loop_over_pairs_of_pairs() -> None:
    cosine, rating = torch.randn(7, dtype=torch.float64).tanh(), torch.tensor([2.0, 0, 1, 1, 2, 0, 3])
    total = 0.0
    for a in range(7):
        for b in range(7):
            if rating[a] > rating[b]:
                total += math.exp(5 * float(cosine[b] - cosine[a]))
    assert float(cosent_loss(cosine, rating, scale=5.0)) == pytest.approx(math.log(1 + total), abs=1e-10)


def test_cosent_of_two_pairs_is_known_by_hand() -> None:
    assert float(cosent_loss(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), scale=20.0)) == pytest.approx(
        math.log(2)
    )
    assert float(cosent_loss(torch.tensor([0.9, 0.1]), torch.tensor([1.0, 1.0]), scale=20.0)) == 0
    right, wrong = (
        cosent_loss(torch.tensor(c), torch.tensor([1.0, 0.0]), scale=20.0) for c in ([0.9, 0.1], [0.1, 0.9])
    )
    assert float(right) < 1e-6 and float(wrong) == pytest.approx(16, abs=1e-5)
    with pytest.raises(ValueError, match=r"cosines \(2,\) and ratings \(3,\); expected \[P\] for both"):
        cosent_loss(torch.zeros(2), torch.zeros(3), scale=1.0)


@pytest.mark.parametrize("itself", [False, True])
def test_captions_of_an_image_find_each_other_as_in_a_loop(itself: bool) -> None:
    text, ids = unit(6, 4), torch.tensor([0, 1, 0, 2, 1, 0])
    terms = []
    for i in range(6):
        others = [j for j in range(6) if j != i and ids[j] == ids[i]]
        columns = [j for j in range(6) if itself or j != i]
        if others:
            log_sum = math.log(sum(math.exp(9 * float(text[i] @ text[j])) for j in columns))
            terms.append(log_sum - sum(9 * float(text[i] @ text[j]) for j in others) / len(others))
    found = text_to_text_loss(text, ids, scale=9.0, self_in_denominator=itself)
    assert float(found) == pytest.approx(sum(terms) / len(terms), abs=1e-9)


def test_one_caption_an_image_adds_nothing() -> None:
    assert float(text_to_text_loss(unit(4, 3), torch.arange(4), scale=9.0)) == 0
    with pytest.raises(ValueError, match=r"expected \[M, E\] and \[M\]"):
        text_to_text_loss(unit(4, 3), torch.arange(3), scale=9.0)


# OmniBridge.


def test_both_directions_are_summed_and_captions_counted_little() -> None:
    from unimodal.losses import info_nce

    torch.manual_seed(0)
    system, pairs = OmniBridge(ToyEncoders(), **SMALL).eval(), toy_pairs(4, captions=2)
    found = system.losses(pairs, "alignment", 0.0)
    image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
    torch.testing.assert_close(found["itc"], 2 * info_nce(image, text, pairs.image_id, scale=system.scale()))
    torch.testing.assert_close(found["t2t"], 0.05 * text_to_text_loss(text, pairs.image_id, scale=system.scale()))


def test_the_gate_starts_at_a_half_and_at_its_ends_is_one_of_both() -> None:
    torch.manual_seed(0)
    system, pairs = OmniBridge(ToyEncoders(), **SMALL).eval(), toy_pairs(3)
    reading = system.image
    assert float(reading.gate.sigmoid()) == 0.5
    with torch.no_grad():
        states = reading.states(pairs.images.tokens, pairs.images.mask)
        bridge = system.bridge.read("image", states, pairs.images.mask)
        for gate, pool, tokens in ((50.0, reading.bridge_pool, bridge), (-50.0, reading.backbone_pool, states)):
            reading.gate.fill_(gate)
            torch.testing.assert_close(system.embed_images(pairs.images), F.normalize(pool(tokens, None), dim=-1))


def test_padding_counts_only_where_the_authors_code_is_followed() -> None:
    pairs, pad = toy_pairs(3), F.pad
    longer = ToyEncoders().read_texts(pad(pairs.texts.ids, (0, 4)), pad(pairs.texts.mask, (0, 4)))
    for masked in (True, False):
        torch.manual_seed(0)
        system = OmniBridge(ToyEncoders(), mask_pooling=masked, **SMALL).eval()
        with torch.no_grad():
            alike = torch.allclose(system.embed_texts(pairs.texts), system.embed_texts(longer), atol=1e-5)
        assert alike == masked


# Qwen3-VL-Embedding and -Reranker.


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reader_does_not_see_padding(side: str) -> None:
    torch.manual_seed(0)
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    reader = Reader(encoders, 16, 2, 2, 0.0, {"query": "find it"}).eval()
    extra = (3, 0) if side == "left" else (0, 3)
    tokens, mask = F.pad(pairs.texts.tokens, (0, 0, *extra), value=7.0), F.pad(pairs.texts.mask, extra)
    with torch.no_grad():
        plain = reader("query", reader.item("text", pairs.texts.tokens, pairs.texts.mask))
        torch.testing.assert_close(reader("query", reader.item("text", tokens, mask)), plain, atol=1e-5, rtol=1e-4)


def turned(reader: Reader, instruction: str) -> None:
    """Its instruction backwards; once more, and it is as before."""
    ids = reader.get_buffer(f"{instruction}_ids")
    ids.copy_(ids.flip(1))


def test_a_reader_sees_the_instruction_and_its_last_position_everything() -> None:
    torch.manual_seed(0)
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    reader = Reader(encoders, 16, 2, 2, 0.0, {"query": "find it"}).eval()
    with torch.no_grad():
        item = reader.item("text", pairs.texts.tokens, pairs.texts.mask)
        plain = reader("query", item)
        turned(reader, "query")
        assert not torch.allclose(reader("query", item), plain)
        turned(reader, "query")
        for place in range(3):
            other = pairs.texts.tokens.clone()
            other[:, place] = torch.randn_like(other[:, place])
            assert not torch.allclose(reader("query", reader.item("text", other, pairs.texts.mask)), plain)


def test_the_row_of_the_answer_is_the_difference_of_two_logits() -> None:
    torch.manual_seed(0)
    system, pairs = QwenReranker(ToyEncoders(), **SMALL).eval(), toy_pairs(5)
    yes, no = torch.randn(2, 16)
    with torch.no_grad():
        system.answer.weight.copy_((yes - no)[None])
        assert system.answer.bias is None
        state = system.image_state(pairs.images), system.text_state(pairs.texts)
        hidden = system.reader("rerank", state[1], state[0])  # the query first, then the document
        two = torch.stack([hidden @ yes, hidden @ no], 1).softmax(1)[:, 0]
        torch.testing.assert_close(system.score_pairs(*state).sigmoid(), two)
        swapped = system.answer(system.reader("rerank", state[0], state[1]))[:, 0]
        assert not torch.allclose(swapped, system.score_pairs(*state))
    assert read_spec(CONFIGS / "qwen_reranker.yaml").scoring.shortlist == "qwen_embedding"


def test_stages_differ_by_what_is_pushed_apart() -> None:
    torch.manual_seed(0)
    system, pairs = QwenEmbedding(ToyEncoders(), dims=(), **SMALL).eval(), toy_pairs(6)
    found = {stage: system.losses(pairs, stage, 0.0) for stage in ("pretrain", "finetune")}
    assert found["pretrain"].keys() == {"t2i", "i2t"} and found["finetune"].keys() == {"t2i", "i2t", "answer", "sts"}
    image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)

    def contrast(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return masked_info_nce(a, b, pairs.image_id, scale=system.scale(), within=True)

    torch.testing.assert_close(found["pretrain"]["t2i"], system._every_form(contrast, text, image))
    assert found["pretrain"]["t2i"] > found["finetune"]["t2i"]
    named = QwenEmbedding(ToyEncoders(), dims=(), category_names=["dog", "cat", "man", "ball"], **SMALL)
    assert float(named.losses(pairs, "finetune", 0.0)["classification"]) > 0


def test_full_width_alone_is_the_base_loss() -> None:
    image, text = unit(4, 8), unit(4, 8)
    ids = torch.arange(4)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return masked_info_nce(a, b, ids, scale=5.0)

    torch.testing.assert_close(matryoshka(loss, text, image, dims=[8]), loss(text, image))


def test_a_duplicate_of_the_positive_is_no_negative() -> None:
    query = unit(3, 6)
    document = query.clone()
    document[1] = document[0]  # as near to query 0 as its own
    ids = torch.tensor([0, 0, 2])
    with_it = masked_info_nce(query, document, ids, scale=10.0)
    loop = 0.0
    for i in range(3):
        s = [float(query[i] @ document[j]) for j in range(3)]
        kept = [j for j in range(3) if j == i or (ids[j] != ids[i] and s[j] <= s[i] + 0.1)]
        loop += (math.log(sum(math.exp(10 * s[j]) for j in kept)) - 10 * s[i]) / 3
    assert float(with_it) == pytest.approx(loop, abs=1e-9)


def test_distillation_ends_in_the_average_of_before_and_after() -> None:
    torch.manual_seed(0)
    system, pairs = QwenEmbedding(ToyEncoders(), dims=(), **SMALL), toy_pairs(16)
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    seen: dict[str, torch.Tensor] = {}
    ended = system.end_stage

    def end_stage(stage: str) -> None:
        seen.update({name: p.detach().clone() for name, p in system.named_parameters()})
        ended(stage)

    system.end_stage = end_stage  # type: ignore[method-assign]
    stage = Stage(batch_size=16, trainable={"*": 1.0, "reranker.*": 0.0})
    train(system, {"distil": stage}, lambda *_: endless(pairs, 16), Budget(steps=3))
    for name, p in system.named_parameters():
        if name.startswith("reranker."):
            assert torch.equal(p, before[name])
        elif name.startswith(("reader.", "projection.")):
            torch.testing.assert_close(p, (before[name] + seen[name]) / 2)
        else:
            assert torch.equal(p, seen[name])
    assert not torch.equal(seen["projection.weight"], before["projection.weight"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_does_not_depend_on_padding(side: str) -> None:
    """Of the query, which stands in the middle of the sequence, of the document, or of both."""
    torch.manual_seed(0)
    system, pairs = QwenReranker(ToyEncoders(), **SMALL).eval(), toy_pairs(4)
    extra = (3, 0) if side == "left" else (0, 3)
    states = [system.image_state(pairs.images), system.text_state(pairs.texts)]
    longer = [(F.pad(x, (0, 0, *extra), value=7.0), F.pad(mask, extra)) for x, mask in states]
    with torch.no_grad():
        plain = system.score_pairs(*states)
        for images, texts in ((states[0], longer[1]), (longer[0], states[1]), tuple(longer)):
            torch.testing.assert_close(system.score_pairs(images, texts), plain, atol=1e-5, rtol=1e-4)


def test_a_reader_looks_back_and_never_ahead() -> None:
    torch.manual_seed(0)
    encoders, pairs = ToyEncoders(), toy_pairs(4)
    reader = Reader(encoders, 16, 2, 2, 0.0, {"query": "find it"}).eval()
    states: list[torch.Tensor] = []
    reader.layers[-1].register_forward_hook(lambda layer, inputs, output: states.append(output))
    told = reader.get_buffer("query_ids").shape[1]
    with torch.no_grad():
        for factor in (1.0, -1.0):
            tokens = pairs.texts.tokens.clone()
            tokens[:, 2] *= factor
            reader("query", reader.item("text", tokens, pairs.texts.mask))
    first, second = states
    assert torch.equal(first[:, : told + 2], second[:, : told + 2])
    assert not torch.allclose(first[:, told + 2], second[:, told + 2])
    assert not torch.allclose(first[:, -1], second[:, -1])


def test_the_instructions_are_the_reports() -> None:
    system = QwenEmbedding(ToyEncoders(), **SMALL)
    for reader, name, words in (
        (system.reader, "document", "Represent the user's input."),
        (system.reranker.reader, "rerank", "Given a search query, retrieve relevant candidates that answer the query."),
    ):
        ids, mask = system.encoders.tokenise([words])
        assert torch.equal(reader.get_buffer(f"{name}_ids"), ids) and torch.equal(
            reader.get_buffer(f"{name}_mask"), mask
        )


@torch.no_grad()
def test_queries_are_told_a_task_and_documents_the_default() -> None:
    """Texts are queries; images are documents, and so is the text of a label."""
    torch.manual_seed(0)
    system = QwenEmbedding(ToyEncoders(), category_names=["dog", "cat"], **SMALL).eval()
    pairs = toy_pairs(3)
    asked: list[str] = []
    system.reader.register_forward_pre_hook(lambda reader, args: asked.append(args[0]))
    text, image = system.embed_texts(pairs.texts), system.embed_images(pairs.images)
    system._classified(image, torch.eye(2)[[0, 1, 0]])
    assert asked == ["query", "document", "document"]
    for name, vectors, others in (("query", text, image), ("document", image, text)):
        turned(system.reader, name)
        after = {"query": system.embed_texts(pairs.texts), "document": system.embed_images(pairs.images)}
        assert not torch.allclose(after[name], vectors)
        assert torch.equal(after["document" if name == "query" else "query"], others)
        turned(system.reader, name)


def forms(x: torch.Tensor, dims: tuple[int, ...], step: float) -> list[torch.Tensor]:
    """Prefixes of unit length as they are, in int8 of the step and in one bit; all of unit length again."""
    out = []
    for dim in dims:
        cut = F.normalize(x[..., :dim], dim=-1)
        ratio = cut * math.sqrt(dim)
        out += [cut, F.normalize((ratio / step).round().clamp(-127, 127), dim=-1), F.normalize(ratio.sign(), dim=-1)]
    return out


def test_the_mining_rule_by_plain_loops() -> None:
    """A query stays if one of its documents scores above a threshold; what is wrong scores below the mean of its documents and a margin."""
    scores = torch.randn(6, 8, dtype=torch.float64).tanh()
    right = torch.rand(6, 8) < 0.3
    right[:, 0] = True
    pool = torch.rand(6, 8) < 0.7
    found = mine_negatives(scores, right, pool, count=3, above=0.4, margin=0.2)
    for i in range(6):
        own = [float(scores[i, j]) for j in range(8) if right[i, j]]
        assert bool(found.kept[i]) == (max(own) > 0.4)
        limit = sum(own) / len(own) + 0.2
        wrong = [j for j in range(8) if pool[i, j] and not right[i, j] and float(scores[i, j]) < limit]
        best = sorted(wrong, key=lambda j: -float(scores[i, j]))[:3]
        assert found.documents[i][found.given[i]].tolist() == best
    assert 0 < int(found.kept.sum()) < 6 and not found.given.all()


@torch.no_grad()
def test_finetuning_contrasts_halves_with_what_was_mined_from_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every form, by plain loops: the documents of a query's own half, and the two of the other that the full embedding finds most
    like it. Queries that miss their documents take no part, nor do their documents."""
    torch.manual_seed(0)
    system, pairs = QwenEmbedding(ToyEncoders(), dim=8, dims=(3,), **SMALL).eval(), toy_pairs(4, captions=2)
    image, text, ids = system.embed_images(pairs.images), system.embed_texts(pairs.texts), pairs.image_id.tolist()
    best = sorted(max(float(image[i] @ text[j]) for j in (i, i ^ 1)) for i in range(8))
    above = (best[1] + best[2]) / 2  # some pairs are found, some are not

    def mine(*args: torch.Tensor, count: int) -> Mined:
        assert count == 7
        return mine_negatives(*args, count=2, above=above)

    monkeypatch.setattr(qwen, "mine_negatives", mine)
    found = system.losses(pairs, "finetune", 0.0)
    for name, queries, documents in (("t2i", text, image), ("i2t", image, text)):
        cosine = (queries @ documents.T).tolist()
        right = [[j for j in range(8) if ids[j] == ids[i]] for i in range(8)]
        kept = [i for i in range(8) if max(cosine[i][j] for j in right[i]) > above]
        assert name == "t2i" or 0 < len(kept) < 8
        losses = []
        for q, d in zip(forms(queries.double(), (3, 8), 0.1), forms(documents.double(), (3, 8), 0.1)):
            for i in kept:
                limit = sum(cosine[i][j] for j in right[i]) / len(right[i]) + 0.1
                pool = [j for j in range(8) if (j < 4) != (i < 4) and j not in right[i] and cosine[i][j] < limit]
                mined = sorted(pool, key=lambda j: -cosine[i][j])[:2]
                beside = [j for j in kept if (j < 4) == (i < 4) and j not in right[i]]
                own = float(q[i] @ d[i])
                others = [s for s in (float(q[i] @ d[j]) for j in beside + mined) if s <= own + 0.1]
                losses.append(math.log(sum(math.exp(20 * s) for s in [own, *others])) - 20 * own)
        assert float(found[name]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_batch_of_which_no_query_finds_its_document_teaches_nothing() -> None:
    torch.manual_seed(0)
    system, pairs = QwenEmbedding(ToyEncoders(), dims=(), **SMALL), toy_pairs(4)
    image, text = system.embed_images(pairs.images), system.embed_texts(pairs.texts)
    nobody = Mined(torch.zeros(4).bool(), torch.zeros(4, 1).long(), torch.ones(4, 1).bool())
    loss = system._half_by_half(text, image, ids=pairs.image_id, mined=nobody)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in system.parameters())


@torch.no_grad()
def test_likeness_of_captions_is_graded_in_every_form() -> None:
    torch.manual_seed(0)
    system, pairs = QwenEmbedding(ToyEncoders(), dim=8, dims=(3,), **SMALL).eval(), toy_pairs(5)
    labels = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).float()
    found = system.losses(pairs._replace(labels=labels), "finetune", 0.0)["sts"]
    ratings = [0, 1, 1 / 3, 0, 0]  # of each caption with the one before: categories shared, of all that either has
    losses = []
    for text in forms(system.embed_texts(pairs.texts).double(), (3, 8), 0.1):
        cosines = [float(text[i] @ text[i - 1]) for i in range(5)]
        pushes = [
            math.exp(20 * (cosines[b] - cosines[a])) for a in range(5) for b in range(5) if ratings[a] > ratings[b]
        ]
        losses.append(math.log(1 + sum(pushes)))
    assert float(found) == pytest.approx(sum(losses) / 6, rel=1e-4)


@torch.no_grad()
def test_labels_are_documents_and_only_wrong_labels_their_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every form; pictures without a label, and other pictures of the batch, take no part."""
    names = ["dog", "cat", "man", "ball"]
    torch.manual_seed(0)
    system = QwenEmbedding(ToyEncoders(), dim=8, dims=(3,), category_names=names, **SMALL).eval()
    pairs = toy_pairs(4)
    labels = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).float()
    drawn: list[torch.Tensor] = []
    multinomial = torch.multinomial

    def draw(weights: torch.Tensor, count: int) -> torch.Tensor:
        drawn.append(multinomial(weights, count))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", draw)
    image = system.embed_images(pairs.images)
    found = system._classified(image, labels)
    right, wrong = drawn
    rows = [0, 1, 3]
    assert right.shape == (3, 1) and wrong.shape == (3, 2)  # as many as each picture has
    for row, own, others in zip(rows, right, wrong):
        assert labels[row, own].all() and not labels[row, others].any() and len(set(others.tolist())) == 2
    told = system.encoders.read_texts(*system.encoders.tokenise(names))
    documents = system._embed("document", system.reader.item("text", told.tokens, told.mask)).double()
    losses = []
    for pictures, words in zip(forms(image.double(), (3, 8), 0.1), forms(documents, (3, 8), 0.1)):
        for row, own, others in zip(rows, right, wrong):
            logits = [20 * float(pictures[row] @ words[i]) for i in (*own, *others)]
            losses.append(math.log(sum(map(math.exp, logits))) - logits[0])
    assert float(found) == pytest.approx(sum(losses) / 18, rel=1e-4)
    assert float(system._classified(image, torch.zeros(4, 4))) == 0  # nobody knows what they show
    assert float(system._classified(image, torch.ones(4, 4))) == 0  # nothing is wrong


@torch.no_grad()
def test_the_order_of_the_reranker_is_learned_in_every_form() -> None:
    """Over each text's image and the seven others that the full embedding finds most like it; the reranker is asked once for each."""
    torch.manual_seed(0)
    system, pairs = QwenEmbedding(ToyEncoders(), dim=8, dims=(3,), **SMALL).eval(), toy_pairs(6, captions=2)
    asked: list[int] = []
    judge = system.reranker.score_pairs

    def score_pairs(images: tuple[torch.Tensor, ...], texts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        asked.append(len(images[0]))
        return judge(images, texts)

    system.reranker.score_pairs = score_pairs  # type: ignore[method-assign, assignment]
    found = system.losses(pairs, "distil", 0.0)
    assert found.keys() == {"distil"} and asked == [12 * 8]
    image, text = system.embed_images(pairs.images).double(), system.embed_texts(pairs.texts).double()
    every = judge(
        tuple(x[torch.arange(144) // 12] for x in system.reranker.image_state(pairs.images)),
        tuple(x[torch.arange(144) % 12] for x in system.reranker.text_state(pairs.texts)),
    ).view(12, 12)
    candidates = []
    for row in range(12):
        wrong = [i for i in range(12) if pairs.image_id[i] != pairs.image_id[row]]
        candidates.append([row, *sorted(wrong, key=lambda i: -float(image[i] @ text[row]))[:7]])
    losses = []
    for pictures, words in zip(forms(image, (3, 8), 0.1), forms(text, (3, 8), 0.1)):
        for row, chosen in enumerate(candidates):
            taught = torch.tensor([float(every[i, row]) for i in chosen], dtype=torch.float64).softmax(0)
            said = [20 * float(pictures[i] @ words[row]) for i in chosen]
            norm = math.log(sum(map(math.exp, said)))
            losses.append(-sum(float(p) * (x - norm) for p, x in zip(taught, said)))
    assert float(found["distil"]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    few = toy_pairs(2, captions=2)  # three others, of which one shows the same image
    order = system._order(few, system.embed_texts(few.texts), system.embed_images(few.images))
    assert order.given.tolist() == [[True, True, True, False]] * 4
    assert (few.image_id[order.candidates[:, 3]] == few.image_id).all()


def test_stages_train_embedder_and_reranker_as_the_report_does() -> None:
    """The reranker beside the second stage of the embedder, and fixed where it teaches."""
    stages = read_spec(CONFIGS / "qwen_embedding.yaml").stages
    assert list(stages) == ["pretrain", "finetune", "distil"]
    assert stages["finetune"].order == "hard"  # mined with the embedder of the first
    system = QwenEmbedding(ToyEncoders(), **SMALL)
    assert system.scale().item() == pytest.approx(20)  # a temperature of 0.05
    for name, stage in stages.items():
        factors = rates(system, stage.trainable)
        frozen = {key for key, factor in factors.items() if not factor}
        reranker = {key for key in factors if key.startswith("reranker.")}
        assert frozen == (set() if name == "finetune" else reranker)
    assert read_spec(CONFIGS / "qwen_reranker.yaml").scoring.combine == "replace"


def test_cosent_has_the_gradient_of_its_value_even_among_equals() -> None:
    cosine = torch.tensor([0.3, -0.2, 0.3, 0.9], dtype=torch.float64, requires_grad=True)
    rating = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert torch.autograd.gradcheck(lambda x: cosent_loss(x, rating, scale=3.0), [cosine])


def test_a_reader_of_an_older_survey_opens() -> None:
    """It held the tokens of its instructions, and as many places as those took."""
    torch.manual_seed(0)
    reader = Reader(ToyEncoders(), 16, 2, 2, 0.0, {"query": "find it"}).eval()
    older = reader.state_dict()
    older["places.weight"] = older["places.weight"][:-8].clone()
    older["query"] = torch.zeros(1, 4, 20)
    other = Reader(ToyEncoders(), 16, 2, 2, 0.0, {"query": "find it"}).eval()
    other.load_state_dict(older)
    pairs = toy_pairs(3)
    item = reader.item("text", pairs.texts.tokens, pairs.texts.mask)
    with torch.no_grad():
        assert torch.equal(
            reader("query", item), other("query", other.item("text", pairs.texts.tokens, pairs.texts.mask))
        )
