"""The image's recipe, without an engine: what it declares, and its Python steps run for real in an environment.

That the image builds and starts is not shown here: that takes an engine and the bases' registry.
"""

import fnmatch
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def steps():
    """(instruction, value) in order, continued lines joined."""
    parser = DockerfileParser(fileobj=io.BytesIO((DOCKER / "Dockerfile").read_bytes()))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def values(steps, instruction):
    return [value for name, value in steps if name == instruction]


def commands(value):
    """The commands of one RUN."""
    return [re.split(r" > ", part)[0].split() for part in re.split(r" && ", re.sub(r"\s+", " ", value))]


def copied(steps):
    """Paths in the repository that COPY names."""
    return [path for value in values(steps, "COPY") for path in value.split()[:-1]]


def pip_installs(steps):
    return [words for value in values(steps, "RUN") for words in commands(value) if words[:2] == ["pip", "install"]]


def test_bases_are_fixed_and_one_argument_chooses(steps):
    arguments = dict(value.split("=", 1) for value in values(steps, "ARG") if "TORCH_INDEX" not in value)
    assert arguments["DEVICE"] == "cuda"
    assert re.fullmatch(r"\d+\.\d+\.\d+", arguments["CUDA"])
    cuda, cpu, image = values(steps, "FROM")
    assert cuda == "nvidia/cuda:${CUDA}-runtime-ubuntu24.04 AS cuda"
    assert cpu == "ubuntu:24.04 AS cpu"
    assert image == "${DEVICE}"
    indices = [value for value in values(steps, "ARG") if value.startswith("TORCH_INDEX=")]
    assert [index.rpartition("/")[2] for index in indices] == ["simple", "cpu"]


def test_who_runs_what_where(steps):
    last = max(number for number, (name, _) in enumerate(steps) if name in ("RUN", "COPY"))
    final = dict(steps[last + 1 :])
    assert final["USER"].isdigit()  # by number, so that a cluster can see that it is not root
    assert int(final["USER"]) > 0
    assert f"useradd --create-home --uid {final['USER']}" in steps[last][1]
    assert final["ENTRYPOINT"] == '["radargate"]'
    assert final["VOLUME"] == '["/cache"]'
    environment = dict(pair.split("=", 1) for pair in final["ENV"].split())
    assert environment["RADARGATE_CACHE"].startswith("/cache/")
    assert environment["HF_HOME"].startswith("/cache/")
    assert "radargate" in PROJECT["scripts"]


def test_nothing_that_looks_like_a_secret(steps):
    for name, value in steps:
        if name in ("ARG", "ENV"):
            assert not re.search(r"(?i)(token|key|secret|password)(?!izers)\w*=", value)
        assert name != "ADD"


def test_every_layer_of_debian_packages_is_small(steps):
    for value in values(steps, "RUN"):
        if "apt-get install" in value:
            assert "apt-get install -y --no-install-recommends" in value
            assert value.endswith("rm -rf /var/lib/apt/lists/*") or "rm -rf /var/lib/apt/lists/* &&" in value


def allowed(path):
    """Whether the ignore file lets a path through: the last line that matches decides."""
    lines = [line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in "#"]
    heads = [str(Path(*Path(path).parts[: depth + 1])) for depth in range(len(Path(path).parts))]
    is_in = True
    for line in lines:
        pattern = line.removeprefix("!").removeprefix("**/")
        names = Path(path).parts if "**/" in line else heads
        if any(fnmatch.fnmatch(name, pattern) for name in names):
            is_in = line.startswith("!")
    return is_in


def test_what_is_copied_exists_and_reaches_the_builder(steps):
    paths = copied(steps)
    assert {"constraints.txt", "pyproject.toml", "radargate_pl", "configs"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
        assert allowed(path), path
    assert allowed("radargate_pl/gates/radar.py")
    for path in ("radargate_pl/__pycache__/ops.pyc", "runs/x/gate", ".git/config", ".env", "tests/conftest.py"):
        assert not allowed(path), path


def test_every_install_is_pinned(steps):
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    installs = pip_installs(steps)
    assert len(installs) == 3
    for words in installs:
        assert words[words.index("--constraint") + 1] == "constraints.txt"
        names = [word for word in words[2:] if re.fullmatch(r"[a-z][\w-]*", word) and word not in ("constraints",)]
        assert set(names) <= pins
    torch, dependencies, package = installs
    assert torch[-2:] == ["--no-deps", "torch"]
    assert dependencies[-2:] == ["--requirement", "requirements.txt"]
    assert package[-2:] == ["--no-deps", "."]


def test_the_extras_exist_and_their_packages_are_pinned(steps):
    (words,) = [words for value in values(steps, "RUN") for words in commands(value) if "requirements.py" in words]
    extras = words[words.index("requirements.py") + 1 :]
    printed = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", *extras], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    expected = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    assert printed == expected
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for requirement in map(Requirement, printed):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_an_extra_that_does_not_exist(tmp_path):
    done = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", "speed"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Expected an extra of pyproject.toml, but got speed" in done.stderr


def environment_like_the_images(folder):
    """An environment that sees the packages of this one, and installs into itself without an index."""
    venv.create(folder, with_pip=False, symlinks=True)
    library = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (library / "seen.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = folder / "bin/pip"
    pip.write_text(f'#!/bin/sh\nexec {folder}/bin/python -m pip "$@"\n')
    pip.chmod(0o755)
    return {
        "PATH": f"{folder}/bin{os.pathsep}/usr/bin{os.pathsep}/bin",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TORCH_INDEX": "https://download.pytorch.org/whl/cpu",
    }


def test_the_python_steps_run(steps, tmp_path):
    """Each COPY and each Python command of each RUN in order; what they install must be here in a fitting version."""
    source = tmp_path / "src"
    source.mkdir()
    environment = environment_like_the_images(tmp_path / "venv")
    ran = []
    for name, value in steps:
        if name == "COPY":
            *paths, target = value.split()
            for path in map(ROOT.__truediv__, paths):
                if path.is_dir():
                    shutil.copytree(path, source / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(path, source / target)
        for command in re.split(r" && ", re.sub(r"\s+", " ", value)) if name == "RUN" else ():
            if command.split()[0] in ("pip", "python"):
                done = subprocess.run(
                    ["sh", "-euc", command], cwd=source, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
                ran.append(command)
    assert len(ran) == 4
    program = tmp_path / "venv/bin/radargate"
    done = subprocess.run(
        [program, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("radargate-pl ")
    assert list((tmp_path / "venv").rglob("radargate_pl/configs/trainer/slurm.yaml"))


def test_hadolint():
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed; it comes with the extra 'dev'")
    done = subprocess.run([program, "--no-color", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
