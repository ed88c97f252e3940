"""Find what ships with the package: a recipe by name (`quickstart/schedule` -> the YAML file), and the small checkpoint.

A recipe is a YAML file under `tasks/`, named by its path there without the suffix. The wheel carries that folder as
`unimodal/_recipes`, beside `unimodal/configs`. The checkpoint is no part of the wheel.
"""

import difflib
from pathlib import Path

PACKAGE = Path(__file__).parent
CHECKPOINT = "checkpoints/unimodal-small"  # in the repository


def recipe_root() -> Path:
    """The folder that holds the recipes: inside the package when installed, `tasks/` beside it in a clone."""
    installed = PACKAGE / "_recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "tasks"


def recipe_names() -> list[str]:
    """Every recipe's name, sorted."""
    root = recipe_root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def recipe(name: str) -> Path:
    """The file of the recipe `name`, with or without its `.yaml`.

    Raises:
        LookupError: no such recipe; the message has the nearest names and all of them.
    """
    names = recipe_names()
    wanted = name.removesuffix(".yaml")
    if wanted in names:
        return recipe_root() / f"{wanted}.yaml"
    near = difflib.get_close_matches(wanted, names, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise LookupError(f"no recipe named {name!r}.{hint} Recipes: {', '.join(names)}.")


def shipped_checkpoint() -> Path:
    """The folder of the checkpoint that ships with the repository: in the clone that is imported, or in the working directory.

    Raises:
        FileNotFoundError: there is none.
    """
    for root in (PACKAGE.parent, Path()):
        if (root / CHECKPOINT / "config.json").is_file():
            return root / CHECKPOINT
    raise FileNotFoundError(
        f"no model in {CHECKPOINT}, which ships with the repository; start in a clone of it, or give --model: a checkpoint "
        "folder (`make demo` makes checkpoints/demo/model) or a Hub id"
    )
