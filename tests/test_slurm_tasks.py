"""The number of Slurm tasks is checked before anything starts; Lightning's own Slurm environment is the reference."""

import warnings

import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from slurm_environments import (
    BATCH,
    BATCH_ONE,
    BATCH_TWO,
    NOT_SLURM,
    SALLOC,
    SALLOC_NAMED,
    SALLOC_SRUN,
    SALLOC_SRUN_NAMED,
    SALLOC_STEP_SHELL,
    SHELL,
    SRUN_FOUR,
    SRUN_ONE,
    SRUN_ONE_OF_TWO,
    SRUN_TWO,
    SRUN_TWO_TOTAL,
    TORCHRUN,
    TORCHRUN_IN_SRUN,
)

from radargate_pl.slurm import check_launch, check_tasks, count_devices, names_slurm

ACCEPTED = {
    "laptop": (NOT_SLURM, 2, 1),
    "batch, no tasks asked for": (BATCH, 2, 1),  # not Slurm to Lightning: it starts the processes itself
    "batch, one task": (BATCH_ONE, 1, 1),
    "srun": (SRUN_TWO, 2, 1),
    "srun, one task": (SRUN_ONE, 1, 1),
    "srun, two nodes": (SRUN_FOUR, 2, 2),
    "srun in a named step of salloc": (SALLOC_SRUN_NAMED, 2, 1),
    "shell of salloc": (SALLOC, 2, 1),
    "shell of salloc in a step": (SALLOC_STEP_SHELL, 2, 1),
    "shell of salloc, one device": (SALLOC, 1, 1),
    "shell of srun --pty": (SHELL, 2, 1),
    "torchrun": (TORCHRUN, 2, 1),
    "torchrun as one task": (TORCHRUN_IN_SRUN, 2, 1),
}
REFUSED = {
    "batch without srun": (BATCH_TWO, 2, 1, "was started without srun .SLURM_NTASKS=2, SLURM_NTASKS_PER_NODE=2"),
    "batch without srun, devices 1": (BATCH_TWO, 1, 1, "without srun .*trainer.devices=1"),
    "batch, one task for two": (BATCH_ONE, 2, 1, "Expected one Slurm task per device, 2 for trainer.devices=2"),
    "srun, one task for two": (SRUN_ONE, 2, 1, "got SLURM_NTASKS=1, .* ask sbatch .* --nodes=1 --ntasks-per-node=2"),
    "srun -n 1 of two": (SRUN_ONE_OF_TWO, 2, 1, "got SLURM_NTASKS=1, SLURM_NTASKS_PER_NODE=2"),
    "srun -n 1 of two, devices 1": (SRUN_ONE_OF_TWO, 1, 1, "got SLURM_NTASKS=1, SLURM_NTASKS_PER_NODE=2"),
    "srun, two tasks for one": (SRUN_TWO, 1, 1, "or write --trainer.devices 2 --trainer.num_nodes 1"),
    "srun, total only": (SRUN_TWO_TOTAL, 2, 1, "SLURM_NTASKS_PER_NODE=.not set."),
    "srun, a node too few": (SRUN_FOUR, 2, 1, "or write --trainer.devices 2 --trainer.num_nodes 2"),
    "srun, devices and nodes exchanged": (SRUN_FOUR, 4, 1, "SLURM_NNODES=2"),
    "shell of a named salloc": (SALLOC_NAMED, 2, 1, "without srun"),
    "srun in salloc": (SALLOC_SRUN, 2, 1, "named 'interactive'.* each of the 2 tasks would be a run of its own"),
    "srun in salloc, other rank": ({**SHELL, "SLURM_PROCID": "1"}, 2, 1, "named 'bash'"),
}


def lightning_follows_slurm(environment, devices, num_nodes, monkeypatch):
    """Whether Lightning would take this process for one of as many ranks as there are devices, by its own code."""
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NAME", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        slurm = SLURMEnvironment(auto_requeue=False)
        slurm.validate_settings(devices, num_nodes)
        return slurm.world_size() == devices * num_nodes and slurm.global_rank() + slurm.local_rank() >= 0
    except (KeyError, RuntimeError, ValueError):
        return False


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():  # that there is an srun on this machine
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_works_is_accepted(case, monkeypatch):
    environment, devices, num_nodes = ACCEPTED[case]
    check_tasks(environment, devices, num_nodes)
    works = lightning_follows_slurm(environment, devices, num_nodes, monkeypatch)
    assert works or "TORCHELASTIC_RUN_ID" in environment or not SLURMEnvironment.detect()


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_hang_or_train_on_less_is_refused(case, monkeypatch):
    environment, devices, num_nodes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_tasks(environment, devices, num_nodes)
    works = lightning_follows_slurm(environment, devices, num_nodes, monkeypatch) and SLURMEnvironment.detect()
    assert not works or "SLURM_STEP_ID" not in environment  # or it would wait for tasks that nobody starts


@pytest.mark.parametrize("case", ["srun", "srun, one task", "srun, two nodes", "batch, one task"])
def test_with_the_environment_named_in_the_config(case):
    check_tasks(*ACCEPTED[case], is_chosen=True)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (NOT_SLURM, "without srun .trainer.plugins names SLURMEnvironment.*--trainer.plugins null"),
        (BATCH, "without srun .trainer.plugins names SLURMEnvironment"),
        (SALLOC, "without srun .SLURM_NTASKS=2"),
        (TORCHRUN, "but got torchrun; write --config configs/trainer/ddp.yaml"),
        (TORCHRUN_IN_SRUN, "but got torchrun"),
    ],
)
def test_named_in_the_config_but_not_started_by_srun(environment, message):
    with pytest.raises(ValueError, match=message):
        check_tasks(environment, 2, 1, is_chosen=True)


def test_named_in_the_config_the_name_of_the_job_does_not_matter():
    check_tasks(SALLOC_SRUN, 2, 1, is_chosen=True)


@pytest.mark.parametrize(
    ("accelerator", "devices", "count"),
    [
        ("cpu", "auto", 1),
        ("cpu", 2, 2),
        ("gpu", "2", 2),
        ("gpu", [0, 3, 4], 3),
        ("gpu", "1,", 1),
        ("gpu", "0, 1", 2),
        ("gpu", -1, 4),
        ("auto", "auto", 4),
        ("cuda", "-1", 4),
    ],
)
def test_devices_of_every_spelling(accelerator, devices, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count_devices(accelerator, devices) == count


def test_all_devices_of_a_machine_without_any(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_devices("auto", "auto") == 1


@pytest.mark.parametrize(
    ("plugins", "found"),
    [
        (None, False),
        ([], False),
        ([{"class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment"}], True),
        ({"class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment"}, True),
        (["SLURMEnvironment"], True),
        ([{"class_path": "lightning.pytorch.plugins.environments.LightningEnvironment"}], False),
        ("TransformerEnginePrecision", False),
    ],
)
def test_plugins_of_every_spelling(plugins, found):
    assert names_slurm(plugins) is found


def test_an_object_is_found_too(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert names_slurm([SLURMEnvironment(auto_requeue=False)])


def test_the_section_of_the_config():
    section = {"accelerator": "cpu", "devices": 2, "num_nodes": 1, "plugins": None}
    check_launch(SRUN_TWO, section)
    with pytest.raises(ValueError, match="without srun"):
        check_launch(NOT_SLURM, {**section, "plugins": [{"class_path": "x.SLURMEnvironment"}]})
