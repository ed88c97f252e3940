"""Two-stage search: exact against a plain loop, in both directions and with both matching heads; the index comes back
from its folder, continues where it stopped, and refuses what does not belong to it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_model, toy_processor

from unimodal.data import Scenes, load_image
from unimodal.data.items import Item, as_items
from unimodal.retrieval import similarity
from unimodal.search import Encoder, Index, build_index, dequantise, quantise, store
from unimodal.search.quantise import int8_rows

TEXTS = [
    "a red circle",
    "a small blue square left of a large green star",
    "two yellow triangles",
    "a large red square on a grey background",
    "a green circle above a blue star",
]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def encoder(seed: int = 0, **overrides) -> Encoder:
    return Encoder(toy_model(seed, **overrides), toy_processor())


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [str(folder / f"{i}.png") for i in range(6)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    return paths


# Two stages on plain arrays.


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


# Few bits.


def test_int8_rows_are_within_half_a_step_and_alone() -> None:
    x = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32) * 10.0 ** np.arange(-3, 4)[:, None]
    codes, scale = int8_rows(x)
    assert (np.abs(codes * scale[:, None] - x) <= scale[:, None] * 0.5001).all()
    assert (int8_rows(x[3:4])[0] == codes[3]).all()
    assert (int8_rows(np.zeros((2, 4), np.float32))[0] == 0).all()


@pytest.mark.parametrize(
    ("precision", "cosine"), [("int8", 0.999), ("uint8", 0.999), ("binary", 0.7), ("ubinary", 0.7)]
)
def test_codes_come_back_as_unit_vectors(precision: str, cosine: float) -> None:
    x = unit(50, 64).numpy()
    back = dequantise(quantise(x, precision), precision)  # type: ignore[arg-type]
    assert np.allclose(np.linalg.norm(back, axis=1), 1, atol=1e-6)
    assert (x * back).sum(1).min() > cosine


def test_layouts_of_codes() -> None:
    x = np.array([[1, -1, 1, -1, 0.5, 0, -0.5, 1]], np.float32)
    assert quantise(x, "int8").tolist() == [[127, -127, 127, -127, 64, 0, -64, 127]]
    assert quantise(x, "uint8").tolist() == [[255, 1, 255, 1, 192, 128, 64, 255]]
    assert quantise(x, "ubinary").tolist() == [[0b10101001]]
    assert quantise(x, "binary").tolist() == [[0b10101001 - 128]]
    with pytest.raises(ValueError, match="eight dimensions to a byte, got 6"):
        quantise(x[:, :6], "binary")
    with pytest.raises(ValueError, match="expected one of float32, int8, uint8, binary, ubinary, got 'int4'"):
        quantise(x, "int4")  # type: ignore[arg-type]


# The index.


@pytest.mark.parametrize("kind", ["cached", "bridge"])
@pytest.mark.parametrize("direction", ["text to image", "image to text"])
def test_search_equals_scoring_every_pair(kind: str, direction: str) -> None:
    one = encoder(matching={"kind": kind, "hidden": 32, "layers": 1, "heads": 2})
    images, texts = [picture(i) for i in range(6)], TEXTS
    queries, documents = (texts, images) if direction == "text to image" else (images, texts)
    index = build_index(one, documents, precision="float32", batch_size=4)
    with torch.no_grad():
        image, text = one.images(images), one.texts(texts)
        cosine = one.model.image_embedding(image) @ one.model.text_embedding(text).T  # [6, 5]
        grid = torch.cartesian_prod(torch.arange(6), torch.arange(5))
        chance = one.model.match(image, text, grid[:, 0], grid[:, 1]).sigmoid().view(6, 5)
    if direction == "text to image":
        cosine, chance = cosine.T, chance.T
    for q, hits in enumerate(index.search(queries, top_k=10, rerank_top_k=3, batch_size=2)):
        order = cosine[q].argsort(descending=True).tolist()
        again = sorted(order[:3], key=lambda row: -float(chance[q, row]))
        assert [hit["id"] for hit in hits] == again + order[3:]
        assert [hit["rank"] for hit in hits] == list(range(1, len(documents) + 1))
        for hit in hits:
            assert hit["first_score"] == pytest.approx(float(cosine[q, hit["id"]]), abs=1e-5)
        for hit in hits[:3]:
            assert hit["score"] == hit["rerank_score"] == pytest.approx(float(chance[q, hit["id"]]), abs=1e-5)
        assert all(hit["rerank_score"] is None and hit["score"] == hit["first_score"] for hit in hits[3:])


@pytest.mark.parametrize("documents", [TEXTS, [picture(i) for i in range(5)]])
def test_int8_tokens_hardly_move_the_score(documents: list) -> None:
    queries = TEXTS if documents is not TEXTS else [picture(i) for i in range(5)]
    exact, small = (build_index(encoder(), documents, precision=p) for p in ("float32", "int8"))
    sizes = [sum(path.stat().st_size for path in index.folder.glob("part-*")) for index in (exact, small)]
    assert sizes[1] < 0.6 * sizes[0]  # embeddings are float32 in both
    for a, b in zip(exact.search(queries), small.search(queries)):
        scores = [{hit["id"]: hit["rerank_score"] for hit in hits} for hits in (a, b)]
        assert scores[0] == pytest.approx(scores[1], abs=5e-3)


def test_no_image_is_opened_at_query_time(photos: list[str]) -> None:
    index = build_index(encoder(), photos, ids=[f"photo {i}" for i in range(6)])
    for path in photos:
        Path(path).unlink()
    hits = index.search("a red circle", top_k=2)
    assert len(hits) == 2
    assert photos[int(hits[0]["id"].removeprefix("photo "))] == hits[0]["document"]
    assert isinstance(hits[0]["score"], float)


def test_batches_change_nothing() -> None:
    images = [picture(i) for i in range(5)]
    one = build_index(encoder(), images, batch_size=1, precision="float32")
    many = build_index(encoder(), images, batch_size=32, precision="float32")
    for a, b in zip(one.search(TEXTS, batch_size=1), many.search(TEXTS, batch_size=32)):
        assert [hit["id"] for hit in a] == [hit["id"] for hit in b]
        for x, y in zip(a, b):
            assert x["score"] == pytest.approx(y["score"], abs=1e-5)


def test_queries_of_the_same_kind_and_mixed_indexes_keep_the_first_stage() -> None:
    index = build_index(encoder(), TEXTS)
    assert index.search(TEXTS[2])[0]["id"] == 2
    assert index.search(TEXTS[2])[0]["rerank_score"] is None
    queries = ["a red circle", picture(0), {"image": picture(0), "text": "a red circle"}]
    matched = [hits[0]["rerank_score"] is not None for hits in index.search(queries)]
    assert matched == [False, True, False]
    mixed = build_index(encoder(), [*TEXTS, picture(0), {"image": picture(1), "text": "a star"}])
    assert mixed.documents[-1] == {"image": None, "text": "a star"}
    assert mixed.search(picture(0))[0]["id"] == 5
    assert mixed.search(picture(0))[0]["rerank_score"] is None


def test_a_model_without_matching_head_searches_in_one_stage() -> None:
    index = build_index(encoder(matching=None), [picture(0), picture(1)])
    assert [hit["rerank_score"] for hit in index.search("a red circle")] == [None, None]


def test_one_vector_per_query() -> None:
    one = encoder(embedding={"dim": 16, "pool": "query"})
    images = [picture(i) for i in range(4)]
    index = build_index(one, images)
    assert index.embedding.shape == (4, 4, 16)
    scores = similarity(one.read(as_items(TEXTS)).embedding, one.read(as_items(images)).embedding)
    for q, hits in enumerate(index.search(TEXTS, rerank_top_k=0)):
        assert [hit["id"] for hit in hits] == scores[q].argsort(descending=True).tolist()
    with pytest.raises(ValueError, match="pass images and texts in separate calls"):
        build_index(one, [images[0], "a red circle"])


def test_empty_and_small_galleries() -> None:
    index = build_index(encoder(), [])
    assert len(index) == 0
    assert index.search("a red circle") == []
    assert index.search(TEXTS) == [[] for _ in TEXTS]
    assert build_index(encoder(), TEXTS).search([]) == []
    assert len(build_index(encoder(), TEXTS).search(picture(0), top_k=100)) == 5


def test_saved_index_searches_alike(tmp_path: Path, photos: list[str]) -> None:
    index = build_index(encoder(), photos)
    index.save(tmp_path / "index")
    index.save(tmp_path / "index")  # replaces what is there
    loaded = Index.load(tmp_path / "index", encoder())
    assert loaded.search(TEXTS) == index.search(TEXTS)
    names = ["documents.sqlite", "exact", "index.json", "part-00000.safetensors"]
    assert sorted(p.name for p in (tmp_path / "index").glob("[!.]*")) == names
    build_index(encoder(), []).save(tmp_path / "empty")
    assert Index.load(tmp_path / "empty", encoder()).search(["a red circle"]) == [[]]


@pytest.mark.parametrize(
    "form", [str, Path, lambda path: {"image": path}, lambda path: {"image": path, "text": "a star"}]
)
def test_an_index_of_relative_paths_is_searched_from_elsewhere(
    form, photos: list[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    index = build_index(encoder(), [form("photos/0.png"), form("./photos/1.png")], folder="kept")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for opened in (index, Index.load("../kept", encoder())):
        found = [hit["document"] for hit in opened.search("a red circle", top_k=2)]
        paths = [one["image"] if isinstance(one, dict) else one for one in found]
        assert sorted(paths) == photos[:2] and all(load_image(path).size == (32, 32) for path in paths)
    assert as_items(["https://a.example/b.png"])[0].document == "https://a.example/b.png"


def test_training_other_heads_leaves_an_index_valid(tmp_path: Path, photos: list[str]) -> None:
    trained = encoder()
    build_index(trained, photos).save(tmp_path / "index")
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if name.startswith(("heads.generation.", "heads.captioning.")) or name == "bridge.query_sets.generate":
                parameter.add_(1)
    assert len(Index.load(tmp_path / "index", trained)) == 6
    with torch.no_grad():
        trained.model.bridge.query_sets["image"].add_(1e-3)
    with pytest.raises(
        ValueError, match=r"was made by model [0-9a-f]{16}, this is model [0-9a-f]{16}.*build the index again"
    ):
        Index.load(tmp_path / "index", trained)


def test_an_interrupted_build_continues(tmp_path: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PART", 2)
    opened: list[str] = []
    interrupted_at: list[str] = [photos[4]]

    def load(path: str) -> Image.Image:
        if path in interrupted_at:
            raise KeyboardInterrupt
        opened.append(path)
        return load_image(path)

    monkeypatch.setattr("unimodal.data.items.load_image", load)
    with pytest.raises(KeyboardInterrupt):
        build_index(encoder(), photos, folder=tmp_path / "index", batch_size=1)
    with pytest.raises(ValueError, match="is incomplete: 1 of 3 parts are missing, first part-00002.safetensors"):
        Index.load(tmp_path / "index", encoder())
    interrupted_at.clear()
    index = build_index(encoder(), photos, folder=tmp_path / "index", batch_size=1)
    assert opened == photos  # nothing twice
    whole = build_index(encoder(), photos)
    assert [hit["id"] for hit in index.search("a red circle")] == [hit["id"] for hit in whole.search("a red circle")]
    assert Index.load(tmp_path / "index", encoder()).search("a star") == index.search("a star")


def test_unreadable_images_raise_or_are_counted(photos: list[str]) -> None:
    Path(photos[1]).write_bytes(b"no picture")
    Path(photos[4]).unlink()
    with pytest.raises(FileNotFoundError, match="item 4: there is no image file"):
        build_index(encoder(), photos)
    photos[4] = photos[0]
    with pytest.raises((ValueError, OSError), match="1.png"):
        build_index(encoder(), photos)
    photos[4] = "gone.png"
    with pytest.warns(UserWarning, match=r"2 of 6 documents could not be read and are not in the index: 1: .*; 4: "):
        index = build_index(encoder(), photos, on_error="skip", batch_size=1)
    assert index.skipped == [1, 4]
    assert index.ids == [0, 2, 3, 5]
    assert {hit["document"] for hit in index.search("a red circle")} == {photos[i] for i in (0, 2, 3, 5)}


def test_what_does_not_fit_is_refused(tmp_path: Path, photos: list[str]) -> None:
    one = encoder()
    with pytest.raises(ValueError, match="expected 6 different ones, one per document, got 6 of which 1 differ"):
        build_index(one, photos, ids=["a"] * 6)
    with pytest.raises(TypeError, match="expected an id as int or str, got .*0.5"):
        build_index(one, photos, ids=[0.5] * 6)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="precision: .*binary"):
        build_index(one, photos, precision="binary")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_error: .*ignore"):
        build_index(one, photos, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no index; choose another folder"):
        build_index(one, photos, folder=tmp_path / "photos")
    index = build_index(one, photos, folder=tmp_path / "index")
    with pytest.raises(ValueError, match="holds another index: other ids, documents"):
        build_index(one, photos[:2], folder=tmp_path / "index")
    with pytest.raises(ValueError, match=r"holds other files \(\d.png\); choose another folder"):
        index.save(tmp_path / "photos")
    assert len(list((tmp_path / "photos").iterdir())) == 6
    with pytest.raises(FileNotFoundError, match="holds no index.json"):
        Index.load(tmp_path / "photos", one)
    (tmp_path / "index" / "index.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="has index format 0, this version reads 2; build it again"):
        Index.load(tmp_path / "index", one)


# Items.


def test_a_string_is_an_image_by_its_suffix_only(photos: list[str], tmp_path: Path) -> None:
    (tmp_path / "a red circle").write_text("a file that happens to be called like a text")
    kinds = [
        ("a red circle", "text"),
        (str(tmp_path / "a red circle"), "text"),
        (photos[0], "image"),
        (Path(photos[0]), "image"),
        ("https://example.org/cat.JPG", "image"),
        ("https://example.org/cat.jpg?size=2", "image"),
        ({"image": "https://example.org/picture?id=3"}, "image"),
        ({"text": "cat.png"}, "text"),
        ({"image": photos[0], "text": "cat.png"}, "both"),
        (picture(0), "image"),
        (np.zeros((4, 4, 3), np.uint8), "image"),
        (torch.zeros(3, 4, 4), "image"),
        ("红色的圆", "text"),
    ]
    assert [as_items(value)[0].kind for value, _ in kinds] == [kind for _, kind in kinds]
    assert as_items(["a", "b"]) == [Item(text="a"), Item(text="b")]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (["a", "missing.png"], FileNotFoundError, r"item 1: there is no image file 'missing.png'.*pass \{'text'"),
        (Path("missing"), FileNotFoundError, "there is no image file 'missing'"),
        ("https://example.org/picture?id=3", ValueError, r"a URL without a picture's suffix; pass \{'image': url\}"),
        (["a", " \n"], ValueError, "item 1: the text is empty"),
        ([1], TypeError, "item 0: expected a text, an image .*, got 1"),
        (None, TypeError, "items: expected a list of items, each of them a text, an image .*, got None"),
        ({"picture": 1}, ValueError, r"the keys 'image', 'video', 'text', got \['picture'\]"),
        ({}, ValueError, r"got \[\]"),
        ({"text": 3}, TypeError, "expected a text as str, got 3"),
        ({"image": None}, TypeError, "expected an image .*, got None"),
        ({"image": 3}, TypeError, "expected an image .*, got 3"),
    ],
)
def test_bad_items_are_named(value, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_items(value)


def test_a_search_counts_the_match_score_as_the_model_says() -> None:
    summing = toy_model(matching={"hidden": 32, "layers": 1, "heads": 2}, scoring={"combine": "sum", "scale": 0.5})
    encoder = Encoder(summing, toy_processor())
    pictures = [Scenes("test", count=4).image(i) for i in range(4)]
    index = build_index(encoder, pictures)
    hits = index.search("a red circle", top_k=4)
    assert hits == index.search("a red circle", top_k=4, combine="sum", match_scale=0.5)
    for hit in hits:
        logit = torch.logit(torch.tensor(hit["rerank_score"]).double()).item()
        assert hit["score"] == pytest.approx(hit["first_score"] + 0.5 * logit, abs=1e-4)
    replaced = index.search("a red circle", top_k=4, combine="replace")
    assert [hit["score"] for hit in replaced] == [hit["rerank_score"] for hit in replaced]
