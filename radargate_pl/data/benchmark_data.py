"""BenchmarkData: benchmarks as a LightningDataModule, every example on exactly one process."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from radargate_pl.benchmarks import PROTOCOLS, Benchmark, Protocol
from radargate_pl.chat_template import checked_date
from radargate_pl.data.benchmark_encoding import AskedAs, Request, RequestEncoder
from radargate_pl.data.benchmark_fields import Fields
from radargate_pl.data.benchmark_files import BenchmarkSource, find_benchmarks, read_fields
from radargate_pl.data.benchmark_items import Item, ItemMaker
from radargate_pl.data.benchmark_requests import BenchmarkBatch, RequestCollator, RequestGroup, grouped, share
from radargate_pl.data.common_day import take_common_day
from radargate_pl.data.prompts import check_prompt
from radargate_pl.data.records import BadRecords
from radargate_pl.data.workers import leave_signals_to_the_main_process
from radargate_pl.scoring.optional_packages import check_packages

NAMED = 10  # items that a message names


class BenchmarkData(LightningDataModule):
    """The paper's benchmarks, the FLAN fitting tasks and natural instructions, for `radargate test`.

    A file is looked for first: `<task>.jsonl[.gz]` or `.parquet` in `root`, `root/benchmarks` or `root/flan_cot`
    (`aqua.test.jsonl.gz` for `cot_aqua`), natural instructions in `root/niv2/<category>`. Without one the hub is asked.

    Args:
        tasks: Names of benchmarks, or of groups: glue, mmlu, wmt14, flan_cot, paper, niv2.
        tokenizer: The backbone whose tokenizer is used: hub id, folder, `.gguf` file or a built-in name.
        root: Folder with files of benchmarks; the hub alone when null.
        limit: Examples a task uses at most, from the front; all when null.
        num_fewshot: The first so many examples of a task stand before each prompt, and are not scored.
        protocol: `standard` is that of each task; `ranking` takes the likeliest choice, `generation` writes an answer.
        prompt: What stands around the prompt of every task: nothing (`plain`), the tokenizer's chat template (`chat`),
            or a template with `{source}` in it. Tasks that `FlanMixture` trains on are then asked exactly as by it.
            When null, those are asked by `fitting_prompt`, all others plain.
        special_tokens: Whether prompts get the tokenizer's own special tokens (never with a chat template); false where
            the template in `prompt` writes them.
        fitting_prompt: The `prompt` of the `FlanMixture` that the model was fitted on. `radargate test` takes it from
            the config of the run. When null, the source and a line with `Answer:`.
        fitting_special_tokens: The `special_tokens` of that `FlanMixture`.
        date: The day that a chat template prints, as 2026-11-30. When null, that of the run whose weights are tested,
            else today's.
        batch_size: Rows a batch; ranking has a row for every choice of an example.
        max_length: Tokens of prompt and answer together. A longer prompt loses its middle, an answer nothing.
        max_new_tokens: Longest generated answer, in tokens; that of each task when null.
        on_bad_record: `raise` refuses to start; `skip` leaves bad examples out, counts and logs them.
        num_workers: Processes that collate batches; 0 collates in the main one.

    Attributes:
        skip: Tells which ids of a task are answered already, and so left out of the batches; None for none.
        truncated: Ids of the prompts of each task that lost their middle.
    """

    def __init__(  # noqa: PLR0913  flat, because these are what a user types
        self,
        tasks: str | list[str],
        tokenizer: str,
        root: str | None = None,
        limit: int | None = None,
        num_fewshot: int = 0,
        protocol: Literal["standard", "ranking", "generation"] = "standard",
        prompt: str | None = None,
        batch_size: int = 16,
        max_length: int = 2048,
        max_new_tokens: int | None = None,
        on_bad_record: Literal["raise", "skip"] = "raise",
        num_workers: int = 0,
        special_tokens: bool = True,
        fitting_prompt: str | None = None,
        fitting_special_tokens: bool = True,
        date: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("limit", limit, 1),
            ("num_fewshot", num_fewshot, 0),
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 1),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"Expected {name} to be {least} or more, but got {value}.")
        for given in (prompt, fitting_prompt):
            if given is not None:
                check_prompt(given)
        if protocol not in ("standard", *PROTOCOLS):
            raise ValueError(f"Expected protocol to be standard, ranking or generation, but got {protocol!r}.")
        self.sources = find_benchmarks(tasks, root)
        self.tokenizer_name, self.date = tokenizer, checked_date(date)
        self.limit = limit
        self.num_fewshot = num_fewshot
        self.protocol = protocol
        self.prompt, self.special_tokens = prompt, special_tokens
        self.fitting_prompt, self.fitting_special_tokens = fitting_prompt, fitting_special_tokens
        self.batch_size = batch_size
        self.max_length = max_length
        self.max_new_tokens = max_new_tokens
        self.num_workers = num_workers
        self.bad_records = BadRecords(on_bad_record)
        self.skip: Callable[[str], Collection[str]] | None = None
        self.truncated: dict[str, list[str]] = {}
        self._requests: dict[str, list[Request]] = {}
        self._reserved: dict[str, tuple[str, ...]] = {}
        self._backbone: tuple[Any, bool] | None = None
        self._encoders: dict[AskedAs, RequestEncoder] = {}
        for source in self.sources:  # what cannot be asked or scored is refused before anything is read
            ItemMaker(source.benchmark, self.protocol_of(source.benchmark))
            check_packages(source.benchmark.metrics, source.benchmark.name)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks; `task` of a batch counts in them."""
        return tuple(source.benchmark.name for source in self.sources)

    @property
    def categories(self) -> dict[str, str | None]:
        """Category of each task, or None."""
        return {source.benchmark.name: source.category for source in self.sources}

    @property
    def benchmarks(self) -> dict[str, Benchmark]:
        """The declarations of the tasks."""
        return {source.benchmark.name: source.benchmark for source in self.sources}

    def protocol_of(self, benchmark: Benchmark) -> Protocol:
        """How a benchmark is asked."""
        return benchmark.protocol if self.protocol == "standard" else self.protocol

    def max_new_tokens_of(self, benchmark: Benchmark) -> int:
        """Longest generated answer of a benchmark, in tokens."""
        return self.max_new_tokens or benchmark.max_new_tokens

    def asked_as(self, benchmark: Benchmark) -> AskedAs:
        """What stands around the prompts of a benchmark."""
        is_of_fit = bool(benchmark.source_prompt)
        if self.prompt is None and is_of_fit and self.fitting_prompt is not None:
            return AskedAs(self.fitting_prompt, self.fitting_special_tokens, as_in_fit=True)
        return AskedAs(self.prompt, self.special_tokens, as_in_fit=is_of_fit and self.prompt is not None)

    @property
    def backbone(self) -> tuple[Any, bool]:
        """The tokenizer, loaded on first use, and whether the backbone is an encoder-decoder."""
        if self._backbone is None:
            from radargate_pl.backbones import context_length, is_encoder_decoder, load_tokenizer

            self._backbone = load_tokenizer(self.tokenizer_name), is_encoder_decoder(self.tokenizer_name)
            context = context_length(self.tokenizer_name)
            if context is not None and context < self.max_length:
                rank_zero_info(f"max_length is {context}, the context of {self.tokenizer_name}, not {self.max_length}")
                self.max_length = context
        return self._backbone

    def encoder_of(self, benchmark: Benchmark) -> RequestEncoder:
        """Turns the items of a benchmark into token ids."""
        asked, (tokenizer, is_encoder_decoder) = self.asked_as(benchmark), self.backbone
        if asked not in self._encoders:
            self._encoders[asked] = RequestEncoder(tokenizer, asked, self.max_length, is_encoder_decoder, self.date)
        return self._encoders[asked]

    def prepare_data(self) -> None:
        """Download what is not here; Lightning calls this on one process. Bad input is refused here too."""
        self._read_all()

    def setup(self, stage: str) -> None:
        """Read, render and encode every task, once.

        Args:
            stage: Of no meaning: benchmarks are tested on.

        Raises:
            ValueError: For bad input.
        """
        if take_common_day(self):  # all processes are here together; prepare_data is called on one of them
            self._encoders, self._requests = {}, {}
        self._read_all()

    def _read_all(self) -> None:
        for source in self.sources:
            if source.benchmark.name not in self._requests:
                self._read(source)
        self.bad_records.raise_if_any()

    def _read(self, source: BenchmarkSource) -> None:
        benchmark, encoder = source.benchmark, self.encoder_of(source.benchmark)
        protocol = self.protocol_of(benchmark)
        shown, scored = self._divided(benchmark, read_fields(source, self.bad_records))
        self._reserved[benchmark.name] = tuple(example.id for example in shown)
        items = ItemMaker(benchmark, protocol, encoder.asked.as_in_fit).items(shown, scored, self.bad_records)
        if protocol == "ranking":
            requests = encoder.ranking(items, self.bad_records)
        else:
            requests = encoder.generation(items, self.max_new_tokens_of(benchmark), self.bad_records)
        self._requests[benchmark.name] = requests
        cut = self.truncated[benchmark.name] = [request.item.id for request in requests if request.is_truncated]
        if cut:
            more = f" and {len(cut) - NAMED} more" if len(cut) > NAMED else ""
            rank_zero_info(
                f"task {benchmark.name}: {len(cut)} of {len(items)} prompts lost their middle, max_length is "
                f"{self.max_length}: {', '.join(cut[:NAMED])}{more}"
            )

    def _divided(self, benchmark: Benchmark, examples: list[Fields]) -> tuple[list[Fields], list[Fields]]:
        """The examples that are shown, and those that are scored."""
        count = self.num_fewshot
        if not self.bad_records.problems and len(examples) <= count:
            raise ValueError(
                f"Expected benchmark {benchmark.name} to have more examples than num_fewshot={count}, but it has "
                f"{len(examples)}."
            )
        return examples[:count], examples[count : None if self.limit is None else count + self.limit]

    def items(self, task: str) -> list[Item]:
        """The scored items of a task, in the order of its file.

        Args:
            task: Name of the task.
        """
        return [request.item for request in self.requests(task)]

    def requests(self, task: str) -> list[Request]:
        """The scored items of a task as token ids, in the order of its file.

        Args:
            task: Name of the task.
        """
        return self._requests[task]

    def reserved_ids(self, task: str) -> tuple[str, ...]:
        """Ids of the examples of a task that are shown in prompts and never scored.

        Args:
            task: Name of the task.
        """
        return self._reserved[task]

    def groups(self) -> list[RequestGroup]:
        """All batches, task after task; of those that are answered in part, the rest."""
        groups = []
        for number, (name, benchmark) in enumerate(self.benchmarks.items()):
            finished = frozenset(self.skip(name)) if self.skip else frozenset()
            answered_by = (number, self.protocol_of(benchmark), benchmark.stop, self.max_new_tokens_of(benchmark))
            for requests in grouped(self._requests[name], self.batch_size):
                groups.append(RequestGroup(requests, *answered_by).without(finished))
        # One stays, so that a test whose answers are all there still has something to run over.
        return [group for group in groups if group.requests] or groups[:1]

    def test_dataloader(self) -> DataLoader[BenchmarkBatch]:
        """This process's batches, longest first within a task.

        Raises:
            ValueError: If Lightning would divide them once more, or there is nothing to test on.
        """
        trainer: Any = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "Expected trainer.use_distributed_sampler to be false, since BenchmarkData itself divides the examples "
                "among the processes, but it is true: some would be scored twice and others not at all."
            )
        groups = self.groups()
        if not groups:
            raise ValueError(f"Expected examples to test on, but none are left in {', '.join(self.task_names)}.")
        tokenizer, is_encoder_decoder = self.backbone
        collate: Callable[[Any], BenchmarkBatch] = RequestCollator(tokenizer.pad_token_id, is_encoder_decoder)
        mine: Sequence[RequestGroup] = share(groups, rank, world_size)
        return DataLoader(
            mine,  # type: ignore[arg-type]  # a list of batches is data enough
            batch_size=None,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_signals_to_the_main_process,
            generator=torch.Generator(),  # a loader draws a number; not one of those that anything else draws from
        )

    def preview(self, n: int = 3) -> str:
        """What is tested, as text: the tasks in numbers, and prompts and choices of the first.

        Args:
            n: How many examples.
        """
        from radargate_pl.data.benchmark_preview import preview

        self.setup("test")
        return preview(self, n)
