"""The bridge: a Q-Former, whose learned queries read backbone tokens (BLIP-2, Li et al. 2023, arXiv 2301.12597).

A BERT whose self-attention is shared by queries and text. Queries alone cross-attend to the memory (the backbone's
tokens), in every k-th layer, and have feed-forward networks of their own. One set of weights is used in four passes:

    read     queries alone                                  what an item holds, in N vectors
    text     text alone                                     a text in its own right
    match    queries and text, each sees everything         does this text describe this image?
    caption  text after the queries, each sees its past     what would one say about this image?

In the causal pass queries see only queries, so they need not be run together with the text: `caption` reads first and
keeps the queries' keys and values in a cache, which the text then looks back at. The same cache, grown token by token,
decodes.

Shapes: B batch, N queries, T tokens of memory, L text length, D width of memory, W width of the bridge, V vocabulary.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal.layers import MLP, Attention, KeyValues, Padding, causal_bias, init_weights, key_mask_to_bias

EPS = 1e-12  # of every LayerNorm, as in BERT


class QFormerLayer(nn.Module):
    """BERT's post-norm layer, with cross-attention and a feed-forward network for the first rows, which are queries."""

    def __init__(
        self, width: int, heads: int, intermediate: int, *, memory_width: int | None, text: bool, dropout: float
    ):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.attention = Attention(width, heads, dropout=dropout)
        self.attention_norm = nn.LayerNorm(width, EPS)
        self.reads_memory = memory_width is not None
        if self.reads_memory:
            self.cross_attention = Attention(width, heads, memory_width=memory_width, dropout=dropout)
            self.cross_attention_norm = nn.LayerNorm(width, EPS)
        self.query_mlp = MLP(width, intermediate)
        self.query_mlp_norm = nn.LayerNorm(width, EPS)
        if text:
            self.text_mlp = MLP(width, intermediate)
            self.text_mlp_norm = nn.LayerNorm(width, EPS)

    def forward(
        self,
        read: Tensor | None,
        text: Tensor | None,
        padding: Padding | None,
        bias: Tensor | None,
        memory: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None,
        cache: KeyValues | None,
        place: int,
        ask_text: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Queries [B, N, W] and text [B, L, W], or its real tokens [R, W], to the same; one of them may be absent.

        `memory`: keys, values, bias, index; `place`: the layer's place in the cache; `ask_text`: whether anyone reads the text after it.
        """
        projected = [self.attention.project(x, p) for x, p in ((read, None), (text, padding)) if x is not None]
        keys, values = (torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*projected, strict=True))
        if cache is not None:
            keys, values = cache.extend(place, keys, values)
        if read is not None:
            read = self.attention_norm(read + self.dropout(self.attention(read, keys, values, bias)))
            if memory is not None:
                read = self.cross_attention_norm(read + self.dropout(self.cross_attention(read, *memory)))
            read = self.query_mlp_norm(read + self.dropout(self.query_mlp(read)))
        if text is None or not ask_text:
            return read, None
        text = self.attention_norm(text + self.dropout(self.attention(text, keys, values, bias, padding=padding)))
        return read, self.text_mlp_norm(text + self.dropout(self.text_mlp(text)))


class QFormer(nn.Module):
    """Named sets of learned queries that read a memory, and a text branch that shares their self-attention.

    Wherever a memory is asked for, the tokens [B, T, D] will do, or their keys and values from `project_memory`, which
    can be used in several passes and shared by pairs (`memory.shared(index)`); a mask only goes with tokens, as keys
    and values carry theirs.

    Args:
        width: W.
        layers: number of layers.
        heads: attention heads.
        intermediate: hidden width of the feed-forward networks.
        memory_width: D.
        cross_attention_every: the memory is read in layers 0, k, 2k, ...
        dropout: dropout of attention weights, of every sublayer's output and of the input.
        queries: N of each named query set, for example {"image": 32, "text": 8}.
        vocab_size: V; None leaves out the text branch.
        max_positions: longest text in tokens.
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        intermediate: int,
        memory_width: int,
        cross_attention_every: int = 2,
        dropout: float = 0.1,
        queries: Mapping[str, int],
        vocab_size: int | None,
        max_positions: int = 512,
    ):
        super().__init__()
        self.memory_width, self.max_positions = memory_width, max_positions
        self.query_sets = nn.ParameterDict(
            {name: nn.Parameter(0.02 * torch.randn(count, width)) for name, count in queries.items()}
        )
        self.norm = nn.LayerNorm(width, EPS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(
                width,
                heads,
                intermediate,
                memory_width=None if i % cross_attention_every else memory_width,
                text=vocab_size is not None,
                dropout=dropout,
            )
            for i in range(layers)
        )
        self.has_text = vocab_size is not None
        if vocab_size is not None:
            self.token_embedding = nn.Embedding(vocab_size, width)
            self.position_embedding = nn.Embedding(max_positions, width)
            self.lm_transform = nn.Linear(width, width)
            self.lm_norm = nn.LayerNorm(width, EPS)
            self.lm_bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(init_weights)

    def project_memory(self, memory: Tensor, memory_mask: Tensor | None = None) -> KeyValues:
        """Keys and values of memory [B, T, D], mask [B, T], for every layer that reads it."""
        if memory.shape[-1] != self.memory_width:
            raise ValueError(
                f"memory: expected [B, T, {self.memory_width}], got {list(memory.shape)}; "
                "memory_width is the width of the tokens that the bridge reads"
            )
        readers = (layer.cross_attention for layer in self.layers if layer.reads_memory)
        return KeyValues.of(readers, memory, memory_mask)

    def read(
        self,
        name: str,
        memory: Tensor | KeyValues,
        memory_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        cache: KeyValues | None = None,
    ) -> Tensor:
        """The queries `name` read the memory: -> [B, N, W].

        Args:
            name: which query set.
            memory: [B, T, D], or its keys and values.
            memory_mask: [B, T], True = real token.
            inputs: [B, N, W] in place of the learned queries, for example queries mixed with the embeddings of a
                caption (OmniBridge, arXiv 2509.19018).
            cache: an empty one is filled with what `caption` looks back at.
        """
        memory = self._projected(memory, memory_mask)
        if inputs is None:
            inputs = self._queries(name).expand(memory.rows, -1, -1)
        read, _ = self._encode(inputs, None, None, None, memory, cache)
        assert read is not None
        return read

    def embed_text(self, ids: Tensor, offset: int = 0) -> Tensor:
        """Embeddings of ids [B, L], the first at position `offset`: -> [B, L, W]; every pass normalises its input."""
        if not self.has_text:
            raise ValueError(
                "this bridge has no text branch: it reads, but takes no text; build it with vocab_size=... "
                "or use heads that have text networks of their own (CachedMatchingHead, CaptionDecoder)"
            )
        end = offset + ids.shape[1]
        if end > self.max_positions:
            raise ValueError(
                f"text: {end} tokens for {self.max_positions} positions; shorten it or raise max_positions"
            )
        return self.token_embedding(ids) + self.position_embedding.weight[offset:end]

    def text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Text alone, read in both directions: ids [B, L], mask [B, L] -> [B, L, W]."""
        return self._written(self.embed_text(ids), mask, key_mask_to_bias(mask), None)

    def match(
        self,
        name: str,
        ids: Tensor,
        text_mask: Tensor | None,
        memory: Tensor | KeyValues | None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Queries and text of P pairs together, each sees everything: -> what the queries found, [P, N, W].

        Args:
            name: which query set.
            ids: [P, L], row p belongs to row p of the memory.
            text_mask: [P, L], True = real token.
            memory: [P, T, D], or its keys and values; None where queries read the text alone.
            memory_mask: [P, T], True = real token.

        Raises:
            ValueError: texts and memory are not as many.
        """
        memory = None if memory is None else self._projected(memory, memory_mask)
        if memory is not None and memory.rows != len(ids):
            raise ValueError(
                f"match: {len(ids)} texts but {memory.rows} memories; pairs are row by row, "
                "so say which memory each text goes with: memory.shared(index)"
            )
        queries = self._queries(name).expand(len(ids), -1, -1)  # [P, N, W]
        seen = None
        if text_mask is not None:
            seen = torch.cat([text_mask.new_ones(queries.shape[:2]), text_mask], 1)  # [P, N + L]
        read, _ = self._encode(queries, self.embed_text(ids), text_mask, key_mask_to_bias(seen), memory, None)
        assert read is not None
        return read

    def caption(
        self,
        name: str,
        ids: Tensor,
        memory: Tensor | KeyValues | None = None,
        memory_mask: Tensor | None = None,
        *,
        cache: KeyValues | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Text after the queries, every token sees the queries and its past: -> [B, L, W], for `lm_logits`.

        Texts are padded on the right: no token looks to its right, so the real ones come out the same with a mask or without.

        Args:
            name: which query set.
            ids: [B, L], the text, or its continuation where the cache already holds a beginning.
            memory: [B, T, D], or its keys and values; not needed where the cache holds what the queries read.
            memory_mask: [B, T], True = real token.
            cache: what queries and text have left so far; grows by L tokens. `read` of the same query set fills an
                empty one.
            text_mask: [B, L], True = real token; in training the padding then costs nothing.
        """
        cache = KeyValues() if cache is None else cache
        if cache.length == 0:
            if memory is None:
                raise ValueError("caption: nothing to describe: pass the memory, or a cache that `read` has filled")
            self.read(name, memory, memory_mask, cache=cache)
        x = self.embed_text(ids, offset=cache.length - len(self._queries(name)))
        return self._written(x, text_mask, causal_bias(ids.shape[1], cache.length, ids.device), cache)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits as BERT's, decoder tied to the token embedding: [B, L, W] -> [B, L, V]."""
        return F.linear(self.lm_norm(F.gelu(self.lm_transform(hidden))), self.token_embedding.weight, self.lm_bias)

    def _queries(self, name: str) -> Tensor:
        if name not in self.query_sets:
            raise KeyError(f"no query set {name!r}; this bridge has {', '.join(self.query_sets)}")
        return self.query_sets[name]

    def _projected(self, memory: Tensor | KeyValues, mask: Tensor | None) -> KeyValues:
        return self.project_memory(memory, mask) if isinstance(memory, Tensor) else memory

    def _written(self, x: Tensor, mask: Tensor | None, bias: Tensor | None, cache: KeyValues | None) -> Tensor:
        """Text alone, or after queries that are in the cache: embeddings [B, L, W] -> [B, L, W]."""
        _, text = self._encode(None, x, mask, bias, None, cache)
        assert text is not None
        return text

    def _encode(
        self,
        read: Tensor | None,
        text: Tensor | None,
        mask: Tensor | None,
        bias: Tensor | None,
        memory: KeyValues | None,
        cache: KeyValues | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Queries [B, N, W], or text [B, L, W] with its mask, or both, of which then only the queries are read."""
        # In training only: how many tokens are real is not known before, which a traced graph would have to.
        padding = Padding(mask) if self.training and text is not None and mask is not None else None
        if text is not None:
            text = self.dropout(self.norm(text if padding is None else padding.remove(text)))
        if read is not None:
            read = self.dropout(self.norm(read))
        readers = iter([] if memory is None else [memory.layer(place) for place in range(len(memory.layers))])
        for i, layer in enumerate(self.layers):
            shown = next(readers) if memory is not None and layer.reads_memory else None
            ask_text = read is None or i < len(self.layers) - 1
            read, text = layer(read, text, padding, bias, shown, cache, i, ask_text)
        return read, text if padding is None or text is None else padding.restore(text)

    # Weights of others.

    def to_blip2(self, name: str = "image") -> dict[str, Tensor]:
        """Weights under the names of transformers' `Blip2ForImageTextRetrieval`, with the queries `name` as its query
        tokens.

        These are `query_tokens`, `qformer.*` (a `Blip2QFormerModel`) and `embeddings.*` (a `Blip2TextEmbeddings`).
        Other query sets and the language model head have no place there.
        """
        ours = self.state_dict()
        weights = {theirs: ours[key] for theirs, key in self._blip2_names().items()}
        return {"query_tokens": self._queries(name).detach()[None], **weights}

    def load_blip2(self, weights: Mapping[str, Tensor], name: str = "image") -> None:
        """Take over `to_blip2`'s weights; the query tokens become the queries `name`. All else in a BLIP-2 checkpoint
        is ignored.

        Raises:
            ValueError: a weight is missing or unknown to this bridge, or its shape differs. Nothing is loaded then.
        """
        names = self._blip2_names()
        theirs = {k: w for k, w in weights.items() if k.startswith(("qformer.", "embeddings.")) or k == "query_tokens"}
        expected = {"query_tokens", *names}
        if theirs.keys() != expected:
            raise ValueError(
                f"BLIP-2 weights do not fit this bridge: missing {sorted(expected - theirs.keys())}, unknown "
                f"{sorted(theirs.keys() - expected)}; build it with the checkpoint's layers, cross_attention_every "
                "and vocab_size"
            )
        self._load({f"query_sets.{name}": theirs["query_tokens"][0], **{names[k]: theirs[k] for k in names}})

    def load_bert(self, weights: Mapping[str, Tensor]) -> None:
        """Start from transformers' `BertModel` of the same width, as BLIP-2 does: query networks begin as copies of the
        text's.

        Layers beyond the bridge's own are ignored; queries, cross-attention and language model head stay as they are.
        BERT's embedding of the first segment is added to every position, so that `text` equals `BertModel`.

        Raises:
            ValueError: a weight is missing, or its shape differs. Nothing is loaded then.
        """
        taken = {}
        for blip2, ours in self._blip2_names().items():
            if "crossattention" in blip2:
                continue
            key = re.sub(r"^qformer\.(layernorm)?", lambda m: "embeddings.LayerNorm" if m[1] else "", blip2)
            key = key.replace("attention.attention", "attention.self").replace("_query.", ".")
            if key not in weights:
                raise ValueError(
                    f"BERT weights do not fit this bridge: missing {key!r}; expected the state of a BertModel"
                )
            taken[ours] = weights[key]
            if key == "embeddings.position_embeddings.weight":
                taken[ours] = weights[key] + weights["embeddings.token_type_embeddings.weight"][0]
        self._load(taken)

    def _load(self, weights: dict[str, Tensor]) -> None:
        ours = self.state_dict()
        for key, weight in weights.items():
            if key not in ours or ours[key].shape != weight.shape:
                shape = f"the shape {list(ours[key].shape)}" if key in ours else "nothing of that name"
                raise ValueError(f"{key}: the weights have the shape {list(weight.shape)}, this bridge {shape}")
        self.load_state_dict({**ours, **weights})

    def _blip2_names(self) -> dict[str, str]:
        """transformers' name of a weight -> ours, for every weight that both have."""
        names = {}
        for ours in self.state_dict():
            if ours.startswith(("query_sets.", "lm_")):
                continue
            theirs = ours
            for pattern, replacement in _BLIP2_NAMES:
                theirs = re.sub(pattern, replacement, theirs)
            names[theirs] = ours
        return names


_BLIP2_NAMES = (
    (r"^token_embedding", "embeddings.word_embeddings"),
    (r"^position_embedding", "embeddings.position_embeddings"),
    (r"^norm", "qformer.layernorm"),
    (r"^layers\.", "qformer.encoder.layer."),
    (r"cross_attention", "crossattention"),
    (r"attention\.(query|key|value)", r"attention.attention.\1"),
    (r"attention\.output", "attention.output.dense"),
    (r"attention_norm", "attention.output.LayerNorm"),
    (r"query_mlp\.up", "intermediate_query.dense"),
    (r"query_mlp\.down", "output_query.dense"),
    (r"query_mlp_norm", "output_query.LayerNorm"),
    (r"text_mlp\.up", "intermediate.dense"),
    (r"text_mlp\.down", "output.dense"),
    (r"text_mlp_norm", "output.LayerNorm"),
)
