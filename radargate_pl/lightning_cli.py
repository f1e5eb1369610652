"""LightningCLI with this project's parts: what the parser accepts, what happens before the trainer starts (layer 6)."""

import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

import radargate_pl.data  # noqa: F401 - short names such as "FlanMixture" are found once their module is loaded
from radargate_pl import callbacks
from radargate_pl.callbacks import Preemption, RunCheckpoint, RunProgressBar
from radargate_pl.callbacks.input_answers import answers_to_inputs
from radargate_pl.checkpoint_content import check_content
from radargate_pl.class_help import LINKS
from radargate_pl.config_classes import own_defaults
from radargate_pl.config_errors import ConfigCheck
from radargate_pl.config_places import ConfigError, Located
from radargate_pl.config_schema import drop_empty_groups, parser_schema
from radargate_pl.config_sources import CommandLine, drop_replaced, find_config, merge, read_command_line, setting_tree
from radargate_pl.config_yaml import read_yaml
from radargate_pl.fit_checks import check_takes_steps, check_trainer
from radargate_pl.fitting_prompts import FittingPrompts
from radargate_pl.help_pages import COMMANDS, asks_for_help, check_command
from radargate_pl.kept_settings import keep_settings
from radargate_pl.last_lines import fit_lines, predict_lines, score_lines
from radargate_pl.module import AdaptedLM
from radargate_pl.networks import GatedNetwork
from radargate_pl.overwriting import DiscardOverwritten, Overwriting, settle
from radargate_pl.processes import beyond_cores
from radargate_pl.run_callbacks import LoadGateFolder, NameTrainedExperts, StoreConfig, plain_config
from radargate_pl.run_folder import check_run_folder, is_gate_folder, resolve_checkpoint
from radargate_pl.run_lock import RunLock
from radargate_pl.run_loggers import RunCSVLogger, RunTensorBoardLogger
from radargate_pl.slurm import check_launch
from radargate_pl.trainer_config import check_run_path, check_trainer_config, make_plain, naming_the_trainer

_EPILOG = (
    "radargate doctor tells what is wrong with a machine or a config, radargate score scores predictions, radargate "
    "harness runs tasks of lm-evaluation-harness; each has its own --help. --help NAME explains one class, e.g. "
    "radargate --help RadarGate; --version prints the version; --debug shows the traceback of an error."
)

# PartsTable says what Lightning's summary would, with dtypes and bytes.
TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,
    "default_root_dir": "runs/unnamed",
    "enable_model_summary": False,
}
FLAGS = {
    "preview": "Print three records with the tokens that carry loss, and exit before any weights are loaded.",
    "overwrite": "Of fit: replace the run that the run folder holds; its checkpoints, gate, experts and metrics are "
    "deleted once the new one has taken a step. Of the other commands: evaluate in that folder whatever it holds; "
    "nothing of it is deleted, but "
    "benchmarks that these very weights and settings have answered already are answered again.",
}

# Settings of the trainer that turn off what default callbacks do.
SWITCHES: dict[str, tuple[type[Callback], ...]] = {
    "enable_checkpointing": (RunCheckpoint, Preemption),
    "enable_progress_bar": (RunProgressBar,),
}


class _Parser(LightningArgumentParser):
    """Raises instead of printing a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError([f"configuration: {message.strip()}"]) from ex


class RadarGateCLI(LightningCLI):
    """Runs one command; the model class is fixed, everything inside it is chosen by ``class_path``.

    Args:
        words: The words after ``radargate``.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._line = read_command_line(words, tuple(COMMANDS))
        self._words = list(words)
        with ExitStack() as self._ending:  # the run folder is this command's to its end
            self._run_command()

    def _run_command(self) -> None:
        super().__init__(
            AdaptedLM,
            LightningDataModule,
            save_config_callback=StoreConfig,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=42,
            parser_kwargs={
                "prog": "radargate",
                "description": "Trains gates over frozen LoRA experts.",
                "epilog": _EPILOG,
            },
            parser_class=_Parser,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # else a checkpoint's arguments beat what was typed
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was typed, or Lightning's four for --help: a parser for each takes its time.

        Weights are always read as data, so that is no option.
        """
        typed = (self._line.subcommand,)
        names = COMMANDS if asks_for_help(self._words) or typed[0] not in COMMANDS else typed
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items() if name in names}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the flags, the callbacks every run has, and what follows from another setting."""
        for name, text in FLAGS.items():
            parser.add_argument(f"--{name}", type=bool, default=False, help=text)
        for name, callback in callbacks.DEFAULTS.items():
            parser.add_lightning_class_args(callback, name)
        for target, source in LINKS.items():
            parser.link_arguments(source, target)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Checks and merges the config files, then lets jsonargparse put the command line on top."""
        line = self._line
        if line.subcommand not in COMMANDS or asks_for_help(self._words):
            if not asks_for_help(self._words):
                check_command(self._words)
            self.config = parser.parse_args(self._words)
            return
        merged = self._check(line)
        text = yaml.safe_dump(merged.plain(), sort_keys=False)
        rest = [f"{word}=true" if word[2:] in FLAGS and not _has_value(line, word[2:]) else word for word in line.rest]
        with own_defaults():
            self.config = parser.parse_args([line.subcommand, f"--config={text}", *rest])

    def _check(self, line: CommandLine) -> Located:
        """Merges the files; every mistake in them and on the command line is raised at once."""
        assert line.subcommand is not None
        check = ConfigCheck(parser_schema(self._subcommand_parsers[line.subcommand], ""), LINKS)
        merged = setting_tree("model.network.class_path", f"{GatedNetwork.__module__}.{GatedNetwork.__name__}")
        check.read(merged)
        is_complete = "print_config" not in dict(line.settings)
        prompts = FittingPrompts()
        for name in line.files:
            try:
                source = read_yaml(find_config(name), name)
            except ConfigError as error:
                check.mistakes.extend(error.mistakes)
                is_complete = False
                continue
            check.read(source)
            drop_empty_groups(source, check.root)
            merged = merge(merged, source)
            prompts.read(merged)
        for key, text in line.settings:
            if key != "print_config":
                try:
                    check.read(setting_tree(key, text))
                except ConfigError as error:
                    check.mistakes.extend(error.mistakes)
        if is_complete:
            check.require_all()
        check.raise_mistakes()
        drop_replaced(merged, line)
        prompts.hand_over(merged, line)
        return merged

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is not None and not 0 <= seed < 2**32:
            raise ConfigError([f"configuration: seed_everything: expected 0 to {2**32 - 1}, found {seed}."])
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Resolves ``--ckpt_path``; nothing in a checkpoint changes the config."""
        if not self.config.get("subcommand"):
            return
        config = self.config[self.config.subcommand]
        check_run_path(config.trainer.default_root_dir)
        folder = Path(config.trainer.default_root_dir)
        self._asked = config.get("ckpt_path")
        if self._writes(config):
            self._ending.callback(RunLock(folder, self.config.subcommand).release)
            settle(folder)
        self._checkpoint = resolve_checkpoint(str(self._asked), folder, self.config.subcommand) if self._asked else None
        config.ckpt_path = None
        if self._checkpoint is not None and not is_gate_folder(self._checkpoint):
            check_content(self._checkpoint, self.config.subcommand)
        keep_settings(config, self._checkpoint)
        if self._checkpoint is not None and is_gate_folder(self._checkpoint):
            self.trainer_defaults["callbacks"] = [LoadGateFolder(self._checkpoint)]
        elif self._checkpoint is not None:
            config.ckpt_path = str(self._checkpoint)
            if self.config.subcommand != "fit":
                self.trainer_defaults["callbacks"] = [NameTrainedExperts(self._checkpoint)]

    def before_instantiate_classes(self) -> None:
        """Refuses to mix two runs in one folder."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        make_plain(config.trainer.callbacks)
        if self.subcommand == "fit":
            check_trainer_config(config.trainer)
        check_launch(os.environ, config.trainer)
        if not torch.cuda.is_available():
            trainer, cores = config.trainer, len(os.sched_getaffinity(0))
            _say([line] if (line := beyond_cores(str(trainer.accelerator), str(trainer.devices), cores)) else [])
        if not self._writes(config):
            return
        folder = Path(config.trainer.default_root_dir)
        plain = plain_config(self._subcommand_parsers[self.subcommand], config)
        if config.overwrite and self.subcommand == "fit" and self._asked is None:
            read = {name: plain.get(name) for name in ("model", "data")}
            aside = self._ending.enter_context(Overwriting(folder, read)).aside
            self.trainer_defaults["callbacks"] = [DiscardOverwritten(aside)]
        elif not (config.overwrite and self.subcommand != "fit"):
            check_run_folder(folder, self.subcommand, plain["model"], self._checkpoint, self._asked == "auto")

    def _writes(self, config: Any) -> bool:
        """Whether this process is the one that writes into the run folder, if any does."""
        is_first = getattr(rank_zero_only, "rank", 0) == 0
        return is_first and not (config.preview or config.trainer.fast_dev_run)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With TensorBoard and CSV in the run folder while fitting; a logger of the config replaces TensorBoard."""
        config = self._get(self.config_init, "trainer")
        logger, folder = config.get("logger"), config["default_root_dir"]
        if self.subcommand == "fit" and logger is not False:
            given = [] if logger in (None, True) else logger if isinstance(logger, list) else [logger]
            kwargs["logger"] = [*(given or [RunTensorBoardLogger(folder)]), RunCSVLogger(folder)]
        elif logger in (None, True):
            kwargs["logger"] = False  # results of the other commands are in summary.json and test/
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        # Lightning refuses a callback whose job the trainer's switches turn off, and a second progress bar.
        off = tuple(kind for name, kinds in SWITCHES.items() if config[name] is False for kind in kinds)
        given = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        off += (RunProgressBar,) if any(isinstance(one, ProgressBar) for one in given) else ()
        with naming_the_trainer():
            trainer = super()._instantiate_trainer(config, [c for c in callbacks if not isinstance(c, off)])
        if self.subcommand == "fit":
            check_trainer(trainer)
            check_takes_steps(trainer)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "weights_only" in inspect.signature(getattr(Trainer, subcommand)).parameters:
            kwargs["weights_only"] = True
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.config[subcommand].preview:
            # Standard output belongs to the answers, whatever a bar or a library would print there meanwhile.
            with redirect_stdout(sys.stderr) if subcommand == "predict" else nullcontext():
                super()._run_subcommand(subcommand)
            if subcommand == "predict":
                print(answers_to_inputs(self.trainer), end="", flush=True)
            return
        preview = getattr(self.datamodule, "preview", None)
        if preview is None:
            raise ValueError(
                f"Expected a data module with preview() for --preview, but got {type(self.datamodule).__name__}."
            )
        print(preview(3))

    def after_fit(self) -> None:
        """Says the last scores, and where everything lies."""
        if not self._get(self.config, "trainer").fast_dev_run:
            _say(fit_lines(self.trainer, self.model.task_results))

    def after_validate(self) -> None:
        """Says the scores with the number of examples."""
        _say(score_lines(self.model.task_results, "validation"))

    def after_test(self) -> None:
        """Says the scores with the number of examples."""
        _say(score_lines(self.model.task_results, "test"))

    def after_predict(self) -> None:
        """Says where the answers are."""
        _say(predict_lines(self.trainer))


def _say(lines: Sequence[str]) -> None:
    if lines:
        rank_zero_info("\n".join(lines))


def _has_value(line: CommandLine, key: str) -> bool:
    return dict(line.settings).get(key) is not None
