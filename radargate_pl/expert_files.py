"""Write an expert as a plain PEFT folder, with `expert.json` beside: where it came from and which bytes it is."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from radargate_pl import __version__
from radargate_pl.adapter_config import CONFIG_FILE, fingerprinted_fields
from radargate_pl.fingerprints import fingerprint_state, fingerprint_tensors
from radargate_pl.folders import replacing_folder

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

WEIGHTS_FILE = "adapter_model.safetensors"
EXPERT_FILE = "expert.json"
FORMAT_VERSION = 1
OURS = (CONFIG_FILE, WEIGHTS_FILE, EXPERT_FILE, "domain.safetensors", "README.md")
# With the adapter's name in it (lora_A.default.weight) where the model itself was saved instead of the adapter.
TENSOR_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


def save_adapter(
    folder: Path | str,
    lora_A: Mapping[str, Tensor],
    lora_B: Mapping[str, Tensor],
    *,
    alpha: float | Mapping[str, float],
    rank: int,
    use_rslora: bool = False,
    target_modules: list[str] | str,
    backbone: str,
    backbone_fingerprint: str,
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"],
    shared_A: bool = False,
) -> str:
    """Write one expert as a PEFT folder that PEFT loads alone. An older adapter there is replaced once all is written.

    Args:
        folder: its name is the expert's name.
        lora_A: module path inside the backbone to (r, in).
        lora_B: module path to (out, r).
        alpha: of every layer, or per module path.
        rank: of most layers; others get an entry in rank_pattern.
        use_rslora: scale by `alpha / sqrt(rank)` instead of `alpha / rank`.
        target_modules: as PEFT writes them; must match the layers given.
        backbone: what the user called the backbone.
        backbone_fingerprint: its fingerprint.
        task_type: PEFT's word for the kind of model.
        shared_A: whether `lora_A` is shared with other experts; it is written here too, with its hash.

    Returns:
        The adapter's fingerprint.

    Raises:
        ValueError: the folder holds something else, or the tensors do not fit together.
        OSError: it could not be written; what was there before is unchanged.
    """
    from safetensors.torch import save

    folder = Path(folder)
    _check_replaceable(folder)
    config = _config(lora_A, lora_B, alpha, rank, use_rslora, target_modules)
    config.base_model_name_or_path, config.task_type, config.inference_mode = backbone, task_type, True
    tensors = {peft_key(path, side): t for side, ts in (("A", lora_A), ("B", lora_B)) for path, t in ts.items()}
    with replacing_folder(folder, ours=OURS) as new:
        copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        (new / WEIGHTS_FILE).write_bytes(save(copies, metadata={"format": "pt"}))
        config.save_pretrained(str(new))
        fingerprint = fingerprint_tensors([new / WEIGHTS_FILE], fingerprinted_fields(config))
        record = {
            "format_version": FORMAT_VERSION,
            "name": folder.name,
            "fingerprint": fingerprint,
            "backbone": {"source": backbone, "fingerprint": backbone_fingerprint},
            **fingerprinted_fields(config),
            "shared_A": fingerprint_state(lora_A) if shared_A else None,
            "radargate_version": __version__,
        }
        (new / EXPERT_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return fingerprint


def read_expert_record(folder: Path) -> dict[str, Any] | None:
    """Read `expert.json`; None where there is none, as in folders that PEFT wrote.

    Args:
        folder: a PEFT folder.

    Raises:
        ValueError: the file is damaged or of a later version of this package.
    """
    file = folder / EXPERT_FILE
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version, _ = (
            record["format_version"],
            (record["fingerprint"], record["backbone"]["fingerprint"], record["shared_A"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"Expected {EXPERT_FILE} to be whole, but it is damaged: {error!r}.") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"Expected format_version {FORMAT_VERSION} in {EXPERT_FILE}, but got {version!r}. "
            "It was written by another version of radargate-pl: use that one."
        )
    return record


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read an adapter's tensors.

    Args:
        folder: a PEFT folder.

    Returns:
        Module path inside the backbone to A (r, in), and to B (out, r), in the dtype of the file.

    Raises:
        ValueError: the file is missing or damaged, or holds a tensor that is not half of a LoRA; one line per problem.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        old = " It has adapter_model.bin: load it with PEFT and save it again." if _old_file(folder).is_file() else ""
        raise ValueError(f"Expected a file {WEIGHTS_FILE}, but there is none.{old}")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Expected {WEIGHTS_FILE} to be whole, but it is {_damage(file, error)}. Fetch or save it again."
        ) from error
    return _halves(tensors)


def _halves(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Module path to A, and to B, of what a file holds; see `read_tensors`."""
    halves: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    unknown, adapters = [], set()
    if empty := [key for key, tensor in tensors.items() if not tensor.numel()]:
        raise ValueError(
            f"{len(empty)} of {len(tensors)} tensors in {WEIGHTS_FILE} are empty, the first is {empty[0]}: the adapter "
            "was saved under DeepSpeed ZeRO-3, which leaves pieces of weights on other processes. Save it with the "
            "weights gathered (stage3_gather_16bit_weights_on_model_save, or accelerator.get_state_dict)."
        )
    for key, tensor in tensors.items():
        match = TENSOR_KEY.fullmatch(key)
        if match is None or tensor.dim() != 2 or not tensor.is_floating_point() or tensor.element_size() < 2:
            unknown.append(f"{key} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        else:
            halves[match["side"]][match["path"]] = tensor
            adapters.add(match["adapter"])
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name) for name in adapters))
        raise ValueError(f"{WEIGHTS_FILE} holds several adapters ({names}): save each into a folder of its own.")
    _check_halves(halves["A"], halves["B"], unknown)
    if broken := [path for path, A in halves["A"].items() if not _is_finite(A, halves["B"][path])]:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ValueError(
            f"{WEIGHTS_FILE} holds NaN or infinity in layer {broken[0]}{more}: its training went wrong. Take "
            "an earlier checkpoint of it, or train it again with a lower learning rate."
        )
    return halves["A"], halves["B"]


def _is_finite(*tensors: Tensor) -> bool:
    """Also in float32, in which experts are computed with."""
    return all(bool(tensor.float().isfinite().all()) for tensor in tensors)


def _damage(file: Path, error: Exception) -> str:
    with file.open("rb") as opened:
        is_pointer = opened.read(24).startswith(b"version https://git-lfs")
    return "only a pointer of Git LFS (run git lfs pull)" if is_pointer else f"damaged: {error}"


def _old_file(folder: Path) -> Path:
    return folder / "adapter_model.bin"


def _check_halves(lora_A: dict[str, Tensor], lora_B: dict[str, Tensor], unknown: list[str]) -> None:
    problems = []
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        problems.append(
            f"{WEIGHTS_FILE} holds tensors that are no LoRA of a linear layer: {', '.join(unknown[:3])}{more}."
            f"{_other_prefix(unknown[0])}"
        )
        if not lora_A:  # what follows would only repeat it
            raise ValueError(problems[0])
    try:
        _check_tensors(lora_A, lora_B)
    except ValueError as error:
        problems.append(f"{WEIGHTS_FILE}: {error}")
    if problems:
        raise ValueError("\n".join(problems))


def _other_prefix(key: str) -> str:
    """What to do where keys of a LoRA begin otherwise than PEFT's."""
    if ".lora_" not in key or key.startswith("base_model.model."):
        return ""
    return (
        f" Keys of PEFT begin with base_model.model., but this one with {key.partition('.')[0]}.: the adapter was "
        "saved from inside a wrapper. Save it with save_pretrained of the PeftModel itself."
    )


def peft_key(path: str, side: str) -> str:
    """PEFT's name of a tensor in the file.

    Args:
        path: module path inside the backbone.
        side: `"A"` or `"B"`.
    """
    return f"base_model.model.{path}.lora_{side}.weight"


def _config(
    lora_A: Mapping[str, Tensor],
    lora_B: Mapping[str, Tensor],
    alpha: float | Mapping[str, float],
    rank: int,
    use_rslora: bool,
    target_modules: list[str] | str,
) -> LoraConfig:
    """The config under which PEFT computes exactly these experts."""
    from peft import LoraConfig

    _check_tensors(lora_A, lora_B)
    given = alpha if isinstance(alpha, Mapping) else dict.fromkeys(lora_A, alpha)
    # Callers recover alpha from the scaling; rounding undoes 32.000000000000004 and with it a needless pattern.
    alphas = {path: round(float(given[path]), 10) for path in lora_A}
    usual = Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=_whole(usual),  # PEFT computes with fractions too
        use_rslora=use_rslora,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        rank_pattern=_sorted({path: A.shape[0] for path, A in lora_A.items() if A.shape[0] != rank}),
        alpha_pattern=_sorted({path: _whole(alphas[path]) for path in lora_A if alphas[path] != usual}),
    )


def _sorted(pattern: dict[str, Any]) -> dict[str, Any]:
    # PEFT writes its JSON sorted; the order of patterns is part of the fingerprint.
    return dict(sorted((re.escape(path), value) for path, value in pattern.items()))


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha.is_integer() else alpha


def _check_tensors(lora_A: Mapping[str, Tensor], lora_B: Mapping[str, Tensor]) -> None:
    if not lora_A or lora_A.keys() != lora_B.keys():
        unpaired: Sequence[str] = sorted(lora_A.keys() ^ lora_B.keys())
        raise ValueError(f"Expected lora_A and lora_B to hold the same layers, at least one, but {unpaired} differ.")
    for path, A in lora_A.items():
        if A.shape[0] != lora_B[path].shape[1]:
            raise ValueError(
                f"Expected lora_A and lora_B of {path} to have one rank, but got {tuple(A.shape)} and "
                f"{tuple(lora_B[path].shape)}."
            )


def _check_replaceable(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"Expected the folder {folder} to be new, empty or an older adapter, but it holds something else. "
            "Nothing was written; choose another folder."
        )
