"""Captions that scorers stumble over, and what the COCO tools make of them; `coco_captions.json` holds their numbers and their words.

`python -m tests.coco_captions` writes the file anew, where pycocoevalcap 1.2 is installed and `java` runs. `numbers` are those of its Bleu,
Cider and Rouge on our words, for each of the sets below. `words` has for each text those of its tokenizer (Stanford's PTBTokenizer 3.4.1,
without the marks that it leaves out), and ours where they differ.
"""

import json
import random
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("coco_captions.json")
COUNT = 400

PLAIN = ["a", "the", "red", "blue", "dog", "cat", "man", "girl", "runs", "sits", "on", "in", "grass", "of", "two"]
ODD = [
    *(
        "don't",
        "don\u2019t",
        "cannot",
        "dog's",
        "dogs'",
        "U.S.",
        "3,000",
        "1.5",
        "50%",
        "$5",
        "well-known",
        "t-shirt",
        "and/or",
    ),
    *(
        "café",
        "cafe\u0301",
        "naïve",
        "nai\u0308ve",
        "Straße",
        "İstanbul",
        "ΣΊΣΥΦΟΣ",
        "ﬁsh",
        "x\u00ady",
        "\u200b",
        "\u00a0",
    ),
    *(
        "कुत्ता",
        "घास",
        "हिन्दी",
        "สุนัข",
        "น้ำ",
        "कि\u200dताब",
        "می\u200cخواهم",
        "الكلب",
        "犬",
        "草の上",
        "강아지",
        "😀",
        "👩\u200d🚒",
        "1️⃣",
    ),
    *(
        "...",
        "\u2026",
        "--",
        "\u2014",
        "(",
        ")",
        "[x]",
        "\u201cquote\u201d",
        "``",
        "''",
        "'",
        "_",
        "under_score",
        "#tag",
        "@me",
        "a.b",
    ),
]


def captions(seed: int) -> tuple[list[str], list[list[str]]]:
    """Candidates and their references: each seed stumbles in its own way."""
    rng = random.Random(seed)
    words = PLAIN + ODD if seed % 2 else PLAIN[: 4 + seed % 12]
    longest = (2, 3, 4, 9, 25)[seed % 5]

    def caption(shortest: int = 1) -> str:
        return " ".join(rng.choices(words, k=rng.randint(shortest, max(shortest, longest))))

    references = []
    for _ in range(rng.randint(2, 9)):
        references.append([f"{rng.choice(PLAIN)} {caption(0)}" for _ in range(rng.randint(1, 5))])
    candidates = []
    for refs in references:
        kind = rng.randrange(8)
        reversed_words = " ".join(reversed(refs[0].split()))
        choices = [
            "",
            "...",
            caption(),
            refs[0],
            f"{refs[-1]} {caption()}",
            reversed_words,
            "zebra " * rng.randint(1, 12),
        ]
        candidates.append((choices + [" ".join([rng.choice(PLAIN)] * 8)])[kind])
    if seed % 7 == 0:  # no order has a match
        candidates = ["zebra quagga"] * len(references)
    return candidates, references


def read() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def measure() -> dict[str, Any]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    from unimodal.metrics import tokenize

    numbers = []
    for seed in range(COUNT):
        candidates, references = captions(seed)
        found = {i: [" ".join(tokenize(candidate))] for i, candidate in enumerate(candidates)}
        truth = {i: [" ".join(tokenize(ref)) for ref in refs] for i, refs in enumerate(references)}
        bleu = Bleu(4).compute_score(truth, found, verbose=0)[0]
        scores = [*bleu, Cider().compute_score(truth, found)[0], Rouge().compute_score(truth, found)[0]]
        numbers.append([round(100 * float(score), 9) for score in scores])
    texts = list(read()["words"])
    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    words = {text: [theirs[i][0].split(" ") if theirs[i][0] else [], tokenize(text)] for i, text in enumerate(texts)}
    return {
        "numbers": numbers,
        "words": {text: both if both[0] != both[1] else both[:1] for text, both in words.items()},
    }


def rows(values: Any) -> list[str]:
    """Each number or text of the file on a line."""
    if isinstance(values, dict):
        return [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    return [json.dumps(value) for value in values]


if __name__ == "__main__":
    measured = measure()
    parts = (("numbers", "[]"), ("words", "{}"))
    text = ",\n".join(f'"{key}": {ends[0]}\n' + ",\n".join(rows(measured[key])) + f"\n{ends[1]}" for key, ends in parts)
    FILE.write_text("{\n" + text + "\n}\n", encoding="utf-8")
