"""How a task measures: the whole split is read, then every head that is present is scored."""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from unimodal.data.batch import Batch, image_inputs, text_inputs
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.model import UnimodalModel
from unimodal.tasks.evaluation import Evaluation, EvaluationSettings


class Evaluated(pl.LightningModule):
    """A LightningModule that validates, tests and embeds by a model's evaluation.

    Attributes:
        model: what is measured.
        processor: its preprocessing, once there is data.
        settings: what is measured.
        evaluation: the one that is under way.
        results: of the last one.
    """

    model: UnimodalModel
    processor: Processor | None
    settings: EvaluationSettings
    evaluation: Evaluation | None
    results: dict[str, Any]

    @property
    def data(self) -> Any:
        """The data module of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _begin(self, pairs: Pairs) -> None:
        assert self.processor is not None
        self.evaluation = Evaluation(self.model, self.processor, pairs, self.settings)

    def _end(self, prefix: str) -> None:
        assert self.evaluation is not None
        if self.trainer.sanity_checking and self.evaluation.read < len(self.evaluation.pairs):
            return
        with self.trainer.precision_plugin.forward_context():
            self.results = self.evaluation.results()
        self.log_dict(
            {f"{prefix}/{k}": v for k, v in self.evaluation.numbers(self.results).items()}, rank_zero_only=True
        )
        self.evaluation = None

    def on_validation_epoch_start(self) -> None:
        self._begin(self.data.val)

    def on_test_epoch_start(self) -> None:
        self._begin(self.data.test)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        assert self.evaluation is not None
        self.evaluation.add(batch)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        self.validation_step(batch, batch_index)

    def on_validation_epoch_end(self) -> None:
        self._end("val")

    def on_test_epoch_end(self) -> None:
        self._end("test")

    def predict_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        """Embeddings of the batch's images, and of its captions where it has any."""
        image = self.model.encode_image(**image_inputs(batch))
        embeddings = {"image": self.model.image_embedding(image)}
        if "text" in batch:
            text = self.model.encode_text(**text_inputs(batch))
            embeddings["text"] = self.model.text_embedding(text)
        return embeddings
