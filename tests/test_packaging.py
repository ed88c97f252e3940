"""The wheel installs one name, `unimodal`, holds its types, recipes and fragments, and works without the clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from unimodal import recipes

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network and unpacked outside the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPO)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(unpacked: Path, program: str) -> str:
    """What `program` prints when only the unpacked wheel and the libraries are importable."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=unpacked.parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_only_our_name_is_installed(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == {"unimodal"}


def test_everything_is_inside(unpacked: Path) -> None:
    inside = files(unpacked / "unimodal")
    assert "py.typed" in inside
    assert files(REPO / "unimodal") <= inside
    assert {f"_recipes/{name}" for name in files(REPO / "tasks")} <= inside
    assert {f"configs/{name}" for name in files(REPO / "configs")} <= inside
    assert recipes.recipe_names(), "tasks/ holds no recipe"


def test_recipes_are_found_without_the_clone(unpacked: Path) -> None:
    program = "from unimodal.recipes import *; print(*[recipe(name) for name in recipe_names()], sep='\\n')"
    found = run(unpacked, program).splitlines()
    expected = [unpacked / "unimodal" / "_recipes" / f"{name}.yaml" for name in recipes.recipe_names()]
    assert [Path(line) for line in found] == expected


def test_a_recipe_of_the_wheel_parses_there(unpacked: Path) -> None:
    """`--print_config` resolves every class, key and relative include of a recipe from the wheel's own files."""
    program = (
        "import unimodal.cli, unimodal.recipes as r;"
        "unimodal.cli.main(['fit', '--config', str(r.recipe('quickstart/schedule')), '--print_config'])"
    )
    assert "class_path: unimodal.tasks." in run(unpacked, program)


def test_unknown_recipe_names_the_nearest() -> None:
    known = recipes.recipe_names()[0]
    with pytest.raises(LookupError, match=f"no recipe named '{known}x'. Did you mean .*{known}.*Recipes: "):
        recipes.recipe(f"{known}x")
