"""One Slurm task per device: checked before anything starts, since Lightning alone hangs or trains on less (layer 5).

What Slurm says about a process is in its environment; which of it Lightning follows is decided in its
``SLURMEnvironment.detect``: any process with ``SLURM_NTASKS``, unless the job is named ``bash`` or ``interactive``.
"""

from collections.abc import Mapping
from typing import Any

import torch

# Jobs of these names are shells; Lightning takes no notice of Slurm there and starts the processes itself.
INTERACTIVE = ("bash", "interactive")

_FIRST_RESERVED_STEP = 0xFFFFFFF0  # ids of batch scripts and of salloc's shells, which are no steps of srun's
_PLUGIN = "SLURMEnvironment"


def check_launch(environment: Mapping[str, str], trainer: Mapping[str, Any]) -> None:
    """Refuses to start a trainer that Slurm gave another number of tasks than it has devices.

    Args:
        environment: The process's environment variables.
        trainer: The ``trainer`` section of the config: ``accelerator``, ``devices``, ``num_nodes``, ``plugins``.

    Raises:
        ValueError: See ``check_tasks``.
    """
    devices = count_devices(trainer["accelerator"], trainer["devices"])
    check_tasks(environment, devices, int(trainer["num_nodes"]), is_chosen=names_slurm(trainer["plugins"]))


def count_devices(accelerator: Any, devices: Any) -> int:
    """How many devices of each node Lightning will use for ``trainer.devices``.

    Args:
        accelerator: ``trainer.accelerator``.
        devices: ``trainer.devices``: a number, a list of ids or either as text; ``auto`` and -1 mean all of them.
    """
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices).strip()
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text not in ("auto", "-1"):
        return int(text)
    return 1 if accelerator == "cpu" else max(torch.cuda.device_count(), 1)


def names_slurm(plugins: Any) -> bool:
    """Whether ``trainer.plugins`` asks for Lightning's Slurm environment, as ``configs/trainer/slurm.yaml`` does."""
    given = plugins if isinstance(plugins, list | tuple) else [plugins]
    paths = (plugin.get("class_path") if hasattr(plugin, "get") else plugin for plugin in given)
    return any(str(path).rpartition(".")[2] == _PLUGIN or type(path).__name__ == _PLUGIN for path in paths)


def check_tasks(environment: Mapping[str, str], devices: int, num_nodes: int, *, is_chosen: bool = False) -> None:
    """Refuses a number of Slurm tasks other than ``devices`` x ``num_nodes``.

    Nothing is refused outside Slurm, under ``torchrun``, and in interactive shells, where Lightning starts the
    processes itself.

    Args:
        environment: The process's environment variables.
        devices: Devices of each node, ``trainer.devices``.
        num_nodes: ``trainer.num_nodes``.
        is_chosen: Whether the config names ``SLURMEnvironment``, which is then used wherever the process was started.

    Raises:
        ValueError: Says what was found and what to write.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        if is_chosen:
            raise ValueError(_under_torchrun())
        return
    if not is_chosen and ("SLURM_NTASKS" not in environment or _is_interactive(environment)):
        if _is_one_of_many(environment):
            raise ValueError(_every_task_alone(environment))
        return
    if "SLURM_PROCID" not in environment or "SLURM_NTASKS" not in environment:
        raise ValueError(_without_srun(environment, devices, num_nodes))
    tasks = int(environment["SLURM_NTASKS"])
    if tasks > 1 and not _is_step(environment):
        raise ValueError(_without_srun(environment, devices, num_nodes))
    # What Lightning itself compares; of one task it asks nothing.
    per_node = environment.get("SLURM_NTASKS_PER_NODE", "1" if tasks == 1 else None)
    nodes = environment.get("SLURM_NNODES", str(num_nodes))
    if (tasks, per_node, nodes) != (devices * num_nodes, str(devices), str(num_nodes)):
        raise ValueError(_other_number(environment, devices, num_nodes))


def _is_interactive(environment: Mapping[str, str]) -> bool:
    return environment.get("SLURM_JOB_NAME") in INTERACTIVE


def _is_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process."""
    return int(environment.get("SLURM_STEP_ID", _FIRST_RESERVED_STEP)) < _FIRST_RESERVED_STEP


def _is_one_of_many(environment: Mapping[str, str]) -> bool:
    """Whether srun started this program several times, rather than a shell for a person.

    A shell of ``srun --pty`` has a terminal and is always task 0; programs started from it inherit both.
    """
    is_shell = "SLURM_PTY_PORT" in environment and environment.get("SLURM_PROCID") == "0"
    return _is_step(environment) and int(environment.get("SLURM_NTASKS", "1")) > 1 and not is_shell


def _found(environment: Mapping[str, str]) -> str:
    names = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES")
    return ", ".join(f"{name}={environment.get(name, '(not set)')}" for name in names)


def _asked(devices: int, num_nodes: int) -> str:
    return f"trainer.devices={devices} and trainer.num_nodes={num_nodes}"


def _remedy(devices: int, num_nodes: int) -> str:
    return (
        f"ask sbatch or salloc for --nodes={num_nodes} --ntasks-per-node={devices} and start with "
        "'srun radargate ...', as slurm/radargate.sbatch does"
    )


def _other_number(environment: Mapping[str, str], devices: int, num_nodes: int) -> str:
    message = (
        f"Expected one Slurm task per device, {devices * num_nodes} for {_asked(devices, num_nodes)}, but got "
        f"{_found(environment)}; {_remedy(devices, num_nodes)}"
    )
    per_node, nodes = environment.get("SLURM_NTASKS_PER_NODE"), environment.get("SLURM_NNODES", "1")
    if per_node is None or int(per_node) * int(nodes) != int(environment["SLURM_NTASKS"]):
        return message + "."
    return f"{message}; or write --trainer.devices {per_node} --trainer.num_nodes {nodes}."


def _without_srun(environment: Mapping[str, str], devices: int, num_nodes: int) -> str:
    why = "trainer.plugins names SLURMEnvironment" if "SLURM_NTASKS" not in environment else _found(environment)
    return (
        f"Expected srun to start one task per device, but this process was started without srun ({why}, for "
        f"{_asked(devices, num_nodes)}) and would wait for the others for ever; {_remedy(devices, num_nodes)}. To let "
        "one process start the others, write --trainer.plugins null in a job named 'interactive'."
    )


def _every_task_alone(environment: Mapping[str, str]) -> str:
    name = environment.get("SLURM_JOB_NAME")
    return (
        f"Expected the tasks of srun to train together, but the job is named '{name}', for which Lightning takes no "
        f"notice of Slurm: each of the {environment['SLURM_NTASKS']} tasks would be a run of its own in the same run "
        "folder; write --config configs/trainer/slurm.yaml, or srun --job-name=radargate."
    )


def _under_torchrun() -> str:
    return (
        "Expected srun to start the tasks, since trainer.plugins names SLURMEnvironment (configs/trainer/slurm.yaml), "
        "but got torchrun; write --config configs/trainer/ddp.yaml in its place."
    )
