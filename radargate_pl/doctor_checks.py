"""What the doctor looks at: versions, device, disks, caches, Slurm (layer 6; only the device check imports torch)."""

import os
import platform
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from radargate_pl.disk_space import Disk, format_bytes

Status = Literal["ok", "note", "warning", "wrong"]
DISTRIBUTION = "radargate-pl"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
LITTLE_BYTES, TOO_LITTLE_BYTES = 5_000_000_000, 200_000_000

# Releases that must not be imported, whatever the ranges of a requirement say.
MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}
_REMEDY = (
    "a malicious release that steals credentials when it is imported (GHSA-w37p-236h-pfx3): replace every credential "
    "this machine has seen, then run pip install 'lightning>=2.6.4'"
)
_EXTRAS_SHOWN = ("nevergrad", "bitsandbytes", "reasoning-gym", "gguf")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: the check it belongs to.
        status: ``ok`` or ``note`` for facts, ``warning`` for what may hurt, ``wrong`` for what will.
        text: what was found and, unless all is well, what to do.
    """

    section: str
    status: Status
    text: str


def check_versions() -> Iterator[Finding]:
    """Python, this package's dependencies and optional extras, against the ranges it asks for; imports none of them.

    Yields:
        One finding each.
    """
    python, requirements = declared()
    found = platform.python_version()
    fits = SpecifierSet(python).contains(found, prereleases=True)
    yield Finding("versions", "ok" if fits else "wrong", f"python {found} ({python})")
    for requirement, is_optional in requirements:
        yield Finding("versions", *_judge(requirement, is_optional))


def declared() -> tuple[str, list[tuple[Requirement, bool]]]:
    """Python's range and what this package asks for, from ``pyproject.toml`` in a checkout, else from what pip stored.

    Returns:
        The range; each requirement with whether it is optional, without those of the tests.
    """
    path = Path(__file__).parent.parent / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        extras = {text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts}
        python, needed = project["requires-python"], [Requirement(text) for text in project["dependencies"]]
        optional = [Requirement(text) for text in sorted(extras)]
    else:
        python = str(metadata.metadata(DISTRIBUTION)["Requires-Python"])
        stored = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
        needed = [requirement for requirement in stored if "extra" not in str(requirement.marker)]
        optional = [r for r in stored if "extra" in str(r.marker) and "dev" not in str(r.marker)]
    named = {requirement.name for requirement in optional}
    optional += [Requirement(name) for name in _EXTRAS_SHOWN if name not in named]
    return python, [(r, False) for r in needed] + [(r, True) for r in optional]


def _judge(requirement: Requirement, is_optional: bool) -> tuple[Status, str]:
    name, wanted = requirement.name, str(requirement.specifier) or "any"
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        if is_optional:
            return "note", f"{name} is not installed (optional, {wanted})"
        return "wrong", f"{name} is not installed ({wanted}): pip install '{requirement}'"
    if found in MALICIOUS.get(name, ()):
        return "wrong", f"{name} {found} is {_REMEDY}"
    if not requirement.specifier.contains(found, prereleases=True):
        return "warning" if is_optional else "wrong", f"{name} {found} is outside {wanted}: pip install '{requirement}'"
    return "ok", f"{name} {found} ({'optional, ' if is_optional else ''}{wanted})"


def is_malicious_installed() -> bool:
    """Whether anything is installed that must not be imported."""
    for name, versions in MALICIOUS.items():
        try:
            if metadata.version(name) in versions:
                return True
        except metadata.PackageNotFoundError:
            continue
    return False


def check_device() -> Iterator[Finding]:
    """CPU, GPUs, memory, and whether bfloat16 works.

    Yields:
        Findings for the CPU and the mixture's native code there, one for CUDA, one for each GPU.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("device", "note", f"{platform.system()} {platform.machine()}, {cores} cores, {format_bytes(memory)}")
    try:
        import torch
    except Exception as error:  # a broken installation raises OSError, ImportError and others
        yield Finding("device", "wrong", f"torch cannot be imported: {error}")
        return
    yield _bf16_on_cpu(torch)
    yield _native_code()
    has_driver = Path("/proc/driver/nvidia/version").exists()
    if torch.cuda.is_available():
        yield Finding("device", "ok", f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} devices")
        for index in range(torch.cuda.device_count()):
            yield _gpu(torch, index)
    elif has_driver and torch.version.cuda is None:
        yield Finding("device", "warning", "there is an NVIDIA driver, but this torch was built without CUDA")
    elif has_driver:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else "driver too old for it, or no device here"
        yield Finding("device", "warning", f"there is an NVIDIA driver, but torch finds no device ({why})")
    else:
        yield Finding("device", "note", "no GPU")


def _native_code() -> Finding:
    from radargate_pl.native.library import attempt

    library, cause = attempt()
    if library is not None:
        return Finding("device", "ok", "native code of the mixture: built")
    return Finding("device", "warning", f"no native code of the mixture, fits on this CPU are slower: {cause}")


def _bf16_on_cpu(torch: Any) -> Finding:
    flags = _cpu_flags()
    units = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if name in flags]
    speed = f"with {', '.join(units)}" if units else "without units for it"
    left = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    try:
        narrow = left.bfloat16().requires_grad_()
        product = narrow @ narrow.T
        product.float().sum().backward()
        error = float((product.detach().float() - left @ left.T).abs().max())
    except Exception as refusal:
        return Finding("device", "wrong", f"bfloat16 does not work on the CPU: {refusal}")
    if not error < 0.5:  # entries reach 64; three digits of bfloat16 make errors of 0.1
        return Finding("device", "wrong", f"bfloat16 on the CPU gives wrong products (off by {error:.3g})")
    return Finding("device", "ok", f"bfloat16 on the CPU works, {speed} ({torch.backends.cpu.get_cpu_capability()})")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return set()
    return {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}


def _gpu(torch: Any, index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    try:
        free, _ = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return Finding("device", "wrong", f"GPU {index}, {properties.name}, cannot be used: {error}")
    bf16 = "bfloat16" if properties.major >= 8 else "no bfloat16 units: model.network.init_args.dtype: float32"
    text = f"GPU {index}: {properties.name}, {format_bytes(properties.total_memory)}, {format_bytes(free)} free, {bf16}"
    return Finding("device", "ok" if properties.major >= 8 else "warning", text)


def check_disks(run_folder: Path) -> Iterator[Finding]:
    """Room in the working folder, the run folder and the temporary folder.

    Args:
        run_folder: ``trainer.default_root_dir``.

    Yields:
        One finding each, and whether temporary files lie on the run folder's file system.
    """
    places = [Disk("working folder", Path.cwd()), Disk("run folder", run_folder)]
    temporary = Disk("temporary folder", Path(tempfile.gettempdir()))
    for place in [*places, temporary]:
        refusal = _refusal(place.folder)
        if refusal:
            status: Status = "warning" if place.label == "working folder" else "wrong"
            yield Finding("disks", status, f"{place}, but nothing can be written: {refusal}")
        elif place.free < TOO_LITTLE_BYTES:
            yield Finding("disks", "wrong", f"{place}: too little to start a fit; free some space")
        else:
            yield Finding("disks", "ok" if place.free >= LITTLE_BYTES else "warning", str(place))
    is_same = temporary.device == places[1].device
    where = "the run folder's file system" if is_same else "another file system than the run folder"
    yield Finding("disks", "note", f"temporary files lie on {where}; checkpoints are written inside the run folder")


def check_caches(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Where models and tokenised data are kept, whether that can be written, and what is switched offline.

    Args:
        environment: the process's environment variables.

    Yields:
        A finding for each cache, and one for the offline switches.
    """
    from radargate_pl.cache_folder import cache_folder

    offline = [f"{name}={environment[name]}" for name in OFFLINE if environment.get(name)]
    general = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    hugging_face = Path(environment.get("HF_HOME") or general / "huggingface").expanduser()
    for name, folder in (("RADARGATE_CACHE", cache_folder()), ("HF_HOME", hugging_face)):
        place = Disk(name if environment.get(name) else f"{name} (not set)", folder)
        refusal = _refusal(place.folder)
        if not refusal:
            yield Finding("caches", "ok" if place.free >= TOO_LITTLE_BYTES else "warning", str(place))
        elif name == "HF_HOME" and offline:  # a cache for all users that somebody else fills
            yield Finding("caches", "note", f"{place}, read only")
        else:
            yield Finding("caches", "wrong", f"{place}, but nothing can be written: {refusal}; set {name}")
    yield Finding("caches", "note", f"offline: {', '.join(offline) or 'not asked for'}")


def _refusal(folder: Path) -> str:
    """Why no file can be written into a folder; empty if it can. Permissions alone do not tell, on network disks."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_slurm(environment: Mapping[str, str], trainer: Mapping[str, Any]) -> Iterator[Finding]:
    """One Slurm task per device.

    Args:
        environment: the process's environment variables.
        trainer: ``accelerator``, ``devices``, ``num_nodes`` and ``plugins`` of the config, as far as given.

    Yields:
        What Slurm says, and whether it fits.
    """
    names = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_PER_TASK")
    found = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
    if not found and "SLURM_JOB_ID" not in environment:
        yield Finding("slurm", "note", "not inside a Slurm job")
        return
    yield Finding("slurm", "note", f"inside a Slurm job: {found or 'nothing about its tasks'}")
    if "torch" not in sys.modules:  # it could not be imported
        return
    from radargate_pl.slurm import check_tasks, count_devices, names_slurm

    devices = count_devices(trainer.get("accelerator", "auto"), trainer.get("devices", "auto"))
    nodes = int(trainer.get("num_nodes", environment.get("SLURM_NNODES", "1")))
    if "devices" not in trainer and not sys.modules["torch"].cuda.is_available():
        return  # processes on CPUs may be as many as one likes
    try:
        check_tasks(environment, devices, nodes, is_chosen=names_slurm(trainer.get("plugins")))
        yield Finding("slurm", "ok", f"the tasks fit {devices} devices on each of {nodes} nodes")
    except ValueError as error:
        yield Finding("slurm", "wrong", str(error))
