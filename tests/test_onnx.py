"""ONNX graphs give what the model gives, for batches and texts of any size, on inputs that the export has not seen."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_config, toy_model, toy_processor

from unimodal import Unimodal, cli, export
from unimodal.data import Processor, Scenes
from unimodal.search import Calibration

LIBRARIES = pytest.mark.skipif(not all(map(find_spec, export.LIBRARIES)), reason="needs unimodal[onnx]")
TEXTS = [
    "a",
    "a red star",
    "two small green triangles are above a large grey square, and a circle is left of them",
    "circle",
    "a blue thing and another blue thing",
]


def small(**parts: Any) -> Unimodal:
    """A model of one layer each, since the exporter's time grows with them."""
    backbone = asdict(toy_config().backbone)
    backbone["text"]["kwargs"]["num_hidden_layers"] = 1
    bridge = {"width": 32, "layers": 1, "heads": 2, "intermediate": 64, "queries": {"image": 4, "text": 3}}
    return Unimodal(
        toy_model(backbone=backbone, bridge=bridge, captioning=None, generation=None, **parts), toy_processor()
    )


class Runtime:
    """An exported folder, used as a user of onnxruntime would: by what onnx.json says, with the processor beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.about = folder, json.loads((folder / "onnx.json").read_text())
        self.processor = Processor.from_pretrained(folder)

    def __call__(self, name: str, **inputs: Any) -> dict[str, np.ndarray]:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(self.folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        graph = self.about["graphs"][f"{name}.onnx"]
        feed = {key: np.asarray(inputs[key]) for key in graph["inputs"]}
        for key, value in feed.items():
            assert value.dtype == graph["inputs"][key]["dtype"]
        found = dict(zip(graph["outputs"], session.run(list(graph["outputs"]), feed)))
        for key, value in found.items():
            said = graph["outputs"][key]["shape"]
            assert all(isinstance(a, str) or a == b for a, b in zip(said, value.shape, strict=True)), key
        return found


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes("test", count=5)


def compare(model: Unimodal, runtime: Runtime, scenes: Scenes, count: int, texts: list[str]) -> dict[str, np.ndarray]:
    """The encoders on the first `count` pictures and on `texts`, then the matching head on all their pairs, against the model."""
    pictures = [scenes.image(i) for i in range(count)]
    ids, mask = runtime.processor.texts(texts)
    image = runtime("image_encoder", pixels=runtime.processor.images(pictures))
    assert image["image_embedding"] == pytest.approx(model.encode(pictures), abs=1e-5)
    read = {"ids": ids, "mask": mask}
    if "text_encoder.onnx" in runtime.about["graphs"]:
        read |= runtime("text_encoder", ids=ids, mask=mask)
        assert read["text_embedding"] == pytest.approx(model.encode(texts), abs=1e-5)

    i, t = (rows.reshape(-1) for rows in np.mgrid[:count, : len(texts)])
    read = {name: value[t] for name, value in read.items()} | {"image_tokens": image["image_tokens"][i]}
    logits = runtime("matching", **read)["logits"]
    said = runtime.about["probability"]
    probability = 1 / (1 + np.exp(-(said["scale"] * logits + said["offset"])))
    assert probability == pytest.approx(model.predict([(pictures[a], texts[b]) for a, b in zip(i, t)]), abs=1e-5)
    return image


@LIBRARIES
def test_cached_matching_head(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder, out = small(), tmp_path / "model", tmp_path / "new" / "onnx"
    model.encoder.calibration = Calibration(0.5, -0.25, 2, 1, 0.1, 0.0, ((0.5, 1.0),), model.encoder.fingerprint())
    model.save_pretrained(folder)
    assert cli.main(["export", "onnx", "--model", str(folder), "--out", str(out)]) == 0
    assert f"{out}: image_encoder.onnx, matching.onnx, onnx.json" in capsys.readouterr().out
    runtime = Runtime(out)
    assert runtime.about["fingerprint"] == model.encoder.fingerprint() and runtime.about["matching"] == "cached"
    assert runtime.about["probability"] == {"is": "sigmoid(scale * logit + offset)", "scale": 0.5, "offset": -0.25}
    assert all(graph["largest_difference"] < 1e-5 for graph in runtime.about["graphs"].values())
    assert runtime.about["graphs"]["text_encoder.onnx"]["inputs"]["ids"] == {
        "dtype": "int64",
        "shape": ["batch", "length"],
    }
    compare(model, runtime, scenes, 1, TEXTS[:1])
    compare(model, runtime, scenes, 4, TEXTS)


@LIBRARIES
def test_matching_in_the_bridge_and_one_vector_per_query(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = export.graphs
    assert [graph.outputs for graph in every(toy_model(matching={"kind": "bridge"}))][1] == ("text_embedding",)
    # That text encoder is a part of the one above, and the exporter takes its time.
    monkeypatch.setattr(export, "graphs", lambda model: [g for g in every(model) if g.file != "text_encoder.onnx"])
    model = small(matching={"kind": "bridge"}, embedding={"dim": 16, "pool": "query", "gate": False})
    runtime = Runtime(export.export_onnx(model, tmp_path / "onnx"))
    assert list(runtime.about["graphs"]["matching.onnx"]["inputs"]) == ["image_tokens", "ids", "mask"]
    image = compare(model, runtime, scenes, 1, TEXTS[1:2])
    assert runtime.about["embedding"] == {"dim": 16, "one_vector_per_query": True}
    assert image["image_embedding"].shape == (1, 4, 16) and image["image_tokens"].shape == (1, 64, 32)
    compare(model, runtime, scenes, 5, TEXTS[:3])


def test_without_a_matching_head_there_are_the_encoders_alone() -> None:
    found = {graph.file: graph.outputs for graph in export.graphs(toy_model(matching=None))}
    assert found == {"image_encoder.onnx": ("image_embedding",), "text_encoder.onnx": ("text_embedding",)}


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, model = tmp_path / "onnx", small()
    with monkeypatch.context() as without:
        without.setattr(export, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"needs onnx, onnxruntime, onnxscript: pip install 'unimodal\[onnx\]'"):
            export.export_onnx(model, out)
    monkeypatch.setattr(export, "find_spec", lambda name: True)
    with pytest.raises(FileExistsError, match="exists and is not an empty folder; give another one"):
        export.export_onnx(model, Path(__file__).parent)
    half = small()
    half.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"on the CPU in float32, got torch.bfloat16 on cpu; load it without"):
        export.export_onnx(half, out)
    with monkeypatch.context() as other:
        other.setattr(export, "_export", lambda *_: None)
        other.setattr(export, "_compare", lambda *_: float("nan"))
        with pytest.raises(ValueError, match=r"image_encoder.onnx: onnxruntime and torch differ by nan \(allowed"):
            export.export_onnx(model, out)
    with pytest.raises(ValueError, match="this model has no embedding head"):
        export.export_onnx(small(embedding=None, matching=None), out)
    monkeypatch.setattr(model.model.backbone, "random_pixels", lambda *_: {"patches": torch.zeros(1)})
    with pytest.raises(ValueError, match="this backbone reads pictures in their own sizes, as patches; choose one"):
        export.export_onnx(model, out)
    assert list(tmp_path.iterdir()) == []  # a failure leaves nothing behind
