"""The heads learn, decode what they say they decode, and compute nothing twice.

Proved at toy size: each head overfits a tiny batch, cached decoding equals teacher forcing, one beam is greedy search
and enough beams are exhaustive search, sampling follows the probabilities, and stored image keys and values equal fresh
ones.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from unimodal.bridge import QFormer
from unimodal.heads import BridgeCaptioner, BridgeMatchingHead, CachedMatchingHead, CaptionDecoder, EmbeddingHead
from unimodal.heads.decoding import Decoding, beam_rows, decode
from unimodal.layers import KeyValues

B, N, T, L, D, W, V = 4, 3, 6, 5, 24, 32, 12
BOS, EOS, UNK = 1, 2, 3


def decoder(**changes) -> CaptionDecoder:
    sizes = dict(vocab_size=V, width=W, hidden=32, layers=2, heads=2, max_length=8, dropout=0.0)
    return CaptionDecoder(**{**sizes, "bos_id": BOS, "eos_id": EOS, "unk_id": UNK, **changes})


def bridge(**changes) -> QFormer:
    sizes = dict(width=W, layers=2, heads=2, intermediate=64, memory_width=D, dropout=0.0, vocab_size=V)
    return QFormer(**{**sizes, "queries": {"image": N, "text": 2}, "max_positions": 8, **changes})


def matcher(**changes) -> CachedMatchingHead:
    return CachedMatchingHead(**{**dict(width=W, text_width=D, hidden=32, layers=2, heads=2, dropout=0.0), **changes})


def embedder(pool: str, gate: bool, dim: int = 16) -> EmbeddingHead:
    return EmbeddingHead(width=W, backbone_width=D, dim=dim, pool=pool, gate=gate)  # type: ignore[arg-type]


def lively(model: nn.Module) -> nn.Module:
    """Weights large enough that every decision of a toy model is far from a tie."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def fit(parameters, loss, until: float, steps: int = 600) -> float:
    optimiser = torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        if value.item() < until:
            break
    return value.item()


def without_gradient(model: nn.Module) -> list[str]:
    """Parameters without effect. A softmax over keys does not see what is added to all, so key biases have none."""
    names = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    return [name for name in names if not name.endswith("attention.key.bias")]


@pytest.fixture
def image_tokens() -> torch.Tensor:
    return torch.randn(B, N, W)


@pytest.fixture
def captions() -> torch.Tensor:
    """Four captions of three different lengths, padded on the right with 0."""
    return torch.tensor(
        [[BOS, 4, 5, 6, EOS, 0], [BOS, 5, 4, EOS, 0, 0], [BOS, 7, EOS, 0, 0, 0], [BOS, 4, 5, 8, EOS, 0]]
    )


# Embedding.


@pytest.mark.parametrize("pool", ["query", "mean", "attention"])
@pytest.mark.parametrize("gate", [True, False])
def test_embeddings_are_unit_vectors_and_every_parameter_learns(pool, gate) -> None:
    head, mask = embedder(pool, gate), torch.arange(T) < torch.tensor([[T], [3], [2], [1]])
    bridged, tokens = torch.randn(B, N, W), torch.randn(B, T, D)
    embedding = head(bridged, tokens, mask)
    assert embedding.shape == ((B, N, 16) if pool == "query" else (B, 16))
    assert_close(embedding.norm(dim=-1), torch.ones(embedding.shape[:-1]))
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert without_gradient(head) == []
    padded = head(bridged, tokens.masked_fill(~mask[..., None], 9.0), mask)
    assert_close(padded, embedding)  # padding of the backbone changes nothing


@pytest.mark.parametrize("pool", ["query", "mean", "attention"])
def test_gate_turns_from_bridge_to_backbone(pool) -> None:
    head = embedder(pool, gate=True)
    tokens, bridged = torch.randn(B, T, D), torch.randn(B, N, W)
    assert head.gate is not None
    with torch.no_grad():
        head.gate.fill_(50.0)
        assert_close(head(bridged, tokens, None), head(bridged, tokens + 1, None))
        head.gate.fill_(-50.0)
        assert_close(head(bridged, tokens, None), head(bridged + torch.randn(W), tokens, None))


@torch.no_grad()
def test_one_query_scored_by_the_best_is_the_cosine_of_clip() -> None:
    image_head, text_head = embedder("query", False), embedder("mean", False)
    image, text = torch.randn(B, 1, W), torch.randn(B, 2, W)
    per_query = image_head(image, image, None)  # [B, 1, E]
    scores = torch.einsum("ine,te->itn", per_query, text_head(text, text, None)).amax(-1)
    x = image_head.bridge_projection(image[:, 0])
    y = text_head.bridge_projection(text.mean(1))
    assert_close(scores, F.cosine_similarity(x[:, None], y[None], dim=-1))


def test_unknown_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'query', 'first', 'mean' or 'attention', got 'max'"):
        embedder("max", False)


def test_embedding_heads_overfit() -> None:
    image_head, text_head = embedder("query", True), embedder("attention", True)
    image, text = (torch.randn(B, N, W), torch.randn(B, T, D)), (torch.randn(B, 2, W), torch.randn(B, L, D))

    def loss() -> torch.Tensor:
        scores = torch.einsum("ine,te->itn", image_head(*image, None), text_head(*text, None)).amax(-1)
        return F.cross_entropy(20 * scores, torch.arange(B))

    assert fit([*image_head.parameters(), *text_head.parameters()], loss, until=0.01) < 0.01


# Matching.


def test_stored_keys_and_values_equal_fresh_ones(image_tokens) -> None:
    head = lively(matcher())
    text, mask = torch.randn(6, L, D), torch.arange(L) < torch.tensor([[L], [2], [1], [L], [4], [3]])
    index = torch.tensor([0, 0, 3, 1, 2, 3])
    stored = head(text, mask, head.project_images(image_tokens).select(index))  # type: ignore[operator]
    fresh = head(text, mask, image_tokens[index])
    assert stored.shape == (6,)
    assert_close(stored, fresh)
    weights = list(head.parameters())
    for a, b in zip(torch.autograd.grad(stored.sum(), weights), torch.autograd.grad(fresh.sum(), weights)):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
    noise = text.masked_fill(~mask[..., None], 1e3)
    assert_close(head(noise, mask, image_tokens[index]), fresh)  # padding of the text changes nothing


def test_match_heads_give_every_parameter_a_gradient(image_tokens) -> None:
    for head, inputs in (
        (matcher(), (torch.randn(B, L, D), None, image_tokens)),
        (BridgeMatchingHead(width=W), (image_tokens,)),
    ):
        head(*inputs).square().sum().backward()
        assert without_gradient(head) == []


def test_bridge_matching_logit_is_the_log_odds_of_the_mean(image_tokens) -> None:
    head = BridgeMatchingHead(width=W)
    two_way = torch.stack([head.score(image_tokens[:, n]) for n in range(N)]).mean(0)  # BLIP-2: average over queries
    assert_close(head(image_tokens).sigmoid(), two_way.softmax(-1)[:, 1])


def test_cached_matching_overfits_pairs_that_share_their_tokens(image_tokens) -> None:
    head, text = matcher(), torch.randn(B, L, D)
    rows, columns = torch.cartesian_prod(torch.arange(B), torch.arange(B)).unbind(1)
    labels = (rows == columns).float()  # all sixteen pairs: neither side alone tells

    def loss() -> torch.Tensor:
        images = head.project_images(image_tokens).select(rows)
        return F.binary_cross_entropy_with_logits(head(text[columns], None, images), labels)

    assert fit(head.parameters(), loss, until=0.02) < 0.02


def test_bridge_matching_overfits(captions) -> None:
    model, head, images = bridge(), BridgeMatchingHead(width=W), torch.randn(B, T, D)
    rows, columns = torch.cartesian_prod(torch.arange(B), torch.arange(B)).unbind(1)
    labels = (rows == columns).float()

    def loss() -> torch.Tensor:
        memory = model.project_memory(images).select(rows)
        found = model.match("image", captions[columns], (captions != 0)[columns], memory)
        return F.binary_cross_entropy_with_logits(head(found), labels)

    assert fit([*model.parameters(), *head.parameters()], loss, until=0.02) < 0.02


# Captioning.


def captioners() -> list:
    """Both captioners behind one face: logits(ids, images), generate(images, **settings), and the images they read."""
    small, speaker, model = lively(decoder()), BridgeCaptioner(bos_id=BOS, eos_id=EOS), lively(bridge())
    return [
        (small, small.generate, torch.randn(B, N, W)),
        (
            lambda ids, memory: speaker(model, ids, memory),
            lambda memory, **settings: speaker.generate(model, memory, **settings),
            torch.randn(B, T, D),
        ),
    ]


def test_caption_decoder_overfits_and_stops_at_the_end_token(image_tokens, captions) -> None:
    head = decoder()

    def loss() -> torch.Tensor:
        logits = head(captions, image_tokens)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), head.rows_of(captions)[:, 1:].flatten(), ignore_index=0)

    assert fit(head.parameters(), loss, until=0.02) < 0.02
    said = [[4, 5, 6], [5, 4], [7], [4, 5, 8]]
    assert head.generate(image_tokens) == said
    assert head.generate(image_tokens, num_beams=3) == said
    assert head.generate(image_tokens, do_sample=True, top_p=0.5) == said
    assert head.generate(image_tokens, max_new_tokens=2) == [words[:2] for words in said]


def test_bridge_captioner_overfits_and_stops_at_the_end_token(captions) -> None:
    head, model, images = BridgeCaptioner(bos_id=BOS, eos_id=EOS), bridge(), torch.randn(B, T, D)

    def loss() -> torch.Tensor:
        logits = head(model, captions, images)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=0)

    assert fit(model.parameters(), loss, until=0.02) < 0.02
    said = [[4, 5, 6], [5, 4], [7], [4, 5, 8]]
    assert head.generate(model, images) == said
    assert head.generate(model, images, num_beams=3) == said
    cache = KeyValues()
    model.read("image", images, cache=cache)
    assert head.generate(model, cache=cache) == head.generate(model, cache=cache, num_beams=3) == said
    assert cache.length == N  # decoding leaves it as it was
    assert list(head.parameters()) == []


@pytest.mark.parametrize("which", [0, 1])
@torch.no_grad()
def test_greedy_decoding_with_a_cache_equals_running_the_whole_text_again(which) -> None:
    logits, generate, images = captioners()[which]
    ids = torch.full((B, 1), BOS)
    for _ in range(8):
        ids = torch.cat([ids, logits(ids, images)[:, -1:].argmax(-1)], 1)
    expected = [row[: row.index(EOS)] if EOS in row else row for row in ids[:, 1:].tolist()]
    assert len(set(map(tuple, expected))) > 1
    assert generate(images) == expected
    assert generate(images[1:3]) == expected[1:3]  # a row does not depend on its batch


@pytest.mark.parametrize("which", [0, 1])
def test_no_token_of_a_caption_sees_its_future(which) -> None:
    logits, _, images = captioners()[which]
    ids = torch.randint(4, V, (B, L))
    for i in range(L):
        other = ids.clone()
        other[:, i] = 4 + (ids[:, i] - 3) % (V - 4)
        changed = (logits(other, images) - logits(ids, images)).abs().amax(-1) > 1e-4
        assert changed[:, i:].all() and not changed[:, :i].any()


@pytest.mark.parametrize("which", [0, 1])
def test_one_beam_is_greedy(which) -> None:
    _, generate, images = captioners()[which]
    for penalty in (0.0, 1.0, 2.0):
        assert generate(images, num_beams=1, length_penalty=penalty) == generate(images)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_enough_beams_are_exhaustive_search(length_penalty) -> None:
    words, length, end = 4, 3, 3
    model = lively(decoder(vocab_size=words, bos_id=0, eos_id=end, unk_id=1))
    images = torch.randn(6, N, W)

    def likelihood(image: int, caption: tuple[int, ...]) -> float:
        ids = torch.tensor([[0, *caption]])
        scores = model(ids, images[image : image + 1])[0, :-1].log_softmax(-1)
        return scores.gather(1, ids[0, 1:, None]).sum().item() / len(caption) ** length_penalty

    ended = [(*c, end) for n in range(length) for c in itertools.product(range(end), repeat=n)]
    hypotheses = ended + list(itertools.product(range(end), repeat=length))
    with torch.no_grad():
        best = [max(hypotheses, key=lambda c: likelihood(i, c)) for i in range(6)]
    expected = [[word for word in caption if word != end] for caption in best]
    found = model.generate(images, max_new_tokens=length, num_beams=64, length_penalty=length_penalty)
    assert found == expected


class Oracle:
    """The next word depends, at random but for good, on the image and all words so far, read from the cache."""

    def __init__(self, words: int):
        self.table = 1.5 * torch.randn(997, words)

    def logits(self, history: torch.Tensor) -> torch.Tensor:
        """history [R, t], the image's number first -> [R, V]."""
        return self.table[(history * 31 ** torch.arange(history.shape[1])).sum(1) % 997]

    def step(self, last: torch.Tensor, cache: KeyValues, memory: KeyValues) -> torch.Tensor:
        fed = last[:, None, :, None]
        return self.logits(cache.extend(0, fed, fed)[0][:, 0, :, 0])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_batched_cached_beams_equal_a_plain_search(length_penalty) -> None:
    model, images, beams, length, end = Oracle(words=6), 40, 3, 5, 1

    def plain(image: int) -> list[int]:
        """One image, hypotheses in a list, the whole text run again for every word."""
        hypotheses: list[tuple[list[int], float]] = [([], 0.0)]
        for _ in range(length):
            grown = [(words, total) for words, total in hypotheses if end in words]
            for words, total in hypotheses:
                if end not in words:
                    scores = model.logits(torch.tensor([[image, 0, *words]]))[0].log_softmax(-1).tolist()
                    grown += [([*words, word], total + score) for word, score in enumerate(scores)]
            hypotheses = sorted(grown, key=lambda h: h[1] / len(h[0]) ** length_penalty, reverse=True)[:beams]
        return [word for word in hypotheses[0][0] if word != end]

    expected = [plain(image) for image in range(images)]
    assert len(set(map(len, expected))) > 3  # some end early, so finished and growing hypotheses compete
    numbers = beam_rows(images, beams, torch.device("cpu"))[:, None, None, None]
    start = torch.zeros(images * beams, 1, dtype=torch.long)
    how = Decoding(num_beams=beams, max_new_tokens=length, length_penalty=length_penalty)
    assert decode(model.step, KeyValues([(numbers, numbers)]), KeyValues(), start, end, how, 9) == expected


class Markov:
    """A captioner whose next word depends on the last one alone."""

    def __init__(self, table: list[list[float]]):
        self.logits = torch.tensor(table).log()

    def step(self, last: torch.Tensor, cache: KeyValues, memory: KeyValues) -> torch.Tensor:
        return self.logits[last[:, 0]]


def test_beams_find_what_greedy_misses() -> None:
    # Words: 0 start, 1 end, 2 and 3. Greedy goes 2 (0.6) and then can only ramble; beams find 3, end (0.4 x 0.9).
    model = Markov([[1e-9, 1e-9, 0.6, 0.4], [0.25] * 4, [0.25, 0.25, 0.26, 0.24], [0.03, 0.9, 0.03, 0.04]])

    def run(beams: int) -> list[list[int]]:
        start = torch.zeros(2 * beams, 1, dtype=torch.long)
        return decode(model.step, KeyValues(), KeyValues(), start, 1, Decoding(num_beams=beams, max_new_tokens=4), 9)

    assert run(1) == [[2, 2, 2, 2]] * 2
    assert run(2) == [[3]] * 2


def test_samples_follow_the_probabilities_of_the_nucleus() -> None:
    table = [[0.05, 0.15, 0.5, 0.3]] + [[0.0, 1.0, 0.0, 0.0]] * 3

    def shares(**settings) -> torch.Tensor:
        start = torch.zeros(20_000, 1, dtype=torch.long)
        generator = torch.Generator().manual_seed(0)
        how = Decoding(do_sample=True, generator=generator, **settings)
        said = decode(Markov(table).step, KeyValues(), KeyValues(), start, 1, how, 9)
        first = torch.tensor([words[0] if words else 1 for words in said])
        return torch.bincount(first, minlength=4) / len(first)

    near = {"rtol": 0, "atol": 0.015}
    assert_close(shares(), torch.tensor(table[0]), **near)
    assert_close(shares(top_p=0.75), torch.tensor([0, 0, 0.625, 0.375]), **near)  # 0.5 is not enough, 0.5 + 0.3 is
    assert_close(shares(top_p=0.01), torch.tensor([0.0, 0, 1, 0]), **near)
    sharp = torch.tensor(table[0]) ** 2
    assert_close(shares(temperature=0.5), sharp / sharp.sum(), **near)
    assert torch.equal(shares(temperature=1e-40), shares(top_p=0.01))  # so bold that the likeliest word is all
    assert torch.equal(shares(), shares())  # the generator decides alone


def test_decoding_ends_when_all_rows_have_ended() -> None:
    calls = []

    def step(last, cache, memory):
        calls.append(1)
        return Markov([[0.0, 0.1, 0.9, 0.0], [0.25] * 4, [0.0, 1.0, 0.0, 0.0], [0.25] * 4]).step(last, cache, memory)

    for beams in (1, 2):
        calls.clear()
        start = torch.zeros(3 * beams, 1, dtype=torch.long)
        assert decode(step, KeyValues(), KeyValues(), start, 1, Decoding(num_beams=beams), 30) == [[2]] * 3
        assert len(calls) == 2
    assert beam_rows(2, 3, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 1]


def test_small_vocabulary_speaks_the_tokenizers_ids(image_tokens) -> None:
    head = decoder(vocab_size=6, bos_id=101, eos_id=102, unk_id=100)
    head.set_vocabulary(torch.tensor([7000, 102, 100, 101, 5, 2000]))
    ids = torch.tensor([[101, 5, 7000, 8000, 3, 102]])
    assert head.rows_of(ids).tolist() == [[2, 0, 5, 1, 1, 3]]
    copy = decoder(vocab_size=6, bos_id=101, eos_id=102, unk_id=100)
    copy.load_state_dict(head.state_dict())
    assert torch.equal(copy.rows_of(ids), head.rows_of(ids))

    captions = torch.tensor([[101, 5, 7000, 102], [101, 2000, 102, 0]])

    def loss() -> torch.Tensor:
        logits = head(captions, image_tokens[:2])[:, :-1]
        targets = head.rows_of(captions)[:, 1:].masked_fill(captions[:, 1:] == 0, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    assert fit(head.parameters(), loss, until=0.02) < 0.02
    assert head.generate(image_tokens[:2]) == [[5, 7000], [2000]]


def test_image_keys_and_values_serve_several_captions(image_tokens, captions) -> None:
    head = lively(decoder())
    index = torch.tensor([0, 0, 2, 3])
    stored = head.project_images(image_tokens).select(index)  # type: ignore[operator]
    assert_close(head(captions, stored), head(captions, image_tokens[index]))
    assert head.generate(stored) == head.generate(image_tokens[index])  # type: ignore[operator]


def test_decoder_gives_every_parameter_a_gradient(image_tokens) -> None:
    head = decoder()
    head(torch.randint(0, V, (B, 8)), image_tokens).square().sum().backward()
    assert without_gradient(head) == []


def test_dropout_is_off_in_evaluation(image_tokens, captions) -> None:
    heads = (
        (decoder(dropout=0.3), (captions, image_tokens)),
        (matcher(dropout=0.3), (torch.randn(B, L, D), None, image_tokens)),
    )
    for head, inputs in heads:
        assert not torch.equal(head(*inputs), head(*inputs))
        head.eval()
        assert torch.equal(head(*inputs), head(*inputs))


def test_errors_say_what_came_what_was_expected_and_what_to_do(image_tokens) -> None:
    for settings, message in (
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"num_beams": 0}, "num_beams: expected at least 1, got 0"),
        (
            {"temperature": 0.0},
            "temperature: expected a finite number above 0, got 0.0",
        ),
        ({"top_p": 1.5}, "top_p: expected a finite number at most 1 and above 0, got 1.5"),
        ({"do_sample": True, "num_beams": 2}, "do_sample=True draws one caption, but num_beams is 2; choose one"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder().generate(image_tokens, **settings)
    with pytest.raises(ValueError, match="nothing to describe: pass the memory, or a cache that `QFormer.read` has"):
        BridgeCaptioner(bos_id=BOS, eos_id=EOS).generate(bridge())
    with pytest.raises(TypeError, match="beam_size"):
        decoder().generate(image_tokens, beam_size=2)
    with pytest.raises(ValueError, match="caption: 9 tokens for 8 positions; shorten it or raise max_length"):
        decoder()(torch.ones(B, 9, dtype=torch.long), image_tokens)
    with pytest.raises(
        ValueError, match=r"expected 12 different ids with bos, eos and unk among them, got 3 without \[2\]"
    ):
        decoder().set_vocabulary(torch.tensor([1, 3, 9]))
