"""The only entry point: `unimodal VERB ...`. A verb's module is imported when it is asked for, so that a search waits for no trainer.

What a user can get wrong is one line on standard error and status 1, or 2 where the words of the command are wrong. An interrupted verb
has status 130, one whose reader is gone (`| head -1`) is silent and has status 141, as of programs that a signal ends.
"""

import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress

from unimodal.cli.output import say
from unimodal.config import nearest
from unimodal.files import in_words

# verb -> (module, function, one line of help)
VERBS = {
    "fit": ("train", "run", "train a recipe or a schedule of stages: --config FILE [--config FILE ...]"),
    "finetune": (
        "finetune",
        "run",
        "train a model on your own pairs, without a recipe: --model M --data PATH --out DIR",
    ),
    "validate": ("train", "run", "score a model on the validation split"),
    "test": ("train", "run", "score a model on the test split"),
    "predict": ("train", "run", "embed a split with a recipe's model"),
    "evaluate": ("evaluate", "run", "score a checkpoint's retrieval on a split: --model M --data PATH --out DIR"),
    "compare": ("evaluate", "run", "test whether two evaluated runs differ by more than chance: DIR DIR"),
    "demo": ("train", "demo", "train the embedded quickstart and write its page (--short for a quick pass)"),
    "embed": ("verbs", "embed", "embed images or texts into a .npy file"),
    "search": (
        "verbs",
        "search",
        "search a folder of images by text, or by an image; search tune|calibrate: on your own pairs",
    ),
    "rank": ("verbs", "rank", "rank images against a text, or texts against an image"),
    "caption": ("verbs", "caption", "caption images"),
    "app": ("verbs", "app", "a local page that searches a folder, captions and draws: unimodal app [FOLDER]"),
    "explain": (
        "explaining",
        "run",
        "why a text matches a picture, by a model or a system of the survey: PICTURE TEXT",
    ),
    "generate": ("verbs", "generate", "draw a picture from a text"),
    "mine": ("verbs", "mine", "mine hard negatives of a split into a .jsonl file"),
    "export": ("verbs", "export", "export onnx|sentence-transformers|cross-encoder: a checkpoint for other programs"),
    "survey": (
        "survey",
        "run",
        "every system of the survey on one data set, budget and protocol: --data PATH --budget '200 steps'",
    ),
    "push": ("verbs", "push", "push a checkpoint folder to the Hub"),
    "data": ("verbs", "data", "check a data set before training: unimodal data check PATH"),
    "gather": (
        "gather",
        "run",
        "a training checkpoint, sharded or not, as a checkpoint folder: CKPT --config FILE --out DIR",
    ),
    "doctor": (
        "doctor",
        "run",
        "report versions, devices, whether a checkpoint replays, and what a recipe will take: --config FILE",
    ),
}


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, _, text) in VERBS.items()]
    rest = (
        "unimodal VERB --help tells more. The environment variable UNIMODAL_MAX_PIXELS sets how many pixels a picture may have "
        "(by default 64000000)."
    )
    return "usage: unimodal VERB ...\n\n" + "\n".join(lines) + f"\n\n{rest}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "help"
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file may have a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # rather here than at the end of the process, where nothing can be said
    except KeyboardInterrupt:
        say(f"unimodal {verb}: interrupted")
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except (ImportError, OSError, TypeError, ValueError) as error:
        _drop_output()
        say(f"unimodal {verb}: {' '.join(in_words(error).split()) or type(error).__name__}")
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    verb = arguments[0]
    if verb not in VERBS:
        say(f"unimodal: unknown verb {verb!r}; {nearest(verb, VERBS)}")
        return 2
    if empty := next((word for word in arguments[1:] if re.fullmatch(r"--[\w.-]+=", word)), None):
        say(f"unimodal {verb}: {empty[:-1]} has no value; write {empty[:-1]} VALUE")
        return 2
    module, function, _ = VERBS[verb]
    return getattr(importlib.import_module(f"unimodal.cli.{module}"), function)(arguments) or 0


def _drop_output() -> None:
    """Drop what standard output does not take, which Python would try to write again at the end of the process."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
