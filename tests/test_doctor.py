"""The doctor: what it finds on this machine, faults it must see, and a dry step that leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from radargate_pl import doctor, doctor_checks
from radargate_pl.cli import main
from radargate_pl.doctor import dry_step, scrub, trainer_settings
from radargate_pl.doctor_checks import (
    Finding,
    check_caches,
    check_device,
    check_disks,
    check_slurm,
    check_versions,
    declared,
    is_malicious_installed,
)

ROOT = Path(__file__).parent.parent
Usage = namedtuple("Usage", "total used free")


def texts(findings, status):
    return [finding.text for finding in findings if finding.status == status]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes a distribution look installed in some version: metadata in front of everything else on the path."""

    def install(name, version):
        folder = tmp_path / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return install


# ---- the whole report ----


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Text and exit code of ``radargate doctor`` in an empty folder, and what it left there."""
    folder = tmp_path_factory.mktemp("empty")
    temporary = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "TMPDIR": str(temporary)}
    for name in [name for name in environment if name.startswith("SLURM_")]:
        del environment[name]
    words = [sys.executable, ROOT / "cli.py", "doctor"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    return done, [*folder.iterdir(), *temporary.iterdir()]


def test_nothing_is_wrong_here_and_nothing_is_left_behind(report):
    done, left = report
    assert done.returncode == 0, done.stdout + done.stderr
    assert left == []
    lines = done.stdout.splitlines()
    sections = [line for line in lines if line and not line.startswith((" ", "radargate", "nothing"))]
    assert sections == ["versions", "device", "disks", "caches", "slurm", "dry step"]
    for name in ("torch", "lightning", "transformers", "peft", "jsonargparse"):
        assert any(line.startswith(f"  ok       {name} {metadata.version(name)} (") for line in lines)
    assert any("one batch of a tiny built-in model trained and validated" in line for line in lines)
    assert lines[-1] == "nothing is wrong"
    assert str(Path.home()) not in done.stdout.replace(str(ROOT), "") or str(Path.home()) == "/"


@pytest.fixture
def short(monkeypatch):
    """A doctor whose findings are given."""

    def give(*findings):
        monkeypatch.setattr(doctor, "examine", lambda words: iter(findings))

    return give


def test_json_has_what_the_text_has(short, capsys):
    short(Finding("versions", "ok", "python 3"), Finding("disks", "wrong", "full"), Finding("disks", "note", "a\nb"))
    assert main(["doctor", "--json"]) == 1
    read = json.loads(capsys.readouterr().out)
    assert read["ok"] is False
    assert read["findings"][1] == {"section": "disks", "status": "wrong", "text": "full"}
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        *("", "versions", "  ok       python 3", "", "disks", "  WRONG    full", "  note     a", "           b"),
        *("", "1 thing is wrong"),
    ]


@pytest.mark.parametrize("status", ["ok", "note", "warning"])
def test_a_warning_is_not_wrong(short, status):
    short(Finding("disks", status, "as it may be"))
    assert main(["doctor"]) == 0


def test_help(capsys):
    assert main(["doctor", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: radargate doctor")


def test_the_doctor_and_its_version_check_import_nothing_heavy():
    """Importing a malicious release is what does the harm."""
    code = (
        "import sys; from radargate_pl import doctor, doctor_checks as c; list(c.check_versions());"
        "list(c.check_caches({})); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "lightning", "transformers", "peft", "datasets"} & set(done.stdout.split())


# ---- versions ----


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_malicious_lightning_is_wrong_and_nothing_is_run(installed, monkeypatch, capsys, version):
    installed("lightning", version)
    assert metadata.version("lightning") == version
    assert is_malicious_installed()
    for name in ("check_device", "dry_step"):
        monkeypatch.setattr(doctor, name, lambda *_: pytest.fail("imports what must not be imported"))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert f"WRONG    lightning {version} is a malicious release that steals credentials" in said
    assert "note     left out, see above" in said


def test_a_version_outside_the_range_is_wrong(installed):
    installed("peft", "0.17.1")
    (text,) = texts(check_versions(), "wrong")
    wanted = next(str(r) for r, _ in declared()[1] if r.name == "peft")
    assert text.startswith("peft 0.17.1 is outside ")
    assert f"pip install '{wanted}'" in text


def test_an_optional_version_outside_the_range_is_a_warning(installed):
    installed("nevergrad", "0.4.0")
    (text,) = texts(check_versions(), "warning")
    assert text.startswith("nevergrad 0.4.0 is outside >=1.0")
    assert not texts(check_versions(), "wrong")


def test_what_is_missing_is_wrong_or_noted(monkeypatch):
    version = metadata.version

    def without(name):
        if name in ("safetensors", "bitsandbytes"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    found = list(check_versions())
    assert [text.split(" (")[0] for text in texts(found, "wrong")] == ["safetensors is not installed"]
    assert any(text.startswith("bitsandbytes is not installed (optional") for text in texts(found, "note"))


def test_the_ranges_are_those_of_the_project(monkeypatch, tmp_path, installed):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, listed = declared()
    assert python == project["requires-python"]
    needed = [requirement.name for requirement, is_optional in listed if not is_optional]
    assert needed == [text.split("[")[0].split(">")[0] for text in project["dependencies"]]
    optional = {requirement.name for requirement, is_optional in listed if is_optional}
    assert {"nevergrad", "bitsandbytes", "reasoning-gym"} <= optional
    assert "pytest" not in optional
    # Installed as a wheel there is no such file, and pip's record says the same.
    lines = [f"Requires-Dist: {text}" for text in project["dependencies"]]
    lines += [
        f'Requires-Dist: {text}; extra == "{extra}"'
        for extra, ts in project["optional-dependencies"].items()
        for text in ts
    ]
    installed("radargate-pl", "9.9")
    path = tmp_path / "site/radargate_pl-9.9.dist-info/METADATA"
    path.write_text(path.read_text() + f"Requires-Python: {python}\n" + "\n".join(lines) + "\n")
    monkeypatch.setattr(doctor_checks, "__file__", str(tmp_path / "site/radargate_pl/doctor_checks.py"))
    again = declared()
    assert again[0] == python
    assert [r.name for r, is_optional in again[1] if not is_optional] == needed
    assert {r.name for r, is_optional in again[1] if is_optional} == optional


# ---- device, disks, caches ----


def test_the_device_check_knows_this_machine():
    found = list(check_device())
    assert not texts(found, "wrong")
    assert any("bfloat16 on the CPU works" in text for text in texts(found, "ok"))


def test_native_code_that_cannot_be_built_is_told_with_what_to_do(monkeypatch):
    from radargate_pl.native import library

    assert any("native code of the mixture: built" in text for text in texts(check_device(), "ok"))
    monkeypatch.setattr(library, "attempt", lambda: library.Attempt(None, "there is no compiler g++; install it"))
    (text,) = texts(check_device(), "warning")
    assert "no native code" in text
    assert text.endswith("there is no compiler g++; install it")


def test_bfloat16_that_computes_nonsense_is_wrong(monkeypatch):
    import torch

    bfloat16 = torch.Tensor.bfloat16
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: bfloat16(self * 1.2))
    assert any("gives wrong products" in text for text in texts(check_device(), "wrong"))


def test_a_torch_that_does_not_import_is_wrong(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        (text,) = texts(check_device(), "wrong")
    assert text.startswith("torch cannot be imported")


@pytest.mark.parametrize(("free", "status"), [(10**8, "wrong"), (10**9, "warning"), (10**11, "ok")])
def test_disks(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    monkeypatch.chdir(tmp_path)
    found = [text for text in texts(check_disks(tmp_path / "runs/mine"), status) if text.split()[1] == "folder"]
    assert [text.split()[0] for text in found] == ["working", "run", "temporary"]


def test_file_systems_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert texts(check_disks(tmp_path / "run"), "note")[0].startswith("temporary files lie on the run folder's")
    memory = Path("/dev/shm")
    if memory.is_dir() and memory.stat().st_dev != tmp_path.stat().st_dev:
        assert texts(check_disks(memory / "run"), "note")[0].startswith("temporary files lie on another file system")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_folders_that_cannot_be_written(monkeypatch):
    (text,) = texts(check_disks(Path("/proc/run")), "wrong")
    assert text.startswith("run folder /proc/run")
    assert "nothing can be written" in text
    monkeypatch.setenv("RADARGATE_CACHE", "/proc/cache")
    (text,) = texts(check_caches({"RADARGATE_CACHE": "/proc/cache"}), "wrong")
    assert text.startswith("RADARGATE_CACHE /proc/cache")
    monkeypatch.delenv("RADARGATE_CACHE")
    environment = {"HF_HOME": "/proc/hf"}
    assert len(texts(check_caches(environment), "wrong")) == 1
    environment["HF_HUB_OFFLINE"] = "1"
    assert not texts(check_caches(environment), "wrong")
    notes = texts(check_caches(environment), "note")
    assert any(text.endswith("read only") for text in notes)
    assert "offline: HF_HUB_OFFLINE=1" in notes


# ---- Slurm ----

TWO_TASKS = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_STEP_ID": "0",
}


def test_outside_slurm():
    assert [(f.status, f.text) for f in check_slurm({}, {})] == [("note", "not inside a Slurm job")]


@pytest.mark.parametrize(("devices", "status"), [(2, "ok"), (1, "wrong"), (4, "wrong")])
def test_tasks_against_devices(devices, status):
    found = list(check_slurm(TWO_TASKS, {"devices": devices}))
    assert found[0].text == "inside a Slurm job: SLURM_NTASKS=2, SLURM_NTASKS_PER_NODE=2, SLURM_NNODES=1"
    assert [finding.status for finding in found[1:]] == [status]


def test_tasks_that_do_not_fit_leave_the_dry_step_out(monkeypatch, capsys):
    for name, value in TWO_TASKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "dry_step", lambda words: pytest.fail("would wait for a task that is not there"))
    assert main(["doctor", "--trainer.devices", "1"]) == 1
    assert "left out, see above" in capsys.readouterr().out


def test_trainer_settings_are_read_from_files_and_options(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {devices: 4, default_root_dir: runs/a, num_nodes: null}\n")
    found = trainer_settings(["--config", str(tmp_path / "a.yaml"), "--trainer.devices", "2"])
    assert found == {"devices": "2", "default_root_dir": "runs/a"}
    assert trainer_settings(["--config", "not/there.yaml"]) == {}


# ---- the dry step ----


def test_a_configuration_is_tried_through_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = dry_step(["--config", "configs/debug.yaml", "--trainer.default_root_dir", "runs/x"])
    assert found.status == "ok", found.text
    assert found.text.startswith("one batch of the configuration trained")
    assert not list(tmp_path.rglob("*.ckpt")) + list(tmp_path.rglob("config.yaml"))


def test_a_mistake_in_a_configuration_is_shown():
    found = dry_step(["--config", "configs/debug.yaml", "--trainer.max_step", "3"])
    assert found.status == "wrong"
    assert "ended with exit code 2" in found.text
    assert "max_steps" in found.text.splitlines()[-1]


def test_a_killed_step_says_how_it_ended(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho loading\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found = dry_step([])
    assert found.status == "wrong"
    assert "ended by signal 9 (SIGKILL); most often memory ran out\nloading" in found.text


def test_a_built_in_step_that_hangs_is_ended(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(doctor, "_BUILT_IN_SECONDS", 0.2)
    assert dry_step([]) == Finding("dry step", "wrong", "not done after 0 seconds")


@pytest.mark.parametrize("has_config", [False, True])
def test_launchers_and_network_are_kept_from_the_built_in_step_only(tmp_path, monkeypatch, has_config):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nenv\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(doctor, "_TAIL_LINES", 10_000)
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "MY_RANK"):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    seen = set(dry_step(["--config", "x.yaml"] if has_config else []).text.splitlines())
    assert "MY_RANK=2" in seen
    assert ("SLURM_NTASKS=2" in seen) is ("RANK=2" in seen) is has_config
    assert ("HF_HUB_OFFLINE=1" in seen) is not has_config


# ---- what is not told ----


def test_home_user_and_secrets_are_hidden(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("USER", "alice")
    text = "run folder /home/alice/runs: 3 GB\n/scratch/alice/tmp /home/alice2/x /home/alice\n--hf_token abcdef url"
    assert scrub(text) == "run folder ~/runs: 3 GB\n/scratch/<user>/tmp /home/alice2/x ~\n--hf_token <redacted> url"
    token = "hf_" + "a1" * 10
    assert token not in scrub(f"HF_TOKEN={token} api_key: s3cr3t")
    assert "s3cr3t" not in scrub("api_key: s3cr3t")
    assert scrub("max_new_tokens: 64, tokenizer: a") == "max_new_tokens: 64, tokenizer: a"


def test_the_report_is_scrubbed(short, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    short(Finding("disks", "ok", "run folder /home/alice/runs"))
    main(["doctor", "--json"])
    assert "/home/alice" not in capsys.readouterr().out


def test_the_issue_form_asks_for_the_report():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    fields = {field["id"]: field for field in form["body"]}
    assert "radargate doctor" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"] == {"required": True}
    assert {"name", "description"} <= set(form)
