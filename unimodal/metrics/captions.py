"""Caption metrics without Java: CIDEr-D, BLEU-1 to 4, ROUGE-L, in points (100 times the fraction, as papers print).

On the same words, the numbers are those of pycocoevalcap 1.2 to 1e-6 points, also of empty captions and of orders without a match.
Two things differ, and a result's protocol names the first:

The COCO tools split captions with a Java program, Stanford's PTBTokenizer 3.4.1; ours is one regular expression, and that moves CIDEr-D by
about one point in eighty. So the tokenizer is written into the protocol, and `results_table` keeps the two kinds apart. That program parts
contractions (`do n't`, `dog 's`, `can not`), keeps `well-known`, `U.S.`, `3,000` and `and/or` whole, and counts brackets and symbols as
words; ours keeps contractions whole, parts at every other mark, and leaves marks out. Ours keeps accents and vowel signs with their
letters in every script and reads composed and decomposed ones alike; that program parts Gurmukhi, Kannada or Khmer at vowel signs.

What the COCO tools score without a word is refused: a reference without any word, and CIDEr-D of a single image, where it is always 0.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import regex

from unimodal import arguments

from .protocol import Protocol, Result, check_protocol

# Letters and digits with their marks; a joiner (of Persian, Hindi) inside; one apostrophe inside, straight or curly.
LETTERS = r"[\p{L}\p{N}](?:[\u200c\u200d]?[\p{L}\p{N}\p{Mn}\p{Mc}])*"
WORD = regex.compile(rf"{LETTERS}(?:'{LETTERS})?")
APOSTROPHES = {ord(mark): "'" for mark in "\u2019\u2018\u02bc\uff07"}
UNSEEN = dict.fromkeys((0xAD, 0xFE0E, 0xFE0F))  # the soft hyphen, and what chooses between two looks of a character
TOKENIZER = "lower case, NFC, words of letters, digits and marks with one apostrophe, no PTBTokenizer"
# What the COCO tools add to counts of matches and of n-grams, so that an order without a match does not end in 0.
TINY, SMALL = 1e-15, 1e-9

Ngrams = dict[tuple[str, ...], float]


@dataclass(frozen=True, kw_only=True)
class CaptionMetrics(Result):
    """Points of a set of captions; higher is better, and only CIDEr-D can pass 100."""

    cider_d: float
    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float


def tokenize(caption: str) -> list[str]:
    """The words of a caption, in lower case. Equal texts have equal words, whether their accents are composed or not."""
    plain = arguments.text(caption, "caption", empty=True).translate(APOSTROPHES | UNSEEN).lower()
    return WORD.findall(unicodedata.normalize("NFC", plain))


def caption_metrics(
    candidates: Sequence[str], references: Sequence[Sequence[str]], protocol: Protocol
) -> CaptionMetrics:
    """All caption metrics of one candidate per image.

    Args:
        candidates: [I] generated captions; an empty one scores zero.
        references: [I] human captions of the same images, one or more each.
        protocol: the data; its rule becomes the tokenizer's name, and its stage None.

    Raises:
        ValueError: for missing or unlike inputs, fewer than two images, or counts other than the protocol's.
    """
    check_protocol(protocol)
    candidates, references = _check(candidates, references)
    counts = (len(candidates), sum(map(len, references)))
    if counts != (protocol.images, protocol.captions):
        raise ValueError(
            f"got {counts[0]} candidates and {counts[1]} references; the protocol says {protocol.images} images and "
            f"{protocol.captions} captions. Describe the data that was captioned"
        )
    cider, rouge = cider_d(candidates, references), rouge_l(candidates, references)
    b1, b2, b3, b4 = bleu(candidates, references)
    return CaptionMetrics(
        protocol=replace(
            protocol, stage=None, k=None, combine=None, rule=f"caption words: {TOKENIZER}; BLEU smoothed as in COCO"
        ),
        cider_d=float(cider.mean()),
        bleu_1=b1,
        bleu_2=b2,
        bleu_3=b3,
        bleu_4=b4,
        rouge_l=float(rouge.mean()),
    )


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) against fixed references: tf-idf cosine over 1- to 4-grams, clipped, punished for
    length.

    An n-gram's weight is the log of how rare it is among the images' references: a score belongs to its set of images.

    Args:
        references: [I] human captions of each image, one or more.
        sigma: how many words of difference in length cost how much.

    Raises:
        ValueError: as `caption_metrics`.
    """

    def __init__(self, references: Sequence[Sequence[str]], *, sigma: float = 6.0) -> None:
        self.sigma = arguments.number(sigma, "sigma", least=1e-3, most=1e6)
        self.references = _reference_words(_check_references(references))
        if len(self.references) < 2:
            raise ValueError("got 1 image; CIDEr-D weighs n-grams by how few images mention them and needs at least 2")
        self.images_with = Counter(
            gram for refs in self.references for gram in {gram for ref in refs for gram in _ngrams(ref)}
        )  # an n-gram counts once per image, however many of its captions use it

    def score(self, candidate: str, image: int) -> float:
        """Points of a candidate for an image, 0 to 1000."""
        image = arguments.integer(image, "image", least=0, most=len(self.references) - 1)
        words, refs = tokenize(candidate), self.references[image]
        vectors, total = self._vectors(words), 0.0
        for ref in refs:
            length_penalty = math.exp(-((len(words) - len(ref)) ** 2) / (2 * self.sigma**2))
            total += length_penalty * sum(map(_clipped_cosine, vectors, self._vectors(ref))) / 4 / len(refs)
        return 1000 * total  # the paper's factor of 10, in points

    def _vectors(self, words: list[str]) -> list[Ngrams]:
        """One tf-idf vector for each n."""
        weighted: list[Ngrams] = [{} for _ in range(4)]
        for gram, count in _ngrams(words).items():
            rarity = math.log(len(self.references) / max(1, self.images_with[gram]))
            weighted[len(gram) - 1][gram] = count * rarity
        return weighted


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]], *, sigma: float = 6.0) -> np.ndarray:
    """CIDEr-D of one candidate per image, against references of which the same images are the set.

    Returns:
        [I] float64, points per candidate (0 to 1000); their mean is the metric.

    Raises:
        ValueError: as `caption_metrics`.
    """
    candidates, references = _check(candidates, references)
    metric = CiderD(references, sigma=sigma)
    return np.array([metric.score(candidate, i) for i, candidate in enumerate(candidates)])


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) of the whole set, with the brevity penalty and the smoothing of the COCO tools, in points.

    The penalty looks at the reference nearest in length, of two equally near at the shorter.
    """
    words, reference_words = _tokenize_all(candidates, references)
    matches, ngrams, length, reference_length = np.zeros(4), np.zeros(4), 0, 0
    for candidate, refs in zip(words, reference_words, strict=True):
        length += len(candidate)
        reference_length += min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]
        counts, most = _ngrams(candidate), Counter[tuple[str, ...]]()
        for ref in refs:
            most |= _ngrams(ref)
        for gram, count in counts.items():
            ngrams[len(gram) - 1] += count
            matches[len(gram) - 1] += min(count, most[gram])
    precisions = np.cumprod((matches + TINY) / (ngrams + SMALL))
    ratio = (length + TINY) / (reference_length + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    b1, b2, b3, b4 = (100 * penalty * float(product) ** (1 / n) for n, product in enumerate(precisions, 1))
    return b1, b2, b3, b4


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]], *, beta: float = 1.2) -> np.ndarray:
    """ROUGE-L (Lin 2004) as COCO has it: F of the best precision and the best recall over the references.

    Returns:
        [I] float64, points per candidate; their mean is the metric.
    """
    beta = arguments.number(beta, "beta", least=0, most=1e6)
    words, reference_words = _tokenize_all(candidates, references)
    scores = np.zeros(len(words))
    for i, (candidate, refs) in enumerate(zip(words, reference_words, strict=True)):
        common = [_longest_common_subsequence(candidate, ref) for ref in refs]
        if max(common) > 0:
            precision = max(common) / len(candidate)
            recall = max(c / len(ref) for c, ref in zip(common, refs, strict=True))
            scores[i] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return 100 * scores


def _ngrams(tokens: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(tokens) - n + 1))


def _clipped_cosine(candidate: Ngrams, reference: Ngrams) -> float:
    """Cosine, but a candidate gains nothing by repeating an n-gram more often than the reference."""
    norm = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    dot = sum(min(weight, reference.get(gram, 0.0)) * reference.get(gram, 0.0) for gram, weight in candidate.items())
    return dot / norm if norm else 0.0


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Candidates [I], and the references of the same images."""
    captions, known = arguments.listed(candidates, "candidates", "texts"), _check_references(references)
    if len(captions) != len(known) or not captions:
        raise ValueError(
            f"got {len(captions)} candidates and references of {len(known)} images; "
            "expected one candidate per image and at least one image"
        )
    return [arguments.text(one, f"candidates[{i}]", empty=True) for i, one in enumerate(captions)], known


def _check_references(references: Sequence[Sequence[str]]) -> list[list[str]]:
    known = [
        arguments.listed(refs, f"references[{i}]", "texts")
        for i, refs in enumerate(arguments.listed(references, "references", "lists of texts"))
    ]
    return [[arguments.text(one, f"references[{i}]", empty=True) for one in refs] for i, refs in enumerate(known)]


def _reference_words(references: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    words = [[tokenize(ref) for ref in refs] for refs in references]
    for i, refs in enumerate(words):
        if not refs or not all(refs):
            raise ValueError(
                f"image {i}: got references {list(references[i])!r}; expected at least one, each with a word in it"
            )
    return words


def _tokenize_all(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    candidates, references = _check(candidates, references)
    return [tokenize(c) for c in candidates], _reference_words(references)
