"""The documentation holds: every command parses, every path exists, every number stands in a recipe's `expected.json`.

Read are README.md, CHANGELOG.md, the pages of `tasks/` and `checkpoints/`, and the comments of recipes and fragments.
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import unimodal

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", REPO / "CHANGELOG.md", REPO / "checkpoints/README.md", *sorted(REPO.glob("tasks/**/*.md"))]
YAMLS = sorted([*REPO.glob("tasks/**/*.yaml"), *REPO.glob("configs/**/*.yaml")])
TOP_LEVEL = ("unimodal/", "tasks/", "configs/", "tests/", "checkpoints/")
TRAINING = ("fit", "validate", "test", "predict")


def name(value: object) -> str:
    return value.relative_to(REPO).as_posix() if isinstance(value, Path) else str(value)


OWN = "own.yaml"


def code(page: Path) -> Iterator[str]:
    """Every line of the fenced blocks of a page, every inline code, and every comment of a YAML file."""
    text = page.read_text()
    if page.suffix == ".yaml":
        # a command stands last on its comment line, after two spaces or more
        yield from (part for line in re.findall(r"#(.*)", text) for part in re.split(r"\s{2,}", line.strip()))
        return
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def commands(program: str) -> list[tuple[Path, list[str]]]:
    """(where it stands, words after `program`) for each command of the documentation, comments cut."""
    found = []
    for page in [*PAGES, *YAMLS]:
        for line in code(page):
            started = rf"(\w+=\S+ )*(srun |torchrun .* -m )?{program} "  # by itself or by a launcher
            words = shlex.split(line, comments=True) if re.match(started, line) else []
            rest = words[words.index(program) + 1 :] if words else []
            if rest and rest not in ([verb] for verb in TRAINING):  # a training verb alone is a mention, not a command
                found.append((page, rest))
    return found


@pytest.mark.parametrize(("page", "words"), commands("unimodal"), ids=name)
def test_shell_commands_parse(page: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from unimodal import cli

    monkeypatch.chdir(REPO)
    if OWN in words:  # the reader's file, as the guide shows it
        (block,) = re.findall(
            rf"^```yaml\n# {OWN}\n(.*?)^```", (REPO / "configs/systems/README.md").read_text(), flags=re.M | re.S
        )
        (tmp_path / OWN).write_text(block)
        words = [str(tmp_path / OWN) if word == OWN else word for word in words]
    try:
        if words[0] in (*TRAINING, "demo"):
            status = cli.main([*words, "--help" if words[0] == "demo" else "--print_config"])
        else:
            importlib.import_module(f"unimodal.cli.{cli.VERBS[words[0]][0]}").parse(words)
            status = 0
    except SystemExit as stop:
        status = stop.code or 0
    assert status == 0, f"{name(page)}: `unimodal {shlex.join(words)}` does not parse"


@pytest.mark.parametrize(("page", "words"), commands("make"), ids=name)
def test_make_targets_exist(page: Path, words: list[str]) -> None:
    targets = re.findall(r"^\.PHONY: (.*)", (REPO / "Makefile").read_text(), flags=re.M)[0].split()
    assert set(words) <= set(targets), f"{name(page)}: make has {targets}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}, which does not exist"


@pytest.mark.parametrize("page", [*PAGES, *YAMLS], ids=name)
def test_paths_exist(page: Path) -> None:
    """A path of the repository exists, unless git ignores it: then it is what a run writes."""
    for text in code(page):
        for word in re.findall(r"(?<![\w./])[\w.-]+/[\w./-]*", text):
            path = word.rstrip("/.")
            if word.startswith(TOP_LEVEL) and not (REPO / path).exists():
                ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=REPO).returncode == 0
                assert ignored, f"{name(page)} names {word}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_examples_name_what_exists(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"unimodal": unimodal, "model": getattr(unimodal, "Unimodal", None)}.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), f"{name(page)}: {ast.unparse(node)} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_numbers_come_from_expected_json(page: Path) -> None:
    """A table row that opens with a metric's key, as in | `t2i_r1_first` | 0.71 |, quotes the recipe of its page.

    README.md quotes the quick start.
    """
    recipe = REPO / "tasks/quickstart" if page.parent == REPO else page.parent
    rows = re.findall(r"^\| `(\w+)` \| ([\d.,]+) ", page.read_text(), flags=re.M)
    metrics = json.loads((recipe / "expected.json").read_text())["metrics"] if rows else {}
    for key, number in rows:
        decimals = len(number.partition(".")[2])
        assert f"{metrics[key]:.{decimals}f}" == number, f"{name(page)}: {key} is {metrics[key]} in {recipe.name}"


def test_every_recipe_folder_has_its_readme_and_numbers() -> None:
    folders = [path for path in (REPO / "tasks").iterdir() if path.is_dir()]
    assert folders, "tasks/ holds no recipe"
    for folder in folders:
        assert (folder / "README.md").is_file(), f"tasks/{folder.name} has no README.md"
        assert json.loads((folder / "expected.json").read_text())["metrics"], f"tasks/{folder.name} expects no numbers"
