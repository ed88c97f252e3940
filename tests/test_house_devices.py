"""No model that a published design is mixes devices: every stage on each kind of backbone, on a pretended device."""

from typing import Any

import pytest
import torch
from pretended import ELSEWHERE, elsewhere, moved
from test_house import CARRIED, data, is_searched, small, sources, stages_of, task

from unimodal import Unimodal
from unimodal.config import ModelConfig, from_dict, to_dict
from unimodal.model import UnimodalModel

__all__ = ["sources"]  # a fixture


@pytest.mark.parametrize(("name", "backbone"), CARRIED)
def test_a_model_stays_on_its_device(name: str, backbone: str, sources: dict[str, Any]) -> None:
    """Its words are read and it is fitted there; each stage takes a step; then it answers, is searched and explains."""
    config = from_dict(ModelConfig, {"backbone": sources[backbone], "system": to_dict(small(name))})
    module = data()
    for stage in stages_of(name):
        one = task(config, name, stage)
        objective = one.objectives["own"]
        with elsewhere(one):
            one.bind(module)
            pairs, split = next(iter(module.train_dataloader())), list(module.mining_dataloader())
            objective.fit(one.model, moved(split))
            objective.begin(one.model)
            losses, _ = one.train().training_forward(moved(pairs))
            torch.stack(list(losses.values())).sum().backward()
            objective.after_step(one.model)
            objective.end(one.model)
            trained = [p for p in one.model.parameters() if p.requires_grad]
            assert trained and all(p.grad is not None and p.grad.device == ELSEWHERE for p in trained)
    one.eval()
    with elsewhere():  # where the model still is
        answers(one.model, moved(pairs))
        pictures = [module.val.image(i) for i in range(2)]
        opened = Unimodal(one.model, one.processor)
        is_searched(opened, pictures, ["a red circle"])
        assert opened.explain(pictures[0], "a red circle", steps=2).heatmap.any()


@torch.no_grad()
def answers(model: UnimodalModel, batch: Any) -> None:
    """Embeddings, pair scores and captions are made where the model is."""
    image, text = model.encode_image(batch["image"]), model.encode_text(batch["text"], batch["text_mask"])
    rows = torch.arange(len(batch["text"]), device=ELSEWHERE)
    if model.embeds is not None:
        assert model.image_embedding(image).device == model.text_embedding(text).device == ELSEWHERE
    if model.matcher is not None:
        assert model.match(image, text, rows, rows).device == ELSEWHERE
    if model.captioner is not None:
        assert len(model.caption(image)) == len(rows)
