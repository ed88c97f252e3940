"""`unimodal export onnx|sentence-transformers|cross-encoder`: a checkpoint in the forms that other programs load."""

import argparse
from pathlib import Path
from typing import Any

from unimodal.adapters import export_cross_encoder, export_sentence_transformer
from unimodal.cli.options import words
from unimodal.cli.output import require_free_folder
from unimodal.export import export_onnx
from unimodal.files import BOOKKEEPING
from unimodal.inference import Unimodal

FORMS = {
    "onnx": "both encoders and the matching head as ONNX graphs, compared with torch; needs unimodal[onnx]",
    "sentence-transformers": "a folder for SentenceTransformer(folder, trust_remote_code=True): its embeddings",
    "cross-encoder": "a folder for CrossEncoder(folder, trust_remote_code=True): its matching head",
}


def add_parser(verbs: Any) -> None:
    """Add `export` to the verbs of the command line."""
    export = verbs.add_parser("export", help="write a checkpoint in a form that other programs load")
    forms = export.add_subparsers(dest="form", required=True, metavar="FORM")
    for name, text in FORMS.items():
        form = forms.add_parser(name, help=text, description=text)
        form.add_argument(
            "--model", type=words, help="a checkpoint folder or Hub id; by default the one of `make demo`"
        )
        form.add_argument("--out", type=Path, required=True, help="the folder to write")


def export(options: argparse.Namespace, checkpoint: str) -> None:
    """Write the form asked for and say where it is."""
    names = None if options.form == "onnx" else ()  # the others replace an earlier export of their own
    require_free_folder(options.out, names, inputs=[checkpoint])
    before = _times(options.out)
    if options.form == "onnx":
        export_onnx(Unimodal.from_pretrained(checkpoint), options.out)
    elif options.form == "sentence-transformers":
        export_sentence_transformer(checkpoint, options.out)
    else:
        export_cross_encoder(checkpoint, options.out)
    written = [name for name, time in _times(options.out).items() if before.get(name) != time]
    print(f"{options.out}: {', '.join(written)}")


def _times(folder: Path) -> dict[str, int]:
    """When what lies in a folder was written, by name in order; nothing of a folder that is not there."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: path.stat().st_mtime_ns for path in paths if path.name not in BOOKKEEPING}
