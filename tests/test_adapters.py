"""Other programs' evaluation runs on our models: by their written protocols, and by their own code where it is installed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_model, toy_processor

from unimodal import Unimodal
from unimodal.adapters import MtebModel, clip_benchmark_model, programs
from unimodal.data import Scenes
from unimodal.metrics import first_stage

COUNT = 8


@pytest.fixture(scope="module")
def model() -> Unimodal:
    return Unimodal(toy_model(), toy_processor(), prompts={"query": "a red "})


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes("test", count=COUNT)


def recall_at_3(model: Unimodal, scenes: Scenes) -> tuple[float, float]:
    """What both programs should find: (caption to image, image to caption)."""
    image = model.encode([scenes.image(i) for i in range(COUNT)], convert_to_tensor=True)
    text = model.encode([c for i in range(COUNT) for c in scenes.captions(i)], convert_to_tensor=True)
    found = first_stage(image, text, torch.arange(COUNT).repeat_interleave(5))
    return tuple((side.rank <= 3).float().mean().item() for side in found)


TASK = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}


def test_mteb_batches_are_encoded(model: Unimodal, scenes: Scenes) -> None:
    adapter = MtebModel(model, "me/mine")
    texts, images = ["a circle", "a square", "a star"], [scenes.image(i) for i in range(3)]
    vectors = adapter.encode([{"text": texts[:2]}, {"text": texts[2:]}], **TASK)
    assert vectors.shape == (3, 16) and vectors == pytest.approx(model.encode(texts), abs=1e-5)
    assert adapter.encode([{"image": images}], **TASK) == pytest.approx(model.encode(images), abs=1e-5)
    asked = adapter.encode([{"text": texts}], prompt_type="query", **TASK)
    assert asked == pytest.approx(model.encode(texts, prompt="a red "), abs=1e-5)
    both = adapter.encode([{"image": images, "text": texts}], **TASK)
    pairs = [{"image": i, "text": t} for i, t in zip(images, texts)]
    assert both == pytest.approx(model.encode(pairs), abs=1e-5)
    assert adapter.similarity_pairwise(vectors, asked) == pytest.approx(adapter.similarity(vectors, asked).diag())
    with pytest.raises(ValueError, match=r"got a batch of \['audio'\]"):
        adapter.encode([{"audio": [1]}], **TASK)


def test_clip_model_has_the_parts_of_open_clip(model: Unimodal, scenes: Scenes) -> None:
    clip, transform, tokenizer = clip_benchmark_model(model)
    pixels = torch.stack([transform(scenes.image(i)) for i in range(3)])
    assert torch.allclose(
        clip.encode_image(pixels), model.encode([scenes.image(i) for i in range(3)], convert_to_tensor=True), atol=1e-5
    )
    texts = ["a circle", "a small red square left of a star"]
    assert torch.allclose(clip.encode_text(tokenizer(texts)), model.encode(texts, convert_to_tensor=True), atol=1e-5)
    assert tokenizer("a circle").shape[0] == 1


def test_one_vector_per_query_is_refused() -> None:
    many = Unimodal(toy_model(embedding={"dim": 16, "pool": "query"}), toy_processor())
    with pytest.raises(ValueError, match="one vector per query for an image"):
        clip_benchmark_model(many)


def test_clip_benchmark_evaluates(model: Unimodal, scenes: Scenes) -> None:
    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    clip, transform, tokenizer = clip_benchmark_model(model)
    batches = [
        (torch.stack([transform(scenes.image(i)) for i in rows]), [scenes.captions(i) for i in rows])
        for rows in (range(5), range(5, COUNT))
    ]
    found = retrieval.evaluate(clip, batches, tokenizer, "cpu", amp=False, recall_k_list=[3])
    t2i, i2t = recall_at_3(model, scenes)
    assert found["image_retrieval_recall@3"] == pytest.approx(t2i)
    assert found["text_retrieval_recall@3"] == pytest.approx(i2t)


def toy_task(scenes: Scenes) -> Any:
    """A task of mteb: captions find the scenes that they describe."""
    datasets = pytest.importorskip("datasets")
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Toy(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="ToyT2IRetrieval", description="captions find scenes", type="Any2AnyRetrieval", category="t2i",
            modalities=["text", "image"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
            dataset={"path": "none/none", "revision": "1"}, reference=None, date=None, domains=None,
            task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None,
            bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, *args, **kwargs) -> None:
            captions = [(i, c) for i in range(COUNT) for c in scenes.captions(i)]
            self.dataset = {"default": {"test": {
                "corpus": datasets.Dataset.from_dict(
                    {"id": [f"i{i}" for i in range(COUNT)], "image": [scenes.image(i) for i in range(COUNT)]}
                ).cast_column("image", datasets.Image()),
                "queries": datasets.Dataset.from_dict(
                    {"id": [f"q{q}" for q in range(len(captions))], "text": [c for _, c in captions]}
                ),
                "relevant_docs": {f"q{q}": {f"i{i}": 1} for q, (i, _) in enumerate(captions)},
                "top_ranked": None,
            }}}  # fmt: skip
            self.data_loaded = True

    return Toy


def test_mteb_evaluates(model: Unimodal, scenes: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    mteb = pytest.importorskip("mteb")
    # datasets 5.2 names a table by a hash that fails under pyarrow 26; the name does not matter here
    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", lambda dataset: "toy")
    from mteb.models.models_protocols import EncoderProtocol

    adapter = MtebModel(Unimodal(model.model, model.encoder.processor), "me/mine", "1")
    assert isinstance(adapter, EncoderProtocol)
    scores = (
        mteb.evaluate(adapter, toy_task(scenes)(), cache=None, show_progress_bar=False)
        .task_results[0]
        .scores["test"][0]
    )
    assert scores["recall_at_3"] == pytest.approx(recall_at_3(model, scenes)[0], abs=1e-4)


# Command lines.


@pytest.fixture(scope="module")
def checkpoint(model: Unimodal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "demo" / "model"
    Unimodal(model.model, model.processor).save_pretrained(folder)
    return folder


def test_the_command_line_of_mteb_finds_a_checkpoint(
    checkpoint: Path, scenes: Scenes, model: Unimodal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mteb")
    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", lambda dataset: "toy")
    monkeypatch.setitem(sys.modules["mteb.get_tasks"]._TASKS_REGISTRY, "ToyT2IRetrieval", toy_task(scenes))
    arguments = [
        "run",
        "-m",
        str(checkpoint),
        "-t",
        "ToyT2IRetrieval",
        "--output-folder",
        str(tmp_path),
    ]
    assert programs.main(["mteb", *arguments]) == 0
    (results,) = tmp_path.rglob("ToyT2IRetrieval.json")
    assert "demo__model" in str(results)
    (scores,) = json.loads(results.read_text())["scores"]["test"]
    assert scores["recall_at_3"] == pytest.approx(recall_at_3(model, scenes)[0], abs=1e-4)


def test_the_command_line_of_clip_benchmark_finds_a_checkpoint(
    checkpoint: Path, scenes: Scenes, model: Unimodal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("clip_benchmark")

    def dataset(*, transform: Any, **options: Any) -> list[Any]:
        return [(transform(scenes.image(i)), scenes.captions(i)) for i in range(COUNT)]

    monkeypatch.setattr("clip_benchmark.cli.build_dataset", dataset)
    arguments = ["eval", "--model_type", "unimodal", "--model", "mine", "--pretrained", str(checkpoint), "--no_amp"]
    arguments += ["--dataset", "mscoco_captions", "--recall_k", "3", "--num_workers", "0"]
    assert programs.main(["clip_benchmark", *arguments, "--output", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["metrics"]
    t2i, i2t = recall_at_3(model, scenes)
    assert (found["image_retrieval_recall@3"], found["text_retrieval_recall@3"]) == pytest.approx((t2i, i2t))


def test_other_programs_and_missing_checkpoints_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.main([]) == programs.main(["pytest", "-q"]) == 2
    assert "usage: python -m unimodal.adapters {mteb,clip_benchmark}" in capsys.readouterr().err
    pytest.importorskip("mteb")
    assert programs.main(["mteb", "run", "-m", "no/such/folder", "-t", "x"]) == 1
    assert "unimodal.adapters: no/such/folder: no such folder here" in capsys.readouterr().err


def test_a_program_that_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for program, extra in (("mteb", "mteb"), ("clip_benchmark", "clip-benchmark")):
        monkeypatch.setitem(sys.modules, program, None)
        assert programs.main([program, "run", "-m", "x"]) == 1
        assert f"pip install 'unimodal[{extra}]'" in capsys.readouterr().err
