"""Embeddings of 2,000 texts of mixed length and 500 pictures, against sentence-transformers with the same towers.

    python tests/benchmarks/encoding.py [--dtype float32|bfloat16] [--texts 2000] [--images 500] [--runs 3]

Both open the same published folder: CLIP with random weights, written by transformers (an image tower of 6 x 384 at 224 pixels in patches
of 32, a text tower of 6 x 384; tokenizer and image processor are CLIP's). Texts have 3 to 60 words, pictures are JPEG files of 500 x 375.
Both sort texts by length and read 32 at a time. The embeddings must be the same to 1e-4. Times are medians of alternating runs in one
process.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

import unimodal

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_clip(folder: Path) -> None:
    """CLIP's published format, random weights, a tokenizer that knows letters alone and the pairs of them."""
    pairs = [(a, b + end) for a in LETTERS for b in LETTERS for end in ("", "</w>")]
    words = [*LETTERS, *(f"{c}</w>" for c in LETTERS), *(a + b for a, b in pairs), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    tower = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config={**tower, **ids, "vocab_size": len(words), "max_position_embeddings": 77, "projection_dim": 256},
        vision_config={**tower, "image_size": 224, "patch_size": 32, "projection_dim": 256},
        projection_dim=256,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)


def material(folder: Path, texts: int, images: int) -> tuple[list[str], list[str]]:
    """Made-up texts, and the paths of made-up pictures."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    words = ["".join(rng.choices(LETTERS, k=2)) for _ in range(500)]
    written = [" ".join(rng.choices(words, k=rng.randint(3, 60))) for _ in range(texts)]
    paths = []
    for i in range(images):
        small = Image.fromarray(noise.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        paths.append(str(folder / f"{i}.jpg"))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return written, paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clip(folder / "clip")
        texts, images = material(folder, options.texts, options.images)
        ours: Any = unimodal.from_pretrained(folder / "clip", device=options.device, dtype=dtype)
        theirs = SentenceTransformer(str(folder / "clip"), device=options.device, model_kwargs={"dtype": dtype})
        forms = {
            "ours": lambda items: ours.encode(items, batch_size=32),
            "theirs": lambda items: theirs.encode(items, batch_size=32, normalize_embeddings=True),
        }
        result: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "threads": options.threads}
        for kind, items in {"texts": texts, "images": images}.items():
            seconds: dict[str, list[float]] = {form: [] for form in forms}
            embeddings: dict[str, Any] = {}
            for work in forms.values():
                work(items[:64])  # not counted
            for _ in range(options.runs):
                for form, work in forms.items():
                    begun = time.perf_counter()
                    embeddings[form] = np.asarray(work(items), np.float32)
                    seconds[form].append(time.perf_counter() - begun)
            times = {form: statistics.median(taken) for form, taken in seconds.items()}
            apart = float(abs(embeddings["ours"] - embeddings["theirs"]).max())
            if dtype == torch.float32 and apart > 1e-4:
                raise SystemExit(f"{kind}: the embeddings differ by {apart:.2g}")
            result[kind] = {f"{form} s": round(value, 2) for form, value in times.items()}
            result[kind] |= {"faster": round(times["theirs"] / times["ours"], 2), "largest difference": apart}
        total = {form: sum(result[kind][f"{form} s"] for kind in ("texts", "images")) for form in forms}
        print(json.dumps({**result, "faster in all": round(total["theirs"] / total["ours"], 2)}, indent=1))


if __name__ == "__main__":
    main()
