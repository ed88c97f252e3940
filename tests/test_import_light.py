"""`import unimodal` is cheap: in a fresh interpreter it loads no training framework, no diffusion library, no zoo."""

import subprocess
import sys

HEAVY = ("pytorch_lightning", "diffusers", "peft", "timm", "transformers")


def test_import_loads_nothing_heavy() -> None:
    program = f"import sys, unimodal; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_resolve_and_typos_are_refused() -> None:
    program = "import unimodal; [getattr(unimodal, name) for name in unimodal.__all__]; unimodal.Unimodel"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "AttributeError: module 'unimodal' has no attribute 'Unimodel'" in result.stderr


def test_the_command_line_starts_without_torch() -> None:
    program = "import sys, unimodal.cli; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
