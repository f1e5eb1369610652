"""FlanMixture: a mixture of tasks as a LightningDataModule."""

import os
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Subset

from radargate_pl.chat_template import checked_date
from radargate_pl.data.cache import Encoded
from radargate_pl.data.common_day import take_common_day
from radargate_pl.data.examples import Collator, EncodedTask, Example, ExampleSet
from radargate_pl.data.expert_owner import owner_of
from radargate_pl.data.inputs import NAMES_ONLY, OwnPrompt, input_loader, shared_inputs
from radargate_pl.data.length_windows import LengthWindows, checked_window
from radargate_pl.data.library import Limits, Task, read_tasks, set_categories
from radargate_pl.data.mixing import Mixing, MixtureSampler, epoch_counts
from radargate_pl.data.procedural import default_sizes
from radargate_pl.data.prompts import RecordEncoder
from radargate_pl.data.records import SPLITS, BadRecords, Split
from radargate_pl.data.resumable_loader import MixtureBatches, ResumableLoader
from radargate_pl.data.sources import Tasks, expand
from radargate_pl.data.tokenised_tasks import TokenisedTasks, contents_of, encoding_facts
from radargate_pl.data.workers import leave_signals_to_the_main_process

DEFAULT_SEED = 42


class FlanMixture(LightningDataModule):
    """Tasks from files, folders, the hub or reasoning-gym, mixed as FLAN mixes them.

    Usable alone:

        data = FlanMixture(tasks=["reasoning_gym:chain_sum"], tokenizer="smollm2-135m-q4")
        data.prepare_data()
        data.setup("fit")

    Args:
        tasks: A folder, a file (`.jsonl`, `.jsonl.gz`, `.parquet`), a hub id (`openai/gsm8k?config=main`, or `hub:` and
            a local folder in the hub's layout) or `reasoning_gym:<name>?option=value`; a list of them; or
            `{name: one of them}`.
        tokenizer: The backbone whose tokenizer is used: hub id, folder, `.gguf` file or a built-in name.
        mixing: Shares in an epoch: `proportional` to size with a cap, `equal`, or `{task: weight}`.
        max_examples: Train examples a task uses at most; all when null (1000 for a reasoning_gym task).
        validation_examples: The last so many train records of each file are validation, never the test file.
        test_examples: Test examples a task uses at most; all when null (200 for a reasoning_gym task).
        batch_size: Examples a batch.
        length_window: Batches that are sorted by length among themselves, for less padding (50 is a good number); 1
            leaves the order to chance.
        max_length: Tokens of prompt and answer together. A longer source loses its middle, an answer nothing.
        prompt: `chat` (the tokenizer's chat template), `plain`, or a template with `{source}` in it.
        target: Train on the `answer`, or on the `rationale` followed by the answer.
        mixing_cap: A task counts as no larger than this (proportional mixing).
        mixing_temperature: Above 1 flattens the proportions (proportional mixing).
        on_bad_record: `raise` refuses to start; `skip` leaves bad records out, counts and logs them.
        seed: Seed of the order; the run's `seed_everything` when null.
        num_workers: Processes that collate batches; 0 collates in the main one.
        category_of: Categories of tasks, `{task: category}`, where what the records or folders say is not wanted.
        special_tokens: Whether prompts get the tokenizer's own special tokens (never with a chat template); false where
            the template in `prompt` writes them, such as the language tokens of multilingual models.
        date: The day that a chat template prints, as 2026-11-30. When null, that of the run that goes on or is
            evaluated, and today's in a new one.
        answer_end: `template`: an answer ends as the chat template ends a turn; `eos`: with the tokenizer's end token.
            When null, that of the run that goes on or is evaluated, and `template` in a new one.
        inputs: Prompts of your own that `predict` answers instead: JSON lines without answers, a `.txt` file with one
            prompt a line, or `-` for standard input.
    """

    def __init__(  # noqa: PLR0913  flat, because these are what a user types
        self,
        tasks: Tasks,
        tokenizer: str,
        mixing: Mixing = "proportional",
        max_examples: int | None = None,
        validation_examples: int = 50,
        test_examples: int | None = None,
        batch_size: int = 8,
        length_window: int = 1,
        max_length: int = 512,
        prompt: str = "chat",
        target: Literal["answer", "rationale"] = "answer",
        mixing_cap: int = 3000,
        mixing_temperature: float = 1.0,
        on_bad_record: Literal["raise", "skip"] = "raise",
        seed: int | None = None,
        num_workers: int = 0,
        category_of: dict[str, str] | None = None,
        special_tokens: bool = True,
        inputs: str | None = None,
        date: str | None = None,
        answer_end: Literal["template", "eos"] | None = None,
    ) -> None:
        super().__init__()
        self.date, self.answer_end = checked_date(date), answer_end or "template"
        self.special_tokens, self.inputs = special_tokens, inputs
        limits = (max_examples, validation_examples, test_examples) if inputs is None else NAMES_ONLY
        self.limits = Limits(*limits)
        self.sources = expand(tasks, default_sizes(*limits))
        self.tokenizer_name = tokenizer
        self.mixing, self.mixing_cap, self.mixing_temperature = mixing, mixing_cap, mixing_temperature
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.length_window = checked_window(length_window)
        self.prompt, self.target, self.max_length = prompt, target, max_length
        self.category_of = category_of or {}
        self.on_bad_record, self.bad_records = on_bad_record, BadRecords(on_bad_record)
        self.encoded: dict[tuple[str, Split], Encoded] = {}
        self.own_prompts: list[OwnPrompt] = []
        self._tasks: list[Task] | None = None
        self._encoder: RecordEncoder | None = None
        self._tokenised: TokenisedTasks | None = None

    @property
    def tasks(self) -> list[Task]:
        """The tasks with their records as text, read on first use; needs no tokenizer."""
        if self._tasks is None:
            tasks = read_tasks(self.sources, self.limits, self.bad_records, self.target == "rationale")
            set_categories(tasks, self.category_of)
            self._tasks = tasks
        return self._tasks

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks; `task` of a batch counts in them."""
        return tuple(task.name for task in self.tasks)

    @property
    def categories(self) -> dict[str, str | None]:
        """Category of each task, or None."""
        return {task.name: task.category for task in self.tasks}

    @property
    def encoder(self) -> RecordEncoder:
        """Turns records into token ids; the tokenizer is loaded on first use."""
        if self._encoder is None:
            from radargate_pl.backbones import is_encoder_decoder, load_tokenizer

            self._encoder = RecordEncoder(
                load_tokenizer(self.tokenizer_name),
                self.prompt,
                self.target,
                self.max_length,
                is_encoder_decoder(self.tokenizer_name),
                self.special_tokens,
                self.date,
                self.answer_end,
            )
        return self._encoder

    @property
    def tokenised(self) -> TokenisedTasks:
        """The tasks as token ids, in the cache or in memory."""
        if self._tokenised is None:
            self._tokenised = TokenisedTasks(self.encoder, self.bad_records)
        return self._tokenised

    def prepare_data(self) -> None:
        """Read and tokenise every task once into the cache; Lightning calls this on one process.

        Raises:
            ValueError: For bad input, or an answer longer than `max_length`.
        """
        if self.inputs is not None:
            return
        self.tokenised.prepare(self.tasks)

    def setup(self, stage: str) -> None:
        """Load the tokenised tasks.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: If a task has nothing for this stage.
        """
        if self.inputs is not None:
            self._read_inputs(stage)
            return
        if take_common_day(self):
            self._encoder = self._tokenised = None
        self.encoded = {(task.name, split): self.tokenised.load(task, split) for task in self.tasks for split in SPLITS}
        if stage == "fit":
            self._check_trainable()
        for task in self.tasks:
            if count := self.truncated(task):
                rank_zero_info(f"task {task.name}: {count} sources lost their middle, max_length is {self.max_length}")

    def _read_inputs(self, stage: str) -> None:
        if stage != "predict":
            raise ValueError("Expected inputs with predict alone. Leave inputs out of other commands.")
        given = (self.inputs, self.encoder, self.task_names, BadRecords(self.on_bad_record))
        self.own_prompts = shared_inputs(self.trainer, *given)

    def truncated(self, task: Task) -> int:
        """How many sources of a task lost their middle, all splits together."""
        return sum(int(self.encoded[task.name, split].truncated.sum()) for split in SPLITS)

    def skipped(self, task: Task) -> int:
        """How many records of a task were left out: bad lines, and answers that do not fit."""
        too_long = sum(len(task.records[split]) - len(self.encoded[task.name, split]) for split in SPLITS)
        return task.skipped + too_long

    def _check_trainable(self) -> None:
        empty = [task.name for task in self.tasks if not len(self.encoded[task.name, "train"])]
        if empty:
            raise ValueError(f"Expected every task to have train records, but these have none: {', '.join(empty)}.")

    def train_sizes(self) -> dict[str, int]:
        """Train examples of each task."""
        return {name: len(self.encoded[name, "train"]) for name in self.task_names}

    def epoch_counts(self) -> dict[str, int]:
        """Examples of each task in one epoch."""
        return epoch_counts(self.train_sizes(), self.mixing, self.mixing_cap, self.mixing_temperature)

    def train_sampler(self) -> MixtureSampler:
        """The order of train examples, for the seed of the argument or of the run."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", DEFAULT_SEED)) if self.seed is None else self.seed
        return MixtureSampler(self.train_sizes(), self.epoch_counts(), seed)

    def examples(self, split: Split) -> ExampleSet:
        """The tokenised examples of one split, task after task in file order."""
        tasks = enumerate(self.tasks)
        return ExampleSet([EncodedTask(i, task.records[split], self.encoded[task.name, split]) for i, task in tasks])

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the mixture, padded on the right."""
        examples, sampler = self.examples("train"), self.train_sampler()
        is_sorted = self.length_window != 1
        owner = owner_of(self.trainer, len(self.tasks), examples)
        windows = LengthWindows(self.length_window, examples.lengths(), sampler.seed) if is_sorted else None
        batches = MixtureBatches(sampler, self.batch_size, *self._share(), owner, windows)
        contents = {"tasks": contents_of(self.encoded), "encoding": encoding_facts(self.encoder)}
        return ResumableLoader(examples, batches, self.collator(), self.num_workers, contents)

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Validation examples, padded on the right; an empty list without any."""
        return self._loader("validation") if len(self.examples("validation")) else []

    def test_dataloader(self) -> DataLoader[Example]:
        """Test examples, padded on the right.

        Raises:
            ValueError: If no task has any.
        """
        if not len(self.examples("test")):
            raise ValueError(
                "Expected test records, but no task has any. Add a file ending in .test.jsonl, or records with "
                "split: test."
            )
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Prompts alone: the `inputs`, else the test examples, the validation examples where there are none."""
        if self.inputs is not None:
            collator = self.collator(prompts_only=True)
            return input_loader(self.own_prompts, self.task_names, collator, self.batch_size, self._share())
        return self._loader("test" if len(self.examples("test")) else "validation", prompts_only=True)

    def collator(self, prompts_only: bool = False) -> Collator:
        """The collation of this tokenizer and backbone."""
        pad = self.encoder.tokenizer.pad_token_id
        return Collator(pad, self.encoder.is_encoder_decoder, prompts_only)

    def _share(self) -> tuple[int, int]:
        """The number of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, split: Split, prompts_only: bool = False) -> DataLoader[Example]:
        """This process's share of a split, every example once on some process; none is repeated to even them out."""
        rank, world_size = self._share()
        examples = self.examples(split)
        if len(examples) < world_size:
            raise ValueError(
                f"Expected at least one {split} example for each of {world_size} processes, but there are "
                f"{len(examples)}. Use fewer devices or more examples."
            )
        return DataLoader(
            Subset(examples, range(rank, len(examples), world_size)),
            batch_size=self.batch_size,
            collate_fn=self.collator(prompts_only),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_signals_to_the_main_process,
            generator=torch.Generator(),  # a loader draws a number; not one of those that training draws from
        )

    def preview(self, n: int = 3) -> str:
        """What training sees, as text: counts and shares of the tasks, and the first `n` examples with their labels.

        Args:
            n: How many examples.
        """
        from radargate_pl.data.preview import preview

        self.prepare_data()
        self.setup("fit")
        return preview(self, n)
