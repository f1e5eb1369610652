"""Callbacks that belong to the command line: they store the config, load a gate folder, name experts (layer 6)."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from radargate_pl.backbone_identity import check_identity
from radargate_pl.benchmark_step import is_benchmark
from radargate_pl.callbacks.exact_resume import may_validate_again
from radargate_pl.checkpoint import load_checkpoint, trained_experts
from radargate_pl.expert_banks import experts_of_tasks
from radargate_pl.run_folder import stored_changes, stored_config, write_config
from radargate_pl.run_loggers import RunCSVLogger


def plain_config(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """A parsed config as plain values: everything resolved, nothing left out."""
    text = parser.dump(config, format="yaml", skip_none=False)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


class StoreConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder, without secrets; see ``run_folder.write_config``.

    Args:
        parser: the parser of the subcommand.
        config: the parsed config.
        kwargs: as Lightning passes them.
    """

    def __init__(self, parser: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, **{**kwargs, "save_to_log_dir": False})
        self._of_resumed: str | None = None

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning calls this once, on rank zero."""
        assert trainer.state.fn is not None, "Lightning sets it before setup"
        folder, text = Path(trainer.default_root_dir), stored_config(plain_config(self.parser, self.config))
        if trainer.state.fn == "fit" and self.config.get("ckpt_path"):
            for line in stored_changes(folder, text):
                rank_zero_info(f"config changed since the run began: {line}")
            self._of_resumed = text  # stored once the checkpoint fits: a refused one leaves the run as it was
            return
        write_config(folder, str(trainer.state.fn.value), text)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed fit takes some steps again: their old rows go."""
        if self._of_resumed is not None:
            write_config(Path(trainer.default_root_dir), "fit", self._of_resumed)
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.drop_after(trainer.global_step, may_validate_again(trainer))


class LoadGateFolder(Callback):
    """Loads a saved gate into the network that the config describes, checked against its fingerprints.

    As soon as the network is built: a test asks for its weights before it asks for its data.

    Args:
        folder: the gate folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begin the command with this gate; the validations inside a fit see what the fit makes of it."""
        if pl_module.network is not None:
            self._load(pl_module.network)
            return
        make = pl_module.network_factory

        def make_with_gate(tasks: Any) -> Any:
            network = make(tasks)
            self._load(network)
            return network

        pl_module.network_factory = make_with_gate

    def _load(self, network: Any) -> None:
        from radargate_pl.checkpoint import combine_problems, gate_problems
        from radargate_pl.gate_folder import check_fingerprints, read_config, read_gate_tensors

        config = read_config(self.folder)
        check_fingerprints(config["fingerprints"], network.fingerprints)
        check_identity(config.get("identity"), network.identity(), f"the gate in {self.folder}")
        problems = [
            *gate_problems(config["gate_line"], network.describe(), is_resuming=False),
            *combine_problems(config["combine"], network.combine, is_resuming=False),
        ]
        if problems:
            raise ValueError(f"The gate folder {self.folder} does not fit this configuration: {'; '.join(problems)}.")
        network.load_gate_state(read_gate_tensors(self.folder))


class NameTrainedExperts(Callback):
    """Lets benchmarks be asked of experts that a fit trained: those of the checkpoint, not one for each benchmark.

    Which expert answers a task is found as for a folder of experts: by its name, else by its category, else the only
    union expert. A task that none belongs to is refused by `BenchmarkWriter`.

    Args:
        checkpoint: a file that a fit wrote.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Before the network is built."""
        if pl_module.network is not None or not is_benchmark(getattr(trainer, "datamodule", None)):
            return
        make, names = pl_module.network_factory, trained_experts(load_checkpoint(str(self.checkpoint))["state_dict"])

        def make_with_names(tasks: Any) -> Any:
            network = make({name: name for name in names})  # new experts are called like tasks, or their categories
            per = network.new_experts.per if network.new_experts else None
            network.expert_of_task = experts_of_tasks(tasks, network.experts, per=None if per == "task" else per)
            return network

        if names:
            pl_module.network_factory = make_with_names
