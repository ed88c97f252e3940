"""A toy Qwen3-VL as its authors publish one: weights, processor and template, written by transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODULES = {  # what the published folders list for sentence-transformers
    "embedder": ["base.modules.transformer.Transformer", "sentence_transformer.modules.Pooling", "models.Normalize"],
    "reranker": ["base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore"],
}


def toy_qwen_processor(*, words: bool = True, appends_end: bool = False) -> Qwen3VLProcessor:
    """Bytes as tokens; with `words`, yes and no are one token each; with `appends_end`, every text ends in the padding token."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("y", "e"), ("ye", "s"), ("n", "o")] if words else []
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=list(SPECIAL[1:]),
    )
    if appends_end:
        end = (SPECIAL[0], fast.convert_tokens_to_ids(SPECIAL[0]))
        fast.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {SPECIAL[0]}", special_tokens=[end])
    sizes: dict[str, Any] = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}),
        tokenizer=fast,
        video_processor=Qwen3VLVideoProcessor(**sizes),
        chat_template=TEMPLATE,
    )


def toy_qwen(
    folder: Path, kind: str | None = None, *, tied: bool = True, context: int = 4096, width: int = 96, **options: Any
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """Write a toy Qwen3-VL into a folder; `kind` is `embedder`, `reranker` or None for one that writes."""
    processor = toy_qwen_processor(**options)
    token = processor.tokenizer.convert_tokens_to_ids
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    vision |= {
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": width,
        "num_position_embeddings": 64,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": context}
    config = Qwen3VLConfig(
        vision_config={**vision, "deepstack_visual_indexes": [0]},
        text_config={**text, "rope_parameters": rope},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config).eval()
        for (
            name,
            weight,
        ) in model.named_parameters():  # transformers starts so small that every state is nearly the same
            if "norm" not in name:
                torch.nn.init.normal_(weight, std=0.15)
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]
    model.generation_config.pad_token_id = token("<|endoftext|>")
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)  # as published
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind is not None:
        modules = [
            {"idx": i, "name": str(i), "path": "", "type": f"sentence_transformers.{m}"}
            for i, m in enumerate(MODULES[kind])
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
    return model, processor
