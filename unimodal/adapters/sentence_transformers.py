"""A checkpoint as a sentence-transformers model: `SentenceTransformer` for its embeddings, `CrossEncoder` for its matching head.

export_sentence_transformer("checkpoints/demo/model", "embedder")    # in the shell: unimodal export sentence-transformers
model = SentenceTransformer("embedder", trust_remote_code=True)
model.similarity(model.encode_query(["a red circle"]), model.encode_document(["one.png", "two.png"]))

export_cross_encoder("checkpoints/demo/model", "reranker")           # in the shell: unimodal export cross-encoder
CrossEncoder("reranker", trust_remote_code=True).rank("a red circle", ["one.png", "two.png"])

The folder is the checkpoint, file by file, and two files that name the class below to use; `unimodal.from_pretrained` reads it as before.
sentence-transformers 6 wants `trust_remote_code=True` for every class that is not its own; the folder itself holds no code, and where
the flag is not wanted, a model in memory will do: `SentenceTransformer(modules=[SentenceTransformerModule(model)])`.

Items are told apart as everywhere here (`unimodal.data.items`), but sentence-transformers refuses a batch that mixes texts and images.
It does not normalise what it truncates: `encode(..., truncate_dim=64, normalize_embeddings=True)` equals ours.

Legend: n items, P pairs, D distinct items of them, E embedding width.
"""

import copy
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal import __version__
from unimodal.adapters.features import (
    Features,
    conversation_features,
    conversations,
    count_of,
    decoded,
    picture_features,
    pictures,
    rows_with_pictures,
    rows_with_texts,
    text_features,
    texts,
)
from unimodal.adapters.settings import load_settings, text_length
from unimodal.arguments import integer
from unimodal.backbones import Pixels, move_pixels
from unimodal.config import ModelConfig
from unimodal.data.images import load_image
from unimodal.data.items import Item, as_items
from unimodal.hub import find_checkpoint
from unimodal.hub.contents import is_ours, read_contents
from unimodal.hub.folder import is_checkpoint_file, replacing
from unimodal.inference import Unimodal, as_pair, identity
from unimodal.model import ImageState, TextState

KINDS = ("image", "text")
SHORTEST = 3  # tokens of a text: its first and its last, and a word


class _Module(nn.Module):
    """What both have of the first module of a sentence-transformers model, which calls `preprocess`, then the module itself.

    Args:
        model: the model.
    """

    heads: ClassVar[Sequence[str]]
    modalities: ClassVar[list[Any]] = ["text", "image", ("image", "text")]
    save_in_root: ClassVar[bool] = True

    def __init__(self, model: Unimodal) -> None:
        super().__init__()
        self.unimodal, self.model = model, model.model
        self.processor: Any = model.processor
        self.tokenizer = self.processor.tokenizer
        self.longest: int = self.processor.max_length
        self.eval()

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        token: str | bool | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **place: Any,
    ) -> Self:
        """Load a checkpoint that `export_sentence_transformer` or `export_cross_encoder` wrote; sentence-transformers calls this.

        Args:
            model_name_or_path: the folder or Hub id.
            token, cache_folder, revision, local_files_only: as in `Unimodal.from_pretrained`.
            model_kwargs: `dtype` (or `torch_dtype`), `device_map` of one device, `attn_implementation="sdpa"`.
            processor_kwargs: `model_max_length`, the longest text in tokens.
            config_kwargs: `num_labels=1`.
            backend: `torch`.
            place: where in the folder the module is, and who is trusted; it is the folder itself, and no code is read.

        Raises:
            ValueError: a setting that this model does not have.
        """
        settings = load_settings(model_kwargs, processor_kwargs, config_kwargs, backend)
        module = cls(
            Unimodal.from_pretrained(
                model_name_or_path,
                device=settings.device,
                dtype=settings.dtype,
                revision=revision,
                cache_folder=cache_folder,
                local_files_only=local_files_only,
                token=token,
                heads=cls.heads,
            )
        )
        module.max_seq_length = settings.max_length
        return module

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens; longer ones are cut. It can be set, up to what the checkpoint was saved with; None sets that."""
        return self.processor.max_length

    @max_seq_length.setter
    def max_seq_length(self, length: int | None) -> None:
        self.processor.max_length = self._length(length, "max_seq_length")

    def _length(self, length: int | None, name: str) -> int:
        return self.longest if length is None else integer(length, name, least=SHORTEST, most=self.longest)

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        task: str | None = None,
        max_length: int | None = None,
        processing_kwargs: dict[str, Any] | None = None,
    ) -> Features:
        """What a model reads -> features, one row for each input.

        Args:
            inputs: texts, images, or dicts of both; to a CrossEncoder pairs of them.
            prompt: put before every text; to a vision-language model the instruction.
            task: "query" or "document", as sentence-transformers says; it chose the prompt by it, and nothing else depends on it.
            max_length: longest text in tokens, for this call.
            processing_kwargs: the same as sentence-transformers writes it: `{"text": {"max_length": 16}}`.
        """
        return self._features(inputs, prompt, self._reader(max_length, processing_kwargs))

    def _features(self, inputs: Sequence[Any], prompt: str | None, reader: Any) -> Features:
        raise NotImplementedError

    def _reader(self, max_length: int | None, processing_kwargs: dict[str, Any] | None) -> Any:
        """The processor for one call: with a longest text of its own, where one is given."""
        length = text_length(processing_kwargs)
        if length is None and max_length is None:
            return self.processor
        reader = copy.copy(self.processor)
        reader.max_length = self._length(max_length if length is None else length, "max_length")
        return reader

    def save(self, output_path: str, safe_serialization: bool = True) -> None:
        """Write the checkpoint, with the heads that are loaded and without a card; sentence-transformers calls this and adds its own files,
        a card among them unless `create_model_card=False`.

        Raises:
            ValueError: safe_serialization=False, which would be a pickle.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: checkpoints are safetensors alone; leave the argument out")
        self.unimodal.save_pretrained(output_path)
        (Path(output_path) / "README.md").unlink(missing_ok=True)

    def _items(self, items: Sequence[Item], prompt: str | None, reader: Any) -> Features:
        """Items, each with an image, a text or both, as features; the prompt comes before every text."""
        if self.model.backbone.whole:
            return conversation_features(reader.items(items, prompt))
        pictured, worded = ([i for i, item in enumerate(items) if getattr(item, kind) is not None] for kind in KINDS)
        features: Features = {}
        if pictured:
            pixels = reader.images([load_image(items[i].image) for i in pictured])
            features |= picture_features(pixels, pictured, len(items))
        if worded:
            ids, mask = reader.texts([f"{prompt or ''}{items[i].text}" for i in worded])
            reads_padding = getattr(reader, "pad_to_max", False)
            features |= text_features(ids, mask, worded, len(items), reads_padding=reads_padding)
        return features

    def _image(self, features: Features, rows: Tensor) -> ImageState:
        pixels = conversations(features, rows) if self.model.backbone.whole else pictures(features, rows)
        return self.model.encode_image(self._moved(pixels))

    def _moved(self, pixels: Pixels) -> Any:
        return move_pixels(pixels, self.model.log_scale.device, self.model.log_scale.dtype)

    def _text(self, features: Features, rows: Tensor) -> TextState:
        return self.model.encode_text(*texts(features, rows))


class SentenceTransformerModule(_Module):
    """The embeddings of a model as the only module of a `sentence_transformers.SentenceTransformer`.

    Raises:
        ValueError: the model has no embedding, or one vector per query for an image, where a SentenceTransformer has one in all.
    """

    heads = ("embedding",)

    def __init__(self, model: Unimodal) -> None:
        _require_one_vector(model.model.config)
        super().__init__(model)

    def _features(self, inputs: Sequence[Any], prompt: str | None, reader: Any) -> Features:
        """Items -> features, one row for each item; see `unimodal.adapters.features`."""
        return self._items(as_items([decoded(item) for item in inputs]), prompt, reader)

    def forward(self, features: Features) -> Features:
        """Adds `sentence_embedding` [n, E]: unit vectors; an item with image and text has the normalised mean of its two."""
        vectors = self.model.log_scale.new_zeros(count_of(features), self.model.embedding.dim, dtype=torch.float32)
        pictured, worded = rows_with_pictures(features), rows_with_texts(features)
        if len(pictured):
            embedding = self.model.image_embedding(self._image(features, pictured))
            vectors = vectors.index_add(0, pictured, embedding.float())
        if len(worded):
            embedding = self.model.text_embedding(self._text(features, worded))
            vectors = vectors.index_add(0, worded, embedding.float())
        return features | {"sentence_embedding": F.normalize(vectors, dim=-1)}

    def get_embedding_dimension(self) -> int:
        """E."""
        return self.model.embedding.dim


class CrossEncoderModule(_Module):
    """The matching head of a model as the only module of a `sentence_transformers.CrossEncoder`.

    Raises:
        ValueError: the model has no matching head.
    """

    heads = ("matching",)

    def __init__(self, model: Unimodal) -> None:
        model.model.head("matching")
        super().__init__(model)
        self.judges = model.encoder.judges

    def _features(self, inputs: Sequence[Any], prompt: str | None, reader: Any) -> Features:
        """Pairs of an image and a text, in either order -> features of one row for each pair, and which distinct image and text each has;
        to a vision-language model pairs of a query and a document of any kind -> a conversation each. Single items, whose tokens
        sentence-transformers counts for a model card, give features without scores.
        """
        if not any(isinstance(pair, list | tuple) for pair in inputs):
            return self._items(as_items([decoded(item) for item in inputs]), prompt, reader)
        if self.judges:
            whole = [as_pair(pair, f"pair {i}: ", whole=True) for i, pair in enumerate(inputs)]
            rows = [reader.pair(*pair, prompt, f"pair {i}: ") for i, pair in enumerate(whole)]
            return conversation_features(reader.batch(rows, "left"))
        pairs = [as_pair(pair, f"pair {i}: ") for i, pair in enumerate(inputs)]
        features: Features = {}
        for kind, items in zip(KINDS, zip(*pairs)):
            distinct, index = _distinct(items)
            read = self._items(distinct, prompt, reader)
            features |= {name: part[index] for name, part in read.items()} | {f"{kind}_index": index}
        return features

    def forward(self, features: Features) -> Features:
        """Adds `scores` [P, 1]: match logits, calibrated where the checkpoint is, so that their sigmoid is the match probability.

        A calibration belongs to the weights that it was measured on: in training the logits are plain, and the calibration is let go.
        """
        if self.judges:
            rows = torch.arange(count_of(features))
            logits = self.model.judge(self._moved(conversations(features, rows))).float()
        elif "image_index" in features:
            (pictured, image_index), (worded, text_index) = (_firsts(features[f"{kind}_index"]) for kind in KINDS)
            image, text = self._image(features, pictured), self._text(features, worded)
            logits = self.model.match(image, text, image_index, text_index).float()
        else:
            raise ValueError(
                "got single items, expected pairs of an image and a text, which is what a CrossEncoder scores"
            )
        if self.training and self.unimodal.encoder.calibration is not None:
            warnings.warn(
                "training lets go of the calibration, which was measured on the weights before; calibrate again afterwards",
                stacklevel=2,
            )
            self.unimodal.encoder.calibration = None
        if (calibration := self.unimodal.encoder.calibration) is not None:
            logits = calibration.scale * logits + calibration.offset
        return features | {"scores": logits[:, None]}


def export_sentence_transformer(
    name_or_path: str | Path, folder: str | Path, *, prompts: dict[str, str] | None = None
) -> Path:
    """Write a checkpoint as a folder that `SentenceTransformer` loads; needs no sentence-transformers itself.

    Args:
        name_or_path: the checkpoint: a folder or a Hub id.
        folder: the place; another checkpoint of this library there is replaced.
        prompts: what to put before texts, by name; `encode_query` uses `query`, `encode_document` `document`. None takes those that
            the checkpoint was saved with.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: the folder holds something else.
        unimodal.hub.CheckpointError: it is no checkpoint of this library.
        ValueError: the model has no embedding, or one vector per query for an image; or the folder is the checkpoint itself.
    """
    checkpoint = find_checkpoint(name_or_path)
    contents = read_contents(checkpoint)
    _require_one_vector(contents.model)
    settings = {
        "prompts": contents.prompts if prompts is None else prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    return _export(checkpoint, Path(folder), "SentenceTransformer", settings)


def export_cross_encoder(name_or_path: str | Path, folder: str | Path) -> Path:
    """Write a checkpoint as a folder that `CrossEncoder` loads; arguments and errors as in `export_sentence_transformer`.

    Raises:
        ValueError: the model has no matching head.
    """
    checkpoint = find_checkpoint(name_or_path)
    if read_contents(checkpoint).model.matching is None:
        raise ValueError(
            f"{checkpoint} has no matching head, which is what a CrossEncoder scores with; train one first"
        )
    settings: dict[str, Any] = {
        "prompts": {},
        "default_prompt_name": None,
        "activation_fn": "torch.nn.modules.activation.Sigmoid",
    }
    return _export(checkpoint, Path(folder), "CrossEncoder", settings)


def _export(checkpoint: Path, folder: Path, model_type: str, settings: dict[str, Any]) -> Path:
    if folder.resolve() == checkpoint.resolve():
        raise ValueError(f"{folder} is the checkpoint itself; give another folder")
    module = {"idx": 0, "name": "0", "path": "", "type": f"unimodal.adapters.{model_type}Module"}
    settings = {"model_type": model_type, "requirements": {"unimodal": f">={__version__}"}, **settings}
    with replacing(folder, is_ours) as fresh:
        for path in checkpoint.iterdir():
            if is_checkpoint_file(path.name):
                shutil.copy(path, fresh / path.name)
        for name, content in (("modules.json", [module]), ("config_sentence_transformers.json", settings)):
            (fresh / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _require_one_vector(config: ModelConfig) -> None:
    if config.embedding is None:
        raise ValueError(
            "this model has no embedding head, which is what a SentenceTransformer encodes with; train one first"
        )
    if config.embedding.pool == "query":
        raise ValueError(
            "this model has one vector per query for an image, and a SentenceTransformer has one in all; its matching head works as a "
            "CrossEncoder"
        )


def _distinct(items: Sequence[Item]) -> tuple[list[Item], Tensor]:
    """The different ones among items, and which of them each is [P]."""
    different = {identity(item): item for item in items}
    place = {key: i for i, key in enumerate(different)}
    return list(different.values()), torch.tensor([place[identity(item)] for item in items])


def _firsts(index: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each distinct item [D], and which of these each pair has [P]; a batch may be a part of what was preprocessed."""
    distinct, place = index.unique(return_inverse=True)
    rows = torch.arange(len(index), device=index.device)
    first = rows.new_full((len(distinct),), len(index)).scatter_reduce(0, place, rows, "amin")
    return first, place
