"""Proves that the labelled sets read as they were published, and that two items are relevant to each other if a label is shared."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from unimodal.data import (
    KarpathyJson,
    NusWide,
    PascalSentence,
    Scenes,
    WebDatasetTars,
    Wikipedia,
    label_matrix,
    write_karpathy,
    write_webdataset,
)
from unimodal.metrics import relevance_by_label


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), "red").save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


# Relevance.


def test_relevance_by_label_is_a_shared_label() -> None:
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.rand(n, 6, generator=generator) < 0.3 for n in (5, 7))
    expected = [[any(a and b for a, b in zip(q, g)) for g in gallery.tolist()] for q in query.tolist()]
    assert relevance_by_label(query, gallery).tolist() == expected
    assert relevance_by_label(query.long(), gallery.double()).tolist() == expected
    assert {True, False} == {value for row in expected for value in row}


def test_relevance_refuses_what_is_no_multi_hot() -> None:
    with pytest.raises(ValueError, match=r"got labels \[2, 3\] and \[2, 4\]; expected \[Q, L\] and \[G, L\]"):
        relevance_by_label(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one_hot makes them of class numbers"):
        relevance_by_label(torch.tensor([[2]]), torch.tensor([[1]]))


def test_label_matrix(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="2 of 4 pictures of NUS-WIDE all have no tags or none of the 2 concepts"):
        nus = NusWide(nus_wide(tmp_path), split="all", concepts=["sky", "water"])
    matrix, names = label_matrix(nus)
    assert names == ["sky", "water"] and matrix.tolist() == [[True, True], [False, True]]
    assert label_matrix(nus, ["water", "cat", "sky"])[0].tolist() == [[True, False, True], [True, False, False]]
    with pytest.raises(ValueError, match="actor/0001_11.jpg has the label 'water'; names has sky"):
        label_matrix(nus, ["sky"])
    with pytest.raises(ValueError, match="scenes/val/000000 of scenes val has no label"):
        label_matrix(Scenes("val", count=1))


def test_labels_survive_writing(tmp_path: Path) -> None:
    pairs = PascalSentence(pascal(tmp_path / "pascal"), split="val")
    path = write_karpathy({"val": pairs}, tmp_path / "karpathy")
    write_webdataset(pairs, tmp_path / "tars")
    for back in (KarpathyJson(path, split="val"), WebDatasetTars(tmp_path / "tars" / "*.tar", split="val")):
        assert [back.labels(i) for i in range(2)] == [{"aeroplane"}, {"cat"}]
        assert [back.captions(i) for i in range(2)] == [pairs.captions(i) for i in range(2)]
    data = json.loads(path.read_text())
    data["images"][0]["labels"] = ["cat"]
    before = KarpathyJson(path, split="val").fingerprint()
    path.write_text(json.dumps(data))
    assert KarpathyJson(path, split="val").fingerprint() != before


# Pascal-Sentence.


def pascal(root: Path) -> Path:
    for category in ("cat", "aeroplane"):
        for i in range(10):
            picture(root / "dataset" / category / f"2008_{i}.jpg")
            text(root / "sentence" / category / f"2008_{i}.txt", f"A {category} {i}.\nThe {category}.\n")
    return root


def test_pascal_sentence(tmp_path: Path) -> None:
    root = pascal(tmp_path)
    splits = {split: PascalSentence(root, split=split) for split in ("train", "val", "test", "all")}
    keys = {split: [reader.key(i) for i in range(len(reader))] for split, reader in splits.items()}
    assert [len(keys[split]) for split in splits] == [16, 2, 2, 20]
    assert sorted(keys["train"] + keys["val"] + keys["test"]) == sorted(keys["all"])
    for split in ("val", "test"):
        assert [splits[split].labels(i) for i in range(2)] == [{"aeroplane"}, {"cat"}]
    number = keys["val"][1].removeprefix("cat/2008_").removesuffix(".jpg")
    assert splits["val"].captions(1) == [f"A cat {number}.", "The cat."]
    assert splits["val"].image(1).size == (2, 2)
    assert PascalSentence(root, split="train").fingerprint() == splits["train"].fingerprint()
    assert len({PascalSentence(root, split="test", seed=seed).fingerprint() for seed in range(5)}) > 1


def test_bad_pascal_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected dataset/CLASS/NAME.jpg"):
        PascalSentence(tmp_path, split="train")
    root = pascal(tmp_path)
    with pytest.raises(ValueError, match="split: expected one of train, val, test, all, got 'dev'"):
        PascalSentence(root, split="dev")
    (root / "sentence" / "cat" / "2008_3.txt").unlink()
    with pytest.raises(ValueError, match="cat/2008_3.jpg: expected a list of at least one caption"):
        PascalSentence(root, split="all")


# Wikipedia.


def wikipedia(root: Path) -> Path:
    picture(root / "images" / "art" / "p1.jpg")
    picture(root / "images" / "warfare" / "p2.jpg")
    text(root / "trainset_txt_img_cat.list", "t1-1\tp1\t1\n")
    text(root / "testset_txt_img_cat.list", "t2-1\tp2\t10\n")
    text(root / "texts" / "t1-1.xml", "<article><title>x</title><text>\nOil &amp; water\n\non canvas.</text></article>")
    text(root / "texts" / "t2-1.xml", "<article><text>The R&D battle.</text></article>")
    return root


def test_wikipedia(tmp_path: Path) -> None:
    root = wikipedia(tmp_path)
    for split, key, caption, label in (
        ("train", "art/p1.jpg", "Oil & water on canvas.", "art"),
        ("test", "warfare/p2.jpg", "The R&D battle.", "warfare"),
    ):
        reader = Wikipedia(root, split=split)
        assert (len(reader), reader.key(0), reader.captions(0), reader.labels(0)) == (1, key, [caption], {label})
        assert reader.image(0).size == (2, 2)


def test_bad_wikipedia(tmp_path: Path) -> None:
    root = wikipedia(tmp_path)
    with pytest.raises(ValueError, match="split: expected one of train, test, got 'val'"):
        Wikipedia(root, split="val")
    for line in ("t1-1\tp1", "t1-1\tp1\t11", "t1-1\tp1\tart"):
        text(root / "trainset_txt_img_cat.list", line)
        with pytest.raises(
            ValueError, match="list line 1: expected text, picture and category from 1 to 10, got 't1-1"
        ):
            Wikipedia(root, split="train")
    text(root / "trainset_txt_img_cat.list", "../t\tp1\t1")
    with pytest.raises(ValueError, match=r"'../t.xml' leaves"):
        Wikipedia(root, split="train")
    text(root / "trainset_txt_img_cat.list", "t1-1\tp1\t1")
    text(root / "texts" / "t1-1.xml", "<article>no text</article>")
    with pytest.raises(ValueError, match="art/p1.jpg: expected a list of at least one caption"):
        Wikipedia(root, split="train")


# NUS-WIDE.


def nus_wide(root: Path) -> Path:
    names = ["actor\\0001_11.jpg", "zoo\\0002_22.jpg", "zoo\\0003_33.jpg", "zoo\\0004_44.jpg"]
    text(root / "ImageList" / "Imagelist.txt", "\n".join(names) + "\n")
    text(root / "ImageList" / "TrainImagelist.txt", "\n".join((names[3], names[0])))
    text(root / "ImageList" / "TestImagelist.txt", "\n".join((names[1], names[2])))
    text(root / "NUS_WID_Tags" / "All_Tags.txt", "11      sun sea \n22      lake \n33      animal \n44      \n")
    for concept, values in (("sky", "1000"), ("water", "1101"), ("animal", "0010")):
        text(root / "Groundtruth" / "AllLabels" / f"Labels_{concept}.txt", "\n".join(values) + "\n")
    picture(root / "Flickr" / "actor" / "0001_11.jpg")
    return root


def test_nus_wide(tmp_path: Path) -> None:
    root = nus_wide(tmp_path)
    with pytest.warns(UserWarning, match="1 of 2 pictures of NUS-WIDE train have no tags or none of the 3 concepts"):
        train = NusWide(root, split="train")
    assert (len(train), train.key(0), train.captions(0)) == (1, "actor/0001_11.jpg", ["sun sea"])
    assert train.labels(0) == {"sky", "water"} and train.image(0).size == (2, 2)
    test = NusWide(root, split="test")
    assert [(test.captions(i), test.labels(i)) for i in range(2)] == [(["lake"], {"water"}), (["animal"], {"animal"})]
    with pytest.warns(UserWarning, match="1 of 2 pictures of NUS-WIDE test have no tags or none of the 2 concepts"):
        assert len(NusWide(root, split="test", concepts=["sky", "water"])) == 1


def test_bad_nus_wide(tmp_path: Path) -> None:
    root = nus_wide(tmp_path)
    with pytest.raises(ValueError, match="split: expected one of train, test, all, got 'val'"):
        NusWide(root, split="val")
    with pytest.raises(FileNotFoundError, match="Labels_skie.txt"):
        NusWide(root, split="test", concepts=["skie"])
    text(root / "Groundtruth" / "AllLabels" / "Labels_sky.txt", "1\n0\n-1130179\n0\n")
    with pytest.raises(ValueError, match="Labels_sky.txt: expected 4 lines of 0 or 1; download the file again"):
        NusWide(root, split="test")
    root = nus_wide(tmp_path)
    text(root / "NUS_WID_Tags" / "All_Tags.txt", "11 a\n33 b\n22 c\n44 d\n")
    with pytest.raises(ValueError, match="All_Tags.txt has photo 33 where Imagelist.txt has zoo/0002_22.jpg"):
        NusWide(root, split="test")
    text(root / "NUS_WID_Tags" / "All_Tags.txt", "11 a\n")
    with pytest.raises(ValueError, match="All_Tags.txt has 1 lines and Imagelist.txt 4"):
        NusWide(root, split="test")
