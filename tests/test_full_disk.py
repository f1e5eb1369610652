"""A disk that fills up in the middle of a run, for real: a small file system of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from test_kill_and_resume import script  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent
# In a namespace of its own, so that it needs no rights and leaves no mount behind. The disk is filled to its last byte
# as soon as there is a checkpoint.
FILL = """
set -u
mount -t tmpfs -o size=40m tmpfs "$DISK" || exit 77
(until [ -e "$DISK/run/checkpoints/last.ckpt.sha256" ]; do sleep 0.05; done
 dd if=/dev/zero of="$DISK/filler" bs=1k 2>/dev/null) &
"$@"
code=$?
wait
echo "exit code $code"
ls -A "$DISK/run/checkpoints"
cd "$DISK/run/checkpoints" && sha256sum -c *.sha256
exit "$code"
"""


def in_namespace(words: list[str], disk: Path) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FILL, "sh", *words]
    environment = os.environ | {"DISK": str(disk), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment, check=False)


def test_the_fit_stops_with_a_sentence_and_every_checkpoint_is_whole(script, tmp_path: Path) -> None:  # noqa: F811
    script.write_input(tmp_path / "input")
    disk = tmp_path / "disk"
    disk.mkdir()
    setting = script.Setting(tmp_path, processes=1, precision="32-true", steps=4000)
    words = [*setting.command(disk / "run"), "--resource_guard.stop_below_mb", "0", "--trainer.logger", "false"]
    done = in_namespace(words, disk)
    if done.returncode == 77 or "unshare" in done.stderr.splitlines()[:1]:
        pytest.skip(f"no namespace to mount a small file system in: {done.stderr.strip()}")
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert "No space left on device" in done.stderr
    assert "Free some space or choose another folder" in done.stderr
    after = done.stdout.partition("exit code 1\n")[2].splitlines()
    assert not [line for line in after if ".tmp" in line]
    checked = [line for line in after if ": " in line]
    assert checked
    assert all(line.endswith(": OK") for line in checked), after
