"""A page of one's own in the browser: search a folder by words or by a picture, see why something matched, caption, draw.

`unimodal app FOLDER` in the shell, or from Python `serve(model, model.index_folder(FOLDER))`. It needs gradio
(`pip install 'unimodal[demo]'`), listens on 127.0.0.1 alone, and is never shared. Whatever the page shows comes from this machine, and
what is uploaded goes into a folder of this process, is deleted once it was read, and with the folder when the process ends.
"""

import os
import tempfile
import time
import webbrowser
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache, wraps
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unimodal import retrieval
from unimodal.app.door import HOST, UPLOAD, Door
from unimodal.data.images import load_image
from unimodal.data.items import as_item
from unimodal.inference import Unimodal
from unimodal.report.pieces import chances, image, told_apart
from unimodal.search import Index

THUMBNAIL, SHOWN = 384, 512  # pixels of a side
STEPS = 16  # of a heat-map
LACKS = {
    "matching": "no matching head: results keep the order of their embeddings, and nothing says why",
    "captioning": "no captioning head: it writes no captions",
    "generation": "no generation head: it draws no pictures",
}
STYLE = """
.gradio-container, .gradio-container > main { width: 100% !important; max-width: 68rem !important; margin-inline: auto !important; }
:focus-visible { outline: 3px solid var(--primary-500) !important; outline-offset: 2px !important; }
#results .grid-wrap { max-height: none !important; }
#results .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(44%, 11rem), 1fr)) !important; }
#results .caption-label { max-width: 100%; white-space: normal; font-size: 0.75rem; }
#why .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 0.8rem; max-width: 52rem; }
#why img { width: 100%; border-radius: 5px; }
#why p { overflow-wrap: anywhere; margin-top: 0.8rem; }
body:not(.dark) :is(.min_value, .max_value) { color: var(--neutral-500) !important; }
body:not(.dark) [role="tab"].selected { color: var(--primary-700) !important; }
#drawn img { width: 100%; object-fit: contain; image-rendering: pixelated; }
.word { border-radius: 3px; padding: 0 0.25em; }
"""
SHOW = "() => document.querySelector('#why').scrollIntoView({block: 'nearest'})"  # the answer may lie below the window


def serve(
    model: Unimodal,
    index: Index | None = None,
    *,
    port: int | None = None,
    open_browser: bool = False,
    wait: bool = True,
) -> Any:
    """Serve the page on 127.0.0.1.

    Args:
        model: what to use; the page offers what its heads can do, and says what they cannot.
        index: of pictures on this machine; None leaves out the search.
        port: where to listen; None takes the first free one from 7860.
        open_browser: show the page.
        wait: until it is interrupted; otherwise the page is served as long as this process runs, or until its `close()`.

    Returns:
        gradio's `Blocks`, with the address in `local_url`.

    Raises:
        ImportError: gradio is not installed.
        OSError: the port is taken.
    """
    gradio = require_gradio()
    os.environ["GRADIO_TEMP_DIR"] = upload_folder().name
    page = build(gradio, model, index)
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            show_error=True,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size=UPLOAD,
            app_kwargs={"lifespan": guarded},
            theme=gradio.themes.Default(
                primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]
            ).set(
                button_primary_background_fill="*primary_700",
                button_primary_background_fill_hover="*primary_800",
                input_placeholder_color="*neutral_500",
            ),
            css=STYLE,
        )
    except OSError as error:
        raise OSError(f"port {port or '7860 to 7959'} of {HOST} is taken; give another one") from error
    print(f"{page.local_url} (Ctrl+C ends it)")
    if open_browser:
        webbrowser.open(page.local_url)
    if wait:
        page.block_thread()
    return page


def require_gradio() -> Any:
    """Raises:
    ImportError: gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio: pip install 'unimodal[demo]'") from error
    return gradio


@asynccontextmanager
async def guarded(app: Any) -> AsyncIterator[None]:
    """Put the door before all that gradio answers with, its own middleware included, before the first request comes."""
    from starlette.formparsers import MultiPartException  # it has gradio take back what it wrote of an upload

    app.middleware_stack = Door(app.middleware_stack, MultiPartException)
    yield


@cache
def upload_folder() -> tempfile.TemporaryDirectory:
    """Where this process keeps what is uploaded: for its user alone, and as long as it runs."""
    return tempfile.TemporaryDirectory(prefix="unimodal-app-", dir=os.environ.get("GRADIO_TEMP_DIR"))


def build(gradio: Any, model: Unimodal, index: Index | None) -> Any:
    """The page: a tab for each thing that can be done."""
    one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1}
    lacking = [LACKS[head] for head in model.missing_heads if head in LACKS]
    with gradio.Blocks(title="unimodal", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        about = (
            f"{len(index)} pictures to search"
            if index is not None
            else "No folder to search: start it as `unimodal app FOLDER`"
        )
        gradio.Markdown(f"# unimodal\n{about}." + "".join(f" This model has {what}." for what in lacking))
        with gradio.Tabs():
            if index is not None:
                with gradio.Tab("Search"):
                    search_tab(gradio, model, index, one_at_a_time)
            if "captioning" in model.heads:
                with gradio.Tab("Caption"):
                    caption_tab(gradio, model, one_at_a_time)
            if "generation" in model.heads:
                with gradio.Tab("Draw"):
                    draw_tab(gradio, model, one_at_a_time)
    return page


def search_tab(gradio: Any, model: Unimodal, index: Index, options: dict[str, Any]) -> None:
    """Words or a picture in, pictures out; one that is chosen is captioned and explained."""
    judges = model.encoder.matches
    with gradio.Row():
        words = gradio.Textbox(
            label="Search for",
            placeholder="a dog running on grass",
            autofocus=True,
            max_lines=1,
            scale=4,
            min_width=240,
        )
        button = gradio.Button("Search", variant="primary", scale=1, min_width=120)
    with gradio.Accordion("Search by a picture", open=False):
        example = upload(gradio, "Pictures like this one", 240)
    with gradio.Row():
        count = gradio.Slider(1, min(60, len(index)), min(12, len(index)), step=1, label="Results", min_width=280)
        depth = gradio.Slider(
            0,
            min(500, len(index)),
            retrieval.depth(retrieval.rule_for(model.model.config), min(500, len(index))),
            step=1,
            label="Rerank depth: how many the matching head judges",
            min_width=280,
            visible=judges,
        )
    status = gradio.Markdown("", elem_id="status")
    results = gradio.Gallery(
        label="Results",
        show_label=False,
        elem_id="results",
        allow_preview=False,
        object_fit="contain",
        buttons=[],
        format="jpeg",
        height="auto",
    )
    reason = gradio.HTML(elem_id="why", visible=False)
    asked = gradio.State(None)
    found = gradio.State([])

    def search(query: dict[str, Any] | None, count: int, depth: int) -> tuple[Any, ...]:
        if query is None:
            return [], "Write what the picture should show, then press Enter.", [], gradio.HTML(visible=False)
        started = time.perf_counter()
        best = index.search(query, top_k=int(count), rerank_top_k=int(depth))
        hits = [hit for hit in best if Path(hit["document"]).is_file()]
        said = f"{len(hits)} of {len(index)} pictures in {time.perf_counter() - started:.1f} s. Choose one to see more."
        if gone := len(best) - len(hits):
            said += f" {gone} more are gone since the folder was read."
        if "text" in query and (unknown := model.encoder.unknown_words(as_item(query))):
            said += f" {unknown[0].upper()}{unknown[1:]}."
        if judges and "image" in query:
            said += " The matching head judges words, so these are in the order of their embeddings."
        shown = [(thumbnail(hit["document"]), label) for hit, label in zip(hits, labels(hits))]
        known = [(hit["document"], query.get("text"), label) for hit, label in zip(hits, labels(hits, named=True))]
        return gradio.Gallery(shown, selected_index=None), said, known, gradio.HTML(visible=False)

    def by_words(text: str, count: int, depth: int) -> tuple[Any, ...]:
        query = {"text": text} if text.strip() else None
        return query, *search(query, count, depth)

    def by_picture(path: str | None, count: int, depth: int) -> tuple[Any, ...]:
        query = {"image": _taken(path)} if path else None
        return query, *search(query, count, depth)

    def again(query: dict[str, Any] | None, count: int, depth: int) -> tuple[Any, ...]:
        return search(query, count, depth) if query else tuple(gradio.skip() for _ in outputs)

    def why(hits: list[tuple[str, str | None, str]], chosen: gradio.SelectData) -> Any:
        path, asked, title = hits[chosen.index]
        picture = _opened(path)
        lines = [f"<b>{escape(title)}</b>"]
        shown = image(picture, f"the picture {Path(path).name}", SHOWN)
        if "captioning" in model.heads:
            lines.append(f"Caption: {escape(model.caption(picture))}")
        if asked is not None and judges:
            explanation = model.explain(picture, asked, steps=STEPS)
            shown += image(explanation.overlay(), f"where {Path(path).name} speaks for or against {asked}", SHOWN)
            lines += ["Red speaks for the match, blue against it; so do the words:", coloured(explanation.words)]
        lines.append(f"<small>{escape(path)}</small>")
        said = "".join(f"<p>{line}</p>" for line in lines)
        return gradio.HTML(f'<div class="pair">{shown}</div><div class="said">{said}</div>', visible=True)

    outputs = [results, status, found, reason]
    work = told(gradio)
    gradio.on([words.submit, button.click], work(by_words), [words, count, depth], [asked, *outputs], **options)
    example.input(work(by_picture), [example, count, depth], [asked, *outputs], **options)
    gradio.on(
        [count.change, depth.change], work(again), [asked, count, depth], outputs, trigger_mode="always_last", **options
    )
    results.select(work(why), [found], [reason], **options).then(None, js=SHOW)


def caption_tab(gradio: Any, model: Unimodal, options: dict[str, Any]) -> None:
    """A picture in, a sentence out."""
    picture = upload(gradio, "Picture", 320)
    text = gradio.Textbox(label="Caption", interactive=False)

    def write(path: str | None) -> str:
        return model.caption(_taken(path)) if path else ""

    picture.input(told(gradio)(write), [picture], [text], **options)


def draw_tab(gradio: Any, model: Unimodal, options: dict[str, Any]) -> None:
    """Words in, a picture out; the same seed draws the same one again."""
    with gradio.Row():
        words = gradio.Textbox(
            label="Draw", placeholder="a red circle above a blue square", max_lines=1, scale=4, min_width=240
        )
        button = gradio.Button("Draw", variant="primary", scale=1, min_width=120)
    with gradio.Row():
        steps = gradio.Slider(1, 50, 20, step=1, label="Steps from noise to picture")
        seed = gradio.Slider(0, 100, 0, step=1, label="Seed")
        candidates = gradio.Slider(1, 16, 1, step=1, label="Pictures among which the model chooses")
    drawn = gradio.Image(
        label="Drawn", interactive=False, format="png", height=320, buttons=["download"], elem_id="drawn"
    )

    def draw(text: str, steps: int, seed: int, candidates: int) -> Image.Image:
        if not text.strip():
            raise gradio.Error("Write what to draw, then press Enter.", print_exception=False)
        generator = torch.Generator(model.device).manual_seed(int(seed))
        drawings = model.generate_image(
            text, num_inference_steps=int(steps), candidates=int(candidates), generator=generator
        )
        return drawings.images[0]

    gradio.on([words.submit, button.click], told(gradio)(draw), [words, steps, seed, candidates], [drawn], **options)


def upload(gradio: Any, label: str, height: int) -> Any:
    """A place for a picture of the user's, whose path a handler is given."""
    place = gradio.Image(type="filepath", sources=["upload", "clipboard"], label=label, height=height)
    # gradio would open it first: what is wrong with it would be said less well, and transparent parts turn black.
    place.preprocess = lambda sent: sent.path if sent else None
    return place


def told(gradio: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What is wrong with a picture or a text becomes a message on the page; a fault of ours is also printed, with its traceback."""

    def wrap(work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)  # gradio reads the signature
        def asked(*inputs: Any) -> Any:
            try:
                return work(*inputs)
            except (OSError, ValueError) as error:
                raise gradio.Error(str(error), print_exception=False) from error

        return asked

    return wrap


def _opened(path: str) -> Image.Image:
    """A picture of the user's; what is wrong with it is said of the file's name, for an upload lies in a folder of gradio's."""
    try:
        return load_image(Path(path))
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace(path, Path(path).name)) from error


def _taken(path: str) -> Image.Image:
    """A picture that was uploaded, whose file is no longer needed."""
    try:
        return _opened(path)
    finally:
        if Path(path).resolve().is_relative_to(Path(upload_folder().name).resolve()):
            Path(path).unlink(missing_ok=True)


def labels(hits: list[Any], *, named: bool = False) -> list[str]:
    """Each result in a line: its place, what it is called where there is room for it, and its scores; different ones look different."""
    cosines = told_apart([hit["first_score"] for hit in hits], 2)
    matches = chances([hit["rerank_score"] for hit in hits])
    lines = []
    for hit, cosine, match in zip(hits, cosines, matches):
        scores = [f"match {match}"] * (hit["rerank_score"] is not None) + [f"cosine {cosine}"]
        lines.append(" ".join(filter(None, (f"{hit['rank']}.", hit["id"] if named else "", ", ".join(scores)))))
    return lines


def thumbnail(path: str) -> Image.Image:
    picture = load_image(Path(path))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def coloured(words: list[tuple[str, float]]) -> str:
    """Words on a ground that says how much each speaks for the match or against it."""
    most = max(abs(weight) for _, weight in words) or 1
    shades = [("209, 36, 47" if weight > 0 else "31, 111, 235", abs(weight) / most) for _, weight in words]
    return " ".join(
        f'<span class="word" style="background: rgba({colour}, {0.5 * share:.2f})">{escape(word)}</span>'
        for (word, _), (colour, share) in zip(words, shades)
    )
