"""Variables of processes started in every way, as read on a cluster of Slurm 22.05; tests/cluster reads them again."""

from __future__ import annotations


def variables(
    name: str,
    tasks: int | None = None,
    per_node: int | None = None,
    nodes: int = 1,
    rank: int | None = None,
    step: int | None = None,
    **more: int,
) -> dict[str, str]:
    """Variables of one process."""
    given = {"JOB_NAME": name, "NTASKS": tasks, "NTASKS_PER_NODE": per_node, "NNODES": nodes}
    given |= {"PROCID": rank, "LOCALID": rank, "STEP_ID": step}
    return {f"SLURM_{key}": str(value) for key, value in {**given, **more}.items() if value is not None}


# Named after how the process was started.
BATCH = variables("wrap", rank=0)
BATCH_ONE = variables("wrap", 1, rank=0)
BATCH_TWO = variables("wrap", 2, 2, rank=0)
SRUN_TWO = variables("wrap", 2, 2, rank=1, step=0)
SRUN_TWO_TOTAL = variables("wrap", 2, rank=1, step=0)
SRUN_ONE = variables("wrap", 1, rank=0, step=0)
SRUN_ONE_OF_TWO = variables("wrap", 1, 2, rank=0, step=0)
SRUN_FOUR = variables("wrap", 4, 2, nodes=2, rank=3, step=1)
SALLOC = variables("interactive", 2, 2)
SALLOC_NAMED = variables("mine", 2, 2)
SALLOC_STEP_SHELL = variables("interactive", 2, 2, rank=0, step=0xFFFFFFFA, PTY_PORT=40000)
SALLOC_SRUN = variables("interactive", 2, 2, rank=0, step=0)
SALLOC_SRUN_NAMED = variables("train", 2, 2, rank=0, step=0)
SHELL = variables("bash", 2, 2, rank=0, step=0, PTY_PORT=40000)
NOT_SLURM = {"HOME": "/root"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}
TORCHRUN_IN_SRUN = {**variables("wrap", 1, 1, rank=0, step=0), **TORCHRUN}
