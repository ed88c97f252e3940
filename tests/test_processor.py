"""Proves that pictures and texts become the tensors they should, against Pillow and transformers; that nothing is cut or
replaced in silence; that a processor comes back from its folder; and that every bad input is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.data import Processor, Scenes, scenes_tokenizer, word_tokenizer
from unimodal.data.processor import SETTINGS_FILE, SPECIAL_TOKENS, TruncationWarning

CAPTION = "on a white background, a small solid red circle is to the left of a big striped blue square."


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(scenes_tokenizer(), image_size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0), max_length=40)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


# Pictures.


def test_pictures_are_resized_and_normalised(processor: Processor) -> None:
    pictures = [picture(50, 40), picture(32, 32), picture(7, 90, "L")]
    batch = processor.images(pictures)
    assert batch.shape == (3, 3, 32, 32) and batch.dtype == torch.float32
    for row, source in zip(batch, pictures):
        resized = np.asarray(source.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC), np.float64) / 255
        plain = (resized - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0]
        assert np.abs(row.double().numpy() - plain.transpose(2, 0, 1)).max() < 1e-5


def test_a_picture_of_the_right_size_keeps_its_pixels(processor: Processor) -> None:
    array = processor.image_array(picture(32, 32))
    assert array.shape == (3, 32, 32) and array.dtype == torch.uint8
    assert (array.permute(1, 2, 0).numpy() == np.asarray(picture(32, 32))).all()
    assert torch.equal(processor.normalise(array[None]), processor.images([picture(32, 32)]))


def test_bad_pictures_are_named(processor: Processor) -> None:
    with pytest.raises(ValueError, match="images: got an empty list; give at least one picture"):
        processor.images([])
    for value in (np.zeros((32, 32, 3), np.uint8), "cat.png", None):
        with pytest.raises(
            TypeError, match=f"takes a PIL image, got {type(value).__name__}; load it with .*load_image"
        ):
            processor.images([picture(4, 4), value])


# Texts.


def test_texts_are_padded_to_the_longest(processor: Processor) -> None:
    tokenizer = processor.tokenizer
    ids, mask = processor.texts(["a red circle", "a circle"])
    a, red, circle = tokenizer.convert_tokens_to_ids(["a", "red", "circle"])
    start, end, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    assert ids.tolist() == [[start, a, red, circle, end], [start, a, circle, end, pad]]
    assert mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool


def test_texts_agree_with_transformers(processor: Processor) -> None:
    scenes = Scenes("train", count=10, objects=3)
    texts = [caption for i in range(10) for caption in scenes.captions(i)]
    ids, mask = processor.texts(texts)
    theirs = processor.tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(ids, theirs["input_ids"])
    assert torch.equal(mask, theirs["attention_mask"].bool())


@pytest.mark.parametrize("objects", [2, 3])
def test_scene_captions_have_no_unknown_word_and_come_back(processor: Processor, objects: int) -> None:
    scenes = Scenes("val", count=30, objects=objects)
    for i in range(30):
        ids, mask = processor.texts(scenes.captions(i))
        assert not (ids == processor.tokenizer.unk_token_id).any()
        assert [processor.decode(row) for row in ids] == scenes.captions(i)
        assert processor.decode(ids[0].tolist()) == scenes.captions(i)[0]


def test_case_and_spaces_do_not_matter(processor: Processor) -> None:
    assert torch.equal(processor.texts([CAPTION])[0], processor.texts([f"  {CAPTION.upper()} \n"])[0])


@pytest.mark.parametrize("text", ["红色的圆", "красный круг", "دائرة حمراء", "🔴", "e\u0301", "\u200b", "zyzzyva"])
def test_words_outside_the_vocabulary_are_unknown_never_dropped(processor: Processor, text: str) -> None:
    ids, mask = processor.texts([f"a {text} circle"])
    words = ids[0, 2:-2]
    assert len(words) >= 1 and (words == processor.tokenizer.unk_token_id).all()
    assert mask.all()
    assert processor.decode(ids[0]) == "a circle"


def test_long_texts_are_cut_under_a_warning_that_counts_them() -> None:
    short = Processor(scenes_tokenizer(), image_size=32, max_length=6)
    with pytest.warns(
        TruncationWarning, match="2 of 3 texts are longer than 6 tokens and were cut, first 'on a"
    ) as caught:
        ids, mask = short.texts(["a red circle", CAPTION, CAPTION])
    assert len(caught) == 1 and caught[0].filename == __file__
    assert ids.shape == (3, 6)
    assert ids[1:, -1].tolist() == [short.tokenizer.sep_token_id] * 2
    assert mask.sum(1).tolist() == [5, 6, 6]
    assert short.decode(ids[1]) == "on a white background"


def test_a_text_of_just_the_longest_length_is_kept(recwarn: pytest.WarningsRecorder) -> None:
    exact = Processor(scenes_tokenizer(), image_size=32, max_length=5)
    assert exact.decode(exact.texts(["a red circle"])[0][0]) == "a red circle"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "texts: got an empty list; give at least one text"),
        ("a circle", TypeError, "takes a list of strings, got the string 'a circle'; put it in a list"),
        (["a", ""], ValueError, "entry 1 is empty; leave it out or give it words"),
        ([" \n\t"], ValueError, "entry 0 is empty"),
        (["a", None], TypeError, "entry 1 is NoneType None; expected a string"),
        ([3], TypeError, "entry 0 is int 3; expected a string"),
        ([b"a"], TypeError, "entry 0 is bytes b'a'; expected a string"),
        ([["a"]], TypeError, r"entry 0 is list \['a'\]; expected a string"),
    ],
)
def test_bad_texts_are_named(processor: Processor, texts, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        processor.texts(texts)


def test_no_tokens_are_no_words(processor: Processor) -> None:
    tokenizer = processor.tokenizer
    assert processor.decode([]) == ""
    assert processor.decode([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]) == ""


def test_word_tokenizer_numbers_its_words() -> None:
    tokenizer = word_tokenizer(["cat", "dog", "-"])
    assert tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, "cat", "dog", "-"]) == list(range(9))
    assert tokenizer("Cat-dog")["input_ids"] == [2, 6, 8, 7, 3]
    assert len(tokenizer) == 9


# Files.


def test_a_processor_comes_back(tmp_path: Path, processor: Processor) -> None:
    processor.save_pretrained(tmp_path)
    back = Processor.from_pretrained(tmp_path)
    assert back.settings() == processor.settings()
    assert torch.equal(back.images([picture(50, 40)]), processor.images([picture(50, 40)]))
    ids, mask = processor.texts([CAPTION, "a zyzzyva"])
    assert torch.equal(back.texts([CAPTION, "a zyzzyva"])[0], ids)
    assert back.decode(ids[0]) == CAPTION
    assert back.tokenizer.convert_tokens_to_ids("[DEC]") == 5
    back.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / SETTINGS_FILE).read_bytes() == (tmp_path / SETTINGS_FILE).read_bytes()


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{SETTINGS_FILE} does not exist; .* holds no processor written by"):
        Processor.from_pretrained(tmp_path)
