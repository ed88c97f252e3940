"""Find a recipe by name: `quickstart/schedule` -> the YAML file, in a clone and in an installed wheel alike.

A recipe is a YAML file under `tasks/`, named by its path there without the suffix. The wheel carries that folder as
`unimodal/_recipes`, beside `unimodal/configs`, so that relative includes (`../../configs/...`) hold there too.
"""

import difflib
from pathlib import Path

PACKAGE = Path(__file__).parent


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
