"""A whole Slurm cluster on this machine for as long as a test needs it: munged, slurmctld, slurmd, one node.

Nothing is installed and nothing of the system is touched: own folder, own key, own socket, free ports, the user who
calls. On Debian the programs are in ``slurmctld slurmd slurm-client munge``.

    python tests/cluster/one_node.py sinfo        # the cluster for one command; without one, for a shell
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODE = "localhost"  # what tasks read as the address of the first node
CPUS = 2
_SLURMS_OWN = ("SLURM_", "SRUN_", "SBATCH_", "SALLOC_")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"))

# A requeued job waits until credentials of its first start are void: cred_expire, 120 seconds unless said otherwise.
_CONFIG = """\
ClusterName=onenode
SlurmctldHost={node}
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
KillWait=5
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Names of the programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


class CannotStartError(Exception):
    """The programs are there, but this machine does not let them run; says which and what it wrote."""


class OneNode:
    """The cluster; a context manager that ends every process it has started.

    Args:
        patience: seconds to wait for each of the three programs.
    """

    def __init__(self, patience: float = 30.0) -> None:
        self.patience = patience
        # A short path: the name of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_", "SBATCH_"))
            },
            "PATH": _PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._started: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Self:
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def run(self, *command: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a client such as sbatch prints.

        Raises:
            RuntimeError: it failed; holds what it printed.
        """
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, *words: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """The id of the job that ``sbatch --parsable`` makes of these words."""
        return self.run("sbatch", "--parsable", *words, environment=environment, cwd=cwd).split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job_id: str) -> str:
        """The state of a job, such as PENDING, RUNNING, COMPLETED."""
        return self.job(job_id)["JobState"]

    def wait(self, job_id: str, *states: str, seconds: float = 120.0) -> dict[str, str]:
        """The fields of a job once it has one of these states.

        Raises:
            TimeoutError: it has another state after so many seconds; holds all fields and the logs' last lines.
        """
        end = time.monotonic() + seconds
        while (fields := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job_id} is not {' or '.join(states)} but {fields}\n{self._logs()}")
            time.sleep(0.2)
        return fields

    def stop(self) -> None:
        """Ends every job, then the daemons, the newest first, and removes the folder."""
        if any(name == "slurmd" for name, _ in self._started):
            self._client("scancel", "--user", getpass.getuser())
            self._until(lambda: self._client("squeue", "--noheader") in ("", None), 15.0)
        for _, process in reversed(self._started):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._started.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_all(self) -> None:
        if missing := missing_programs():
            raise CannotStartError(f"not installed: {', '.join(missing)}")
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o711)  # as munged wants it; the key is closed
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        controller_port, daemon_port = _free_ports(2)
        (self.folder / "slurm.conf").write_text(
            _CONFIG.format(
                node=NODE,
                host=socket.gethostname().split(".")[0],
                user=getpass.getuser(),
                cpus=CPUS,
                folder=self.folder,
                controller_port=controller_port,
                daemon_port=daemon_port,
            )
        )
        files = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("key-file", "pid-file", "seed-file")]
        files += [f"--log-file={self.folder}/munged.log", f"--socket={self.folder}/munge.socket"]
        self._start("munged", "--foreground", "--num-threads=2", *files)
        self._wait_for("munged", lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-c")
        self._wait_for("slurmctld", lambda: "UP" in (self._client("scontrol", "ping") or ""))
        self._start("slurmd", "-D", "-N", NODE)
        self._wait_for("slurmd", lambda: self._client("sinfo", "--noheader", "--format=%t") == "idle")

    def _start(self, name: str, *options: str) -> None:
        program = shutil.which(name, path=_PATH)
        with (self.folder / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [str(program), *options], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self._started.append((name, process))

    def _client(self, *command: str) -> str | None:
        try:
            return self.run(*command)
        except (RuntimeError, subprocess.TimeoutExpired):
            return None

    def _wait_for(self, name: str, is_up: Any) -> None:
        process = dict(self._started)[name]
        if not self._until(lambda: process.poll() is not None or is_up(), self.patience) or process.poll() is not None:
            raise CannotStartError(f"{name} does not come up\n{self._logs()}")

    @staticmethod
    def _until(is_so: Any, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def _logs(self) -> str:
        texts = []
        for path in sorted((*self.folder.glob("*.log"), *self.folder.glob("*.out"))):
            texts.append(f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(texts)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main(words: Sequence[str]) -> int:
    """Runs one command, or a shell, beside the cluster."""
    try:
        with OneNode() as cluster:
            command = list(words) or [os.environ.get("SHELL", "sh")]
            return subprocess.run(command, env=cluster.environment).returncode
    except CannotStartError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
