"""The processor of a checkpoint, held against the model and the stored example: a model means nothing with another one."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from unimodal.data.processor import SETTINGS_FILE, Processor
from unimodal.data.published import PLACEHOLDER, open_writer, saved_processor
from unimodal.data.writer import WRITER_FOLDER
from unimodal.hub.contents import Contents
from unimodal.hub.example import TEXTS
from unimodal.hub.folder import EXAMPLE
from unimodal.hub.weights import CheckpointError, open_weights, require_mark
from unimodal.model import UnimodalModel


def open_saved_processor(folder: Path, model: UnimodalModel, contents: Contents) -> Processor:
    """What a folder holds for a model, the tokenizer of its language model included.

    Raises:
        CheckpointError: it is incomplete, holds nonsense, or belongs to another model.
        OSError: a file cannot be read.
    """
    require_vocabulary(folder)
    try:
        processor = saved_processor(folder)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _incomplete(folder, error) from error
    except Exception as error:  # what the readers of transformers and tokenizers happen to meet in files of anyone
        raise _incomplete(folder, error) from error
    largest = max((i for token, i in processor.tokenizer.get_vocab().items() if token != PLACEHOLDER), default=-1)
    if largest >= model.backbone.vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer has tokens up to {largest}, the model's vocabulary {model.backbone.vocab_size}: they do not belong "
            "together; get the checkpoint again"
        )
    if not contents.files:
        _require_pictures(folder, processor, contents)
    if (captioning := model.config.captioning) is not None and model.language_captioner is not None:
        require_vocabulary(folder / WRITER_FOLDER)
        try:
            processor.writer = open_writer(folder / WRITER_FOLDER, captioning, model.language_captioner)
        except ValueError as error:
            raise _incomplete(folder, error) from error
    _require_example(folder, processor, contents)
    return processor


def require_vocabulary(folder: Path) -> None:
    """Refuse a folder without the words of its tokenizer, for which transformers would make up an empty one.

    Raises:
        CheckpointError: it has none.
    """
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    if not any((folder / name).exists() for name in names):
        raise CheckpointError(
            f"{folder} lacks tokenizer.json, so no text could be read; the checkpoint is incomplete, get it again"
        )
    if not (folder / "tokenizer_config.json").exists():
        raise CheckpointError(
            f"{folder} lacks tokenizer_config.json, which says how its tokens are used; the checkpoint is incomplete, get it again"
        )


def require_filled(folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse a tokenizer that leaves most of a model's vocabulary unused: it is another model's.

    Raises:
        CheckpointError: it does.
    """
    if (count := len(tokenizer)) * 2 < vocabulary:
        raise CheckpointError(
            f"{folder}: its tokenizer has {count} tokens, the model's vocabulary {vocabulary}: they do not belong together; get the "
            "folder again"
        )


def _incomplete(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder}: its tokenizer or its {SETTINGS_FILE} is incomplete or damaged: {error or type(error).__name__}; get the folder again"
    )


def _require_pictures(folder: Path, processor: Processor, contents: Contents) -> None:
    """A checkpoint that does not list its files still says in config.json what pictures its towers were trained on."""
    if contents.model.backbone.published is not None:
        return
    vision = contents.model.backbone.vision
    own = (processor.image_size, tuple(processor.mean), tuple(processor.std))
    if own != (expected := (vision.image_size, vision.mean, vision.std)):
        raise CheckpointError(
            f"{folder / SETTINGS_FILE} makes pictures of size, mean and std {own}, its config.json names {expected}: they belong to two "
            "models; get the checkpoint again"
        )


def _require_example(folder: Path, processor: Processor, contents: Contents) -> None:
    """The stored example has the ids of two texts: the tokenizer has to give the same."""
    path = folder / EXAMPLE
    if not path.exists():
        return
    with open_weights(path) as file:
        require_mark(path, file, contents.mark)
        names = set(file.keys())
        if not {"input.ids", "input.mask"} <= names:
            raise CheckpointError(
                f"{path} is no stored example: it has no input.ids and input.mask; get the checkpoint again"
            )
        stored = [file.get_tensor(name) for name in ("input.ids", "input.mask")]
    found = processor.texts(TEXTS)
    if not all(torch.equal(a.long(), b.long()) for a, b in zip(stored, found)):
        raise CheckpointError(
            f"{folder}: its tokenizer reads the texts of {EXAMPLE} otherwise than when the checkpoint was saved, so it is another one or "
            "incomplete; get the tokenizer's files again, from the same checkpoint"
        )
