"""The decoder layers of a training backbone, compiled: few graphs for all of them, eager code elsewhere (layer 3)."""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from radargate_pl.moe import moe_layers

MAX_GRAPHS = 8  # with and without a mask, layers with other experts, a batch of one example: each is a graph


class CompiledLayers:
    """Runs the decoder layers of a backbone through one compiled function while they train.

    The graph holds for every batch size and length, so nothing is compiled anew for a longer batch. Eager code runs
    where nothing trains (validation, generation with its cache, the first layer, whose input needs no gradient), while
    gates are recorded, for what would need more than `MAX_GRAPHS` graphs, and for everything once compiling has failed:
    with a warning, and to the same results. A copy, and what is unpickled, compiles graphs of its own.

    Args:
        model: the backbone with its mixtures; see `decoder_layers` for which have such layers.

    Attributes:
        graphs: compiled so far.
        seconds: spent compiling so far, the first run of each graph included.
        failure: why compiling was given up; ``None`` as long as it was not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.graphs = 0
        self.seconds = 0.0
        self.failure: str | None = None
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._layers = decoder_layers(model)
        for layer in self._layers:
            mixtures = tuple(moe_layers(layer).values())
            vars(layer)["forward"] = partial(self._forward, layer, mixtures)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was compiled: it counts for this object, and no process can be handed it."""
        return {**vars(self), "graphs": 0, "seconds": 0.0, "_functions": {}}

    def remove(self) -> None:
        """Let the layers run as the model wrote them."""
        for layer in self._layers:
            vars(layer).pop("forward", None)
            for mixture in moe_layers(layer).values():
                mixture.bank.W_sum.value = None

    def _forward(self, layer: Any, mixtures: Sequence[Any], *args: Any, **options: Any) -> Any:
        is_recorded = any(mixture.recorder is not None for mixture in mixtures)
        has_cache = options.get("past_key_values") is not None
        hidden = args[0] if args else options.get("hidden_states")
        # The first layer's input needs no gradient: alone, it would be a graph of its own, half of all compiling.
        trains = torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad
        if self.failure is not None or is_recorded or has_cache or not trains:
            return type(layer).forward(layer, *args, **options)
        for mixture in mixtures:
            # Not left to the graph: one that drops them itself is bound to the inputs of its own layer.
            mixture.shared_input.drop_plans()
            mixture.fold_for_graph(hidden)
        used: list[Callable[..., Any]] = []
        run = partial(self._run, used, layer, _plain_forward(layer), **options)
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(run, *args)
        return run(*args)

    def _run(
        self, used: list[Callable[..., Any]], layer: nn.Module, plain: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        if used:  # recomputed in the backward pass, which expects the tensors of the very same code
            return used[0](layer, *args, **options)
        used.append(self._function_of(plain))
        before, begun = self.graphs, time.perf_counter()
        try:
            return used[0](layer, *args, **options)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self._give_up(error)
            used[0] = plain
            return plain(layer, *args, **options)
        finally:
            if self.graphs > before:
                self.seconds += time.perf_counter() - begun

    def _function_of(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        if plain not in self._functions:
            try:
                compiled = self._compiled(plain)
            except RuntimeError as error:  # torch.compile refuses: this Python is too new for it, or built without GIL
                self._give_up(error)
                return plain
            self._functions[plain] = partial(self._call, compiled)
        return self._functions[plain]

    def _call(self, compiled: Callable[..., Any], *args: Any, **options: Any) -> Any:
        stance = "eager_on_recompile" if self.graphs >= MAX_GRAPHS else "default"
        # Under DDP torch would cut each graph at the buckets, so that gradients travel before the backward pass of a
        # large graph ends. One decoder layer is short enough to wait for, and every piece would count as a graph.
        with torch.compiler.set_stance(stance), torch._dynamo.config.patch(optimize_ddp=False):
            return compiled(*args, **options)

    def _compiled(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        # Of the tracer itself, which looks at every attribute of what it traces.
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        # Graphs hang on a code object: with one of its own, each network has its own count of them.
        own: Any = plain
        code = own.__code__.replace()
        copy = FunctionType(code, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
        copy.__kwdefaults__ = own.__kwdefaults__
        compiled: Callable[..., Any] = torch.compile(copy, backend=self._compile, dynamic=True, fullgraph=True)
        return compiled

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        # The backward pass now, not at its first run: there a failure could no longer be caught. torch before 2.8 has
        # no such setting and does so by itself where sizes are symbols.
        name = "force_non_lazy_backward_lowering"
        with config.patch({name: True} if hasattr(config, name) else {}):
            # torch 2.13 writes over a gradient that is still to be read: that of RadarGate's input came out wrong.
            made: Any = compile_fx(graph, inputs, config_patches={"inplace_buffers": False})
        self.graphs += 1  # only now: the tracer may stop here and begin again
        return cast("Callable[..., Any]", made)

    def _give_up(self, error: Exception) -> None:
        self.failure = cause_of(error)
        warn_of_eager_code(self.failure)


def warn_of_eager_code(cause: str) -> None:
    """Say that nothing is compiled though it was meant to be.

    Args:
        cause: why, in one line.
    """
    rank_zero_warn(
        f"execution.compile: the decoder layers cannot be compiled ({cause}); the same is computed without, a little "
        "slower. Set model.network.init_args.execution.compile: false to not try."
    )


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """Return the layers of a decoder-only backbone that can be compiled one by one; none for other backbones.

    Args:
        model: the backbone.
    """
    if model.config.is_encoder_decoder:
        return []
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def missing_compiler(device: torch.device) -> str | None:
    """Say what is missing to compile for a device; ``None`` if nothing is, as far as one can tell without compiling.

    Args:
        device: where the network runs.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "triton does not work here"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        return _first_line(error)
    return None


def cause_of(error: BaseException) -> str:
    """What went wrong while compiling, as one line.

    Args:
        error: as torch raised it; a failure of its backend is shown instead of the wrapping.
    """
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    return f"{type(inner).__name__}: {_first_line(inner)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _plain_forward(layer: nn.Module) -> Callable[..., Any]:
    """The forward of a layer's class without transformers' checkpointing around it."""
    forward: Any = type(layer).forward
    plain: Callable[..., Any] = getattr(forward, "__wrapped__", forward)
    return plain
