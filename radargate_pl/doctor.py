"""``radargate doctor``: what may be wrong with this machine, and one dry step (layer 6; heavy imports stay lazy)."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from radargate_pl import __version__
from radargate_pl.config_places import ConfigError, Located
from radargate_pl.config_sources import find_config, merge, read_command_line, setting_tree
from radargate_pl.config_yaml import read_yaml
from radargate_pl.doctor_checks import (
    Finding,
    check_caches,
    check_device,
    check_disks,
    check_slurm,
    check_versions,
    is_malicious_installed,
)
from radargate_pl.redaction import redact_arguments, redact_text

FORMAT_VERSION = 1
USAGE = """usage: radargate doctor [--json] [--config FILE ...] [--key value ...]

Looks at versions, device, disks, caches and Slurm, then trains and validates one batch: of the configuration given, as
`radargate fit` would, or of a tiny built-in one. Nothing is left in the run folder. Exit code 0 if nothing is wrong.

  --json          print the report as JSON
  --config FILE   as for fit, also several times
  --key value     as for fit, for example --trainer.devices 1
"""
_TAIL_LINES = 15
_BUILT_IN_SECONDS = 600.0
_LAUNCH = re.compile(
    r"SLURM_|TORCHELASTIC_|PMI_|OMPI_|(RANK|LOCAL_RANK|GROUP_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$"
)
_BUILT_IN = """
seed_everything: 1
trainer: {devices: 1, max_steps: 1, logger: false}
model:
  network:
    class_path: radargate_pl.networks.GatedNetwork
    init_args:
      backbone: debug-tiny
      new_experts: {per: task, target_modules: [q_proj, v_proj], rank: 2, alpha: 4}
      gate: {class_path: radargate_pl.gates.RadarGate, init_args: {top_k: 2, rotation_rank: 2}}
      train: both
data:
  class_path: radargate_pl.data.FlanMixture
  init_args: {validation_examples: 2, batch_size: 2, max_length: 64}
"""


def main(words: Sequence[str]) -> int:
    """Run all checks and print what they found.

    Args:
        words: those after ``radargate doctor``.

    Returns:
        0 if nothing is wrong, 1 otherwise.
    """
    if {"-h", "--help"} & set(words):
        print(USAGE, end="")
        return 0
    as_json = "--json" in words
    findings: list[Finding] = []
    if not as_json:
        print(f"radargate doctor, radargate-pl {__version__}", flush=True)
    for finding in examine([word for word in words if word != "--json"]):
        shown = Finding(finding.section, finding.status, scrub(finding.text))
        if not as_json:
            _print(shown, is_first=not findings or findings[-1].section != shown.section)
        findings.append(shown)
    wrong = [finding for finding in findings if finding.status == "wrong"]
    if as_json:
        report = {"format_version": FORMAT_VERSION, "radargate_pl": __version__, "ok": not wrong}
        print(json.dumps({**report, "findings": [vars(finding) for finding in findings]}, indent=2))
    else:
        print(f"\n{_count(len(wrong))} wrong")
    return int(bool(wrong))


def examine(words: Sequence[str]) -> Iterator[Finding]:
    """Look at everything, the cheap and harmless first.

    Args:
        words: options of ``fit``.

    Yields:
        The findings as they come up.
    """
    trainer = trainer_settings(words)
    yield from check_versions()
    if is_malicious_installed():
        yield Finding("device", "note", "not looked at: nothing is imported beside a malicious release")
    else:
        yield from check_device()
    yield from check_disks(Path(str(trainer.get("default_root_dir", "runs"))))
    yield from check_caches(os.environ)
    tasks = list(check_slurm(os.environ, trainer))
    yield from tasks
    if is_malicious_installed() or "torch" not in sys.modules or any(finding.status == "wrong" for finding in tasks):
        yield Finding("dry step", "note", "left out, see above")
    else:
        yield dry_step(words)


def trainer_settings(words: Sequence[str]) -> dict[str, Any]:
    """The ``trainer`` section that files and options name, without defaults; empty if they cannot be read.

    Args:
        words: options of ``fit``.
    """
    merged = Located({}, "")
    with suppress(ConfigError):  # the dry step says what is wrong with them
        line = read_command_line(["fit", *words], ["fit"])
        for name in line.files:
            merged = merge(merged, read_yaml(find_config(name), name))
        for key, text in line.settings:
            merged = merge(merged, setting_tree(key, text))
    section = merged.plain().get("trainer")
    return {key: value for key, value in section.items() if value is not None} if isinstance(section, dict) else {}


def dry_step(words: Sequence[str]) -> Finding:
    """Train and validate one batch in a process of its own, through the normal command line.

    Args:
        words: options of ``fit``; without ``--config`` they change the built-in configuration.

    Returns:
        Whether it went well; if not, how it ended and the last lines it wrote.
    """
    has_config = any(re.match(r"(-c|--config)(=|$)", word) for word in words)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="radargate-doctor-") as folder:
        files = [] if has_config else built_in_files(Path(folder))
        command = "import sys; from radargate_pl.cli import main; sys.exit(main())"
        arguments = [sys.executable, "-c", command, "fit", *files, *words, "--trainer.fast_dev_run", "1"]
        try:
            done = subprocess.run(
                arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=_environment(None if has_config else folder),
                timeout=None if has_config else _BUILT_IN_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Finding("dry step", "wrong", f"not done after {_BUILT_IN_SECONDS:.0f} seconds")
    what = "one batch of the configuration" if has_config else "one batch of a tiny built-in model"
    if done.returncode == 0:
        return Finding("dry step", "ok", f"{what} trained and validated in {time.monotonic() - begun:.0f} s")
    return Finding("dry step", "wrong", f"{what}: {_ending(done.returncode)}\n{_tail(done.stdout)}")


def built_in_files(folder: Path) -> list[str]:
    """Write two small tasks and the configuration for them.

    Args:
        folder: an empty folder, which the words then name as run folder too.

    Returns:
        The words that make ``fit`` use them.
    """
    for name, sign in (("sums", "+"), ("differences", "-")):
        records = [{"source": f"8 {sign} {i} =", "target": str(8 + i if sign == "+" else 8 - i)} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = folder / "config.yaml"
    config.write_text(_BUILT_IN)
    tasks = {name: str(folder / f"{name}.jsonl") for name in ("sums", "differences")}
    return [f"--config={config}", f"--trainer.default_root_dir={folder}", f"--data.tasks={json.dumps(tasks)}"]


def scrub(text: str) -> str:
    """Hide the home folder, the user's name in paths, and whatever looks like a secret.

    Args:
        text: any text of the report.
    """
    home = str(Path.home())
    if home != "/":
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    for name in {os.environ.get("USER"), os.environ.get("LOGNAME"), Path(home).name} - {None, "", "root"}:
        text = re.sub(rf"(?<=/){re.escape(str(name))}(?![\w.-])", "<user>", text)
    lines = (" ".join(redact_arguments(line.split(" "))) for line in text.split("\n"))
    return "\n".join(map(redact_text, lines))


def _environment(folder: str | None) -> Mapping[str, str]:
    """The child's variables, this very package first; with a folder for its temporary files, those of a step alone.

    Such a step belongs to no launcher and needs no network.
    """
    package = str(Path(__file__).parent.parent)
    paths = [package, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if folder is None:
        return environment
    kept = {name: value for name, value in environment.items() if not _LAUNCH.match(name)}
    return {**kept, "HF_HUB_OFFLINE": "1", "TMPDIR": folder}


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = "; most often memory ran out" if -code == signal.SIGKILL else ""
    return f"ended by signal {-code} ({signal.Signals(-code).name}){hint}"


def _tail(output: str) -> str:
    lines = [line.rpartition("\r")[2].rstrip() for line in output.splitlines() if line.strip()]
    return "\n".join(lines[-_TAIL_LINES:])


def _print(finding: Finding, is_first: bool) -> None:
    if is_first:
        print(f"\n{finding.section}")
    label = "WRONG" if finding.status == "wrong" else finding.status
    print(f"  {label:8} " + finding.text.replace("\n", "\n           "), flush=True)


def _count(wrong: int) -> str:
    return {0: "nothing is", 1: "1 thing is"}.get(wrong, f"{wrong} things are")
