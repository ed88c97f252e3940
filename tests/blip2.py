"""Toy BLIP-2 folders in the format that its authors publish: transformers' own models with random weights, saved by transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import Blip2Config, Blip2Processor, BlipImageProcessor, PreTrainedTokenizerFast

# Arguments of `generate` that captions must follow.
DECODING: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": -1.0},
    {"num_beams": 1, "repetition_penalty": 1.5},
    {"num_beams": 2, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    {"num_beams": 4, "num_return_sequences": 2},
]

WORDS = [
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "is",
    "left",
    "of",
    "the",
    "question",
    "answer",
    "what",
    "colour",
    ":",
    "?",
    ".",
    ",",
]
QUERIES, SIDE, TINY = (
    5,
    32,
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
)
TEXTS = ["a red circle.", "the blue square is left of a red circle", "circle"]


def pictures(count: int = 3) -> list[Image.Image]:
    """Noise of different sizes."""
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (40 + 7 * i, 61 - 5 * i, 3), dtype=np.uint8)) for i in range(count)]


def _tokenizer(special: list[str], template: str, **names: str) -> PreTrainedTokenizerFast:
    tokens = {token: i for i, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=names["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    used = [(token, tokens[token]) for token in template.split() if token in tokens]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **names)


def reader_tokenizer() -> PreTrainedTokenizerFast:
    """Of the Q-Former: [CLS] text [SEP], as BERT's."""
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "bos_token": "[DEC]",
    }
    return _tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"], "[CLS] $A [SEP]", **names)


def writer_tokenizer() -> PreTrainedTokenizerFast:
    """Of the language model: </s> text, as OPT's."""
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "</s>", "eos_token": "</s>"}
    return _tokenizer(["<s>", "<pad>", "</s>", "<unk>"], "</s> $A", **names)


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Of a language model with an encoder: text </s>, as T5's."""
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return _tokenizer(["<pad>", "</s>", "<unk>"], "$A </s>", **names)


def _lively(model: Any, seed: int) -> Any:
    """Weights that make outputs differ: transformers starts BLIP-2's vision tower at 1e-10 and its queries at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = 1.0 if "query_tokens" in name else weight[0].numel() ** -0.5
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def _config(vocabulary: int, text: Any, image_token: int | None, **reader: Any) -> Blip2Config:
    return Blip2Config(
        vision_config={"image_size": SIDE, "patch_size": 8, **TINY},
        qformer_config={"vocab_size": vocabulary, "max_position_embeddings": 40, **TINY, **reader},
        text_config=text,
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        image_token_index=image_token,
    )


def _processor(tokenizer: PreTrainedTokenizerFast) -> Blip2Processor:
    image_processor = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES)


def save_retrieval(folder: Path) -> tuple[Any, Blip2Processor]:
    """A `Blip2ForImageTextRetrieval` and its processor, written to `folder`. Its <image> token lies outside of the vocabulary."""
    tokenizer = reader_tokenizer()
    vocabulary = len(tokenizer)
    processor = _processor(tokenizer)
    config = _config(vocabulary, None, tokenizer.convert_tokens_to_ids("<image>"), use_qformer_text_input=True)
    model = _lively(transformers.Blip2ForImageTextRetrieval(config), 0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def language_config(tokenizer: PreTrainedTokenizerFast, model_type: str = "opt", **more: Any) -> Any:
    """A toy OPT that ends with a full stop, as BLIP-2's ends with a new line; or another model of that vocabulary."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 24} if model_type == "opt" else {"intermediate_size": 48}
    sizes |= {"num_key_value_heads": 2, "head_dim": 12} if model_type == "qwen3" else {}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.convert_tokens_to_ids(".")}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer) + 3}  # a vocabulary is often padded
    return transformers.AutoConfig.for_model(model_type, **sizes | ids | more)


def save_captioner(folder: Path) -> tuple[Any, Blip2Processor]:
    """A `Blip2ForConditionalGeneration` with an OPT and its processor, written to `folder`."""
    tokenizer = writer_tokenizer()
    processor = _processor(tokenizer)
    config = _config(90, language_config(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    model = _lively(
        transformers.Blip2ForConditionalGeneration(config), 3
    )  # a seed whose captions end at different places
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def t5_config(tokenizer: PreTrainedTokenizerFast, *, flan: bool) -> Any:
    """A toy T5, or a Flan-T5 with the settings that BLIP-2's authors gave theirs."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer) + 3}
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    kind = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False} if flan else {}
    return transformers.T5Config(**sizes, **ids, **kind)


def save_t5_captioner(folder: Path, *, flan: bool) -> tuple[Any, Blip2Processor]:
    """A `Blip2ForConditionalGeneration` with a T5, or a Flan-T5, and its processor, written to `folder`."""
    tokenizer = encoder_tokenizer()
    processor = _processor(tokenizer)
    config = _config(90, t5_config(tokenizer, flan=flan), tokenizer.convert_tokens_to_ids("<image>"))
    model = transformers.Blip2ForConditionalGeneration(config)
    if flan:  # it writes with other vectors than it reads
        model.language_model.lm_head.weight = nn.Parameter(torch.empty_like(model.language_model.shared.weight))
    _lively(model, 10 if flan else 6)  # seeds whose captions end at different places
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def save_language_model(folder: Path, model_type: str = "opt") -> Any:
    """A language model alone, with its tokenizer, written to `folder`."""
    tokenizer = writer_tokenizer()
    model = _lively(transformers.AutoModelForCausalLM.from_config(language_config(tokenizer, model_type)), 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
