"""Feature caches: the same losses as without, to the precision they keep; resumed after a kill, refused where anything else made them."""

import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_published import saved
from test_tasks import SMALL, data, trainer
from test_tuning import vit_config
from toy import toy_config, toy_model, toy_processor

from unimodal.chunks import by_chunks
from unimodal.config import AdapterConfig, ModelConfig, from_dict, to_dict
from unimodal.data import Scenes
from unimodal.data.features import ImageFeatures, TextFeatures, tower_fingerprint
from unimodal.data.module import PairData
from unimodal.data.negatives import write_negatives
from unimodal.data.store import TokenStore
from unimodal.search import Encoder, mine_negatives
from unimodal.tasks import ITC, ITG, ITM, Joint, MaskedITC
from unimodal.tasks.step import Step

FROZEN = {"*": 1.0, "backbone.vision.*": 0.0, "backbone.text.*": 0.0}


def rows(count: int, width: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + i % 4, width, generator=generator) * 10.0 ** (i % 3) for i in range(count)]


def filled(folder: Path, precision: Any, values: list[torch.Tensor], **about: Any) -> TokenStore:
    store = TokenStore(folder, {"of": "x", **about}, len(values), precision)
    with store.writing():
        for start in range(store.done, len(values), 3):
            store.write(values[start : start + 3], [f"row {i}" for i in range(start, min(start + 3, len(values)))])
    return store


# On disk.


@pytest.mark.parametrize("precision", ["half", "int8"])
def test_rows_come_back_to_their_precision(precision: Any, tmp_path: Path) -> None:
    values = rows(10)
    values[4] = torch.zeros(2, 6)
    filled(tmp_path, precision, values)
    store = TokenStore(tmp_path, {"of": "x"}, 10, precision)
    for i in (7, 0, 4, 9):
        (found,) = store.read([i])
        step = values[i].abs().amax(1, keepdim=True) / (254 if precision == "int8" else 2048)
        assert found.dtype == torch.float32 and bool(((found - values[i]).abs() <= step + 1e-9).all())
    tokens = sum(len(value) for value in values)
    kept = {"half": 2 * 6 * tokens + 4 * 10, "int8": (6 + 4) * tokens + 4 * 10}[precision]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) == kept


def test_values_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1: features up to 7e\+04 are beyond half precision .* to int8"):
        filled(tmp_path / "half", "half", [torch.ones(1, 2), torch.full((1, 2), 7e4)])
    assert filled(tmp_path / "int8", "int8", [torch.full((1, 2), 7e4)]).read([0])[0].tolist() == [[7e4, 7e4]]
    with pytest.raises(ValueError, match="row 0: the backbone's features are not finite; look at the item"):
        filled(tmp_path / "nan", "int8", [torch.tensor([[1.0, float("nan")]])])


@pytest.mark.parametrize("precision", ["half", "int8"])
def test_a_torn_file_loses_only_what_was_not_whole(precision: Any, tmp_path: Path) -> None:
    """Whatever length each file has when the power goes: whole rows stay, and writing goes on after them."""
    values = rows(9)
    whole = filled(tmp_path / "whole", precision, values)
    contents = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.bin")}
    for case in range(12):
        cut = np.random.default_rng(case)
        folder = tmp_path / f"cut{case}"
        folder.mkdir()
        (folder / "manifest.json").write_bytes((tmp_path / "whole/manifest.json").read_bytes())
        for name, content in contents.items():
            (folder / name).write_bytes(content[: cut.integers(len(content) + 1)])
        torn = TokenStore(folder, {"of": "x"}, 9, precision)
        assert torn.done < 9
        again = filled(folder, precision, values)
        assert all(torch.equal(a, b) for a, b in zip(again.read(range(9)), whole.read(range(9))))
        assert {path.name: path.read_bytes() for path in folder.glob("*.bin")} == contents


@pytest.mark.parametrize("content", ["", '{"of": "x"', "null"])
def test_a_manifest_that_a_full_disk_left_is_made_anew(content: str, tmp_path: Path) -> None:
    values = rows(9)
    whole = filled(tmp_path / "whole", "int8", values)
    filled(tmp_path / "cut", "int8", values)
    (tmp_path / "cut/manifest.json").write_text(content)
    assert TokenStore(tmp_path / "cut", {"of": "x"}, 9, "int8").done == 0
    again = filled(tmp_path / "cut", "int8", values)
    assert all(torch.equal(a, b) for a, b in zip(again.read(range(9)), whole.read(range(9))))
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_a_second_writer_waits_and_finds_what_the_first_wrote(tmp_path: Path) -> None:
    """Two threads fill one cache, each as a process of its own would."""
    values = rows(9)
    stores = [TokenStore(tmp_path, {"of": "x"}, 9, "half") for _ in range(2)]
    written = []

    def fill(store: TokenStore) -> None:
        with store.writing():
            missing = range(store.done, 9)
            written.append(len(missing))
            for row in missing:
                store.write([values[row]], [str(row)])

    threads = [threading.Thread(target=fill, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == [0, 9] and [store.done for store in stores] == [9, 9]


def test_two_writers_of_mined_negatives_leave_one_whole_file(tmp_path: Path) -> None:
    """The second begins and ends while the first is in the middle of its rows."""
    path = tmp_path / "negatives.jsonl"

    def first() -> Any:
        yield {"image": 0}
        write_negatives(path, {"by": "second"}, [{"image": n} for n in range(5)])
        yield {"image": 1}

    write_negatives(path, {"by": "first"}, first())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["by"] == "first" and [line["image"] for line in lines[1:]] == [0, 1]

    def fails() -> Any:
        yield {"image": 0}
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_negatives(path, {"by": "third"}, fails())
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_another_maker_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, "half", rows(3), backbone="a")
    with pytest.raises(
        ValueError, match=r"made by something else \(backbone 'a' there, 'b' here\).*name another folder in data.feat"
    ):
        TokenStore(tmp_path, {"of": "x", "backbone": "b"}, 3, "half")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.bin")}


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_killed_build_goes_on(kind: str, tmp_path: Path) -> None:
    def build(folder: str, backbone: Any) -> Any:
        made = {"image": ImageFeatures, "text": TextFeatures}[kind]
        return made(tmp_path / folder, Scenes("train", count=400), backbone, toy_processor(), precision="int8")

    process = multiprocessing.get_context("fork").Process(target=build, args=("killed", toy_model().backbone))
    process.start()
    while process.is_alive() and not any(path.stat().st_size for path in tmp_path.rglob("lengths.bin")):
        time.sleep(0.001)
    process.kill()
    process.join()
    written = len(next(tmp_path.rglob("lengths.bin")).read_bytes()) // 4
    backbone = toy_model().backbone
    reads: list[int] = []
    method = f"{kind}_features"
    plain = getattr(backbone, method)

    def counted(first: Any, *rest: Any) -> Any:
        reads.append(len(first))
        return plain(first, *rest)

    setattr(backbone, method, counted)
    again = build("killed", backbone)
    assert 0 < written < again.store.count == again.store.done and sum(reads) <= again.store.count - written
    build("whole", backbone)
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


# What it is made of.


def test_the_hash_is_of_the_tower_and_its_preprocessing(tmp_path: Path) -> None:
    model = toy_model()
    before = {kind: tower_fingerprint(model.backbone, kind) for kind in ("image", "text")}
    with torch.no_grad():
        model.backbone.vision_projection[1].weight += 1  # what trains beside a frozen tower
        model.backbone.text.encoder.layer[0].output.dense.bias += 1
    after = {kind: tower_fingerprint(model.backbone, kind) for kind in ("image", "text")}
    assert before["image"] == after["image"] and before["text"] != after["text"]
    model.add_adapter("news", AdapterConfig(target=("backbone.vision.*",)))
    assert tower_fingerprint(model.backbone, "image") != before["image"]
    model.set_adapter(None)
    assert tower_fingerprint(model.backbone, "image") == before["image"]

    pairs, processor = Scenes("val", count=3), toy_processor()
    ImageFeatures(tmp_path, pairs, model.backbone, processor, precision="half")
    processor.mean = (0.4, 0.5, 0.5)
    with pytest.raises(ValueError, match="image-scenes-val-.* was made by something else .preprocessing"):
        ImageFeatures(tmp_path, pairs, model.backbone, processor, precision="half")
    with pytest.raises(ValueError, match="was made by something else .backbone"):
        ImageFeatures(tmp_path, pairs, toy_model(seed=1).backbone, toy_processor(), precision="half")


# In training.


def towers() -> tuple[ModelConfig, dict[str, float]]:
    return toy_config(), FROZEN


def published(name: str, folder: Path) -> tuple[ModelConfig, dict[str, float]]:
    """A pair under a bridge with heads of its own."""
    saved(name, folder / name)
    kind = "siglip2" if name == "naflex" else name
    parts = to_dict(toy_config(captioning=None, generation=None))
    parts["backbone"] = {"width": 32, "published": {"name": kind, "source": str(folder / name)}}
    return from_dict(ModelConfig, parts), {"*": 1.0, "backbone.model.*": 0.0}


class Sized(Scenes):
    """Scenes cut to many shapes."""

    def image(self, i: int) -> Image.Image:
        return super().image(i).resize((24 + 8 * (i % 3), 40 - 8 * (i % 2)))


def batches(config: ModelConfig, model: Any, folder: Path | None, **settings: Any) -> tuple[Any, Any]:
    module = PairData(Sized("train", count=8), Sized("val", count=8), batch_size=8, mirror=True, **settings)
    if folder is not None:
        module.feature_cache, module.cached_features = str(folder), ("image", "text")
    module.bind(config, model.backbone)
    return next(iter(module.train_dataloader())), next(iter(module.val_dataloader()))


@pytest.mark.parametrize(("precision", "tolerance"), [("half", 1e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("name", ["towers", "clip", "siglip", "naflex"])
def test_losses_are_those_without(name: str, precision: Any, tolerance: float, tmp_path: Path) -> None:
    """Training batches with mirrored pictures, and evaluation; towers of one size, of any size, and one that reads its padding."""
    config, trainable = towers() if name == "towers" else published(name, tmp_path)
    objectives = {"itc": ITC(), "itm": ITM()} | ({"itg": ITG()} if name == "towers" else {})
    one = Joint(config, objectives, trainable, evaluation=SMALL)
    one.train()
    plain, plain_val = batches(config, one.model, None)
    cached, cached_val = batches(config, one.model, tmp_path / "features", feature_precision=precision)
    assert "image" not in cached and ("image_features_mask" in cached) == (name == "naflex")
    results = []
    for batch in (plain, cached):
        torch.manual_seed(0)
        results.append({key: loss.item() for key, loss in one.training_forward(batch)[0].items()})
    assert results[1] == pytest.approx(results[0], rel=tolerance)
    one.eval()
    with torch.no_grad():
        for batch in (plain_val, cached_val):
            step = Step(one.model, batch, 1.0)
            results.append(torch.cat([step.image_embedding, step.text_embedding]))
    assert torch.allclose(results[2], results[3], atol=tolerance)


def test_towers_do_not_run_and_projections_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, trainable = towers()
    one = Joint(config, {"itc": MaskedITC()}, trainable, evaluation=SMALL, pretrained=False, mini_batch_size=2)
    one.train()
    batch, _ = batches(config, one.model, tmp_path)
    for method in ("image_features", "text_features"):
        monkeypatch.setattr(one.model.backbone, method, lambda *_: pytest.fail("a frozen tower ran"))
    one.training_forward(batch)[0]["itc"].backward()
    for part in (one.model.backbone.vision_projection, one.model.backbone.text_projection):
        assert part[1].weight.grad.abs().sum() > 0


def test_chunks_read_named_pixels_and_what_is_not_there() -> None:
    x, named = torch.randn(5, 3), {"a": torch.randn(5, 2), "b": torch.arange(5)}

    def read(x: torch.Tensor, named: dict[str, torch.Tensor], nothing: None) -> torch.Tensor:
        assert nothing is None and len(x) == len(named["a"]) == len(named["b"])
        return x.sum(1) + named["a"].sum(1) * named["b"]

    assert torch.equal(by_chunks(read, x, named, None, size=2), read(x, named, None))
    assert torch.equal(by_chunks(lambda _, named: named["a"], None, named, size=2), named["a"])


@pytest.mark.parametrize("name", ["towers", "naflex"])
def test_wrong_items_come_from_the_cache(name: str, tmp_path: Path) -> None:
    """Mined captions and pictures are the split's own. A reader's own false captions are not: with them the tower reads all of them."""
    config, trainable = towers() if name == "towers" else published(name, tmp_path)
    one = Joint(config, {"itc": ITC(negatives=True)}, trainable, evaluation=SMALL)
    one.eval()
    module = PairData(Sized("train", count=8))
    encoder = Encoder(one.model, module.bind(config, one.model.backbone))
    header, found = mine_negatives(
        encoder, module.train, num_negatives=3, top_k=6, positive_threshold=-9.0, margin=9.0, judge="cosine"
    )
    mined = write_negatives(tmp_path / "negatives.jsonl", header, found)
    settings: dict[str, Any] = {"negatives": str(mined), "hard_texts": 2, "hard_images": 2, "false_captions": 0}
    losses = []
    for folder in (None, tmp_path / "features"):
        batch, _ = batches(config, one.model, folder, **settings)
        losses.append(one.training_forward(batch)[0]["itc"].item())
    assert {"negative_image_features", "negative_text_features"} <= set(batch)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    mixed, _ = batches(config, one.model, tmp_path / "features", **{**settings, "false_captions": 1})
    assert "negative_text_features" not in mixed and "text_features" in mixed
    assert torch.isfinite(one.training_forward(mixed)[0]["itc"])


@pytest.mark.parametrize(
    ("trainable", "kinds", "message"),
    [
        (
            {"*": 1.0},
            ("image",),
            "what the image tower makes, and this stage trains .*example backbone.vision.*Freeze them",
        ),
        (
            {**FROZEN, "backbone.text.*": 0.1},
            ("image", "text"),
            "what the text tower makes, .*leave 'text' out of data.cached_f",
        ),
        (
            {**FROZEN, "adapters.news": 1.0},
            ("image",),
            r"example backbone.vision.*\.news\.weight: they would train without effect",
        ),
    ],
)
def test_a_tower_that_trains_is_refused(trainable: dict[str, float], kinds: Any, message: str, tmp_path: Path) -> None:
    adapters = {"news": AdapterConfig(target=("backbone.vision.*",))} if "adapters.news" in trainable else {}
    one = Joint(vit_config(**adapters), {"itc": ITC()}, trainable, evaluation=SMALL, pretrained=False)
    module = data(feature_cache=str(tmp_path / "features"), cached_features=kinds)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, steps=1).fit(one, datamodule=module)
    assert not (tmp_path / "features").exists()


def test_a_stage_trains_from_the_cache(tmp_path: Path) -> None:
    """From the same seed with and without; the second run of the same stage runs no tower at all."""
    losses = []
    for _ in range(2):
        one = Joint(vit_config(), {"itc": ITC()}, FROZEN, evaluation=SMALL, pretrained=False)
        module = data(feature_cache=str(tmp_path / "features"), cached_features=("image", "text"))
        trainer(tmp_path, steps=3).fit(one, datamodule=module)
        losses.append(one.step_losses["itc"])
    plain = Joint(vit_config(), {"itc": ITC()}, FROZEN, evaluation=SMALL, pretrained=False)
    trainer(tmp_path, steps=3).fit(plain, datamodule=data())
    assert losses[0] == losses[1] == pytest.approx(plain.step_losses["itc"], rel=1e-3)
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "features").rglob("manifest.json")]
    assert {manifest["features"].split(" of ")[0] for manifest in manifests} == {"image features", "text features"}
