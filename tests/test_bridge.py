"""The bridge computes what BLIP-2's Q-Former computes, and nothing twice.

Proved here against transformers (weights taken both ways), against plain loops, and by taking gradients: the four
passes, their masks, the caches, the independence of the query sets, and what every error says.
"""

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertModel, Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from unimodal.bridge import QFormer
from unimodal.layers import Attention, AttentionPool, KeyValues, attend, causal_bias, key_mask_to_bias, masked_mean

B, N, T, L, D, W, V = 3, 4, 7, 6, 24, 32, 50
QUERIES = {"image": N, "text": 2, "generate": 5}


def bridge(**changes) -> QFormer:
    sizes = dict(width=W, layers=3, heads=2, intermediate=48, memory_width=D, vocab_size=V, max_positions=16)
    return QFormer(**{**sizes, "queries": QUERIES, **changes})


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights of every kind, biases and norms too, so that no term hides behind a zero."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def without_gradient(model: torch.nn.Module) -> list[str]:
    """Parameters without effect. A softmax over keys does not see what is added to all, so key biases have none."""
    names = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    return [name for name in names if not name.endswith("attention.key.bias")]


@pytest.fixture
def ours() -> QFormer:
    return lively(bridge())  # type: ignore[return-value]


@pytest.fixture
def theirs() -> tuple[Blip2QFormerModel, Blip2TextEmbeddings]:
    config = Blip2QFormerConfig(
        vocab_size=V,
        max_position_embeddings=16,
        hidden_size=W,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        cross_attention_frequency=2,
        encoder_hidden_size=D,
        use_qformer_text_input=True,
    )
    return lively(Blip2QFormerModel(config)), lively(Blip2TextEmbeddings(config))  # type: ignore[return-value]


@pytest.fixture
def memory() -> torch.Tensor:
    return torch.randn(B, T, D)


@pytest.fixture
def memory_mask() -> torch.Tensor:
    return torch.arange(T) < torch.tensor([[T], [4], [1]])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, V, (B, L))


@pytest.fixture
def text_mask() -> torch.Tensor:
    return torch.arange(L) < torch.tensor([[L], [3], [1]])


def assert_same_passes(ours, theirs, memory, memory_mask, ids, text_mask) -> None:
    """The four passes of a bridge against transformers' single forward with the mask that makes it that pass."""
    qformer, embeddings = theirs
    queries = ours.query_sets["image"].expand(B, -1, -1)
    tight = {"rtol": 1e-5, "atol": 1e-5}

    def run(embedded, length, mask):
        # In four dimensions: transformers stretches a plain mask over queries and text, where only queries read.
        hidden = torch.zeros(B, 1, 1, T).masked_fill(~memory_mask[:, None, None], torch.finfo(torch.float32).min)
        reads = {"encoder_hidden_states": memory, "encoder_attention_mask": hidden} if length else {}
        return qformer(embedded, query_length=length, attention_mask=mask, **reads).last_hidden_state

    assert_close(ours.read("image", memory, memory_mask), run(queries, N, None), **tight)
    assert_close(ours.text(ids, text_mask)[text_mask], run(embeddings(ids), 0, text_mask.long())[text_mask], **tight)

    joint = embeddings(ids, query_embeds=queries)
    mask = torch.cat([torch.ones(B, N).long(), text_mask.long()], 1)
    assert_close(ours.match("image", ids, text_mask, memory, memory_mask), run(joint, N, mask)[:, :N], **tight)

    allowed = torch.ones(N + L, N + L).tril().bool()
    allowed[:N, :N], allowed[N:, :N] = True, True
    causal = torch.zeros(B, 1, N + L, N + L).masked_fill(~allowed, torch.finfo(torch.float32).min)
    causal_pass = run(joint, N, causal)
    assert_close(ours.caption("image", ids, memory, memory_mask), causal_pass[:, N:], **tight)
    assert_close(ours.read("image", memory, memory_mask), causal_pass[:, :N], **tight)  # queries do not see the text


@torch.no_grad()
def test_blip2_weights_into_ours(ours, theirs, memory, memory_mask, ids, text_mask) -> None:
    qformer, embeddings = theirs
    tokens = torch.randn(1, N, W)
    weights = {f"qformer.{k}": w for k, w in qformer.state_dict().items()}
    weights |= {f"embeddings.{k}": w for k, w in embeddings.state_dict().items()}
    others = {"vision_model.post_layernorm.bias": torch.zeros(8), "itm_head.bias": torch.zeros(2)}
    before = ours.query_sets["text"].clone()
    ours.load_blip2({"query_tokens": tokens, **weights, **others})
    assert_close(ours.query_sets["image"], tokens[0], rtol=0, atol=0)
    assert_close(ours.query_sets["text"], before, rtol=0, atol=0)
    assert_same_passes(ours, theirs, memory, memory_mask, ids, text_mask)


@torch.no_grad()
def test_our_weights_into_blip2(ours, theirs, memory, memory_mask, ids, text_mask) -> None:
    weights = ours.to_blip2()
    for module, prefix in zip(theirs, ("qformer.", "embeddings.")):
        mine = {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
        module.load_state_dict(mine, strict=True)  # one to one: no name is missing, none is left over
    assert_same_passes(ours, theirs, memory, memory_mask, ids, text_mask)


def test_blip2_names_without_a_text_branch() -> None:
    config = Blip2QFormerConfig(
        hidden_size=W, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, encoder_hidden_size=D
    )
    names = {f"qformer.{key}" for key in Blip2QFormerModel(config).state_dict()}
    assert bridge(vocab_size=None).to_blip2().keys() == names | {"query_tokens"}


def test_blip2_round_trip_and_refusals(ours) -> None:
    weights = ours.to_blip2("generate")
    other = bridge()
    other.load_blip2(weights, "generate")
    assert all(torch.equal(other.to_blip2("generate")[key], weights[key]) for key in weights)

    before = {key: w.clone() for key, w in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing \['query_tokens'\], unknown \['qformer.extra'\]; build it with"):
        other.load_blip2({**{k: w for k, w in weights.items() if k != "query_tokens"}, "qformer.extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"query_sets.image: .* the shape \[5, 32\], this bridge the shape \[4, 32\]"):
        other.load_blip2(weights, "image")
    with pytest.raises(ValueError, match="query_sets.picture: .* this bridge nothing of that name"):
        other.load_blip2(weights, "picture")
    assert all(torch.equal(before[key], w) for key, w in other.state_dict().items())  # refused means untouched


@torch.no_grad()
def test_text_pass_of_a_bridge_started_from_bert_is_bert(ids, text_mask) -> None:
    config = BertConfig(
        vocab_size=V,
        hidden_size=W,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    bert = lively(BertModel(config, add_pooling_layer=False))
    ours = bridge().eval()
    ours.load_bert(bert.state_dict())
    expected = bert(ids, text_mask.long()).last_hidden_state
    assert_close(ours.text(ids, text_mask)[text_mask], expected[text_mask], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.layers[1].query_mlp.up.weight, ours.layers[1].text_mlp.up.weight)  # BLIP-2's copy

    with pytest.raises(ValueError, match="missing 'embeddings.LayerNorm.weight'; expected the state of a BertModel"):
        ours.load_bert({})


def test_no_token_of_a_caption_sees_its_future(ours, memory, ids) -> None:
    embedded = ours.embed_text(ids).detach().requires_grad_()
    ours.embed_text = lambda ids, offset=0: embedded[:, offset : offset + ids.shape[1]]
    hidden = ours.caption("image", ids, memory)
    for i in range(L):
        (gradient,) = torch.autograd.grad(hidden[:, i].sum(), embedded, retain_graph=True)
        seen = gradient.abs().sum(-1) > 0  # [B, L]
        assert seen[:, : i + 1].all() and not seen[:, i + 1 :].any()


@torch.no_grad()
def test_caption_token_by_token_equals_all_at_once(ours, memory, memory_mask, ids) -> None:
    expected = ours.caption("image", ids, memory, memory_mask)
    cache = KeyValues()
    bridged = ours.read("image", memory, memory_mask, cache=cache)  # the pass that also makes the embedding
    assert_close(bridged, ours.read("image", memory, memory_mask))
    shared = cache.select(torch.arange(B))
    steps = [ours.caption("image", ids[:, i : i + 1], cache=cache) for i in range(L)]
    assert_close(torch.cat(steps, 1), expected, rtol=1e-5, atol=1e-5)
    pieces = [ours.caption("image", piece, cache=shared) for piece in ids.split([2, 3, 1], 1)]
    assert_close(torch.cat(pieces, 1), expected, rtol=1e-5, atol=1e-5)
    assert cache.length == N + L


@pytest.mark.parametrize("way", ["select", "shared"])
def test_memory_projected_once_equals_recomputation(ours, memory, memory_mask, ids, text_mask, way) -> None:
    image, text = torch.tensor([0, 2, 2, 1]), torch.tensor([1, 0, 2, 2])

    def losses(projected: bool) -> torch.Tensor:
        if projected:
            pair = (getattr(ours.project_memory(memory, memory_mask), way)(image), None)
        else:
            pair = (memory[image], memory_mask[image])
        found = ours.match("image", ids[text], text_mask[text], *pair)
        said = ours.caption("image", ids[text], *pair)
        return torch.cat([found.flatten(), said.flatten(), ours.read("generate", *pair).flatten()])

    once, again = losses(True), losses(False)
    assert_close(once, again, rtol=1e-5, atol=1e-5)
    weights = [p for p in ours.parameters() if p.requires_grad]
    mine = torch.autograd.grad(once.square().mean(), weights, allow_unused=True)
    plain = torch.autograd.grad(again.square().mean(), weights, allow_unused=True)
    for a, b in zip(mine, plain):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(a, b, rtol=1e-4, atol=1e-5)

    counted = []
    ours.layers[0].cross_attention.key.register_forward_hook(lambda *_: counted.append(1))
    losses(True)
    assert len(counted) == 1


def test_pairs_that_share_an_image_keep_no_copy_of_its_keys_and_values(ours, memory, ids) -> None:
    def kept(way: str, pairs: int) -> int:
        """Numbers kept for the backward."""
        index, sizes = torch.zeros(pairs, dtype=torch.long), []
        projected = getattr(ours.project_memory(memory[:1]), way)(index)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            ours.match("image", ids[:1].expand(pairs, -1), None, projected)
        return sum(sizes)

    copies = 2 * T * W * sum(layer.reads_memory for layer in ours.layers)  # of one pair's keys and values
    grown = kept("select", 9) - kept("select", 1) - (kept("shared", 9) - kept("shared", 1))
    assert grown >= 8 * copies


@torch.no_grad()
def test_padding_changes_nothing(ours, memory, memory_mask, ids, text_mask) -> None:
    noise = torch.where(memory_mask[..., None], memory, torch.full_like(memory, 1e3))
    other = torch.where(text_mask, ids, (ids + 7) % V)
    assert_close(ours.read("image", noise, memory_mask), ours.read("image", memory, memory_mask), rtol=0, atol=1e-6)
    assert_close(ours.text(other, text_mask)[text_mask], ours.text(ids, text_mask)[text_mask], rtol=0, atol=1e-6)
    assert_close(
        ours.match("image", other, text_mask, noise, memory_mask),
        ours.match("image", ids, text_mask, memory, memory_mask),
        rtol=0,
        atol=1e-6,
    )
    said, expected = (ours.caption("image", i, memory, memory_mask)[text_mask] for i in (other, ids))
    assert_close(said, expected, rtol=0, atol=1e-6)
    for i, (length, words) in enumerate(zip(memory_mask.sum(1), text_mask.sum(1))):  # each alone, without any padding
        alone = ours.match("image", ids[i : i + 1, :words], None, memory[i : i + 1, :length])
        assert_close(alone[0], ours.match("image", ids, text_mask, memory, memory_mask)[i], rtol=1e-5, atol=1e-5)


def test_query_sets_are_independent(ours, memory, ids, text_mask) -> None:
    ours.read("image", memory).sum().backward()
    assert ours.query_sets["image"].grad is not None
    assert ours.query_sets["text"].grad is None and ours.query_sets["generate"].grad is None
    with torch.no_grad():
        before = {name: ours.read(name, memory) for name in QUERIES}
        assert [tuple(x.shape) for x in before.values()] == [(B, N, W), (B, 2, W), (B, 5, W)]
        ours.query_sets["text"].add_(1)
        assert torch.equal(ours.read("image", memory), before["image"])
        assert not torch.equal(ours.read("text", memory), before["text"])


@torch.no_grad()
def test_inputs_take_the_place_of_learned_queries(ours, memory, memory_mask, ids) -> None:
    learned = ours.query_sets["generate"].expand(B, -1, -1)
    expected = ours.read("generate", memory, memory_mask)
    assert_close(ours.read("generate", memory, memory_mask, inputs=learned), expected)
    mixed = torch.where(torch.rand(B, 5, 1) < 0.5, learned, ours.embed_text(ids[:, :5]))
    together = ours.read("generate", memory, memory_mask, inputs=mixed)
    alone = [
        ours.read("generate", memory[i : i + 1], memory_mask[i : i + 1], inputs=mixed[i : i + 1]) for i in range(B)
    ]
    assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient(memory, ids, text_mask) -> None:
    model = bridge()
    outputs = [model.read(name, memory) for name in QUERIES] + [model.text(ids, text_mask)]
    outputs += [model.match("image", ids, text_mask, memory), model.lm_logits(model.caption("image", ids, memory))]
    sum(x.square().sum() for x in outputs).backward()  # type: ignore[union-attr]
    assert without_gradient(model) == []

    reader = bridge(vocab_size=None)
    sum(reader.read(name, memory).square().sum() for name in QUERIES).backward()  # type: ignore[union-attr]
    assert without_gradient(reader) == []


def test_dropout_is_berts_and_off_in_evaluation(memory) -> None:
    model = bridge()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert {m.dropout for m in model.modules() if isinstance(m, Attention)} == {0.1}
    assert not torch.equal(model.read("image", memory), model.read("image", memory))
    model.eval()
    assert torch.equal(model.read("image", memory), model.read("image", memory))


def test_language_model_head_is_tied_and_berts(ours) -> None:
    hidden = torch.randn(B, L, W)
    x = torch.nn.functional.layer_norm(
        torch.nn.functional.gelu(hidden @ ours.lm_transform.weight.T + ours.lm_transform.bias),
        (W,),
        ours.lm_norm.weight,
        ours.lm_norm.bias,
        1e-12,
    )
    assert_close(ours.lm_logits(hidden), x @ ours.token_embedding.weight.T + ours.lm_bias)


@torch.no_grad()
def test_bfloat16_autocast_stays_near_float32(ours, memory, memory_mask, ids, text_mask) -> None:
    exact = ours.match("image", ids, text_mask, memory, memory_mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = ours.match("image", ids, text_mask, memory, memory_mask)
    assert_close(rough.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_softmax_of_scaled_products(dtype) -> None:
    q, k, v = (torch.randn(B, 2, length, 8).to(dtype) for length in (L, T, T))
    mask = torch.arange(T) < torch.tensor([[T], [3], [1]])
    expected = torch.zeros(B, 2, L, 8, dtype=torch.float64)
    for b in range(B):
        keys, values = k[b, :, mask[b]].double(), v[b, :, mask[b]].double()
        expected[b] = (q[b].double() @ keys.mT / 8**0.5).softmax(-1) @ values
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert_close(attend(q, k, v, key_mask_to_bias(mask), 0.0).double(), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_layers_leave_nothing_undefined() -> None:
    nothing = torch.zeros(B, T, dtype=torch.bool)
    x = torch.randn(B, T, W)
    assert AttentionPool(W, 2)(x, nothing).isfinite().all()  # a row with nothing to see
    assert torch.equal(masked_mean(x, nothing), torch.zeros(B, W))
    assert_close(masked_mean(x, ~nothing), masked_mean(x, None))
    hidden = causal_bias(3, 2, torch.device("cpu"))
    assert hidden is not None and (hidden == 0).tolist() == [
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, True, True, True],
    ]


def test_errors_say_what_came_what_was_expected_and_what_to_do(ours, memory, ids, text_mask) -> None:
    with pytest.raises(KeyError, match="no query set 'picture'; this bridge has generate, image, text"):
        ours.read("picture", memory)
    with pytest.raises(ValueError, match=r"expected \[B, T, 24\], got \[3, 7, 32\]; memory_width is"):
        ours.read("image", torch.randn(B, T, W))
    with pytest.raises(TypeError, match=r"expected bool \[B, T\] .* got torch.int64; pass mask.bool\(\)"):
        ours.read("image", memory, torch.ones(B, T, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected bool \[B, T\] .* got the shape \[3, 7, 1\]"):
        ours.read("image", memory, torch.ones(B, T, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"3 texts but 2 memories; .* memory.shared\(index\)"):
        ours.match("image", ids, text_mask, memory[:2])
    with pytest.raises(ValueError, match="text: 17 tokens for 16 positions; shorten it or raise max_positions"):
        ours.text(torch.ones(1, 17, dtype=torch.long), None)
    with pytest.raises(ValueError, match="nothing to describe: pass the memory, or a cache that `read` has filled"):
        ours.caption("image", ids)
    with pytest.raises(ValueError, match="no text branch.*build it with vocab_size"):
        bridge(vocab_size=None).text(ids, text_mask)
    with pytest.raises(ValueError, match="width of 32 does not divide into 3 heads"):
        bridge(heads=3)


def test_in_training_padding_is_not_read_and_changes_nothing() -> None:
    torch.manual_seed(0)
    bridge = QFormer(
        width=16, layers=3, heads=2, intermediate=32, memory_width=8, dropout=0.0, queries={"image": 3}, vocab_size=20
    )
    ids, memory = torch.randint(0, 20, (4, 6)), torch.randn(4, 5, 8)
    mask = torch.arange(6) < torch.tensor([6, 2, 3, 1])[:, None]

    def outputs() -> tuple[torch.Tensor, ...]:
        text, match = bridge.text(ids, mask), bridge.match("image", ids, mask, memory)
        return text[mask], match, bridge.caption("image", ids, memory, text_mask=mask)[mask]

    def gradients(parts: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        return [g for g in torch.autograd.grad(sum(p.square().sum() for p in parts), used, allow_unused=False)]

    used = [p for name, p in bridge.named_parameters() if not name.startswith("lm_")]
    read: list[int] = []
    bridge.layers[0].text_mlp.up.register_forward_hook(lambda module, inputs, _: read.append(inputs[0].numel() // 16))
    bridge.eval()
    padded = (outputs(), gradients(outputs()))
    read.clear()
    bridge.train()
    packed = (outputs(), gradients(outputs()))
    assert set(read) == {12}  # of 24 places
    for a, b in zip((*padded[0], *padded[1]), (*packed[0], *packed[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
