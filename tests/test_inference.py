"""The user's view of a model: every form of item, singles and lists, order kept, batches that change nothing, return
types that users know, and errors that say what came, what was expected and what to do."""

from pathlib import Path
from typing import Any

import fakehub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from toy import IMAGE_SIZE, toy_model, toy_processor

import unimodal
from unimodal.draws import own_generators
from unimodal.inference import Unimodal
from unimodal.search import dequantise

TEXTS = ["a red circle", "a small blue square left of a large green star", "two yellow triangles", "a star"]


def picture(seed: int, size: int = IMAGE_SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


IMAGES = [picture(i) for i in range(5)]


@pytest.fixture(scope="module")
def model() -> Unimodal:
    return Unimodal(toy_model(), toy_processor())


def toy(**overrides) -> Unimodal:
    return Unimodal(toy_model(**overrides), toy_processor())


@pytest.fixture
def path(tmp_path: Path) -> str:
    IMAGES[0].save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


# Embeddings.


def test_every_form_of_one_image_gives_one_vector(model: Unimodal, path: str) -> None:
    pixels = np.asarray(IMAGES[0])
    forms = [
        IMAGES[0],
        path,
        Path(path),
        Path(path).read_bytes(),
        {"image": path},
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
    ]
    vectors = [model.encode(form) for form in forms]
    assert vectors[0].shape == (16,) and vectors[0].dtype == np.float32
    assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-6)
    for vector in vectors[1:]:
        assert np.allclose(vector, vectors[0], atol=1e-6)


def test_embeddings_are_those_of_the_heads(model: Unimodal) -> None:
    processor = toy_processor()
    with torch.no_grad():
        image = model.model.image_embedding(model.model.encode_image(processor.images(IMAGES)))
        text = model.model.text_embedding(model.model.encode_text(*processor.texts(TEXTS)))
    assert np.allclose(model.encode(IMAGES), image, atol=1e-6)
    assert np.allclose(model.encode(TEXTS), text, atol=1e-6)


def test_order_is_kept_and_batches_change_nothing(model: Unimodal) -> None:
    items = [TEXTS[0], IMAGES[0], {"image": IMAGES[1], "text": TEXTS[1]}, TEXTS[1], IMAGES[2], {"text": TEXTS[2]}]
    alone = np.stack([model.encode(item) for item in items])
    for batch_size in (1, 2, 4, 32):
        assert np.abs(model.encode(items, batch_size=batch_size) - alone).max() < 1e-5


def test_an_item_with_image_and_text_is_the_normalised_mean(model: Unimodal) -> None:
    both = model.encode({"image": IMAGES[0], "text": TEXTS[0]})
    mean = model.encode(IMAGES[0]) + model.encode(TEXTS[0])
    assert np.allclose(both, mean / np.linalg.norm(mean), atol=1e-6)


def test_return_types(model: Unimodal) -> None:
    assert isinstance(model.encode(TEXTS, convert_to_tensor=True), torch.Tensor)
    assert isinstance(model.encode(TEXTS[0], convert_to_tensor=True), torch.Tensor)
    separate = model.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(separate, list) and isinstance(separate[0], torch.Tensor)
    assert model.encode([TEXTS[0]]).shape == (1, 16)
    assert model.encode([]).shape == (0, 16)
    assert not model.encode(TEXTS, convert_to_tensor=True).requires_grad
    assert not model.model.training


def test_truncation_normalises_again(model: Unimodal) -> None:
    full, short = model.encode(TEXTS), model.encode(TEXTS, truncate_dim=8)
    assert np.allclose(short, full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True), atol=1e-6)
    with pytest.warns(
        UserWarning, match=r"truncate_dim=5 is not a width this model was trained for; these are \[8, 16\]"
    ):
        assert model.encode(TEXTS[0], truncate_dim=5).shape == (5,)
    with pytest.raises(ValueError, match="truncate_dim, a width of this model: expected 1 to 16, got 17"):
        model.encode(TEXTS, truncate_dim=17)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precisions(model: Unimodal, precision) -> None:
    codes = model.encode(TEXTS, precision=precision)
    assert codes.dtype == (np.uint8 if precision.startswith("u") else np.int8)
    assert (model.encode(TEXTS[1], precision=precision) == codes[1]).all()
    assert (dequantise(codes, precision) * model.encode(TEXTS)).sum(1).min() > (0.5 if "binary" in precision else 0.999)


def test_prompts_stand_before_texts(model: Unimodal) -> None:
    prompted = Unimodal(model.model, model.processor, prompts={"query": "a small ", "mine": "a large "})
    assert np.allclose(prompted.encode_query("star"), model.encode("a small star"), atol=1e-6)
    assert np.allclose(prompted.encode("star", "mine"), model.encode("a large star"), atol=1e-6)
    assert np.allclose(prompted.encode("star", prompt="a red "), model.encode("a red star"), atol=1e-6)
    assert np.allclose(prompted.encode_document(["star"]), model.encode(["star"]), atol=1e-6)
    assert np.allclose(prompted.encode_query(IMAGES[0]), model.encode(IMAGES[0]), atol=1e-6)
    with pytest.raises(ValueError, match="no prompt named 'qeury'; did you mean 'query'?"):
        prompted.encode("star", prompt_name="qeury")


def test_similarity(model: Unimodal) -> None:
    a, b = model.encode(IMAGES), model.encode(TEXTS, convert_to_tensor=True)
    scores = model.similarity(a, b)
    assert scores.shape == (5, 4) and scores.dtype == torch.float32
    assert torch.allclose(scores, torch.from_numpy(a) @ b.T)
    assert model.similarity(a[0], b).shape == (1, 4)
    with pytest.raises(
        TypeError, match="expected float vectors .*, got ndarray .* of int8; unimodal.search.dequantise"
    ):
        model.similarity(model.encode(TEXTS, precision="int8"), b)
    with pytest.raises(ValueError, match=r"one width are needed, got \[5, 16\] and \[4, 8\]"):
        model.similarity(a, b[:, :8])


def test_one_vector_per_query() -> None:
    model = toy(embedding={"dim": 16, "pool": "query"})
    images, texts = model.encode(IMAGES), model.encode(TEXTS)
    assert images.shape == (5, 4, 16) and texts.shape == (4, 16)
    assert torch.allclose(model.similarity(texts, images), torch.from_numpy((images @ texts.T).max(1).T), atol=1e-6)
    with pytest.raises(ValueError, match="pass images and texts in separate calls"):
        model.encode([IMAGES[0], TEXTS[0]], batch_size=1)


def test_unit_vectors_are_the_only_form(model: Unimodal) -> None:
    with pytest.raises(ValueError, match="unit vectors by construction.*leave the argument out"):
        model.encode(TEXTS, normalize_embeddings=False)


# Matching.


@pytest.mark.parametrize("kind", ["cached", "bridge"])
def test_predict_is_the_matching_head_on_each_pair(kind: str) -> None:
    model = toy(matching={"kind": kind, "hidden": 32, "layers": 1, "heads": 2})
    pairs: list[Any] = [(TEXTS[0], IMAGES[0]), (IMAGES[1], TEXTS[1]), (TEXTS[2], IMAGES[0]), (TEXTS[0], IMAGES[0])]
    expected = []
    for a, b in pairs:
        image, text = (b, a) if isinstance(a, str) else (a, b)
        with torch.no_grad():
            state = model.model.encode_image(model.processor.images([image]))
            words = model.model.encode_text(*model.processor.texts([text]))
            expected.append(float(model.model.match(state, words, torch.tensor([0]), torch.tensor([0]))))
    logits = model.predict(pairs, activation_fn=torch.nn.Identity())
    assert np.allclose(logits, expected, atol=1e-5)
    for batch_size in (1, 3, 32):
        chance = model.predict(pairs, batch_size=batch_size)
        assert chance.dtype == np.float32
        assert np.allclose(chance, 1 / (1 + np.exp(-np.array(expected))), atol=1e-5)
    assert model.predict([]).shape == (0,)
    one = model.predict(pairs[0])
    assert one.dtype == np.float32 and one == pytest.approx(chance[0], abs=1e-5)


def test_each_item_is_read_once(model: Unimodal, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list = []
    real = model.encoder.images

    def images(sources):
        read.extend(sources)
        return real(sources)

    monkeypatch.setattr(model.encoder, "images", images)
    model.predict([(text, image) for text in TEXTS for image in (path, IMAGES[1], Path(path))])
    assert len(read) == 2


def test_rank(model: Unimodal) -> None:
    ranked = model.rank(TEXTS[0], IMAGES)
    scores = model.predict([(TEXTS[0], image) for image in IMAGES])
    assert [hit["corpus_id"] for hit in ranked] == np.argsort(-scores, kind="stable").tolist()
    assert [hit["score"] for hit in ranked] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-6)
    assert all(set(hit) == {"corpus_id", "score"} and type(hit["score"]) is float for hit in ranked)
    best = model.rank(IMAGES[0], TEXTS, top_k=2, return_documents=True)
    assert [hit["document"] for hit in best] == [TEXTS[hit["corpus_id"]] for hit in best]
    assert len(best) == 2
    assert model.rank(TEXTS[0], []) == []
    assert len(model.rank(TEXTS[0], IMAGES, top_k=100)) == 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m.predict([("a", "b")]),
            ValueError,
            "pair 0: the matching head judges one image and one text, got text 'a'",
        ),
        (
            lambda m: m.predict([("a", IMAGES[0]), (IMAGES[0], IMAGES[1])]),
            ValueError,
            "pair 1: .*use encode and similarity",
        ),
        (lambda m: m.predict([("a", {"image": IMAGES[0], "text": "b"})]), ValueError, "got text 'a' and both"),
        (lambda m: m.predict(["ab"]), TypeError, r"pair 0: expected \(query, document\), got str 'ab'"),
        (lambda m: m.predict([("a", IMAGES[0], 3)]), TypeError, r"pair 0: expected \(query, document\), got tuple"),
        (lambda m: m.predict([("a", 3)]), TypeError, "pair 0: expected a text, an image .*, got 3"),
        (lambda m: m.rank("a", ["b"]), ValueError, "document 0: the matching head judges one image and one text"),
        (lambda m: m.rank("a", "b.png"), TypeError, "documents must be a list, got str"),
        (lambda m: m.rank("a", IMAGES, top_k=0), ValueError, "top_k: expected at least 1, got 0"),
        (lambda m: m.rank(" ", IMAGES), ValueError, "query: the text is empty"),
        (lambda m: m.encode(["a"], batch_size=0), ValueError, "batch_size: expected at least 1, got 0"),
        (lambda m: m.encode(["a"], precision="int4"), ValueError, "expected one of float32, int8, .* got 'int4'"),
        (lambda m: m.encode(["a", ""]), ValueError, "item 1: the text is empty"),
        (lambda m: m.encode(["a", 3]), TypeError, "item 1: expected a text, an image"),
        (lambda m: m.encode("missing.png"), FileNotFoundError, "there is no image file 'missing.png'"),
        (lambda m: m.caption("a red circle"), ValueError, "expected images, got the text 'a red circle'"),
        (lambda m: m.caption([IMAGES[0], "missing.png"]), FileNotFoundError, "item 1: there is no image file"),
        (lambda m: m.caption(IMAGES[0], num_beams=0), ValueError, "num_beams: expected 1 to 1000, got 0"),
        (lambda m: m.generate_image(""), ValueError, "prompt 0: the text is empty"),
        (lambda m: m.generate_image(["a", 3]), TypeError, "prompt 1: expected a text as str, got 3"),
        (
            lambda m: m.generate_image("a", num_images_per_prompt=0),
            ValueError,
            "num_images_per_prompt: expected 1 to 1000, got 0",
        ),
        (
            lambda m: m.generate_image("a", num_inference_steps=0),
            ValueError,
            "num_inference_steps: expected 1 to 1000, got 0",
        ),
    ],
)
def test_bad_input_is_named(model: Unimodal, call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(model)


def test_bad_pictures_are_named(model: Unimodal, tmp_path: Path, path: str) -> None:
    whole = Path(path).read_bytes()
    for name, content in (("text.png", b"no picture"), ("half.png", whole[: len(whole) // 2]), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=name):
            model.encode([path, str(tmp_path / name)])
    for pixels in (
        np.zeros((2, 3, 4, 5)),
        np.zeros((4, 4, 7), np.uint8),
        np.array([["a"]]),
        torch.full((3, 4, 4), 300),
    ):
        with pytest.raises((ValueError, TypeError), match=r"expected|dtype|shape"):
            model.encode([IMAGES[0], pixels])


def test_a_missing_head_is_named() -> None:
    model = toy(matching=None, captioning=None, generation=None)
    for call, head in (
        (lambda: model.predict([("a", IMAGES[0])]), "matching"),
        (lambda: model.caption(IMAGES[0]), "captioning"),
        (lambda: model.generate_image("a"), "generation"),
    ):
        with pytest.raises(ValueError, match=f"this model has no {head} head; it has: embedding"):
            call()


# Captioning and generation.


def test_captions(model: Unimodal) -> None:
    one, several = model.caption(IMAGES[0], max_new_tokens=6), model.caption(IMAGES, max_new_tokens=6)
    assert isinstance(one, str)
    assert len(several) == 5 and several[0] == one
    assert model.caption(IMAGES, max_new_tokens=6, batch_size=2) == several
    assert model.caption([]) == []
    assert isinstance(model.caption(IMAGES[0], num_beams=1, do_sample=True, top_p=0.9), str)


def test_the_caption_that_agrees_most_is_chosen(model: Unimodal) -> None:
    def write(images, candidates, **options):
        generator = torch.Generator().manual_seed(3)
        return model.caption(images, candidates=candidates, max_new_tokens=6, generator=generator, **options)

    alone = write(IMAGES[:1], 1)
    assert alone == write(IMAGES[:1], 1, match_scale=5.0)  # nothing to choose
    own = own_generators(torch.Generator().manual_seed(3), 1)
    state = model.encoder.images(IMAGES[:1])
    ids = [model.model.caption(state, do_sample=True, max_new_tokens=6, generator=own)[0] for _ in range(7)]
    draws = [[model.processor.decode(row)] for row in ids]
    pool = [text for (text,) in [alone, *draws] if text]
    for scale in (0.0, 3.0):
        cosine = model.similarity(model.encode(IMAGES[:1]), model.encode(pool))[0]
        logit = torch.as_tensor(model.predict([(IMAGES[0], text) for text in pool], activation_fn=lambda x: x))
        assert write(IMAGES[:1], 8, match_scale=scale) == [pool[int((cosine + scale * logit).argmax())]]
    assert len(set(pool)) > 1  # or there was nothing to choose from
    with pytest.raises(ValueError, match="candidates: expected 1 to 1000, got 0"):
        write(IMAGES[:1], 0)


def test_the_picture_that_agrees_most_is_chosen(model: Unimodal) -> None:
    def draw(prompts, candidates=1, generator=None, **options):
        generator = generator or torch.Generator().manual_seed(3)
        options |= {"num_inference_steps": 2, "candidates": candidates, "generator": generator}
        return [np.asarray(image) for image in model.generate_image(prompts, **options).images]

    own = own_generators(torch.Generator().manual_seed(3), 1)[0]
    pool = [draw(TEXTS[0], generator=own)[0] for _ in range(6)]
    chosen = set()
    for scale in (-3.0, 0.0, 3.0):
        cosine = model.similarity(model.encode(TEXTS[:1]), model.encode(pool))[0]
        logit = torch.as_tensor(model.predict([(picture, TEXTS[0]) for picture in pool], activation_fn=lambda x: x))
        best = int((cosine + scale * logit).argmax())
        assert (draw(TEXTS[0], 6, match_scale=scale)[0] == pool[best]).all()
        chosen.add(best)
    assert len(chosen) > 1  # or the heads had no say
    together = draw(TEXTS[:3], 4)
    for size in (1, 2):
        assert all((a == b).all() for a, b in zip(draw(TEXTS[:3], 4, batch_size=size), together))
    with pytest.raises(ValueError, match="candidates: expected 1 to 1000, got 0"):
        draw(TEXTS[0], 0)


def test_generated_images(model: Unimodal) -> None:
    def draw(prompt, **options):
        generator = torch.Generator().manual_seed(3)
        return model.generate_image(prompt, num_inference_steps=2, generator=generator, **options).images

    images = draw(TEXTS[:2], num_images_per_prompt=2)
    assert len(images) == 4
    assert all(image.mode == "RGB" and image.size == (IMAGE_SIZE, IMAGE_SIZE) for image in images)
    assert [image.tobytes() for image in images] == [
        image.tobytes() for image in draw(TEXTS[:2], num_images_per_prompt=2)
    ]
    assert len(draw("a red circle.png")) == 1  # every prompt is a text
    assert draw([]) == []


# The whole.


def test_search_from_the_model(model: Unimodal, tmp_path: Path) -> None:
    index = model.build_index(IMAGES, ids=list("abcde"))
    hits = model.search(TEXTS, index, top_k=3, rerank_top_k=5)
    assert [len(found) for found in hits] == [3] * 4
    for text, found in zip(TEXTS, hits):
        ranked = model.rank(text, IMAGES)
        assert [hit["rerank_score"] for hit in found] == pytest.approx([r["score"] for r in ranked[:3]], abs=5e-3)
    index.save(tmp_path / "index")
    assert model.search(TEXTS, model.load_index(tmp_path / "index"), top_k=3, rerank_top_k=5) == hits


def test_saved_model_comes_back_equal(model: Unimodal, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = unimodal.from_pretrained(tmp_path / "checkpoint")
    assert np.array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert np.array_equal(loaded.predict([(TEXTS[0], IMAGES[0])]), model.predict([(TEXTS[0], IMAGES[0])]))
    assert loaded.caption(IMAGES[0]) == model.caption(IMAGES[0])
    half = Unimodal.from_pretrained(str(tmp_path / "checkpoint"), device="cpu", dtype=torch.bfloat16)
    assert half.encode(TEXTS).dtype == np.float32
    assert (half.encode(TEXTS) * model.encode(TEXTS)).sum(1).min() > 0.99
    assert half.predict([(TEXTS[0], IMAGES[0])]).dtype == np.float32
    assert len(half.generate_image(TEXTS[0], num_inference_steps=1).images) == 1


def test_pushed_model_comes_back_equal(model: Unimodal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fakehub.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        assert model.push_to_hub("tester/toy", private=True, token="hf_fake").startswith(server.url)
        loaded = Unimodal.from_pretrained("tester/toy", cache_folder=tmp_path, token="hf_fake", heads=["matching"])
    assert np.array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert sorted(loaded.model.heads) == ["image_embedding", "matching", "text_embedding"]


def test_facts(model: Unimodal) -> None:
    assert model.device == torch.device("cpu")
    assert model.to("cpu") is model
    assert model.modalities == ("image", "text")
    assert model.supports("image") and not model.supports("audio")


def test_progress_is_shown_when_asked(model: Unimodal, capsys: pytest.CaptureFixture[str]) -> None:
    model.encode(TEXTS, batch_size=1)
    assert capsys.readouterr().err == ""  # no terminal
    model.encode(TEXTS, batch_size=1, show_progress_bar=True)
    assert capsys.readouterr().out == ""


# Numbers that are none, and cosines.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_a_lower_precision_are_unit_vectors(dtype: torch.dtype) -> None:
    model = toy()
    model.to(dtype=dtype)
    for vectors in (
        model.encode(TEXTS),
        model.encode(IMAGES),
        model.encode({"image": IMAGES[0], "text": TEXTS[0]})[None],
    ):
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("part", "call", "message"),
    [
        ("text_tower", lambda m: m.encode(["a star", "a red circle"]), "item 0: the model's embedding is not finite"),
        ("image_tower", lambda m: m.encode(IMAGES[0]), "the model's embedding is not finite"),
        ("image_tower", lambda m: m.build_index(IMAGES), "the model's embedding is not finite"),
        ("matching", lambda m: m.rank("a star", IMAGES), "the matching head's scores are not finite"),
        ("matching", lambda m: m.predict([(IMAGES[0], "a star")]), "the matching head's scores are not finite"),
    ],
)
def test_a_model_of_weights_that_are_no_numbers_is_refused(part: str, call: Any, message: str) -> None:
    model = toy()
    modules = {
        "text_tower": model.model.backbone.text,
        "image_tower": model.model.backbone.vision,
        "matching": model.model.head("matching"),
    }
    for weight in modules[part].parameters():
        torch.nn.init.constant_(weight, float("nan"))
    with pytest.raises(ValueError, match=message):
        call(model)


def test_no_cosine_passes_one(model: Unimodal) -> None:
    wide = torch.nn.functional.normalize(torch.randn(400, 333), dim=-1)
    assert (wide * wide).sum(-1).max() > 1  # rounding alone
    assert model.similarity(wide, wide).max() <= 1
    assert model.similarity(-wide, wide).min() >= -1
    vectors = model.encode(IMAGES)
    assert model.similarity(vectors, 7 * vectors).diagonal().numpy() == pytest.approx(
        1, abs=1e-6
    )  # cosines, whatever the length
    for hits in model.build_index(IMAGES).search(IMAGES, top_k=5, rerank_top_k=0):
        assert all(-1 <= hit["first_score"] <= 1 and -1 <= hit["score"] <= 1 for hit in hits)


@pytest.mark.parametrize("form", [np.asarray, torch.tensor, list])
def test_similarity_takes_every_form_of_vectors(model: Unimodal, form: Any) -> None:
    rows = [[1.0, 0.0], [0.6, 0.8]]
    assert torch.allclose(model.similarity(form(rows), form(rows)), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))


def test_equal_scores_keep_the_order_of_the_documents(model: Unimodal) -> None:
    ranked = model.rank(TEXTS[0], [IMAGES[1], IMAGES[0], IMAGES[1], IMAGES[0], IMAGES[1]])
    by_score: dict[float, list[int]] = {}
    for hit in ranked:
        by_score.setdefault(hit["score"], []).append(hit["corpus_id"])
    assert sorted(map(tuple, by_score.values())) == [(0, 2, 4), (1, 3)]
