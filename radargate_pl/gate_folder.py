"""The gate folder: a fitted gate as data, small enough to mail (layer 3).

``gate.safetensors`` (tensors by ``<layer path>.gate.*``), ``gate_config.json`` (every argument, fingerprints) and a
``README.md``; with experts also ``experts/<name>/``, plain PEFT folders. Nothing in it is code and nothing is pickled.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from radargate_pl import __version__
from radargate_pl.adapters import fingerprint_of, resolve_adapters
from radargate_pl.arguments import spec_of
from radargate_pl.backbone_identity import check_identity, identity_of
from radargate_pl.backbones import load_backbone
from radargate_pl.class_specs import factory_of
from radargate_pl.execution import Execution
from radargate_pl.expert_library import save_experts
from radargate_pl.fingerprints import check_fingerprint
from radargate_pl.folders import replacing_folder
from radargate_pl.gate_fields import check_numbers, malformed_fields
from radargate_pl.joining_experts import with_new_experts, with_new_rows, without_new_experts

if TYPE_CHECKING:
    from radargate_pl.networks import GatedNetwork

FORMAT_VERSION = 1
CONFIG, TENSORS, EXPERTS = "gate_config.json", "gate.safetensors", "experts"


def save_gate(network: "GatedNetwork", folder: Path, *, include_experts: bool = False) -> None:
    """Write the gate folder, whole or not at all.

    Args:
        network: what to save; its gates must exist.
        folder: target; an older gate folder there is replaced.
        include_experts: copy the experts into it too; always done when they trained together with the gate, or lie in
            the very folder that is replaced.

    Raises:
        ValueError: when the network has no gate, or the folder holds something else than a gate.
        OSError: when it cannot be written; what was there before is unchanged then.
    """
    if not network.layers:
        raise ValueError("Expected a network with gates to save, but it is a bare backbone.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise ValueError(
            f"Expected the folder {folder} to be new, empty or an older gate folder, but it holds something else. "
            "Nothing was written; choose another folder."
        )
    _check_experts_inside(network, folder / EXPERTS, include_experts)
    lie_inside = any(adapter.folder.resolve().is_relative_to(folder.resolve()) for adapter in network.adapters)
    with replacing_folder(folder, ours=(CONFIG, TENSORS, "README.md")) as new:
        fingerprints = dict(network.fingerprints)
        if include_experts or lie_inside or network.train_part != "gate":
            fingerprints["experts"] = save_experts(network, new / EXPERTS)
        config = _config(network, folder) | {"fingerprints": fingerprints, "identity": identity_of(network)}
        save_file(_gate_tensors(network), new / TENSORS)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(_card(config), encoding="utf-8")


def load_gate(
    folder: Path,
    *,
    backbone: str | None = None,
    experts: str | list[str] | dict[str, str] | None = None,
    add_experts: dict[str, str] | None = None,
    dtype: Any = "auto",
    quantization: Any = None,
    execution: Execution | None = None,
    trust_code: bool = False,
) -> "GatedNetwork":
    """Load a gate folder with its backbone and experts, all checked against the fingerprints it was fitted with.

    Args:
        folder: a gate folder.
        backbone: where the backbone is, if not where the folder says.
        experts: where the experts are, if neither in the folder nor where it says.
        add_experts: experts that join behind those the gate was fitted with, without training: name to path or hub id.
            Only gates that find an expert by a description of it take them (NexusGate, ArrowGate).
        dtype: of backbone and experts in memory.
        quantization: "none", "4bit" or "8bit"; None for that of the backbone the gate was fitted over.
        execution: how the network computes; a gate folder holds nothing of it.
        trust_code: allow a gate class from outside this package.

    Returns:
        The network in evaluation mode.

    Raises:
        ValueError: for a folder that is none, a class from elsewhere, another backbone or expert, showing both
            fingerprints, or experts that join a gate which cannot know them.
    """
    from radargate_pl.networks import GatedNetwork

    config = read_config(folder)
    gate = factory_of(config["gate"], trust_code=trust_code)
    source = backbone or _backbone_source(folder, config["backbone"])
    found = experts if experts is not None else _expert_folders(folder, config["experts"])
    if add_experts:
        found = with_new_experts(found, add_experts, gate)
    quantization = _quantization(folder, config.get("quantization", "none"), quantization)
    loading = {"dtype": dtype, "quantization": quantization}
    built: dict[str, Any] = {"gate": gate, "combine": config["combine"], "execution": execution}
    built["decoder_start"] = config.get("decoder_start", [])
    try:
        network = GatedNetwork(backbone=source, experts=found, **built, **loading)
    except TypeError as error:
        raise ValueError(
            f"Expected {folder / CONFIG} and the arguments given to fit together, but a class does not take what it "
            f"gets ({error}). Correct the arguments; if none was given, restore or save the folder again."
        ) from error
    except ValueError:
        # Another backbone or library mostly fails to fit in some detail; then that it is another one is what helps.
        saved = config["fingerprints"]
        check_fingerprint("the backbone", saved["backbone"], load_backbone(source, **loading).fingerprint)
        _check_order(
            list(saved["experts"]), [name for name in resolve_adapters(found) if name not in (add_experts or {})]
        )
        raise
    check_fingerprints(config["fingerprints"], without_new_experts(network.fingerprints, add_experts or {}))
    saved = read_gate_tensors(folder)
    check_identity(config.get("identity"), identity_of(network), f"the gate in {folder}")
    network.answer_end, network.prompt_date = config.get("answer_end"), config.get("prompt_date")
    network.load_gate_state(with_new_rows(saved, network.gate_state()) if add_experts else saved)
    return network.eval()


def read_gate_tensors(folder: Path) -> dict[str, Tensor]:
    """Read a gate folder's tensors, by ``<layer path>.gate.*``.

    Raises:
        ValueError: when the file is damaged.
    """
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(
            f"Expected {folder / TENSORS} to be whole, but it is damaged: {error}. Fetch or save the gate again."
        ) from error
    check_numbers(tensors, str(folder / TENSORS))
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """Read a gate folder's configuration.

    Raises:
        ValueError: when it is no gate folder, damaged, or of another format version.
    """
    path = folder / CONFIG
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"Expected a gate folder with {CONFIG} and {TENSORS}, but {folder} has no {missing[0]}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected {path} to be whole, but it is damaged: {error}. Restore or save it again."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"Expected {path} to be whole, but it is damaged: no JSON object. Restore or save it again.")
    if config.get("format_version") is True or config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"Expected {path} to have format_version {FORMAT_VERSION}, but found {config.get('format_version')!r}. "
            "Use the version of radargate-pl that wrote it."
        )
    absent = [key for key in ("gate", "combine", "backbone", "experts", "fingerprints") if key not in config]
    if absent:
        raise ValueError(f"Expected {path} to be whole, but {absent} are missing. Restore or save it again.")
    if wrong := malformed_fields(config):
        raise ValueError(f"Expected {path} to be whole, but it is damaged: {wrong}. Restore or save it again.")
    return config


def check_fingerprints(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse another backbone, expert or order of experts than a gate was fitted with.

    Args:
        expected: {"backbone": ..., "experts": {name: ...}} as saved.
        found: the same of the network at hand.

    Raises:
        ValueError: naming what differs, with both values.
    """
    check_fingerprint("the backbone", expected["backbone"], found["backbone"])
    _check_order(list(expected["experts"]), list(found["experts"]))
    for name, fingerprint in expected["experts"].items():
        check_fingerprint(f"expert '{name}'", fingerprint, found["experts"][name])


def _check_order(expected: list[str], found: list[str]) -> None:
    if expected != found:
        raise ValueError(
            f"Expected the experts this gate was fitted with, {expected} in this order, but found {found}."
        )


def _check_experts_inside(network: "GatedNetwork", folder: Path, include_experts: bool) -> None:
    """Refuse to leave experts inside a gate folder that are others than the gate's: they would be loaded with it."""
    if include_experts or network.train_part != "gate":
        return
    for adapter in network.adapters:
        inside = folder / adapter.name
        if inside.is_dir() and fingerprint_of(inside) != adapter.fingerprint:
            raise ValueError(
                f"Expected {folder} to hold no other experts than this gate's, but {adapter.name!r} there is another "
                "one. Nothing was written; choose another folder, or include_experts=True."
            )


def _gate_tensors(network: "GatedNetwork") -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in network.gate_state().items()}


def _config(network: "GatedNetwork", folder: Path) -> dict[str, Any]:
    gate = next(iter(network.layers.values())).gate
    where = {adapter.name: _seen_from(folder, adapter.folder) for adapter in network.adapters}
    return {
        "format_version": FORMAT_VERSION,
        "radargate_version": __version__,
        "gate": spec_of(gate),
        "gate_line": network.describe(),
        "combine": network.combine,
        "quantization": network.quantization,
        "decoder_start": network.decoder_start,
        "answer_end": network.answer_end,
        "prompt_date": network.prompt_date,
        "backbone": _seen_from(folder, Path(network.backbone_source).expanduser()),
        "experts": {name: where.get(name, f"{EXPERTS}/{name}") for name in network.experts},
    }


def _quantization(folder: Path, saved: str, asked: str | None) -> str:
    if asked not in (None, saved):
        rank_zero_warn(
            f"quantization: the gate in {folder} was fitted over a backbone in {saved}, going on with {asked}"
        )
    return asked or saved


def _seen_from(folder: Path, target: Path) -> str:
    """A file or folder as a path from the gate folder, so that both can move together; other names as they are."""
    return os.path.relpath(target.resolve(), folder.resolve()) if target.exists() else str(target)


def _backbone_source(folder: Path, stored: str) -> str:
    if (folder / stored).exists():
        return str(folder / stored)
    if stored.startswith((".", "/")):
        raise ValueError(
            f"Expected the backbone of {folder} at {stored} (seen from there), but it is not there. Pass backbone=."
        )
    return stored


def _expert_folders(folder: Path, experts: dict[str, str]) -> dict[str, str]:
    found = {}
    for name, stored in experts.items():
        inside = folder / EXPERTS / name
        found[name] = str(inside if inside.is_dir() else folder / stored)
    missing = {name: path for name, path in found.items() if not Path(path).is_dir()}
    if missing:
        raise ValueError(
            f"Expected the experts of {folder} at {missing}, but they are not there. Pass experts= with their folder, "
            "or save the gate with include_experts=True."
        )
    return found


def _card(config: dict[str, Any]) -> str:
    experts = "\n".join(f"* `{name}`: `{value}`" for name, value in config["fingerprints"]["experts"].items())
    end = f"`{config['answer_end']}`" if config["answer_end"] else "the tokenizer's end token"
    return f"""# {config["gate_line"]}

A gate over {len(config["experts"])} LoRA experts, made with radargate-pl {config["radargate_version"]}.

```python
from radargate_pl.networks import GatedNetwork

network = GatedNetwork.from_pretrained("this folder")  # backbone= and experts= if they lie elsewhere
```

Backbone: `{config["backbone"]}` (`{config["fingerprints"]["backbone"]}`)

Answers end with: {end}

Experts, in order:

{experts}
"""
