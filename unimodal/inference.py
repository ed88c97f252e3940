"""Using a model: embed, match, search, caption and draw, on paths, URLs, PIL images, arrays and strings.

Method names, argument order and return types follow what users know: sentence-transformers for `encode`, `similarity`,
`predict` and `rank`, diffusers for `generate_image`. Items and how a string is told from a path: `unimodal.data.items`.
One item gives one result, a list gives a list in the same order; how items fall into batches changes nothing.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unimodal import arguments, hub
from unimodal.candidates import as_images, best_captions, draw_candidates
from unimodal.config import nearest
from unimodal.data.items import Item, as_item, as_items, is_single, picture_key
from unimodal.data.processor import Processor
from unimodal.data.texts import UnknownWordsWarning
from unimodal.draws import SAMPLING, Generators, one_each
from unimodal.explain import Explanation, explain
from unimodal.model import UnimodalModel
from unimodal.onednn import inference
from unimodal.retrieval import similarity
from unimodal.search import Calibration, Encoder, Index, Precision, build_index, index_folder, quantise
from unimodal.search.access import require_same_model
from unimodal.search.encoder import batches, progress

MOST = 1000  # steps, beams, candidates, pictures of one text: more is a slip of the hand, and no end of work

VERBS = {"embedding": "encode", "matching": "rank", "captioning": "caption", "generation": "generate_image"}


@dataclass
class GeneratedImages:
    """What `generate_image` returns, as diffusers' pipelines do."""

    images: list[Image.Image]


class Unimodal:
    """A model and its processor, ready for use: evaluation mode, no gradients.

    Args:
        model: the network.
        processor: its preprocessing.
        prompts: what to put before every text, by name; `encode_query` uses `query`, `encode_document` `document`.
    """

    def __init__(self, model: UnimodalModel, processor: Processor, *, prompts: dict[str, str] | None = None) -> None:
        if not isinstance(model, UnimodalModel) or not isinstance(processor, Processor):
            raise TypeError(
                f"Unimodal: expected a UnimodalModel and its Processor, got {type(model).__name__} and {type(processor).__name__}; "
                "Unimodal.from_pretrained opens a folder"
            )
        self.model, self.processor = model, processor
        given = arguments.mapping({} if prompts is None else prompts, "prompts")
        self.prompts = {name: arguments.text(one, f"prompts[{name!r}]", empty=True) for name, one in given.items()}
        self.encoder = Encoder(model, processor)
        self.encoders: dict[str | None, Encoder] = {}
        for name in (None, *model.config.adapters):
            names = () if name is None else (name,)
            same = names == model.active
            self.encoders[name] = self.encoder if same else Encoder(_with_adapters(model, names), processor)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_folder: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        heads: Sequence[str] | None = None,
    ) -> "Unimodal":
        """Load a checkpoint, or a published model: CLIP, SigLIP, SigLIP 2, BLIP-2, Qwen3-VL (Instruct, Embedding, Reranker). `heads` says
        what it can do, `missing_heads` what not.

        Args:
            name_or_path: a checkpoint folder, read without any network, or a Hub id.
            device: where to put the model.
            dtype: precision of its weights, for example torch.bfloat16, in which a published model takes half the memory from the start;
                None leaves float32. Embeddings and scores are float32 in any case.
            revision: branch, tag or commit of a Hub id.
            cache_folder: where downloads are kept.
            local_files_only: read a Hub id from the cache alone.
            token: access token of the Hub.
            heads: load only these: `embedding` (always there), `matching`, `captioning`, `generation`; None loads all. A Qwen3-VL does
                what it is asked for of the first three, None takes what its folder says it was trained for.

        Raises:
            FileNotFoundError: no such checkpoint.
            unimodal.hub.CheckpointError: it cannot be read safely and completely.
        """
        place: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_folder,
            "local_files_only": local_files_only,
            "token": token,
        }
        model, processor = hub.load_checkpoint(name_or_path, heads=heads, device=device, dtype=dtype, **place)
        self = cls(model, processor, prompts=hub.find_prompts(name_or_path, **place))
        if "matching" in model.heads and (path := hub.find_calibration(name_or_path, **place)):
            try:
                calibration = Calibration.load(path)
            except ValueError as error:
                raise hub.CheckpointError(str(error)) from error
            if calibration.model == (fingerprint := self.encoder.fingerprint()):
                self.encoder.calibration = calibration
            else:
                warnings.warn(
                    f"{path} was measured on model {calibration.model or '(unknown)'}, this is model {fingerprint} (other "
                    "weights, dtype or preprocessing): match probabilities are not calibrated; calibrate again",
                    stacklevel=2,
                )
        return self

    # Embeddings.

    def encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        adapter: str | None = None,
    ) -> Any:
        """Embeddings: unit vectors, so that their product is their cosine.

        Args:
            inputs: one item or several. An item with image and text has the normalised mean of its two embeddings; a vision-language
                model reads it as one sequence, and several images and videos, too.
            prompt_name: name of a prompt in `prompts`.
            prompt: text to put before every text; to a vision-language model the instruction that says what the embedding is for.
                Overrides `prompt_name`.
            batch_size: items at a time.
            show_progress_bar: None shows one for several batches on a terminal.
            precision: `float32`, or codes: see `unimodal.search.quantise`.
            convert_to_numpy: an array; otherwise a list of tensors.
            convert_to_tensor: a tensor; overrides `convert_to_numpy`.
            device: move the model there first, and leave it there.
            normalize_embeddings: the heads produce unit vectors, there is nothing else to return: False is refused.
            truncate_dim: keep the first dimensions and normalise again; meant for widths the model was trained for.
            adapter: read with this adapter, for this call; None reads with what `set_adapter` chose.

        Returns:
            [E] for one item, [n, E] for n, float32 or codes. A model that keeps one vector per query gives [N, E] and
            [n, N, E] for images.

        Raises:
            ValueError: an unknown prompt or precision, a width the model does not have, normalize_embeddings=False;
                also what `as_items` and `load_image` raise.
        """
        if not arguments.flag(normalize_embeddings, "normalize_embeddings"):
            raise ValueError(
                "normalize_embeddings=False: the embeddings of this model are unit vectors by construction, there is "
                "no other form of them; leave the argument out"
            )
        arguments.choice(precision, "precision", get_args(Precision))
        convert_to_numpy = arguments.flag(convert_to_numpy, "convert_to_numpy")
        convert_to_tensor = arguments.flag(convert_to_tensor, "convert_to_tensor")
        encoder = self.encoder if adapter is None else self._named(adapter)
        dim = self._width(truncate_dim, encoder.model)
        prompt = self._prompt(prompt_name) if prompt is None else arguments.text(prompt, "prompt", empty=True)
        if precision in ("binary", "ubinary") and dim % 8:
            raise ValueError(
                f"precision {precision!r} packs eight dimensions to a byte, got {dim}; choose a truncate_dim that 8 divides"
            )
        items = as_items(inputs)
        if device is not None:
            self.to(device)
        where = [""] if is_single(inputs) else [f"item {i}: " for i in range(len(items))]
        encoder.check_one_shape(items)
        # Images together, then texts by their length: a batch is padded to its longest text.
        order = sorted(range(len(items)), key=lambda i: len(items[i].text or ""))
        steps = progress([order[rows] for rows in batches(len(items), batch_size)], "Encoding", show_progress_bar)
        read = [
            encoder.read([items[i] for i in rows], prompt, [where[i] for i in rows]).embedding[..., :dim]
            for rows in steps
        ]
        embedding = torch.cat(read)[torch.tensor(order).argsort()] if read else torch.empty(0, dim)
        if truncate_dim is not None:
            embedding = F.normalize(embedding, dim=-1)
        if precision != "float32":
            embedding = torch.from_numpy(quantise(embedding.cpu().numpy(), precision))
        result = embedding[0] if is_single(inputs) else embedding
        if convert_to_tensor:
            return result
        if convert_to_numpy:
            return result.cpu().numpy()
        return result if is_single(inputs) else list(result)

    def encode_query(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Any:
        """`encode` with the prompt `query`, where there is one."""
        return self.encode(inputs, _own_prompt(prompt_name, "query", self.prompts), prompt, **options)

    def encode_document(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Any:
        """`encode` with the prompt `document`, where there is one."""
        return self.encode(inputs, _own_prompt(prompt_name, "document", self.prompts), prompt, **options)

    def similarity(self, a: Any, b: Any) -> Tensor:
        """Cosines [A, B], float32, from -1 to 1, of embeddings [A, E] and [B, E]; one vector [E] counts as a list of one.

        Where images have N vectors ([A, N, E]), the best of them counts. Vectors come as tensors, arrays or lists, of any length.

        Raises:
            TypeError: no vectors, or codes; `unimodal.search.dequantise` makes vectors of codes.
            ValueError: embeddings of different widths, or numbers that are not finite.
        """
        x, y = (
            arguments.vectors(values, f"similarity: {name}", dimensions=(1, 2, 3))
            for name, values in (("a", a), ("b", b))
        )
        if x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"similarity: embeddings of one width are needed, got {list(x.shape)} and {list(y.shape)}; encode both "
                "with the same model and truncate_dim"
            )
        x, y = (F.normalize(torch.atleast_2d(values), dim=-1) for values in (x, y.to(x.device)))
        return similarity(x, y).clamp(-1, 1)  # rounding carries the product of equal unit vectors beyond 1

    # Matching.

    def predict(
        self,
        inputs: Sequence[Any],
        batch_size: int = 32,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        show_progress_bar: bool | None = None,
        prompt: str | None = None,
    ) -> Any:
        """Match probabilities of pairs, by the matching head.

        Args:
            inputs: pairs of an image and a text, in either order, or one such pair. An item is read once, however many
                pairs it is in. A vision-language model takes (query, document) of any kinds of items, in this order.
            batch_size: items, and pairs, at a time.
            activation_fn: what turns logits into scores; where not given the calibration, or the sigmoid without one.
            show_progress_bar: None shows one for several batches on a terminal.
            prompt: to a vision-language model the instruction that says what makes a document match; others take none.

        Returns:
            [P] float32; for a single pair a float32 number.

        Raises:
            TypeError, ValueError: for anything but pairs of an image and a text, or a model without a matching head;
                also what `as_items` and `load_image` raise.
        """
        given = arguments.listed(inputs, "inputs", "pairs of an image and a text")
        single = len(given) == 2 and all(is_single(part) for part in given)
        self.model.head("matching")
        whole = self.encoder.judges
        pairs = [as_pair(pair, f"pair {i}: ", whole) for i, pair in enumerate([given] if single else given)]
        arguments.optional(arguments.function, activation_fn, "activation_fn")
        logits = self._logits(pairs, batch_size, show_progress_bar, prompt)
        scores = self.encoder.probability(logits) if activation_fn is None else _activated(activation_fn, logits)
        return scores.numpy()[0] if single else scores.numpy()

    def rank(
        self,
        query: Any,
        documents: Sequence[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        prompt: str | None = None,
    ) -> list[dict[str, Any]]:
        """Documents by their match with one query, best first.

        Args:
            query: a text, to rank images; or an image, to rank texts; to a vision-language model any item.
            documents: the other kind, or any items.
            top_k: keep the best.
            return_documents: put each document into its result, as `document`.
            batch_size: documents at a time.
            show_progress_bar: None shows one for several batches on a terminal.
            prompt: as in `predict`.

        Returns:
            Dicts with `corpus_id`, the place in `documents`, and `score`, the match probability.

        Raises:
            As `predict`; ValueError for top_k below 1, or a query none of whose words the model knows.
        """
        top_k = arguments.optional(arguments.integer, top_k, "top_k")
        arguments.flag(return_documents, "return_documents")
        if is_single(documents):
            raise TypeError(f"rank: documents must be a list, got {type(documents).__name__}; put it into a list")
        documents = arguments.listed(documents, "documents", "items")
        asked = as_item(query, "query: ")
        self.model.head("matching")
        whole = self.encoder.judges
        if not whole and (said := self.encoder.unknown_words(asked)):
            raise ValueError(f"query: {said}")
        pairs = [as_pair((asked, document), f"document {i}: ", whole) for i, document in enumerate(documents)]
        logits = self._logits(pairs, batch_size, show_progress_bar, prompt)
        # Sorted by logits, which still differ where probabilities have both become 1.
        order, scores = (
            logits.argsort(descending=True, stable=True).tolist()[:top_k],
            self.encoder.probability(logits).tolist(),
        )
        extra = [{"document": documents[i]} if return_documents else {} for i in order]
        return [{"corpus_id": i, "score": scores[i], **more} for i, more in zip(order, extra)]

    def _logits(self, pairs: list[tuple[Item, Item]], batch_size: int, show: bool | None, prompt: str | None) -> Tensor:
        """Match logits [P] of (image, text), or of (query, document) where the model reads both as one conversation."""
        prompt = arguments.optional(arguments.text, prompt, "prompt", empty=True)
        if self.encoder.judges:
            return self.encoder.judge(pairs, prompt, batch_size, show)
        if prompt is not None:
            raise ValueError("prompt: the matching head of this model takes no instruction; leave it out")
        names = [(identity(a), identity(b)) for a, b in pairs]
        # A pair is scored once, wherever it stands: rounding differs by a row's place in its batch, and equal pairs would not tie.
        place = {pair: i for i, pair in enumerate(dict.fromkeys(names))}
        images, texts = ({identity(pair[side]): pair[side] for pair in pairs} for side in (0, 1))
        for message in filter(None, map(self.encoder.unknown_words, texts.values())):
            warnings.warn(message, UnknownWordsWarning, stacklevel=3)
        steps = [list(d.items())[rows] for d in (images, texts) for rows in batches(len(d), batch_size)]
        tokens: dict[Any, Tensor] = {}
        for step in progress(steps, "Reading", show):
            keys, items = zip(*step)
            tokens |= zip(keys, self.encoder.read(items).tokens)
        logits = self.encoder.match([(tokens[a], tokens[b]) for a, b in place], batch_size, show)
        return logits[[place[pair] for pair in names]]

    def explain(self, image: Any, text: str, *, steps: int = 64, batch_size: int = 16) -> Explanation:
        """Why the matching head, or without one the embedding, scores this pair as it does; see `unimodal.explain.explain`."""
        return explain(self.model, self.processor, image, text, steps=steps, batch_size=batch_size)

    # Captioning and generation.

    @inference()
    def caption(
        self,
        images: Any,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        candidates: int = 1,
        match_scale: float | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """A sentence about each image, or what a vision-language model answers to a question about it.

        Args:
            images: one image or several; to a vision-language model also videos and items of several images.
            max_new_tokens: longest caption in tokens; by default 30, of a vision-language model 128.
            num_beams: hypotheses kept; 1 is greedy. By default 3, or 1 of a vision-language model and where words are drawn.
            candidates: captions written per image, of which the embedding and matching heads choose one: the decoder's own choice and
                others drawn by their probability. 1 keeps the decoder's choice; more costs as many times the work.
            match_scale: weight of the match logit beside the cosine when they choose; None is that of the model's scoring rule.
            batch_size: images at a time.
            show_progress_bar: None shows one for several batches on a terminal.
            prompt: where a language model writes, the text that it continues, or to a vision-language model a question or instruction:
                one for all images, or one for each. None is the prompt it was trained with. Other captioning heads take none.
            options: `do_sample`, `temperature`, `top_p`, `length_penalty`: see `unimodal.heads.Decoding`. Where a language
                model writes, all that transformers' `generate` takes; `num_return_sequences` gives a list of strings for each image.
                `generator` is what draws follow from, one for all images, which hands its numbers out in their order, or a list of one for
                each: a caption does not depend on the images beside it.

        Returns:
            A string for one image, a list of strings for several.

        Raises:
            TypeError, ValueError: an item is not an image, the model has no captioning head, a setting is unknown, out of range or shapes
                draws where nothing is drawn, a prompt for a head that takes none, prompts and images that are not as many; also what
                `as_items` and `load_image` raise.
        """
        items = as_items(images)
        candidates = arguments.integer(candidates, "candidates", most=MOST)
        match_scale = arguments.optional(arguments.number, match_scale, "match_scale")
        max_new_tokens = arguments.optional(arguments.integer, max_new_tokens, "max_new_tokens")
        num_beams = arguments.optional(arguments.integer, num_beams, "num_beams", most=MOST)
        generator = arguments.optional(arguments.generators, options.pop("generator", None), len(items))
        draws = arguments.flag(options.get("do_sample", False), "do_sample")
        if not draws and candidates == 1 and (shapes := [name for name in SAMPLING if _shapes(options.get(name))]):
            raise ValueError(
                f"{', '.join(shapes)}: it shapes what is drawn, and nothing is; add do_sample=True, or leave it out"
            )
        prompts = _prompts(prompt, len(items))
        if self.encoder.writes:
            if candidates != 1:
                raise ValueError(
                    "candidates: a vision-language model writes one caption; num_beams or do_sample vary it"
                )
            options["max_new_tokens"] = 128 if max_new_tokens is None else max_new_tokens
            options["num_beams"] = 1 if num_beams is None else num_beams
            written = self.encoder.write(items, prompts, options, batch_size, show_progress_bar, generator)
            return written[0] if is_single(images) else written
        self.model.head("captioning")
        for item in items:
            if item.kind != "image":
                raise ValueError(
                    f"caption: expected images, got the {item.kind} {item.told}; the path of a picture without a "
                    "picture's suffix is passed as pathlib.Path"
                )
        captions: list[Any] = []
        sources = one_each(generator, len(items))
        for rows in progress(batches(len(items), batch_size), "Captioning", show_progress_bar):
            state = self.encoder.images([item.image for item in items[rows]])
            captions += best_captions(
                self.model,
                self.processor,
                state,
                candidates,
                match_scale=self.model.config.scoring.scale if match_scale is None else match_scale,
                prompts=None if prompts is None else prompts[rows],
                max_new_tokens=30 if max_new_tokens is None else max_new_tokens,
                num_beams=(1 if draws else 3) if num_beams is None else num_beams,
                generator=sources[rows],
                **options,
            )
        if (each := options.get("num_return_sequences", 1)) > 1:
            captions = [captions[i : i + each] for i in range(0, len(captions), each)]
        return captions[0] if is_single(images) else captions

    def answer(
        self,
        images: Any,
        questions: str | Sequence[str],
        prompt: str | None = None,
        max_new_tokens: int = 10,
        num_beams: int = 5,
        length_penalty: float = -1.0,
        **options: Any,
    ) -> Any:
        """Short answers to questions about images, by a model whose captions a language model writes.

        The defaults are those of BLIP-2's visual question answering (arXiv 2301.12597, section 4.2): five beams, short answers preferred.

        Args:
            images: one image or several.
            questions: one for all images, or one for each.
            prompt: what the language model continues; `{}` is the question. By default "Question: {} Answer:", for a vision-language model
                the question alone.
            max_new_tokens: longest answer in tokens.
            num_beams: hypotheses kept.
            length_penalty: below 0 prefers short answers.
            options: as in `caption`.

        Returns:
            A string for one image, a list of strings for several.

        Raises:
            As `caption`.
        """
        around = ("{}" if self.encoder.writes else "Question: {} Answer:") if prompt is None else prompt
        if "{}" not in arguments.text(around, "prompt"):
            raise ValueError(f"prompt: expected a text with {{}} where the question goes, got {around!r:.80}")
        if isinstance(questions, str):
            asked: str | list[str] = around.replace("{}", arguments.text(questions, "questions"))
        else:
            several = arguments.listed(questions, "questions", "texts")
            asked = [around.replace("{}", arguments.text(one, f"questions[{i}]")) for i, one in enumerate(several)]
        return self.caption(images, max_new_tokens, num_beams, prompt=asked, length_penalty=length_penalty, **options)

    @inference()
    def generate_image(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        generator: Generators = None,
        num_images_per_prompt: int = 1,
        batch_size: int = 16,
        show_progress_bar: bool | None = None,
        candidates: int = 1,
        match_scale: float | None = None,
    ) -> GeneratedImages:
        """Pictures of texts.

        Args:
            prompt: one text or several; every string is a text here.
            num_inference_steps: steps from noise to picture.
            guidance_scale: 1 follows the text as learned, more exaggerates it at twice the cost.
            generator: source of the noise: one for all pictures, which they draw from in their order, or a list of one for each picture, as
                diffusers takes it. The same seed gives the same pictures, in batches of any size.
            num_images_per_prompt: pictures of each text.
            batch_size: pictures at a time.
            show_progress_bar: None shows one for several batches on a terminal.
            candidates: pictures drawn for each one that is returned; the embedding and matching heads choose it among them.
            match_scale: weight of the match logit beside the cosine when they choose; None is that of the model's scoring rule.

        Returns:
            An object whose `images` are PIL images, those of the first prompt first.

        Raises:
            TypeError, ValueError: a prompt is no text or empty, a setting is out of range, the model has no generation
                head.
        """
        self.model.head("generation")
        settings: dict[str, Any] = {
            "num_inference_steps": arguments.integer(num_inference_steps, "num_inference_steps", most=MOST),
            "guidance_scale": arguments.number(guidance_scale, "guidance_scale", least=0),
        }
        candidates = arguments.integer(candidates, "candidates", most=MOST)
        match_scale = arguments.optional(arguments.number, match_scale, "match_scale")
        each = arguments.integer(num_images_per_prompt, "num_images_per_prompt", most=MOST)
        asked = [prompt] if isinstance(prompt, str) else arguments.listed(prompt, "prompt", "texts")
        texts = [arguments.text(text, f"prompt {i}") for i, text in enumerate(asked) for _ in range(each)]
        sources = one_each(arguments.optional(arguments.generators, generator, len(texts)), len(texts))
        images: list[Image.Image] = []
        for rows in progress(batches(len(texts), batch_size), "Drawing", show_progress_bar):
            pictures, scores = draw_candidates(  # [K, B, 3, S, S] in [0, 1]
                self.model,
                self.processor,
                self.encoder.texts(texts[rows]),
                candidates,
                match_scale=self.model.config.scoring.scale if match_scale is None else match_scale,
                generator=sources[rows],
                **settings,
            )
            if not pictures.isfinite().all():
                raise ValueError(
                    f"guidance_scale={guidance_scale}: the pictures have numbers beyond {self.model.log_scale.dtype}; give a scale nearer "
                    "to 1"
                )
            best = scores.argmax(0)  # [B]
            images += as_images(pictures[best, torch.arange(len(best), device=best.device)])
        return GeneratedImages(images)

    # Search.

    def build_index(
        self,
        documents: Any,
        ids: Sequence[int | str] | None = None,
        precision: Literal["int8", "float32"] = "int8",
        **options: Any,
    ) -> Index:
        """An index of images or texts; arguments as in `unimodal.search.build_index`."""
        return build_index(self.encoder, documents, ids, precision, **options)

    def index_folder(self, folder: str | Path, kept_in: str | Path | None = None, **options: Any) -> Index:
        """An index of the pictures in a folder that is kept, and brought up to date when it is asked for again; arguments as in
        `unimodal.search.index_folder`."""
        return index_folder(self.encoder, folder, kept_in, **options).index

    def load_index(self, folder: str | Path, uri: str | None = None) -> Index:
        """Open an index that this model made; arguments as in `Index.load`."""
        return Index.load(folder, self.encoder, uri)

    def search(
        self, queries: Any, index: Index, top_k: int = 10, rerank_top_k: int | None = None, **options: Any
    ) -> Any:
        """Hits of each query; arguments and hits as in `Index.search`.

        Raises:
            ValueError: another model made the index; also what `Index.search` raises.
        """
        if not isinstance(index, Index):
            raise TypeError(arguments.refused("index", "an Index", index, "build_index and load_index give one"))
        if index.encoder is not self.encoder:
            require_same_model("the index", index.manifest["model"], self.encoder)
        return index.search(queries, top_k, rerank_top_k, **options)

    # Adapters: several on one backbone, chosen at call time.

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `set_adapter` and `encode(adapter=...)` take."""
        return tuple(name for name in self.encoders if name is not None)

    def load_adapter(self, name_or_path: str | Path, name: str | None = None, **place: Any) -> str:
        """Load adapters, bridge and heads that were saved alone (`save_adapter`), beside what is there.

        Args:
            name_or_path: their folder or Hub id.
            name: what to call them; None takes the name of the only adapter in it.
            place: `revision`, `cache_dir`, `local_files_only`, `token`, as `from_pretrained` takes them.

        Returns:
            The name, for `set_adapter`.

        Raises:
            unimodal.hub.CheckpointError: they belong to another backbone; also as `unimodal.hub.load_adapter`.
            ValueError: the name is taken, or none is given and they are not one adapter.
        """
        if arguments.optional(arguments.text, name, "name") in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already; give another name")
        model, processor = hub.load_adapter(self.model, name_or_path, name=name, **place)
        if name is None:
            if len(model.config.adapters) != 1:
                raise ValueError(f"{name_or_path} holds {len(model.config.adapters)} adapters: give a name for them")
            (name,) = model.config.adapters
        self.encoders[name] = Encoder(model, processor)
        return name

    def set_adapter(self, name: str | None) -> None:
        """Read with this adapter from now on, and with its bridge and heads where it brought its own; None reads without.

        Raises:
            ValueError: there is no such adapter.
        """
        self._choose(self._named(name))

    @contextmanager
    def using_adapter(self, name: str | None) -> Iterator[None]:
        """`set_adapter` for the length of a `with` block."""
        before = self.encoder
        self.set_adapter(name)
        try:
            yield
        finally:
            self._choose(before)

    def _named(self, name: str | None) -> Encoder:
        if name is not None and arguments.text(name, "adapter", empty=True) not in self.adapters:
            raise ValueError(f"no adapter named {name!r:.80}; {nearest(name, self.adapters)}")
        return self.encoders[name]

    def _choose(self, encoder: Encoder) -> None:
        self.encoder, self.model, self.processor = encoder, encoder.model, encoder.processor

    def merge_adapters(self) -> None:
        """Fold the adapters in use into the weights, and forget all others; see `UnimodalModel.merge_adapters`."""
        self.model.merge_adapters()
        self.encoder = Encoder(self.model, self.processor, self.encoder.calibration)
        self.encoders = {None: self.encoder}

    def save_adapter(self, folder: str | Path, **options: Any) -> None:
        """Write adapters, bridge and heads without the backbone; options as in `unimodal.hub.save_adapter`."""
        hub.save_adapter(self.model, self.processor, folder, **options)

    # Sharing.

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a checkpoint folder that `from_pretrained` loads, with prompts and calibration; options as in
        `unimodal.hub.save_checkpoint`."""
        own: dict[str, Any] = {"prompts": self.prompts, "calibration": self.encoder.calibration}
        hub.save_checkpoint(self.model, self.processor, folder, **own | options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload a unimodal checkpoint",
        **options: Any,
    ) -> str:
        """Save the model and upload it to the Hub as `owner/name`; returns the address of the commit.

        Arguments as in `unimodal.hub.push_to_hub`, options as in `unimodal.hub.save_checkpoint`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            commit = hub.push_to_hub(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        return commit.commit_url

    # Facts.

    @property
    def heads(self) -> tuple[str, ...]:
        """What the model can do: `embedding` (encode), `matching` (predict, rank), `captioning`, `generation`."""
        return self.model.jobs

    @property
    def missing_heads(self) -> tuple[str, ...]:
        """The heads it lacks; they can be trained on top."""
        return tuple(head for head in VERBS if head not in self.heads)

    def __repr__(self) -> str:
        lacking = f"; has no head for {', '.join(self.missing_heads)}" if self.missing_heads else ""
        verbs = ", ".join(VERBS[head] for head in self.heads)
        return f"Unimodal({self.model.config.backbone.label}: can {verbs}{lacking})"

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Unimodal":
        """Move the model to a device or convert it to a precision, with all adapters; returns itself. A calibration holds for the
        precision that it was measured in, and is dropped with it, with a warning."""
        device = arguments.optional(arguments.device, device)
        dtype = arguments.optional(arguments.dtype, dtype)
        before = self.model.log_scale.dtype
        for encoder in (self.encoder, *self.encoders.values()):
            if dtype not in (None, before) and encoder.calibration is not None:
                encoder.calibration = None
                warnings.warn(
                    f"the calibration was measured on weights in {before}, these are now {dtype}: match probabilities are not "
                    "calibrated; calibrate again",
                    stacklevel=2,
                )
            encoder.model.to(device=device, dtype=dtype)
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        """The kinds of item the model reads."""
        return self.model.modalities

    def supports(self, modality: str) -> bool:
        """Whether the model reads items of this kind."""
        return arguments.text(modality, "modality") in self.modalities

    def _width(self, truncate_dim: int | None, model: UnimodalModel) -> int:
        embedding = model.embedding
        if truncate_dim is None:
            return embedding.dim
        truncate_dim = arguments.integer(truncate_dim, "truncate_dim, a width of this model", most=embedding.dim)
        if truncate_dim not in (trained := (*embedding.matryoshka, embedding.dim)):
            warnings.warn(
                f"truncate_dim={truncate_dim} is not a width this model was trained for; these are {sorted(trained)}",
                stacklevel=3,
            )
        return truncate_dim

    def _prompt(self, name: str | None) -> str | None:
        if name is None:
            return None
        if arguments.text(name, "prompt_name", empty=True) not in self.prompts:
            raise ValueError(f"no prompt named {name!r:.80}; {nearest(name, self.prompts)}")
        return self.prompts[name]


def _with_adapters(model: UnimodalModel, names: tuple[str, ...]) -> UnimodalModel:
    """The same modules, read with other adapters."""
    view = copy.copy(model)
    view.active = names
    return view


def _own_prompt(prompt_name: str | None, usual: str, prompts: Mapping[str, str]) -> str | None:
    """The name of the prompt that was asked for, or of the usual one where there is one."""
    return (usual if usual in prompts else None) if prompt_name is None else prompt_name


def _shapes(value: Any) -> bool:
    """Whether a setting of draws is given, and another than 1, at which temperature and top_p change nothing."""
    return value is not None and not (type(value) in (int, float) and value == 1)


def _activated(activation_fn: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Scores [P] that the caller's function makes of logits [P]."""
    try:
        scores = activation_fn(logits)
    except Exception as error:
        raise ValueError(
            f"activation_fn: it raised {type(error).__name__} on logits {list(logits.shape)}: {error}"
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != logits.shape:
        raise TypeError(
            arguments.refused(
                "activation_fn", f"scores as a tensor {list(logits.shape)}", scores, "torch.sigmoid is such a function"
            )
        )
    return scores.detach().cpu()


def _prompts(prompt: str | Sequence[str] | None, count: int) -> list[str] | None:
    """What is asked about each of `count` images."""
    if prompt is None or isinstance(prompt, str):
        return None if prompt is None else [arguments.text(prompt, "prompt", empty=True)] * count
    prompts = arguments.listed(prompt, "prompt", "texts")
    if len(prompts) != count:
        raise ValueError(f"prompt: expected one for all or one for each of {count} images, got {len(prompts)}")
    return [arguments.text(one, f"prompt[{i}]", empty=True) for i, one in enumerate(prompts)]


def as_pair(pair: Any, where: str, whole: bool = False) -> tuple[Item, Item]:
    """(image, text), given in either order; (query, document) as given for a model that reads both as one conversation."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise TypeError(f"{where}expected (query, document), got {type(pair).__name__} {pair!r}")
    a, b = (item if isinstance(item, Item) else as_item(item, where) for item in pair)
    if whole:
        return a, b
    if {a.kind, b.kind} != {"image", "text"}:
        raise ValueError(
            f"{where}the matching head judges one image and one text, got {a.kind} {a.told} and {b.kind} "
            f"{b.told}; to compare items of any kind use encode and similarity"
        )
    return (a, b) if a.kind == "image" else (b, a)


def identity(item: Item) -> Any:
    """Equal for items that need reading only once."""
    return ("text", item.text) if item.kind == "text" else ("image", picture_key(item.image))
