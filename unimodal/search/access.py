"""How a folder with an index is read and written: its newest whole state, and the one who may change it."""

import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from unimodal.files import LOCK, InUseError, locked, restore
from unimodal.search.backends import open_backend
from unimodal.search.catalogue import PATIENCE
from unimodal.search.encoder import Encoder
from unimodal.search.state import State, newest, stage_of, stamp_of
from unimodal.search.store import Manifest, require_place, write_manifest
from unimodal.search.writer import Writer

WAIT = 30  # seconds to wait for another writer


class Access:
    """A folder that holds an index, for one model.

    Args:
        encoder: the model that read the documents.
        folder: where everything is kept.
        home: the temporary folder, where it is one; it goes when the object does.
        uri: address of the server that holds the vectors, where one does.
    """

    def __init__(
        self, encoder: Encoder, folder: Path, home: tempfile.TemporaryDirectory | None = None, uri: str | None = None
    ) -> None:
        self.encoder, self.folder, self.home, self.uri = encoder, folder.absolute(), home, uri
        self._own = threading.local()  # the writer, in the thread that writes
        self._spare: tempfile.TemporaryDirectory | None = None

        self._process, self._lock = os.getpid(), threading.Lock()
        self._state: State | None = None
        self._model: str | None = None  # the model of the index, once it was compared with this one

    def _notice_fork(self) -> None:
        """A lock and a database of another process are of no use after a fork."""
        if self._process != os.getpid():
            self._own, self._process, self._lock, self._state = threading.local(), os.getpid(), threading.Lock(), None

    @property
    def state(self) -> State:
        """The newest whole state."""
        self._notice_fork()
        with self._lock:
            if self._state is None or self._state.stamp != stamp_of(self.folder):
                self._state = self._take(self._state)
            return self._state

    def _take(self, held: State | None) -> State:
        shared = held.backend if held is not None and held.backend.shared else None
        state = newest(self.folder, self.encoder, self.uri, shared)
        self._require_model(state.manifest)
        if state.sound and state.catalogue.in_line:
            return state
        try:  # a kill or a lost file left something, which a writer mends when it begins; or another one writes just now
            with self.writing(wait=0 if state.sound else PATIENCE):
                pass
        except InUseError:
            if state.sound:
                return state
            raise
        except PermissionError:
            return state if state.sound else self._mended_elsewhere(state)
        state = newest(self.folder, self.encoder, self.uri, shared)
        if not state.sound:
            raise ValueError(
                f"{self.folder / state.manifest['backend']} is damaged and could not be mended; delete it, and it is made again"
            )
        return state

    def _require_model(self, manifest: Manifest) -> None:
        """Raises:
        ValueError: another model than this one made the index.
        """
        if self._model != manifest["model"]:  # a fingerprint reads all weights
            require_same_model(str(self.folder), manifest["model"], self.encoder)
            self._model = manifest["model"]

    def _mended_elsewhere(self, state: State) -> State:
        """A state whose backend is made anew in a temporary folder, where its own cannot be written."""
        name, manifest = state.manifest["backend"], state.manifest
        self._spare = tempfile.TemporaryDirectory(prefix="unimodal-index-")
        backend = open_backend(
            name, Path(self._spare.name, name), manifest["first_width"], manifest["first_precision"], manifest["uri"]
        )
        first = stage_of(manifest, backend, state.parts, state.catalogue, state.catalogue.rows())
        first.hold(first.rows, state.catalogue.documents)
        warnings.warn(
            f"{self.folder / name} is damaged and cannot be written: its vectors are made again each time that the index is opened; open "
            "it once where you may write it",
            stacklevel=4,
        )
        return State(manifest, state.catalogue, state.parts, first, True, state.stamp)

    @contextmanager
    def writing(self, wait: float | None = None, begin: Manifest | None = None) -> Iterator[Writer]:
        """Hold the index as the only one who writes it while the block runs; `add` and `delete` within the block write as the same one.

        Args:
            wait: seconds to wait for another writer; None is half a minute.
            begin: what `index.json` says of an index that may have to be begun.

        Raises:
            InUseError: another process or thread writes the index.
            PermissionError: the folder cannot be written.
        """
        self._notice_fork()
        if (writer := getattr(self._own, "writer", None)) is not None:
            yield writer
            return
        if begin is not None:
            require_place(self.folder, begin)
            self.folder.mkdir(parents=True, exist_ok=True)
        restore(self.folder)
        with self._holding(WAIT if wait is None else wait):
            if begin is not None and require_place(self.folder, begin) is None:
                write_manifest(self.folder, begin)
            shared = self._state.backend if self._state is not None and self._state.backend.shared else None
            writer = self._own.writer = Writer(self.folder, self.encoder, shared)
            try:
                yield writer
            finally:
                self._own.writer = None
                writer.close()

    @contextmanager
    def _holding(self, wait: float) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / LOCK, f"the index {self.folder}", wait))
            except InUseError:
                raise
            except OSError as error:
                raise PermissionError(
                    f"{self.folder}: the index cannot be changed ({error.strerror}); save it to a folder that you may write, and change "
                    "that one"
                ) from error
            yield


def require_same_model(name: str, made_by: str, encoder: Encoder) -> None:
    """Raises:
    ValueError: another model than this one made the index.
    """
    if made_by != (fingerprint := encoder.fingerprint()):
        raise ValueError(
            f"{name} was made by model {made_by}, this is model {fingerprint}: their vectors cannot be "
            "compared. Load the model that made it (same weights, dtype, preprocessing), or build the index again"
        )
