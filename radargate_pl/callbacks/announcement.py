"""One line at the start of every command: the gate as built, what it sits on, and what trains."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from radargate_pl.callbacks.run_summary import count_parameters


class GateAnnouncement(Callback):
    """Prints the gate with all its arguments, so that nobody has to trust a config file."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Announce a fit."""
        self._announce(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Announce a validation, unless it belongs to a fit."""
        if trainer.state.fn == "validate":
            self._announce(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Announce a test."""
        self._announce(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Announce a prediction."""
        self._announce(pl_module)

    def _announce(self, pl_module: Any) -> None:
        network = pl_module.built_network
        trainable = count_parameters(network)["trainable"]
        experts = f"{len(network.experts)} experts ({', '.join(network.experts)})"
        rank_zero_info(
            f"gate: {network.describe()}\n"
            f"{len(network.layers)} layers, {experts}, combine: {network.combine}, train: {network.train_part}, "
            f"{trainable:,} trainable parameters"
        )
