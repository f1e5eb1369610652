"""Domain embeddings: what an expert was trained on, as one vector the frozen backbone makes of it (layer 3).

``d = normalize(mean over samples of mean over real tokens of the last hidden state)``, stored as ``domain.safetensors``
beside the expert's adapter. NexusGate knows experts by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F

from radargate_pl.atomic_files import save_atomically
from radargate_pl.fingerprints import check_fingerprint
from radargate_pl.network_checks import takes_position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DOMAIN_FILE = "domain.safetensors"
KEY = "domain"


@torch.no_grad()
def domain_embedding(backbone: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Embed the texts an expert was trained on.

    Each sample counts the same, however long it is. The last hidden state is that of the decoder, after its final
    norm; of the encoder for an encoder-decoder model.

    Args:
        backbone: the frozen backbone, without experts.
        batches: ``input_ids`` and ``attention_mask``, each (samples, length) int64, padded at either end.

    Returns:
        (hidden,) float32 on the CPU, of norm 1.

    Raises:
        ValueError: when there is no sample, or a sample has no token.

    Source: Nexus, arXiv 2408.15901, section 3 (there from an external text embedder; the frozen backbone is our
        reading, INFERRED).
    """
    pooled = [_pooled(backbone, batch["input_ids"], batch["attention_mask"]) for batch in batches]
    if not pooled:
        raise ValueError("Expected at least one sample to make a domain embedding of, but there are none.")
    return F.normalize(torch.cat(pooled).mean(0), dim=0).float().cpu()


def _pooled(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # (samples, hidden)
    ids, mask = input_ids.to(backbone.device), attention_mask.to(backbone.device)
    lengths = mask.sum(-1, keepdim=True)
    if not lengths.all():
        raise ValueError("Expected every sample to have at least one token, but some have none.")
    if backbone.config.is_encoder_decoder:
        hidden = backbone.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    else:
        # Counted from each sample's first token, so that padding at the left is no distance.
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if takes_position_ids(backbone) else {}
        hidden = backbone.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).last_hidden_state
    # Not a product with the mask: what stands at padding may be anything, NaN too.
    real = torch.where(mask.bool().unsqueeze(-1), hidden.double(), 0)
    return real.sum(1) / lengths


def write_domain(folder: Path, embedding: Tensor, *, backbone_fingerprint: str, samples: int | None = None) -> None:
    """Write an expert's domain embedding beside its adapter, whole or not at all.

    Args:
        folder: the expert's PEFT folder.
        embedding: (m,).
        backbone_fingerprint: of the backbone that made it.
        samples: how many texts it is the mean of, where that is known.

    Raises:
        OSError: when it cannot be written.
    """
    from safetensors.torch import save

    metadata = {"backbone": backbone_fingerprint} | ({} if samples is None else {"samples": str(samples)})
    content = save({KEY: embedding.detach().float().cpu().contiguous()}, metadata=metadata)
    save_atomically(folder / DOMAIN_FILE, lambda file: _write(file, content))


def read_domain(folder: Path, *, backbone_fingerprint: str | None = None) -> Tensor | None:
    """Read an expert's domain embedding; ``None`` where there is none.

    Args:
        folder: the expert's PEFT folder.
        backbone_fingerprint: of the backbone in use; ``None`` takes one of any backbone.

    Returns:
        (m,) float32.

    Raises:
        ValueError: when the file is damaged or another backbone made it.
    """
    from safetensors import SafetensorError, safe_open

    file = folder / DOMAIN_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            embedding, metadata = content.get_tensor(KEY), content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"Expected {file} to be whole, but it is damaged: {error}. Make it again.") from error
    if embedding.dim() != 1 or not embedding.isfinite().all():
        raise ValueError(f"Expected {file} to hold one vector of numbers, but it is damaged. Make it again.")
    if backbone_fingerprint is not None:
        made_by = metadata.get("backbone", "unknown")
        check_fingerprint(f"the backbone that made {file}", made_by, backbone_fingerprint)
    return embedding.float()


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)
