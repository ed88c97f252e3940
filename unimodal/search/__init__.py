"""Two-stage search: embeddings find candidates, the matching head reranks them on cached tokens."""

from unimodal.search.build import build_index
from unimodal.search.calibrate import Calibration, calibrate
from unimodal.search.encoder import Encoded, Encoder
from unimodal.search.folder import FolderIndex, cache_folder, index_folder
from unimodal.search.hits import Hit
from unimodal.search.index import Index
from unimodal.search.negatives import mine_negatives
from unimodal.search.quantise import Precision, dequantise, quantise

__all__ = [
    "Calibration",
    "Encoded",
    "Encoder",
    "FolderIndex",
    "Hit",
    "Index",
    "Precision",
    "build_index",
    "cache_folder",
    "calibrate",
    "dequantise",
    "index_folder",
    "mine_negatives",
    "quantise",
]
