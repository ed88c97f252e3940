"""unimodal: one vision-language model that retrieves, reranks, captions and draws.

import unimodal

model = unimodal.from_pretrained("checkpoints/demo")
model.rank("a red circle", ["red.png", "blue.png"])

Names are loaded on first use (PEP 562): the import itself loads neither torch nor anything built on it.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimodal.config import ModelConfig
    from unimodal.finetuning import finetune
    from unimodal.inference import Unimodal
    from unimodal.model import UnimodalModel

    from_pretrained = Unimodal.from_pretrained

__version__ = version("unimodal")
_HOME = {"Unimodal": "inference", "UnimodalModel": "model", "ModelConfig": "config", "finetune": "finetuning"}
__all__ = ["ModelConfig", "Unimodal", "UnimodalModel", "__version__", "finetune", "from_pretrained"]


def __getattr__(name: str) -> Any:
    if name == "from_pretrained":
        return __getattr__("Unimodal").from_pretrained
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
