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

Legend: n items, I images, M texts, P pairs, E embedding width, S image side, L text length.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimodal import __version__
from unimodal.backbones import move_pixels
from unimodal.config import ModelConfig
from unimodal.data.images import load_image
from unimodal.data.items import Item, as_items
from unimodal.hub import find_checkpoint
from unimodal.hub.contents import is_ours, read_contents
from unimodal.hub.folder import is_checkpoint_file, replacing
from unimodal.inference import Unimodal, as_pair, identity
from unimodal.model import ImageState, TextState


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
            model_kwargs: `dtype` is understood.
            processor_kwargs, config_kwargs, backend: only their defaults are.
            place: where in the folder the module is, and who is trusted; it is the folder itself, and no code is read.

        Raises:
            ValueError: a setting that this model does not have.
        """
        settings = dict(model_kwargs or {})
        dtype = settings.pop("dtype", None)
        unknown = [*settings, *(processor_kwargs or {}), *(config_kwargs or {})]
        if unknown or backend != "torch":
            raise ValueError(
                f"a unimodal checkpoint is loaded as it is, with `dtype` alone among model_kwargs and backend='torch'; got "
                f"{', '.join(unknown) or f'backend={backend!r}'}; for ONNX use `unimodal export onnx`"
            )
        return cls(
            Unimodal.from_pretrained(
                model_name_or_path,
                dtype=dtype,
                revision=revision,
                cache_folder=cache_folder,
                local_files_only=local_files_only,
                token=token,
                heads=cls.heads,
            )
        )

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens."""
        return self.processor.max_length

    def save(self, output_path: str, safe_serialization: bool = True) -> None:
        """Write the checkpoint, with the heads that are loaded; sentence-transformers calls this and adds its own files.

        Raises:
            ValueError: safe_serialization=False, which would be a pickle.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: checkpoints are safetensors alone; leave the argument out")
        self.unimodal.save_pretrained(output_path)

    def _read(self, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
        """Images and texts as the model takes them, what is not there left out: `pixels` [I, 3, S, S], or `pixels.*` where a processor
        makes several tensors; input_ids and attention_mask [M, L]."""
        features: dict[str, Tensor] = {}
        if images:
            features |= _named(self.processor.images([load_image(image) for image in images]))
        if texts:
            features["input_ids"], features["attention_mask"] = self.processor.texts(texts)
        return features

    def _pixels(self, features: dict[str, Tensor]) -> Any:
        named = {name.removeprefix("pixels."): part for name, part in features.items() if name.startswith("pixels.")}
        return move_pixels(named or features["pixels"], self.model.log_scale.device, self.model.log_scale.dtype)

    def _image(self, features: dict[str, Tensor]) -> ImageState:
        return self.model.encode_image(self._pixels(features))

    def _text(self, features: dict[str, Tensor]) -> TextState:
        return self.model.encode_text(features["input_ids"], features["attention_mask"])


class SentenceTransformerModule(_Module):
    """The embeddings of a model as the only module of a `sentence_transformers.SentenceTransformer`.

    Raises:
        ValueError: the model has no embedding, or one vector per query for an image, where a SentenceTransformer has one in all.
    """

    heads = ("embedding",)

    def __init__(self, model: Unimodal) -> None:
        _require_one_vector(model.model.config)
        super().__init__(model)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """Items -> tensors, and for each image and text the row of the item that it belongs to.

        Args:
            inputs: texts, images, or dicts of both.
            prompt: put before every text; to a vision-language model the instruction.
            task: "query" or "document", as sentence-transformers says; it chose the prompt by it, and nothing else depends on it.
        """
        items = as_items(list(inputs))
        if self.model.backbone.whole:
            return self._conversations(items, prompt)
        rows = {
            kind: [i for i, item in enumerate(items) if getattr(item, kind) is not None] for kind in ("image", "text")
        }
        features = self._read(
            [items[i].image for i in rows["image"]], [f"{prompt or ''}{items[i].text}" for i in rows["text"]]
        )
        return features | {f"{kind}_rows": torch.tensor(places) for kind, places in rows.items() if places}

    def _conversations(self, items: Sequence[Item], instruction: str | None) -> dict[str, Tensor]:
        """Each item as one sequence; those with pictures apart from mere texts, as `Unimodal.encode` reads them."""
        features: dict[str, Tensor] = {}
        for kind, seen in (("image", True), ("text", False)):
            rows = [i for i, item in enumerate(items) if bool(item.images or item.video) is seen]
            if not rows:
                continue
            batch = self.processor.items([items[i] for i in rows], instruction)
            features |= _named(batch) if seen else {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
            features[f"{kind}_rows"] = torch.tensor(rows)
        return features

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds `sentence_embedding` [n, E]: unit vectors; an item with image and text has the normalised mean of its two."""
        vectors, rows = [], []
        if "image_rows" in features:
            vectors.append(self.model.image_embedding(self._image(features)))
            rows.append(features["image_rows"])
        if "text_rows" in features:
            vectors.append(self.model.text_embedding(self._text(features)))
            rows.append(features["text_rows"])
        row, vector = torch.cat(rows), torch.cat(vectors).float()
        summed = vector.new_zeros(int(row.max()) + 1, vector.shape[1]).index_add(0, row, vector)
        return features | {"sentence_embedding": F.normalize(summed, dim=-1)}

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

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None) -> dict[str, Tensor]:
        """Pairs of an image and a text, in either order -> tensors of the distinct images and texts, and which of them each pair is; to a
        vision-language model pairs of a query and a document of any kind -> a conversation each.

        Args:
            inputs: the pairs.
            prompt: put before every text; to a vision-language model the instruction.
        """
        if self.judges:
            whole = [as_pair(pair, f"pair {i}: ", whole=True) for i, pair in enumerate(inputs)]
            rows = [self.processor.pair(*pair, prompt, f"pair {i}: ") for i, pair in enumerate(whole)]
            return _named(self.processor.batch(rows, "left"))
        pairs = [as_pair(pair, f"pair {i}: ") for i, pair in enumerate(inputs)]
        images, image_index = _distinct([image for image, _ in pairs])
        texts, text_index = _distinct([text for _, text in pairs])
        features = self._read([item.image for item in images], [f"{prompt or ''}{item.text}" for item in texts])
        return features | {"image_index": image_index, "text_index": text_index}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds `scores` [P, 1]: match logits, calibrated where the checkpoint is, so that their sigmoid is the match probability."""
        if self.judges:
            logits = self.model.judge(self._pixels(features)).float()
        else:
            image, text = self._image(features), self._text(features)
            logits = self.model.match(image, text, features["image_index"], features["text_index"]).float()
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
        prompts: what to put before texts, by name; `encode_query` uses `query`, `encode_document` `document`.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: the folder holds something else.
        unimodal.hub.CheckpointError: it is no checkpoint of this library.
        ValueError: the model has no embedding, or one vector per query for an image; or the folder is the checkpoint itself.
    """
    checkpoint = find_checkpoint(name_or_path)
    _require_one_vector(read_contents(checkpoint).model)
    settings = {"prompts": prompts or {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
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


def _named(pixels: Any) -> dict[str, Tensor]:
    """Pixels as features of their own names."""
    return {f"pixels.{name}": part for name, part in pixels.items()} if isinstance(pixels, dict) else {"pixels": pixels}


def _distinct(items: Sequence[Item]) -> tuple[list[Item], Tensor]:
    """The different ones among items, and which of them each is [P]."""
    different = {identity(item): item for item in items}
    place = {key: i for i, key in enumerate(different)}
    return list(different.values()), torch.tensor([place[identity(item)] for item in items])
