"""A copy of an index: of one state, while others may go on writing the folder that it was taken of."""

import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from safetensors.numpy import save_file

from unimodal.search.backends import release_backend
from unimodal.search.encoder import Encoder
from unimodal.search.ledger import Ledger
from unimodal.search.state import State
from unimodal.search.store import part_file, write_manifest
from unimodal.search.writer import Writer


def copy_index(state: State, source: Path, folder: Path, encoder: Encoder) -> None:
    """Write a state of the index in the folder `source` to a new folder that nobody else uses. Whoever made it brings it to the disk."""
    write_manifest(folder, state.manifest)
    with closing(sqlite3.connect(folder / "documents.sqlite")) as file:
        state.catalogue.db.backup(file)
    with closing(Ledger(folder / "documents.sqlite", state.manifest["part"])) as ledger:
        ledger.forget_plan()
    for number in sorted(state.parts.numbers):
        save_file(state.parts[number], part_file(folder, number))
    name = state.manifest["backend"]
    with suppress(OSError, shutil.Error):  # files that a writer changes now; what is not copied whole is mended below
        shutil.copytree(source / name, folder / name)
    Writer(folder, encoder).close()
    release_backend(name, folder / name)
