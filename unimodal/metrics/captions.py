"""Caption metrics without Java: CIDEr-D, BLEU-1 to 4, ROUGE-L, in points (100 times the fraction, as papers print).

The COCO tools split words with a Java tokenizer; ours is one regular expression, and that moves CIDEr-D by about one
point in eighty. So the tokenizer is written into the result's protocol, and `results_table` keeps the two kinds apart.
On the same words, the numbers are those of pycocoevalcap.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torchmetrics.functional.text import bleu_score

from .protocol import Protocol, Result

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
TOKENIZER = f"lower case, regex {WORD.pattern}"

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
    return WORD.findall(caption.lower())


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
    counts = (len(candidates), sum(map(len, references)))
    if counts != (protocol.images, protocol.captions):
        raise ValueError(
            f"got {counts[0]} candidates and {counts[1]} references; the protocol says {protocol.images} images and "
            f"{protocol.captions} captions. Describe the data that was captioned"
        )
    cider, rouge = cider_d(candidates, references), rouge_l(candidates, references)
    b1, b2, b3, b4 = bleu(candidates, references)
    return CaptionMetrics(
        protocol=replace(protocol, stage=None, k=None, combine=None, rule=f"caption words: {TOKENIZER}"),
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
        self.references, self.sigma = _reference_words(references), sigma
        if len(self.references) < 2:
            raise ValueError("got 1 image; CIDEr-D weighs n-grams by how few images mention them and needs at least 2")
        self.images_with = Counter(
            gram for refs in self.references for gram in {gram for ref in refs for gram in _ngrams(ref)}
        )  # an n-gram counts once per image, however many of its captions use it

    def score(self, candidate: str, image: int) -> float:
        """Points of a candidate for an image, 0 to 1000."""
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
    _check(candidates, references)
    metric = CiderD(references, sigma=sigma)
    return np.array([metric.score(candidate, i) for i, candidate in enumerate(candidates)])


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) of the whole set, with the brevity penalty, in points."""
    words, reference_words = _tokenize_all(candidates, references)
    joined = [" ".join(w) for w in words]
    # The penalty looks at the reference nearest in length. Of two equally near, torchmetrics takes the first and the
    # COCO tools the shorter; sorting makes them one.
    joined_references = [[" ".join(ref) for ref in sorted(refs, key=len)] for refs in reference_words]
    b1, b2, b3, b4 = (100 * bleu_score(joined, joined_references, n_gram=n).item() for n in (1, 2, 3, 4))
    return b1, b2, b3, b4


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]], *, beta: float = 1.2) -> np.ndarray:
    """ROUGE-L (Lin 2004) as COCO has it: F of the best precision and the best recall over the references.

    Returns:
        [I] float64, points per candidate; their mean is the metric.
    """
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


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"got {len(candidates)} candidates and references of {len(references)} images; "
            "expected one candidate per image and at least one image"
        )
    for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True)):
        if isinstance(refs, str) or not all(isinstance(s, str) for s in (candidate, *refs)):
            raise ValueError(
                f"image {i}: got candidate {candidate!r} and references {refs!r}; "
                "expected a string and a list of strings"
            )


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
    _check(candidates, references)
    return [tokenize(c) for c in candidates], _reference_words(references)
