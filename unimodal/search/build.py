"""Building an index: every document is read once, a part at a time; an interrupted build continues where it stopped."""

import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from unimodal import arguments
from unimodal.data.folders import require_unicode
from unimodal.data.items import as_items
from unimodal.search import store
from unimodal.search.backends import Backend, FirstPrecision, check_backend
from unimodal.search.catalogue import Id, Metadata
from unimodal.search.encoder import Encoder
from unimodal.search.index import Index, warn_of_skipped
from unimodal.search.writer import kind_of


def build_index(
    encoder: Encoder,
    documents: Any,
    ids: Sequence[Id] | None = None,
    precision: Literal["int8", "float32"] = "int8",
    *,
    backend: Backend = "exact",
    first_precision: FirstPrecision = "float32",
    first_width: int | None = None,
    metadata: Sequence[Metadata] | None = None,
    uri: str | None = None,
    batch_size: int = 32,
    on_error: Literal["raise", "skip"] = "raise",
    folder: str | Path | None = None,
    show_progress_bar: bool | None = None,
    prompt: str | None = None,
    root: str | Path | None = None,
) -> Index:
    """Read documents into an index.

    Args:
        encoder: the model and its processor.
        documents: items, see `unimodal.data.items`.
        ids: what hits are called, all different; 0, 1, ... where not given.
        precision: of the tokens that are kept for reranking. With `int8` an image takes N W bytes for the cached
            matching head (N queries, W bridge width) and T D for the one in the bridge (T image tokens, D backbone
            width; often ten times as much); `float32` takes four times that. Embeddings are always kept as float32 on
            the disk, where candidates are scored again; the first pass searches the backend's own copy.
        backend: what finds candidates, see `unimodal.search.backends`.
        first_precision: of the backend's copy: `float32`, `int8` (a quarter) or `binary` (1/32).
        first_width: the backend keeps only so many of the first dimensions; meant for widths the model was trained for.
        metadata: per document a dict of texts, numbers and booleans, for filters (`unimodal.search.filters`) and hits.
        uri: address of a Milvus server, such as "http://localhost:19530"; the environment variable MILVUS_TOKEN says who asks.
            By default Milvus keeps a file in the folder.
        batch_size: documents at a time.
        on_error: what happens at an image that cannot be read: `raise` stops; `skip` leaves it out, warns with count
            and reasons, and lists it in `Index.skipped`.
        folder: keep the index there, and continue one that was interrupted; without it the index lives in a temporary
            folder as long as the object does. Documents are told apart by path, text, id and metadata, not by the
            content of files.
        show_progress_bar: None shows one for several batches on a terminal.
        prompt: put before every text of a document; to a vision-language model the instruction by which documents are read. It is kept, so
            that documents that are added later are read by the same.
        root: the folder whose pictures `unimodal.search.index_folder` keeps here; None where the documents are one's own.

    Raises:
        InUseError: another process or thread writes the index in that folder.
        ValueError: ids or metadata that do not fit, an unknown precision or backend, an address with a password, a folder that holds
            something else; also what `as_items` and `load_image` raise.
        ImportError: the library of the backend is not installed.
    """
    precision = arguments.choice(precision, "precision", ("int8", "float32"))  # type: ignore[assignment]
    on_error = arguments.choice(on_error, "on_error", ("raise", "skip"))  # type: ignore[assignment]
    batch_size = arguments.integer(batch_size, "batch_size")
    prompt = arguments.optional(arguments.text, prompt, "prompt", empty=True)
    dim = encoder.model.embedding.dim
    if first_width is not None:
        first_width = arguments.integer(first_width, "first_width", most=dim)
    check_backend(backend, first_width or dim, first_precision, uri)
    if uri and "@" in uri:
        raise ValueError(
            "uri: an address with a password would be kept in index.json; give it without, and set MILVUS_TOKEN"
        )
    items = as_items(documents, check_files=on_error == "raise")
    manifest: store.Manifest = {
        "format": store.FORMAT,
        "model": encoder.fingerprint(),
        "precision": precision,
        "kind": kind_of(items),
        "backend": backend,
        "first_precision": first_precision,
        "first_width": first_width or dim,
        "uri": f"{uri}#unimodal_{uuid.uuid4().hex}" if uri else None,
        "part": store.PART,
        "prompt": prompt,
        "root": None if root is None else str(root),
    }
    encoder.check_one_shape(items)
    home = tempfile.TemporaryDirectory(prefix="unimodal-index-") if folder is None else None
    place = Path(home.name) if home is not None else arguments.path(folder, "folder")
    require_unicode(place)
    index = Index(encoder, place, home, uri)
    with index.writing(begin=manifest) as writer:
        planned = writer.planned(items, range(len(items)) if ids is None else ids, metadata)
        writer.build(items, planned, batch_size, on_error, show_progress_bar)
        warn_of_skipped(writer.ledger)
    return index
