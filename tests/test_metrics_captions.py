"""Caption metrics equal slow second implementations and numbers from the COCO tools, and their known properties hold;
captions that cannot be scored are refused by name.
"""

import itertools
import math
import random
import unicodedata

import numpy as np
import pytest

from tests import coco_captions
from unimodal.metrics import Protocol, bleu, caption_metrics, cider_d, rouge_l, tokenize
from unimodal.metrics.captions import TOKENIZER

CANDIDATES = [
    "A brown dog runs through the green grass.",
    "Two girls are playing soccer",
    "a man is riding a bike bike bike",
    "The child's red ball floats on water",
]
REFERENCES = [
    ["A dog is running in the grass .", "A brown dog runs across a green field", "the dog runs through grass"],
    ["Two girls in uniforms play soccer on a field.", "Girls are playing soccer"],
    ["A man rides his bike down a hill", "a cyclist is riding a mountain bike", "The man is on a bike"],
    ["A red ball floats in the pool", "A child's ball is on the water", "the child looks at a red ball on the water"],
]


def random_captions(seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)
    words = ["a", "the", "red", "blue", "dog", "cat", "man", "girl", "runs", "sits", "on", "in", "grass"]
    references = [
        [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(rng.randint(1, 4))] for _ in range(12)
    ]
    candidates = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(8)]
    return candidates + [refs[0] + " dog" for refs in references[8:]], references


def slow_cider_d(candidates: list[str], references: list[list[str]]) -> list[float]:
    """The paper's formulas with dense count vectors over every n-gram that occurs."""

    def grams(caption: str, n: int) -> list[str]:
        words = caption.split()
        return ["_".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    totals = np.zeros(len(candidates))
    for n in (1, 2, 3, 4):
        everything = itertools.chain(candidates, *references)
        vocabulary = sorted({g for caption in everything for g in grams(caption, n)})

        def count(caption: str, n: int = n, vocabulary: list[str] = vocabulary) -> np.ndarray:
            return np.array([grams(caption, n).count(g) for g in vocabulary], dtype=float)

        images_with = sum(np.any([count(ref) > 0 for ref in refs], axis=0).astype(float) for refs in references)
        idf = np.log(len(references)) - np.log(np.maximum(images_with, 1))
        for i, (candidate, refs) in enumerate(zip(candidates, references)):
            for ref in refs:
                c, r = count(candidate) * idf, count(ref) * idf
                norm = np.sqrt((c**2).sum()) * np.sqrt((r**2).sum())
                gap = len(candidate.split()) - len(ref.split())
                if norm > 0:
                    totals[i] += (np.minimum(c, r) * r).sum() / norm * math.exp(-(gap**2) / 72) / len(refs) / 4
    return (10 * 100 * totals).tolist()


def slow_rouge_l(candidate: str, refs: list[str]) -> float:
    """Longest common subsequence by trying every subsequence of the candidate."""
    words = candidate.split()

    def is_subsequence(part: tuple[str, ...], whole: list[str]) -> bool:
        rest = iter(whole)
        return all(word in rest for word in part)

    def common(ref: str) -> int:
        parts = (p for n in range(len(words), -1, -1) for p in itertools.combinations(words, n))
        return next(len(p) for p in parts if is_subsequence(p, ref.split()))

    p = max(common(ref) / len(words) for ref in refs)
    r = max(common(ref) / len(ref.split()) for ref in refs)
    return 100 * (1 + 1.44) * p * r / (r + 1.44 * p) if p else 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cider_d_equals_a_dense_slow_implementation(seed) -> None:
    candidates, references = random_captions(seed)
    np.testing.assert_allclose(cider_d(candidates, references), slow_cider_d(candidates, references), atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_rouge_l_equals_a_search_over_all_subsequences(seed) -> None:
    candidates, references = random_captions(seed)
    slow = [slow_rouge_l(c, refs) for c, refs in zip(candidates, references)]
    np.testing.assert_allclose(rouge_l(candidates, references), slow, atol=1e-9)


def test_numbers_of_the_coco_tools_on_the_same_words() -> None:
    """Computed with pycocoevalcap 1.2 after our tokenizer, times 100."""
    assert bleu(CANDIDATES, REFERENCES) == pytest.approx((92.857143, 76.181175, 58.783367, 39.917961), abs=1e-4)
    np.testing.assert_allclose(
        cider_d(CANDIDATES, REFERENCES), [283.23339159, 481.56463994, 154.78005544, 217.39094755], atol=1e-7
    )
    np.testing.assert_allclose(
        rouge_l(CANDIDATES, REFERENCES), [71.76470588, 90.70631970, 67.47787611, 62.24489796], atol=1e-7
    )


@pytest.mark.parametrize("start", range(0, coco_captions.COUNT, 50))
def test_numbers_of_the_coco_tools_on_captions_that_scorers_stumble_over(start: int) -> None:
    """Empty captions, marks alone, orders of BLEU without a match or without an n-gram, repetition, several scripts."""
    for seed, numbers in enumerate(coco_captions.read()["numbers"][start : start + 50], start):
        candidates, references = coco_captions.captions(seed)
        scores = [
            *bleu(candidates, references),
            cider_d(candidates, references).mean(),
            rouge_l(candidates, references).mean(),
        ]
        assert scores == pytest.approx(numbers, abs=1e-6), seed


def test_the_table_holds_what_is_hard() -> None:
    table = coco_captions.read()
    assert len(table["numbers"]) == coco_captions.COUNT and len(table["words"]) > 240
    without_match = [row for row in table["numbers"] if row[0] > 1 and row[3] < 1e-3 * row[0]]
    assert len(without_match) > 20 and sum(row[0] < 1e-3 for row in table["numbers"]) > 20


def test_an_order_without_a_match_does_not_end_in_zero() -> None:
    """`(tiny / ngrams)` to the power of a quarter; the other libraries give 0."""
    scores = bleu(["a b c d", "a b c d"], [["a c b d"], ["a c b d"]])
    assert scores == pytest.approx(
        (100, 100 * (1e-15 / 6) ** 0.5, 100 * (1e-30 / 24) ** (1 / 3), 100 * (1e-45 / 48) ** 0.25), rel=1e-6
    )


def test_bleu_does_not_depend_on_the_order_of_references() -> None:
    candidate, short, long = "a b c d e", "a b c d", "a b c d e f"  # equally near: the penalty must pick one
    scores = {bleu([candidate, candidate], [refs, refs]) for refs in ([short, long], [long, short])}
    assert len(scores) == 1


def test_a_perfect_caption_has_full_marks() -> None:
    captions = ["a red dog runs on grass", "two cats sit under a table"]
    result = caption_metrics(captions, [[c] for c in captions], protocol(2, 2))
    assert result.cider_d == pytest.approx(1000)
    assert (result.bleu_1, result.bleu_4, result.rouge_l) == pytest.approx((100, 100, 100))


def test_cider_d_ignores_words_of_every_image_and_gains_nothing_by_repetition_or_length() -> None:
    refs = [["the dog runs fast"], ["the cat sleeps here"], ["the bird sings well"]]
    others = ["cat", "bird"]
    everywhere, once, thrice, longer = (
        cider_d([c, *others], refs)[0] for c in ("the the", "dog", "dog dog dog", "dog " + "filler " * 20)
    )
    assert everywhere == 0 < longer < thrice <= once + 1e-9


def test_an_empty_candidate_scores_zero_without_harm_to_the_others() -> None:
    scores = cider_d(["", "the dog runs"], [["a cat sleeps"], ["the dog runs"]])
    assert scores[0] == 0 and scores[1] > 0
    assert rouge_l(["", "the dog runs"], [["a cat sleeps"], ["the dog runs"]]).tolist() == pytest.approx([0, 100])


def protocol(images: int, captions: int) -> Protocol:
    return Protocol(dataset="toy", split="test", fingerprint="0", images=images, captions=captions)


def test_the_result_names_its_tokenizer_and_averages_over_images() -> None:
    result = caption_metrics(CANDIDATES, REFERENCES, protocol(4, 11))
    assert (
        result.protocol.rule == f"caption words: {TOKENIZER}; BLEU smoothed as in COCO"
        and result.protocol.stage is None
    )
    assert result.cider_d == pytest.approx(cider_d(CANDIDATES, REFERENCES).mean())
    assert list(result.to_dict()) == ["protocol", "cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]


def test_tokenizer() -> None:
    assert tokenize("A dog's BALL, 2-year_old café!") == ["a", "dog's", "ball", "2", "year", "old", "café"]


def test_words_are_those_of_the_coco_tools_or_another_known_choice() -> None:
    """The table has the words of the COCO tools, and ours where they differ: contractions, hyphens, dots in words, symbols."""
    table = coco_captions.read()["words"]
    assert {text: tokenize(text) for text in table} == {text: words[-1] for text, words in table.items()}


@pytest.mark.parametrize(
    "words",
    [
        ["café", "straße", "naïve"],
        ["कुत्ता", "हिन्दी", "क्षत्रिय"],
        ["สุนัข", "น้ำ"],
        ["தமிழ்", "ਪੰਜਾਬੀ", "ಕನ್ನಡ", "ខ្មែរ", "မြန်မာ"],
        ["كَلْب", "שָׁלוֹם", "か\u3099", "강아지"],
        ["don't", "o'clock", "dog's"],
        ["می\u200cخواهم", "कि\u200dताब"],
    ],
)
def test_words_stay_whole_however_they_are_encoded(words: list[str]) -> None:
    composed = [unicodedata.normalize("NFC", word) for word in words]
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, " ".join(words))
        assert tokenize(text) == tokenize(text.replace("'", "\u2019")) == tokenize(text.title()) == composed
        assert tokenize(f"({text.replace(' ', ', ')}...) 😀") == composed


@pytest.mark.parametrize(
    ("candidates", "references", "says"),
    [
        ([], [], "got 0 candidates and references of 0 images; expected one candidate per image"),
        (["a"], [["a"], ["b"]], "got 1 candidates and references of 2 images"),
        (["a", "b"], [["a"], []], r"image 1: got references \[\]; expected at least one"),
        (["a", "b"], [["a"], ["..."]], r"image 1: got references \['...'\]; expected at least one, each with a word"),
        (["a", None], [["a"], ["b"]], r"candidates\[1\]: expected a text as str, got None"),
        (["a", "b"], ["a", ["b"]], r"references\[0\]: expected a list of texts, got 'a'"),
        (["a"], [["a"]], "got 1 image; CIDEr-D .* needs at least 2"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(candidates, references, says) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        cider_d(candidates, references)


def test_a_protocol_that_describes_other_captions_is_refused() -> None:
    with pytest.raises(
        ValueError, match="got 4 candidates and 11 references; the protocol says 4 images and 20 captions"
    ):
        caption_metrics(CANDIDATES, REFERENCES, protocol(4, 20))
