"""Captions of 64 images, greedy and with three beams, against transformers' `generate` driving the same decoder.

    python tests/benchmarks/captioning.py [--dtype float32|bfloat16] [--hidden 256] [--layers 4] [--vocabulary 8000] [--runs 5]

The decoder is `CaptionDecoder`; transformers' GPT-2 with cross-attention is the same network and is given the same weights: fitted, for
half a minute, to 64 made-up captions of 4 to 28 words, 12 in the mean, so that they end at different places as people's do. Both read
32 image tokens. In float32 the greedy captions must be the same, word by word; beams are ranked by different rules once a hypothesis has
ended, so how many are the same is printed. With --steps 0 the weights are random, no caption ends before 30 words, and leaving early
gains nothing. The peer runs as users call it, and with a cache that also keeps the keys and values of the image tokens
(`EncoderDecoderCache`), which it does not make by itself. Times are medians of alternating runs in one process.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GPT2Config, GPT2LMHeadModel

from unimodal.heads import CaptionDecoder
from unimodal.losses import caption_loss

IMAGES, TOKENS, WORDS = 64, 32, 30
BOS, EOS, UNK = 1, 2, 3

Captions = list[list[int]]


def as_gpt2(decoder: CaptionDecoder) -> GPT2LMHeadModel:
    """The same network in transformers."""
    hidden, vocabulary = decoder.token_embedding.embedding_dim, decoder.token_embedding.num_embeddings
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=decoder.max_length, n_embd=hidden, n_layer=len(decoder.blocks),
        n_head=decoder.blocks[0].attention.heads, activation_function="gelu", add_cross_attention=True,
        tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    ours = decoder.state_dict()

    def joined(*names: str) -> dict[str, Tensor]:
        """Linear layers side by side, as GPT-2 has them: [in, out]."""
        weights = torch.cat([ours[f"{name}.weight"] for name in names]).T
        return {"weight": weights, "bias": torch.cat([ours[f"{name}.bias"] for name in names])}

    scale = hidden**0.5
    theirs = {
        "transformer.wte.weight": ours["token_embedding.weight"] * scale,
        "transformer.wpe.weight": ours["position_embedding.weight"] * scale,
        "transformer.ln_f.weight": ours["norm.weight"],
        "transformer.ln_f.bias": ours["norm.bias"],
        "lm_head.weight": ours["token_embedding.weight"],
    }
    for i in range(len(decoder.blocks)):
        block, gpt2 = f"blocks.{i}", f"transformer.h.{i}"
        parts = {
            "attn.c_attn": [f"attention.{part}" for part in ("query", "key", "value")],
            "attn.c_proj": ["attention.output"],
            "crossattention.q_attn": ["cross_attention.query"],
            "crossattention.c_attn": ["cross_attention.key", "cross_attention.value"],
            "crossattention.c_proj": ["cross_attention.output"],
            "mlp.c_fc": ["mlp.up"],
            "mlp.c_proj": ["mlp.down"],
        }
        for name, members in parts.items():
            weights = joined(*(f"{block}.{member}" for member in members))
            theirs |= {f"{gpt2}.{name}.{kind}": tensor for kind, tensor in weights.items()}
        for name, norm in {
            "ln_1": "attention_norm",
            "ln_cross_attn": "cross_attention_norm",
            "ln_2": "mlp_norm",
        }.items():
            theirs |= {f"{gpt2}.{name}.{kind}": ours[f"{block}.{norm}.{kind}"] for kind in ("weight", "bias")}
    peer = GPT2LMHeadModel(config).eval()
    peer.load_state_dict(theirs)
    return peer


def fit(decoder: CaptionDecoder, images: Tensor, steps: int) -> None:
    """Teach the decoder one made-up caption per image."""
    lengths = (12 + 5 * torch.randn(IMAGES, 1)).round().clamp(4, WORDS - 2)
    places = torch.arange(WORDS)
    ids = torch.randint(UNK + 1, decoder.token_embedding.num_embeddings, (IMAGES, WORDS)).where(places <= lengths, EOS)
    ids[:, 0] = BOS
    optimizer = torch.optim.Adam(decoder.parameters(), 2e-3)
    for _ in range(steps):
        loss = caption_loss(decoder(ids, images), ids, places <= lengths + 1, label_smoothing=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if steps:
        print(f"fitted to a loss of {loss.item():.3f}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=80, help="of fitting the decoder")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    decoder = CaptionDecoder(
        vocab_size=options.vocabulary, width=options.hidden, hidden=options.hidden, layers=options.layers,
        heads=options.hidden // 64, max_length=WORDS + 2, bos_id=BOS, eos_id=EOS, unk_id=UNK, dropout=0.0,
    ).eval()  # fmt: skip
    images = torch.randn(IMAGES, TOKENS, options.hidden)
    fit(decoder, images, options.steps)
    peer = as_gpt2(decoder).to(options.device, dtype)
    decoder.to(options.device, dtype)
    images = images.to(options.device, dtype)
    start = torch.full((IMAGES, 1), BOS, device=options.device)

    @torch.no_grad()
    def generate(beams: int, keep: bool) -> Captions:
        kept = {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())} if keep else {}
        seen: Any = decoder.image_norm(images)
        out = peer.generate(
            start, encoder_hidden_states=seen, attention_mask=torch.ones_like(start), max_new_tokens=WORDS,
            num_beams=beams, do_sample=False, **kept,
        )  # fmt: skip
        return [row[: row.index(EOS)] if EOS in row else row for row in out[:, 1:].tolist()]

    forms: dict[str, Callable[[int], Captions]] = {
        "ours": lambda beams: decoder.generate(images, num_beams=beams, max_new_tokens=WORDS),
        "generate": lambda beams: generate(beams, False),
        "generate, images kept": lambda beams: generate(beams, True),
    }
    result: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "threads": options.threads}
    for beams in (1, 3):
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        captions: dict[str, Captions] = {}
        for run in range(options.runs + 1):  # the first is not counted
            for form, work in forms.items():
                begun = time.perf_counter()
                captions[form] = work(beams)
                if options.device == "cuda":
                    torch.cuda.synchronize()
                if run:
                    seconds[form].append(time.perf_counter() - begun)
        times = {form: statistics.median(taken) for form, taken in seconds.items()}
        ours = times.pop("ours")
        same = sum(a == b for a, b in zip(captions["ours"], captions["generate"], strict=True))
        lengths = [len(caption) for caption in captions["ours"]]
        name = "greedy" if beams == 1 else f"{beams} beams"
        if beams == 1 and dtype == torch.float32 and same < IMAGES:
            raise SystemExit(f"{IMAGES - same} of {IMAGES} greedy captions differ from transformers'")
        result[name] = {
            "ours ms": round(1000 * ours),
            **{f"{form} ms": round(1000 * value) for form, value in times.items()},
            **{f"faster than {form}": round(value / ours, 2) for form, value in times.items()},
            "same captions": same,
            "words": {"mean": round(statistics.mean(lengths), 1), "longest": max(lengths)},
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
