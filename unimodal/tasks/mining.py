"""Hard negatives mined over the whole training split: for each image, the other images whose captions the model confuses with its own."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimodal import files
from unimodal.data.batch import image_inputs
from unimodal.data.pairs import Pairs
from unimodal.data.processor import Processor
from unimodal.model import UnimodalModel
from unimodal.retrieval import similarity


@torch.no_grad()
def mine_neighbours(
    model: UnimodalModel,
    image_embedding: Tensor,
    pairs: Pairs,
    processor: Processor,
    *,
    neighbours: int,
    batch_size: int = 256,
) -> Tensor:
    """Rows of the nearest wrong images [I, neighbours], nearest first, judged by image embeddings against one caption of each image.

    Args:
        model: the model, in evaluation mode.
        image_embedding: [I, E] unit vectors of the split's images, or [I, N, E].
        pairs: the split.
        processor: its tokenizer.
        neighbours: how many per image.
        batch_size: captions read, and rows compared, at a time.

    Raises:
        ValueError: when the split has no more images than neighbours asked for.
    """
    count = len(pairs)
    if neighbours >= count:
        raise ValueError(
            f"asked for {neighbours} neighbours among {count} images; ask for fewer than there are other images"
        )
    device = image_embedding.device
    texts = []
    for start in range(0, count, batch_size):
        ids, mask = processor.texts([pairs.captions(i)[0] for i in range(start, min(start + batch_size, count))])
        texts.append(model.text_embedding(model.encode_text(ids.to(device), mask.to(device))).float())
    text = torch.cat(texts)  # [I, E]
    ids = torch.tensor([pairs.image_id(i) for i in range(count)], device=device)
    rows = []
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        scores = similarity(image_embedding[part], text)  # [b, I]
        scores = scores.masked_fill(ids[part, None] == ids[None], float("-inf"))
        rows.append(scores.topk(neighbours, dim=1).indices.cpu())
    return torch.cat(rows)


@torch.no_grad()
def kept_neighbours(model: UnimodalModel, processor: Processor, data: Any, path: Path) -> Tensor:
    """Hard neighbours of the training split under the weights that a stage starts from, as `mine_neighbours`; kept in a file of the run.

    Args:
        model: the model.
        processor: its tokenizer.
        data: the data module (`unimodal.data.module.PairData`).
        path: the file, which is read where it is there.
    """
    if not path.exists():
        model.eval()
        images = [
            model.image_embedding(model.encode_image(**image_inputs(batch))) for batch in data.mining_dataloader()
        ]
        neighbours = mine_neighbours(
            model, torch.cat(images).float(), data.train, processor, neighbours=data.hard_neighbours
        )
        model.train()
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as unfinished:
            save_file({"neighbours": neighbours}, unfinished)
    return load_file(path)["neighbours"]
