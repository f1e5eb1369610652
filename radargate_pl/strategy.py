"""Data parallel training of what is small beside a frozen backbone (layer 5)."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from radargate_pl.expert_division import ExpertDivision
from radargate_pl.expert_gradients import expert_parameters
from radargate_pl.networks import GatedNetwork
from radargate_pl.replicas import check_replicas

NAME = "gate_ddp"
REMEDY = "Give every process the same files of backbone and experts."


class GateDDPStrategy(DDPStrategy):
    """DDP that exchanges the gradients of what trains, and nothing else; ``trainer.strategy: gate_ddp``.

    At the start frozen parameters and buffers are not sent to the other processes, as DDP would: every process has
    loaded the same files, and checksums are compared instead. No step sends them either. Experts that train under
    TaskGate exchange no gradients at all: each belongs to one process, see `ExpertDivision`.

    Args:
        kwargs: of Lightning's DDPStrategy.

    Raises:
        ValueError: in ``setup``, on every process, when they have loaded different weights.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.division: ExpertDivision | None = None

    def configure_ddp(self) -> None:
        """Compare what is frozen, then wrap the module so that only what trains is exchanged."""
        module: Any = self.lightning_module
        frozen = frozen_tensors(module)
        check_replicas(frozen, self.world_size, "frozen weights", REMEDY)
        experts = experts_alone(module.network)
        if self.world_size > 1 and len(experts) > 1:
            check_nothing_is_shared(module, experts)
            self.division = ExpertDivision(experts, self.global_rank, self.world_size)
            return
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(frozen))
        super().configure_ddp()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights for a checkpoint; Lightning reads the moments behind them. All, on every process."""
        self._gather()
        return super().lightning_module_state_dict()

    def on_validation_start(self) -> None:
        """Validate all experts on every process."""
        self._gather()

    def on_train_end(self) -> None:
        """Leave all experts on every process."""
        self._gather()

    def _gather(self) -> None:
        if self.division is not None and self.optimizers:
            self.division.gather(self.optimizers[0])


def experts_alone(network: GatedNetwork) -> dict[int, list[Tensor]]:
    """Id of each expert that trains under TaskGate to the parameters that are its own."""
    return expert_parameters(network, network.experts)


def check_nothing_is_shared(module: nn.Module, experts: Mapping[int, Sequence[Tensor]]) -> None:
    """Refuse to divide experts that train something together (one A for all: HydraLoRA's).

    Raises:
        ValueError: naming the parameters.
    """
    owned = {id(parameter) for parameters in experts.values() for parameter in parameters}
    shared = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in owned]
    if shared:
        raise ValueError(
            "Expected experts that train under TaskGate on several processes to have all their parameters to "
            f"themselves, but they share {', '.join(shared[:3])} and others. Use one process, share_A: false, or a "
            "gate that sends every example through all experts."
        )


def check_strategy(strategy: Strategy, network: GatedNetwork) -> None:
    """Refuse plain DDP for experts that train under TaskGate.

    A step leaves some of them without a gradient, for which DDP would wait.

    Raises:
        ValueError: naming the strategy to use.
    """
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, GateDDPStrategy):
        return
    if strategy.world_size > 1 and len(experts_alone(network)) > 1:
        raise ValueError(
            f"Expected trainer.strategy to be {NAME} while experts train under TaskGate on {strategy.world_size} "
            f"processes, but got {type(strategy).__name__}. Use configs/trainer/ddp.yaml."
        )


def processes_averaged_over(strategy: Strategy) -> int:
    """Number of processes whose gradients the strategy averages."""
    is_divided = getattr(strategy, "division", None) is not None
    return 1 if is_divided else int(getattr(strategy, "world_size", 1))


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that do not train, and all buffers, by name."""
    frozen: dict[str, Tensor] = {n: value for n, value in module.named_parameters() if not value.requires_grad}
    return frozen | dict(module.named_buffers())


StrategyRegistry.register(NAME, GateDDPStrategy, description="DDP that exchanges only what trains")
