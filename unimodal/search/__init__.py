"""Two-stage search: embeddings find candidates, the matching head reranks them on cached tokens."""

from unimodal.search.build import build_index
from unimodal.search.encoder import Encoded, Encoder
from unimodal.search.index import Hit, Index
from unimodal.search.negatives import mine_negatives
from unimodal.search.quantise import Precision, dequantise, quantise
from unimodal.search.twostage import similarity

__all__ = [
    "Encoded",
    "Encoder",
    "Hit",
    "Index",
    "Precision",
    "build_index",
    "dequantise",
    "mine_negatives",
    "quantise",
    "similarity",
]
