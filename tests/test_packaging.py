"""What a wheel holds: the package, its configs once, the licence; and that it finds the configs when installed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the present tree, built without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("radargate_pl", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = "-m pip wheel --quiet --no-build-isolation --no-deps --no-index --disable-pip-version-check -w dist ."
    subprocess.run([sys.executable, *command.split()], cwd=source, check=True, capture_output=True)
    (path,) = (source / "dist").glob("radargate_pl-*.whl")
    return path


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    sources = (path for ending in ("py", "cpp", "h") for path in (ROOT / "radargate_pl").rglob(f"*.{ending}"))
    modules = {str(path.relative_to(ROOT)) for path in sources}
    configs = {f"radargate_pl/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert package == modules | configs
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_configs_are_found_when_installed(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from radargate_pl.config_sources import find_config; print(find_config('configs/gates/stretch.yaml'))"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "site/radargate_pl/configs/gates/stretch.yaml")
