"""The published designs by name: a configuration that comes from anyone chooses among these, and can name no code."""

from unimodal.systems.albef import ALBEF
from unimodal.systems.base import System
from unimodal.systems.blip2 import BLIP2
from unimodal.systems.cca import CanonicalCorrelation
from unimodal.systems.cdisa import CDISA
from unimodal.systems.cimn import CIMN
from unimodal.systems.clip import CLIP, SigLIP
from unimodal.systems.elip import ELIPB, ELIPC, ELIPS
from unimodal.systems.mim import MaskedImages
from unimodal.systems.omnibridge import OmniBridge
from unimodal.systems.oscar import OSCAR
from unimodal.systems.qwen import QwenEmbedding, QwenReranker
from unimodal.systems.scan import SCAN, SCANEnsemble
from unimodal.systems.vlgap import VLGAP
from unimodal.systems.vlmo import VLMo

SYSTEMS: dict[str, type[System]] = {
    "albef": ALBEF,
    "blip2": BLIP2,
    "cca": CanonicalCorrelation,
    "cdisa": CDISA,
    "cimn": CIMN,
    "clip": CLIP,
    "clip_mim": MaskedImages,
    "elip_b": ELIPB,
    "elip_c": ELIPC,
    "elip_s": ELIPS,
    "omnibridge": OmniBridge,
    "oscar": OSCAR,
    "qwen_embedding": QwenEmbedding,
    "qwen_reranker": QwenReranker,
    "scan": SCAN,
    "scan_ensemble": SCANEnsemble,
    "siglip": SigLIP,
    "vlgap": VLGAP,
    "vlmo": VLMo,
}
