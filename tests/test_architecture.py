"""The house keeps its order: imports go one way, heavy libraries keep to their rooms, functions import nothing of ours.

Every module of `unimodal/` is parsed, none is imported. A room is a module or package at the top of `unimodal/`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "unimodal"

# room: (what it may import of ours, why). A room that is not here fails: give it a row.
ROOMS: dict[str, tuple[set[str], str]] = {
    "config": (set(), "configuration is plain data"),
    "files": (set(), "it knows the file system only"),
    "arguments": ({"config"}, "it checks what came, whatever it is for"),
    "draws": (set(), "it knows torch's generators only"),
    "layers": (set(), "layers know torch only"),
    "onednn": (set(), "it knows torch only"),
    "tuning": ({"config"}, "adapters go on any module, by name"),
    "retrieval": ({"layers", "config"}, "retrieval's rule takes tensors"),
    "metrics": ({"retrieval", "config"}, "metrics take tensors and strings"),
    "distributed": (set(), "it knows torch.distributed only"),
    "diffusion": (set(), "the path and the sampler take tensors"),
    "words": (set(), "words of YAML know no setting of ours"),
    "recipes": (set(), "recipes are found by name, without loading anything"),
    "report": (set(), "the page is written from plain data"),
    "losses": ({"distributed", "layers", "retrieval"}, "losses take tensors"),
    "data": (
        {"config", "distributed", "backbones", "tuning"},
        "data may cache a frozen tower's tokens and knows no model",
    ),
    "bridge": ({"layers", "config"}, "the bridge is built from layers"),
    "backbones": ({"layers", "config"}, "a backbone knows no bridge and no head"),
    "states": ({"layers"}, "states are tensors"),
    "heads": (
        {"layers", "config", "bridge", "diffusion", "backbones", "states", "systems"},
        "a head takes tensors, and is built for a backbone",
    ),
    "systems": (
        {"layers", "config", "losses", "bridge", "tuning", "merge", "retrieval", "backbones", "distributed"},
        "a system is built from layers and losses, on tokens that others read, and compares the pairs of all ranks",
    ),
    "survey": (
        {
            "systems",
            "metrics",
            "stages",
            "hub",
            "data",
            "model",
            "backbones",
            "config",
            "report",
            "layers",
            "explain",
            "onednn",
            "words",
            "retrieval",
        },
        "the survey trains and scores systems, it knows no command line",
    ),
    "model": (
        {"backbones", "bridge", "heads", "layers", "config", "tuning", "states", "systems"},
        "the model only composes: no losses, no tokenizer, no files",
    ),
    "blocks": ({"layers"}, "a block is found in any module"),
    "sharding": ({"blocks", "layers"}, "it cuts any module, and knows torch.distributed"),
    "stages": (
        {"model", "backbones", "config", "tuning", "sharding", "heads"},
        "a stage sees a model's parameters, no losses and no data",
    ),
    "hub": ({"model", "backbones", "config", "data", "tuning"}, "the hub saves and loads a model"),
    "candidates": (
        {"model", "backbones", "data", "retrieval"},
        "choosing among candidates uses a model, it does not train one",
    ),
    "tasks": (
        {
            "model",
            "losses",
            "metrics",
            "diffusion",
            "stages",
            "data",
            "config",
            "hub",
            "candidates",
            "chunks",
            "tuning",
            "distributed",
            "blocks",
            "sharding",
            "onednn",
            "retrieval",
            "search",
            "systems",
            "heads",
        },
        "a task trains a model, it knows no command line",
    ),
    "finetuning": (
        {"tasks", "stages", "model", "hub", "data", "metrics", "config", "onednn"},
        "a fine-tuning is a stage with a plan of its own, it knows no command line",
    ),
    "merge": (set(), "merging takes state dicts"),
    "chunks": (set(), "reading in chunks takes a function and tensors"),
    "search": (
        {"model", "backbones", "hub", "data", "config", "metrics", "tuning", "onednn", "retrieval"},
        "search uses a model, it does not train one",
    ),
    "explain": ({"model", "hub", "data", "backbones", "retrieval"}, "explaining uses a model, it does not train one"),
    "inference": (
        {"model", "hub", "data", "search", "explain", "config", "candidates", "onednn", "retrieval"},
        "inference uses a model, it does not train one",
    ),
    "adapters": (
        {"inference", "model", "hub", "data", "backbones", "config"},
        "another program's view of a finished model",
    ),
    "app": ({"inference", "search", "data", "report", "retrieval"}, "a page around a finished model"),
    "lavis": ({"inference", "model", "candidates", "retrieval", "data"}, "another program's view of a finished model"),
    "export": ({"inference", "model", "hub"}, "a finished model for machines without torch"),
    "__main__": ({"cli"}, "it starts the command line"),
    "cli": (
        {
            "config",
            "tasks",
            "recipes",
            "data",
            "inference",
            "search",
            "explain",
            "hub",
            "metrics",
            "report",
            "stages",
            "merge",
            "model",
            "adapters",
            "export",
            "app",
            "survey",
            "finetuning",
            "words",
            "retrieval",
            "backbones",
            "systems",
        },
        "the command line is the only entry point",
    ),
}

# Rooms at the very bottom, which know at most `config` of ours: every room may import them.
FOUNDATION = {"files", "arguments", "draws"}

# library: the only places of ours that may import it
LIBRARIES: dict[str, tuple[str, ...]] = {
    "pytorch_lightning": ("tasks/", "data/module.py", "cli/", "survey/train.py", "finetuning/"),
    "diffusers": ("diffusion.py", "heads/generation.py", "heads/unet.py"),
    "timm": ("backbones/",),
    "peft": ("tuning/",),
    "torch.distributed": ("distributed.py", "sharding.py", "hub/training.py"),
}
FORBIDDEN = {"lightning": "import pytorch_lightning: the two names do not mix", "pickle": "we read and write no pickle"}

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(path: str, source: str) -> Iterator[tuple[str, bool]]:
    """(dotted module, inside a function) for every import statement; relative imports are made absolute."""
    package = ["unimodal", *Path(path).parent.parts]

    def walk(node: ast.AST, local: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, local) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                # `from unimodal import model` names a module, `from torch import distributed` as well
                yield from ((f"{module}.{alias.name}", local) for alias in child.names)
            hook = path.endswith("__init__.py") and getattr(child, "name", "") == "__getattr__"  # PEP 562
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not hook
            yield from walk(child, local or inside)

    yield from walk(ast.parse(source), False)


def room_of(path: str) -> str:
    return Path(path).parts[0].removesuffix(".py")


def complaints(path: str, source: str) -> list[str]:
    """What is wrong with the imports of one module, in words."""
    found = []
    room = room_of(path)
    if room != "__init__" and room not in ROOMS:
        return [f"unimodal/{path} is a room without a row in ROOMS: say what it may import"]
    for module, local in imports(path, source):
        top, _, rest = module.partition(".")
        if top == "unimodal" and path != "__init__.py":
            target = rest.partition(".")[0]
            if local:
                found.append(f"{path} imports {module} inside a function: move it to the top of the file")
            elif target != room and target not in ROOMS[room][0] | FOUNDATION and target not in ("", "__version__"):
                found.append(f"{path} imports unimodal.{target}: {ROOMS[room][1]}")
        for library, places in LIBRARIES.items():
            if f"{module}.".startswith(f"{library}.") and not path.startswith(places):
                found.append(f"{path} imports {library}: only {', '.join(places)} may")
        if top in FORBIDDEN:
            found.append(f"{path} imports {top}: {FORBIDDEN[top]}")
    return found


@pytest.mark.parametrize("path", MODULES)
def test_imports_go_one_way(path: str) -> None:
    assert complaints(path, (PACKAGE / path).read_text()) == []


TABLE = "heads/building.py"  # the only place that knows the kinds of heads
PART = "language_model"  # also the name of a part of a model that a source may give
KINDS = {"bridge", "backbone", "cached", "decoder", PART}


def head_classes() -> set[str]:
    """Names of the classes of heads: those of the contract in `heads/base.py` that say how they do, and all that stand on them."""
    trees = [ast.parse(path.read_text()) for path in (PACKAGE / "heads").glob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = {"MatchingHead", "CaptioningHead", "Embedder", "EmbeddingHead", "GenerationHead"}
    for _ in range(3):  # generations of classes
        found |= {one.name for one in classes if found & {getattr(base, "id", "") for base in one.bases}}
    return found


def asked_kinds(source: str, classes: set[str]) -> list[str]:
    """Where a source asks which head it has: a comparison with the name of a kind, or `isinstance` of a head's class."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if isinstance(node.ops[0], ast.In | ast.NotIn):  # a key that is looked up is no comparison
                sides = node.comparators
            compared = [part for side in sides for part in getattr(side, "elts", [side])]
            names = {part.value for part in compared if isinstance(part, ast.Constant) and isinstance(part.value, str)}
            kind = any(getattr(side, "attr", getattr(side, "id", "")) == "kind" for side in sides)
            asked = names & (KINDS if kind else KINDS - {PART})
            found += [f"line {node.lineno} compares with {name!r}" for name in sorted(asked)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {getattr(part, "attr", getattr(part, "id", "")) for part in ast.walk(node.args[1])}
            found += [f"line {node.lineno} asks for a {name}" for name in sorted(asked & classes)]
    return found


@pytest.mark.parametrize("path", sorted(set(MODULES) - {TABLE}))
def test_nobody_asks_which_head_it_is(path: str) -> None:
    assert asked_kinds((PACKAGE / path).read_text(), head_classes()) == []


@pytest.mark.parametrize(
    "source",
    [
        'judges = config.matching.kind == "bridge"',
        'whole = kind in ("cached", "bridge")',
        'own = captioning.kind != "language_model"',
        "own = isinstance(head, heads.BridgeCaptioner)",
        "own = isinstance(head, (AnswerHead, CaptionDecoder))",
    ],
)
def test_questions_for_a_kind_of_head_are_found(source: str) -> None:
    assert asked_kinds(source, head_classes())


def test_table_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ROOMS):
        free = {room for room, (needs, _) in ROOMS.items() if room not in done and needs <= done}
        assert free, f"rooms that wait for each other: {sorted(set(ROOMS) - done)}"
        done |= free


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        (
            "losses/contrastive.py",
            "from unimodal.model import UnimodalModel",
            "losses/contrastive.py imports unimodal.model: losses take tensors",
        ),
        (
            "losses/matching.py",
            "from ..model import UnimodalModel",
            "losses/matching.py imports unimodal.model: losses take tensors",
        ),
        ("model.py", "from unimodal import losses", "model.py imports unimodal.losses: the model only composes"),
        ("model.py", "import pytorch_lightning as pl", "model.py imports pytorch_lightning: only tasks/"),
        (
            "model.py",
            "from torch import distributed",
            "model.py imports torch.distributed: only distributed.py, sharding.py",
        ),
        ("hub.py", "def load():\n    from unimodal.model import UnimodalModel", "inside a function"),
        ("heads/__init__.py", "def helper():\n    from unimodal.heads.generation import X", "inside a function"),
        ("helpers.py", "", "a room without a row"),
        ("hub.py", "import pickle", "no pickle"),
    ],
)
def test_wrong_imports_are_named(path: str, source: str, message: str) -> None:
    assert any(message in line for line in complaints(path, source)), complaints(path, source)


def test_lazy_package_hook_is_allowed() -> None:
    assert complaints("heads/__init__.py", "def __getattr__(name):\n    from unimodal.heads.generation import X") == []
