"""The report's page is one file that asks nothing of anyone, says what it was given, and lets no text become markup."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimodal.report import Report, write_misses, write_report
from unimodal.report.chart import log_ticks, loss_chart, thin
from unimodal.report.pieces import differing, duration, image

PICTURE = Image.new("RGB", (32, 32), "red")
VOID = {"meta", "img", "line", "path", "circle", "br"}


def contents(text: str = "a red circle") -> Report:
    """A report with one of everything, `text` wherever words may stand."""
    hit, other = {"score": 0.8, "right": True, "picture": PICTURE}, {"score": 0.9, "right": False, "text": text}
    score = {"name": text, "after": [0.4, None, 0.3]}
    stage = {
        "name": text,
        "goal": text,
        "trained": {text: 1500},
        "frozen": {"backbone": 2_500_000},
        "proof": text,
        "steps": 10,
        "seconds": 61.0,
        "losses": {text: [(0, 4.0), (5, 1.0), (10, 0.0)]},
    }
    return {
        "title": text,
        "summary": text,
        "facts": {text: text},
        "wall_seconds": 3700.0,
        "peak_memory_mb": 1834.2,
        "metrics": [
            {
                "name": text,
                "protocol": "gallery of 500",
                "first": 0.712,
                "reranked": 0.934,
                "aims": {"first": 0.8, "reranked": 0.9},
            },
            {"name": "rank", "protocol": text, "value": 3.0, "unit": "number"},
        ],
        "stages": [stage],  # type: ignore[list-item]
        "scores": [score],  # type: ignore[list-item]
        "searches": [
            {"text": text, "first": [other, hit], "reranked": [hit, other]},  # type: ignore[list-item]
            {"picture": PICTURE, "first": [other], "reranked": []},  # type: ignore[list-item]
        ],
        "swaps": [
            {"picture": PICTURE, "true": text, "false": text, "embedding": (0.4, 0.5), "matching": (0.9, 0.1)},
        ],
        "captions": [{"picture": PICTURE, "text": text, "right": False, "reference": text}],
        "drawings": [{"picture": PICTURE, "text": text, "right": True, "verdict": text}],
    }


def page(tmp_path: Path, report: Report) -> str:
    return write_report(tmp_path / "sub" / "report.html", report).read_text()


class Balanced(HTMLParser):
    """Collects the tags and attributes of a page and insists that every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_page_reaches_for_nothing_outside(tmp_path: Path) -> None:
    text = page(tmp_path, contents())
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    seen = Balanced(text).seen
    assert not {tag for tag, _ in seen} & {"script", "link", "iframe", "object", "base"}
    sources = [attributes[key] for _, attributes in seen for key in ("src", "href") if key in attributes]
    assert sources and all(str(source).startswith(("data:image/", "#")) for source in sources)


def test_every_section_is_there_and_named_in_the_navigation(tmp_path: Path) -> None:
    text = page(tmp_path, contents())
    titles = ["Results", "Stages", "Learned and forgotten", "Search", "Swapped attributes", "Captions", "Drawings"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == titles
    assert re.findall(r'<a href="#(.*?)">', text) == re.findall(r'<section id="(.*?)">', text)


def test_empty_lists_leave_their_sections_out(tmp_path: Path) -> None:
    report = contents()
    for key in ("metrics", "scores", "searches", "swaps", "captions", "drawings"):
        report[key] = []  # type: ignore[literal-required]
    assert re.findall(r"<h2>(.*?)</h2>", page(tmp_path, report)) == ["Stages"]


def test_numbers_and_verdicts_are_shown(tmp_path: Path) -> None:
    text = page(tmp_path, contents())
    for shown in (
        "71.2%",
        "93.4%",
        "80.0%",
        "90.0%",
        "gallery of 500",
        "1 h 1 min 40 s",
        "1,834 MiB",
        "2.50 M",
        "1.5 k",
    ):
        assert shown in text
    assert '<small class="down">−10.0</small>' in text  # 0.4, unknown, 0.3
    assert "the right one: #2 → #1" in text
    assert "not in the first 1" in text
    assert text.count('aria-label="wrong"') == 3  # an aim, the embedding's swap and the caption


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b 'c' \u202e{0} %s"]
)
def test_hostile_words_stay_words(tmp_path: Path, text: str) -> None:
    def tags(report: Report) -> list[str]:
        return [tag for tag, _ in Balanced(page(tmp_path, report)).seen if tag != "mark"]

    assert tags(contents(text)) == tags(contents())
    assert not any("onerror" in attributes for _, attributes in Balanced(page(tmp_path, contents(text))).seen)


def test_small_pictures_are_exact_and_photographs_are_reduced() -> None:
    assert 'class="pixels" src="data:image/png' in image(np.zeros((32, 32, 3), np.uint8), "black")
    photograph = image(Image.new("RGB", (1000, 500)), "grey")
    assert 'src="data:image/jpeg' in photograph and 'width="256" height="128"' in photograph


@pytest.mark.parametrize(
    ("picture", "came"), [(np.zeros((3, 8, 8), np.float32), r"float32 \[3, 8, 8\]"), ("cat.png", "str")]
)
def test_wrong_pictures_are_named(picture, came: str) -> None:
    with pytest.raises(TypeError, match=rf"a PIL image or a uint8 array \[H, W, 3\], not {came}"):
        image(picture, "")


def test_missed_queries_have_a_page_of_their_own(tmp_path: Path) -> None:
    other, right = {"score": 0.9, "right": False, "picture": PICTURE}, {"score": 0.8, "right": True, "picture": PICTURE}
    miss = {"text": "a <red> circle", "first": [other, right], "reranked": [right, other], "note": "a twin & more"}
    path = write_misses(
        tmp_path / "misses.html", title="Misses <1>", summary="two of 9", facts={"Model": "toy"},
        misses={"Text to image": [miss], "Image to text": []},  # type: ignore[list-item]
    )  # fmt: skip
    text = path.read_text()
    Balanced(text)
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Text to image"]  # an empty group is left out
    for shown in (
        "Misses &lt;1&gt;",
        "a &lt;red&gt; circle",
        "a twin &amp; more",
        "the right one: #2 → #1",
        "two of 9",
        "toy",
    ):
        assert shown in text


def test_wrong_keys_are_named(tmp_path: Path) -> None:
    report = dict(contents(), sweaps=[])
    del report["swaps"]
    with pytest.raises(ValueError, match=r"lacks \['swaps'\] and has the unknown \['sweaps'\]"):
        write_report(tmp_path / "report.html", report)  # type: ignore[arg-type]


def test_differing_words_are_marked() -> None:
    true, false = differing("a red circle left of a < square", "a blue circle left of a < square")
    assert true == "a <mark>red</mark> circle left of a &lt; square"
    assert false == "a <mark>blue</mark> circle left of a &lt; square"


def test_chart_keeps_its_curves_inside_and_its_page_small() -> None:
    chart = loss_chart("losses", {"long": [(i, 5.0 / (i + 1)) for i in range(5000)], "one": [(7, 0.3)], "none": []})
    assert len(chart) < 20_000 and ">none<" not in chart
    points = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)(?=[L\"])", chart) if "." in x]
    assert points and all(0 <= x <= 400 and 0 <= y <= 220 for x, y in points)


def test_thinning_keeps_the_mean() -> None:
    points = [(i, float(i)) for i in range(1000)]
    thinned = thin(points, count=100)
    assert len(thinned) == 100 and np.mean([v for _, v in thinned]) == pytest.approx(np.mean([v for _, v in points]))


def test_ticks_and_durations_are_round() -> None:
    assert log_ticks(0.08, 5.5) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    assert log_ticks(0.001, 12) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert [duration(s) for s in (0.2, 61, 3600)] == ["0 s", "1 min 1 s", "1 h"]
