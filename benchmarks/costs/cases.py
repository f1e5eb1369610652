"""From a row to a case: training steps, decoding, single layers, steps that the monitors look at."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from costs.backbones import ALPHA, SharedWeights, batch_of
from costs.case import Case, Setting, UnavailableError, with_gradient_at_input
from costs.naive import bytes_of_naive, loss_of_layer, naive_layer, put_naive
from costs.ours import auxiliary_losses_of, compiled_facts, layer_of, network_of
from costs.peers import peft_model_of
from costs.rows import OURS, TARGETS, Row
from radargate_pl.auxiliary_terms import AuxiliaryTerms
from radargate_pl.callbacks import ExpertLoadMonitor, RotationAngleMonitor
from radargate_pl.gates import LoraHub
from radargate_pl.label_logits import only_positions
from radargate_pl.losses import IGNORE_INDEX, example_mean_cross_entropy
from radargate_pl.networks import GatedNetwork

LAYER_TOKENS = 512


def case_of(row: Row, setting: Setting, weights: SharedWeights) -> Case:
    """Build what a row measures.

    Raises:
        UnavailableError: it cannot run here.
    """
    if row.table == "layer":
        return _layer(row, setting, weights)
    if row.kind in ("peft-lora", "x-lora", "arrow"):
        model = peft_model_of(row, setting, weights)
        inner = model.get_base_model() if row.kind != "x-lora" else model.base_model.lora_model.model
        run = _peft_decoding(row, setting, model, inner) if row.table == "decode" else _peft_step(row, setting, model)
        return Case(run, model, inner)
    _check_memory(row, weights)
    network = network_of(row, setting, weights)
    if row.kind == "naive":
        put_naive(network.backbone, TARGETS[row.targets], row.n, setting.rank, ALPHA / setting.rank, setting.seed)
        network.train()
    run = _decoding(row, setting, network) if row.table == "decode" else _step(row, setting, network)
    compiled = partial(compiled_facts, network) if row.mode == "compiled" else None
    return Case(run, network, network.backbone, compiled)


def _step(row: Row, setting: Setting, network: GatedNetwork) -> Callable[[], Any]:
    """Forward, loss over the labelled positions, backward; with the monitors where the row says so."""
    batch: dict[str, Any] = batch_of(row, network.backbone.config.vocab_size, setting)
    batch["expert"] = batch["expert"] if network.experts else None
    terms = AuxiliaryTerms(auxiliary_losses_of(row) if row.kind == OURS else {})
    is_searched = any(isinstance(layer.gate, LoraHub) for layer in network.layers.values())
    if is_searched or not any(parameter.requires_grad for parameter in network.parameters()):
        with_gradient_at_input(network.backbone)
    look = _monitors() if row.recorded else None

    def run() -> None:
        with terms.recording(network, row.recorded) as outputs:
            labelled = network(**batch)
        loss = example_mean_cross_entropy(*labelled, row.batch)
        loss = loss + terms.add(terms.values(network, outputs), row.batch)
        if look is not None:
            look({path: output.detach() for path, output in outputs.items()})
        loss.backward()
        terms.reset()

    return run


def _monitors() -> Callable[[Any], None]:
    """What the default callbacks do with the gates of a step they have asked for; nothing is written."""
    trainer: Any = SimpleNamespace(global_step=1, world_size=1, loggers=[])
    module: Any = SimpleNamespace(completed_step=1)
    callbacks = (RotationAngleMonitor(), ExpertLoadMonitor())

    def look(gates: Any) -> None:
        for callback in callbacks:
            callback.on_train_batch_end(trainer, module, {"gates": gates}, None, 0)

    return look


def _peft_step(row: Row, setting: Setting, model: Any) -> Callable[[], Any]:
    batch = batch_of(row, model.config.vocab_size, setting)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    if row.loss == "full":
        return lambda: model(**inputs, labels=labels).loss.backward()
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    kept = targets != IGNORE_INDEX
    example = kept.nonzero()[:, 0]

    def run() -> None:
        with only_positions(model.get_base_model().get_output_embeddings(), kept):
            logits = model(**inputs, use_cache=False).logits
        example_mean_cross_entropy(logits, targets[kept], example, row.batch).backward()

    return run


def _decoding(row: Row, setting: Setting, network: GatedNetwork) -> Callable[[], Any]:
    batch = batch_of(row, network.backbone.config.vocab_size, setting)
    options: dict[str, Any] = {**_greedily(setting), "expert": batch["expert"] if network.experts else None}
    return lambda: network.generate(batch["input_ids"], batch["attention_mask"], **options)


def _peft_decoding(row: Row, setting: Setting, model: Any, inner: Any) -> Callable[[], Any]:
    batch = batch_of(row, inner.config.vocab_size, setting)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {**_greedily(setting), "pad_token_id": inner.generation_config.eos_token_id}
    model.eval()

    @torch.no_grad()
    def run() -> Tensor:
        ids: Tensor = model.generate(**prompt, **options)[:, row.length :]
        return ids

    return run


def _greedily(setting: Setting) -> dict[str, Any]:
    return {"do_sample": False, "min_new_tokens": setting.new_tokens, "max_new_tokens": setting.new_tokens}


def _layer(row: Row, setting: Setting, weights: SharedWeights) -> Case:
    """Forward and backward of one linear layer of the backbone, the widest square one of attention."""
    paths = [path for path, _ in weights.model.named_modules() if path.endswith("q_proj")]
    source: nn.Linear = weights.model.get_submodule(paths[0])
    linear = nn.Linear(source.in_features, source.out_features, bias=False, dtype=source.weight.dtype)
    linear.weight = nn.Parameter(source.weight.detach(), requires_grad=False)
    generator = torch.Generator().manual_seed(setting.seed)
    layer: nn.Module = linear
    if row.kind == "naive":
        layer = naive_layer(linear, row.n, setting.rank, ALPHA / setting.rank, generator, row.k)
    elif row.kind == OURS:
        layer = layer_of(row, setting, linear)
    layer.to(setting.device)
    x = torch.randn(LAYER_TOKENS, linear.in_features, generator=generator).to(setting.device, source.weight.dtype)
    x.requires_grad_()

    def run() -> None:
        loss_of_layer(layer, x).backward()
        x.grad = None

    return Case(run, layer)


def _check_memory(row: Row, weights: SharedWeights) -> None:
    """Refuse a dense mixture that would not fit: a process that runs out of memory takes all results with it."""
    if row.kind != "naive" or weights.setting.device.type != "cpu":
        return
    needed = bytes_of_naive(weights.model, TARGETS[row.targets], row.n, row.batch * row.length)
    free = free_bytes()
    if free is not None and needed > 0.7 * free:
        raise UnavailableError(
            f"would keep about {needed / 2**30:.0f} GiB for the backward pass, {free / 2**30:.0f} are free"
        )


def free_bytes() -> int | None:
    """Memory that is free now, in bytes; ``None`` where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
