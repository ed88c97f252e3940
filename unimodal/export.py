"""A model as ONNX graphs: both encoders and the matching head, to run where there is neither torch nor this package.

    image_encoder.onnx    pixels [B, 3, S, S] -> image_embedding [B, E] ([B, N, E] with one vector per query), image_tokens [B, N, W]
    text_encoder.onnx     ids [M, L] int64, mask [M, L] bool (True = real token) -> text_embedding [M, E], text_tokens [M, L, D]
    matching.onnx         image_tokens [P, N, W], text_tokens [P, L, D], mask [P, L], of P pairs row by row -> logits [P]
    onnx.json             these names and shapes, the model's fingerprint, how a logit becomes a probability, what the check found
    tokenizer*, preprocessor_config.json    the processor: what pixels and ids are made with

Embeddings are unit vectors; with one vector per query the best of an image's N counts. A matching head in the bridge (BLIP-2) reads the
backbone's image tokens [P, T, D], and `ids` in place of text_tokens, which its text encoder leaves out. A model without a matching head
has neither tokens nor matching.onnx. Batch sizes and text lengths are free, apart from those of the processor (`max_length`).

Legend: B images, M texts, P pairs, T image tokens, N queries, L text length, S image side, D backbone width, W bridge width, E embedding
width.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimodal import __version__, files
from unimodal.hub.example import differences
from unimodal.inference import Unimodal
from unimodal.model import UnimodalModel

LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # the largest difference to torch, on the scale of `unimodal.hub.example.differences`
TRACED, CHECKED = 3, (1, 2, 5)  # batch sizes; none of the second has the text length of the first
FILE_LIMIT = 2**30  # bytes of weights from which they lie beside their graph; a single ONNX file ends at 2 GiB
SENTENCE = "a small red circle is left of a large blue square, and a dog runs there"
AXES = {"batch": 0, "length": 1}
FREE = {  # the free axes of every tensor
    "pixels": ("batch",),
    "ids": ("batch", "length"),
    "mask": ("batch", "length"),
    "image_embedding": ("batch",),
    "image_tokens": ("batch",),
    "text_embedding": ("batch",),
    "text_tokens": ("batch", "length"),
    "logits": ("batch",),
}


@dataclass
class Graph:
    """One file: a function of the model and the tensors `inputs`, which returns the tensors `outputs`."""

    file: str
    function: Callable[..., Sequence[Tensor]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, model: UnimodalModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for the inputs among `values`, by torch."""
        return dict(zip(self.outputs, self.function(model, *(values[name] for name in self.inputs))))


def export_onnx(model: Unimodal, folder: str | Path) -> Path:
    """Write a model's encoders and its matching head as ONNX, each compared with torch by onnxruntime before anything is left behind.

    Args:
        model: on the CPU, in float32.
        folder: the place; it may not hold anything yet.

    Raises:
        ImportError: one of onnx, onnxruntime, onnxscript is not installed.
        FileExistsError: the folder holds something.
        ValueError: another device or precision, a backbone that reads pictures in their own sizes, a model without an embedding, or a
            graph that computes something else than torch.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise ImportError(f"export to ONNX needs {', '.join(missing)}: pip install 'unimodal[onnx]'")
    parameter = model.model.log_scale
    if (parameter.device.type, parameter.dtype) != ("cpu", torch.float32):
        raise ValueError(
            f"export to ONNX takes a model on the CPU in float32, got {parameter.dtype} on {parameter.device}; "
            "load it without device and dtype"
        )
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - files.BOOKKEEPING):
        raise FileExistsError(f"{folder} exists and is not an empty folder; give another one, or remove it first")
    with files.replacing_contents(folder, lambda name: False) as place:
        model.processor.save_pretrained(place)
        files.write_json(place / "onnx.json", {**_about(model), "graphs": _write(model, place)})
    return folder


def graphs(model: UnimodalModel) -> list[Graph]:
    """The graphs that a model has."""
    matcher = model.matcher
    if matcher is None:
        return [
            Graph("image_encoder.onnx", _image_embedding, ("pixels",), ("image_embedding",)),
            Graph("text_encoder.onnx", _text_embedding, ("ids", "mask"), ("text_embedding",)),
        ]
    kept = matcher.text_kept
    texts = Graph("text_encoder.onnx", _text_and_kept, ("ids", "mask"), ("text_embedding", kept))
    if kept == "ids":  # what went in
        texts = Graph("text_encoder.onnx", _text_embedding, ("ids", "mask"), ("text_embedding",))
    return [
        Graph("image_encoder.onnx", _image_and_kept, ("pixels",), ("image_embedding", "image_tokens")),
        texts,
        Graph("matching.onnx", _match, ("image_tokens", kept, "mask"), ("logits",)),
    ]


def _image_embedding(model: UnimodalModel, pixels: Tensor) -> tuple[Tensor]:
    return (model.image_embedding(model.encode_image(pixels)),)


def _image_and_kept(model: UnimodalModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    state = model.encode_image(pixels)
    return model.image_embedding(state), model.head("matching").image_kept(state)[0]


def _text_embedding(model: UnimodalModel, ids: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (model.text_embedding(model.encode_text(ids, mask)),)


def _text_and_kept(model: UnimodalModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    state = model.encode_text(ids, mask)
    return model.text_embedding(state), model.head("matching").kept_of_text(state)


def _match(model: UnimodalModel, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (model.head("matching").rows(model, image, text, mask),)


class _Module(nn.Module):
    """A function of a model and tensors as the module that the exporter takes."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], model: UnimodalModel) -> None:
        super().__init__()
        self.function, self.model = function, model
        self.training = False

    def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self.function(self.model, *tensors)


def _about(model: Unimodal) -> dict[str, Any]:
    matching, calibration = model.model.config.matching, model.encoder.calibration
    about: dict[str, Any] = {
        "library": "unimodal",
        "version": __version__,
        "fingerprint": model.encoder.fingerprint(),
        "max_length": model.processor.max_length,
        "embedding": {"dim": model.model.embedding.dim, "one_vector_per_query": model.model.embedding.pool == "query"},
    }
    if matching is not None:
        scale, offset = (1.0, 0.0) if calibration is None else (calibration.scale, calibration.offset)
        about["matching"] = matching.kind
        about["probability"] = {"is": "sigmoid(scale * logit + offset)", "scale": scale, "offset": offset}
    return about


def _inputs(model: Unimodal, batch: int) -> dict[str, Tensor]:
    """A batch of noise for pictures and of texts of different lengths, as the processor makes them."""
    pixels = model.model.backbone.random_pixels(batch, torch.Generator().manual_seed(batch))
    if isinstance(pixels, dict):
        raise ValueError(
            "export to ONNX: this backbone reads pictures in their own sizes, as patches; choose one whose pictures have one size"
        )
    ids, mask = model.processor.texts([SENTENCE[: 6 + 18 * i] for i in range(batch)])
    return {"pixels": pixels, "ids": ids, "mask": mask}


@torch.no_grad()
def _write(model: Unimodal, folder: Path) -> dict[str, Any]:
    """Export every graph and check it; returns its description by its file's name."""
    network = model.model
    values, checks = _inputs(model, TRACED), [_inputs(model, batch) for batch in CHECKED]
    described = {}
    for graph in graphs(network):
        _export(graph, network, values, folder / graph.file)
        difference = _compare(graph, network, checks, folder / graph.file)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{graph.file}: onnxruntime and torch differ by {difference:.2g} (allowed {TOLERANCE:g}); "
                "compare the versions of torch, onnxscript and onnxruntime"
            )
        values |= graph(network, values)
        for check in checks:
            check |= graph(network, check)
        inputs, outputs = (
            {name: _described(name, values[name]) for name in names} for names in (graph.inputs, graph.outputs)
        )
        described[graph.file] = {"inputs": inputs, "outputs": outputs, "largest_difference": difference}
    return described


def _export(graph: Graph, model: UnimodalModel, values: dict[str, Tensor], path: Path) -> None:
    free = tuple({AXES[axis]: axis for axis in FREE[name]} for name in graph.inputs)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")  # that two inputs share an axis
        torch.onnx.export(
            _Module(graph.function, model),
            tuple(values[name] for name in graph.inputs),
            path,
            dynamo=True,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=(free,),
            external_data=weights > FILE_LIMIT,
            verbose=False,
        )


def _compare(graph: Graph, model: UnimodalModel, checks: Sequence[dict[str, Tensor]], path: Path) -> float:
    """The largest difference between onnxruntime and torch on any batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    found: list[float] = []
    for values in checks:
        outputs = session.run(graph.outputs, {name: values[name].numpy() for name in graph.inputs})
        found += differences(graph(model, values), dict(zip(graph.outputs, map(torch.from_numpy, outputs)))).values()
    return torch.tensor(found).max().item()  # unlike Python's max, not a number where one of them is none


def _described(name: str, value: Tensor) -> dict[str, Any]:
    shape: list[int | str] = list(value.shape)
    for axis in FREE[name]:
        shape[AXES[axis]] = axis
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
