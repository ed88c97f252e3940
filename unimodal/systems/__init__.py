"""The systems of the survey: one file for each mechanism that only one of them has, and what they share.

| File          | Systems                                                     |
|---------------|-------------------------------------------------------------|
| `base.py`     | what a system is, its stages and its way of scoring         |
| `towers.py`   | layers on top of the shared frozen encoders                 |
| `words.py`    | masked words                                                |
| `encoders.py` | a model's backbone as its system reads it                  |
| `hosted.py`   | a system as a part of a model                               |
| `table.py`    | the systems by name                                         |
| `momentum.py` | a slow teacher and its queue                                |
| `albef.py`    | ALBEF                                                       |
| `adapted.py`  | the encoders as they come, full fine-tuning, learned context, adapters, LoRA |
| `blip2.py`    | BLIP-2                                                      |
| `cca.py`      | CCA                                                         |
| `cdisa.py`    | CDISA                                                       |
| `cimn.py`     | CIMN                                                        |
| `clip.py`     | CLIP, SigLIP                                                |
| `elip.py`     | ELIP-C, ELIP-S, ELIP-B                                      |
| `mim.py`      | CLIP with masked image modelling                            |
| `omnibridge.py` | OmniBridge's retrieval branch                             |
| `oscar.py`    | OSCAR                                                       |
| `qwen.py`     | Qwen3-VL-Embedding and Qwen3-VL-Reranker                    |
| `scan.py`     | SCAN, two directions, two pools, and an ensemble            |
| `vlgap.py`    | VL-GAP                                                      |
| `vlmo.py`     | VLMo                                                        |
"""

from unimodal.systems.adapted import Adapted, AsItComes
from unimodal.systems.albef import ALBEF, FusionEncoder
from unimodal.systems.base import Batch, Encoders, Images, Published, Scoring, Stage, System, Texts
from unimodal.systems.blip2 import BLIP2
from unimodal.systems.cca import CCA, CanonicalCorrelation
from unimodal.systems.cdisa import CDISA
from unimodal.systems.cimn import CIMN
from unimodal.systems.clip import CLIP, DualEncoder, SigLIP
from unimodal.systems.elip import ELIPB, ELIPC, ELIPS
from unimodal.systems.encoders import BackboneEncoders, positions_like
from unimodal.systems.hosted import build_system, embedding_shape, heads_of, known_texts
from unimodal.systems.mim import MaskedImages
from unimodal.systems.omnibridge import OmniBridge
from unimodal.systems.oscar import OSCAR, NounTags, TagProvider
from unimodal.systems.qwen import QwenEmbedding, QwenReranker
from unimodal.systems.scan import SCAN, SCANEnsemble
from unimodal.systems.table import SYSTEMS
from unimodal.systems.vlgap import VLGAP
from unimodal.systems.vlmo import VLMo

__all__ = [
    "OmniBridge",
    "QwenEmbedding",
    "QwenReranker",
    "VLGAP",
    "BLIP2",
    "BackboneEncoders",
    "VLMo",
    "ALBEF",
    "FusionEncoder",
    "Adapted",
    "AsItComes",
    "Batch",
    "CCA",
    "CDISA",
    "CIMN",
    "CLIP",
    "CanonicalCorrelation",
    "DualEncoder",
    "ELIPB",
    "ELIPC",
    "ELIPS",
    "Encoders",
    "Images",
    "MaskedImages",
    "NounTags",
    "OSCAR",
    "Published",
    "SCAN",
    "SCANEnsemble",
    "Scoring",
    "SigLIP",
    "Stage",
    "System",
    "TagProvider",
    "SYSTEMS",
    "Texts",
    "build_system",
    "embedding_shape",
    "heads_of",
    "known_texts",
    "positions_like",
]
