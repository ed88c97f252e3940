"""What a stage minimises: a loss with its weight, the batch keys that it reads, and what it does before, between and after the steps."""

from collections.abc import Iterable

from torch import Tensor

from unimodal.data.batch import Batch
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.model import UnimodalModel
from unimodal.tasks.step import Step

Report = dict[str, Tensor]


class Objective:
    """A loss with its weight and the batch keys it reads. Subclasses compute it from a `Step`.

    Attributes:
        keys: what the batch must have.
        states: whether it reads token states, beyond embeddings.
    """

    keys: tuple[str, ...] = ()
    states = True

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def prepare(self, pairs: Pairs, processor: Processor) -> None:
        """Called before the first step with the training split and the preprocessing: for what depends on the whole split."""

    def fit(self, model: UnimodalModel, split: Iterable[Batch]) -> None:
        """Called once before the first step of a system that is new, with the training split in order, every image with all its captions:
        for what is fitted in closed form."""

    def begin(self, model: UnimodalModel) -> None:
        """Called before the first step of a stage, and not when a stage goes on."""

    def after_step(self, model: UnimodalModel) -> None:
        """Called after every step of the optimizer."""

    def end(self, model: UnimodalModel) -> None:
        """Called when the last step of a stage is done."""

    def __call__(self, step: Step) -> tuple[Tensor, Report]:
        raise NotImplementedError(f"{type(self).__name__} is an objective without a loss; implement __call__(step)")
