"""Faults put into real fits: NaN and infinity before the update, memory and disks that run out, records left out."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import FixedBatches, adapters, batch_of, fit, gated_lm, read_json, rows_of, trainer, two_row_batches

from radargate_pl.callbacks.non_finite import NonFiniteGuard
from radargate_pl.callbacks.resource_guard import ResourceGuard, disks, is_out_of_memory, skipped_records
from radargate_pl.callbacks.run_checkpoint import RunCheckpoint
from radargate_pl.disk_space import Disk
from radargate_pl.search import NevergradSearch


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


def weights_and_moments(lm, run):
    state = run.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{name}": value.clone() for i, values in state.items() for name, value in values.items()}
    return {**{name: value.clone() for name, value in lm.network.trainable_state().items()}, **moments}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


NO_VALIDATION = {"limit_val_batches": 0}


class BadGradient(Callback):
    """Writes one value into a gradient after the backward pass of one micro-batch."""

    def __init__(self, value: float, batch: int, part: str = "scorer") -> None:
        self.value, self.batch, self.part, self.seen = value, batch, part, -1

    def on_after_backward(self, trainer, pl_module):
        self.seen += 1
        if self.seen == self.batch:
            name, parameter = next(
                (n, p) for n, p in pl_module.named_parameters() if p.requires_grad and self.part in n
            )
            self.name = name
            parameter.grad.view(-1)[1] = self.value


# ---- NonFiniteGuard ----


@pytest.mark.parametrize(
    ("lr", "found"), [(1e30, r"NaN or infinity in the gradients of 2 parameters"), (3e37, r"a loss of nan and NaN")]
)
def test_a_learning_rate_that_is_too_high_stops_before_the_next_update(library, tmp_path, lr, found):
    """The step after the huge one has no finite gradients; weights and moments stay those of a shorter run."""
    lm = gated_lm(library, lr=lr)
    run = trainer(tmp_path / "broken", max_steps=4, callbacks=[NonFiniteGuard(), RunCheckpoint(every_n_steps=1)])
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=rf"{found}.* at optimiser step 2\. The update was not made") as error:
        run.fit(lm, datamodule=two_row_batches())
    assert run.global_step == 1
    shorter = gated_lm(library, lr=lr)
    assert_same(weights_and_moments(lm, run), weights_and_moments(shorter, fit(shorter, tmp_path / "short", steps=1)))
    report = read_json(tmp_path / "broken/non_finite.json")
    assert (report["step"], report["learning_rates"]) == (2, [lr])
    assert (report["loss"] == "nan") is ("loss" in found)
    assert report["bad_gradients"]
    assert report["bad_parameters"] == {}
    second = two_row_batches().train[1]
    (micro_batch,) = report["micro_batches"]
    assert [example["id"] for example in micro_batch["examples"]] == second["id"]
    assert [example["task"] for example in micro_batch["examples"]] == [name.split("-")[0] for name in second["id"]]
    message = str(error.value)
    assert f"model.optimizer.lr (now {lr:g})" in message
    assert "trainer.gradient_clip_val: 1.0 (now None)" in message
    assert str(tmp_path / "broken/non_finite.json") in message
    last = tmp_path / "broken/checkpoints/last.ckpt"
    assert f"The last checkpoint, {last}, is intact" in message
    assert torch.load(last, weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_one_bad_entry_of_a_gradient_is_found_by_name(library, tmp_path, value, clip):
    """In the first of two micro-batches of different sizes: both are reported, with the losses they had."""
    rows = rows_of(24)
    batches = FixedBatches([batch_of(rows[a:b]) for a, b in ((0, 4), (4, 8), (8, 12), (12, 15))], batch_size=4)
    lm, fault = gated_lm(library), BadGradient(value, batch=2)
    run = trainer(
        tmp_path,
        max_steps=4,
        accumulate_grad_batches=2,
        gradient_clip_val=clip,
        **NO_VALIDATION,
        callbacks=[fault, NonFiniteGuard()],
    )
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"gradients of 1 parameters \(first: network\..*scorer.*\) at optimiser step 2"
    ):
        run.fit(lm, datamodule=batches)
    shorter = gated_lm(library)
    reference = fit(
        shorter,
        tmp_path / "short",
        module=batches,
        steps=1,
        accumulate_grad_batches=2,
        gradient_clip_val=clip,
        **NO_VALIDATION,
    )
    assert_same(weights_and_moments(lm, run), weights_and_moments(shorter, reference))
    report = read_json(tmp_path / "non_finite.json")
    counts = {"nan": int(math.isnan(value)), "infinite": int(math.isinf(value))}
    assert {name: {k: v for k, v in c.items() if k != "entries"} for name, c in report["bad_gradients"].items()} == {
        fault.name: counts
    }
    shown = [[example["id"] for example in batch["examples"]] for batch in report["micro_batches"]]
    assert shown == [batches.train[2]["id"], batches.train[3]["id"]]
    with torch.no_grad():
        lm.eval()
        losses = [float(lm.model_step(batch, "val").loss) for batch in batches.train[2:]]
    assert [batch["loss"] for batch in report["micro_batches"]] == pytest.approx(losses, rel=1e-5)
    assert report["loss"] == pytest.approx((4 * losses[0] + 3 * losses[1]) / 7, rel=1e-5)


def test_an_infinite_loss_with_finite_gradients_stops_too(library, tmp_path):
    lm = gated_lm(library)
    step = lm.training_step

    def training_step(batch, batch_idx):
        out = step(batch, batch_idx)
        return {**out, "loss": out["loss"] + (math.inf if batch_idx == 1 else 0.0)}

    lm.training_step = training_step
    with pytest.raises(ValueError, match="a loss of inf at optimiser step 2"):
        fit(lm, tmp_path, NonFiniteGuard())
    assert read_json(tmp_path / "non_finite.json")["bad_gradients"] == {}


def test_large_finite_gradients_go_on(library, tmp_path):
    """Their float32 sum is infinite; that is no reason to stop."""
    lm = gated_lm(library, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))

    class Large(Callback):
        def on_after_backward(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(3e38)

    assert fit(lm, tmp_path, Large(), NonFiniteGuard(), steps=2).global_step == 2
    assert not (tmp_path / "non_finite.json").exists()


def test_parameters_that_were_bad_already_are_named(library, tmp_path):
    lm = gated_lm(library)

    class Break(Callback):
        def on_train_start(self, trainer, pl_module):
            next(p for n, p in pl_module.named_parameters() if n.endswith("rotation.Q")).data.view(-1)[0] = math.inf

    with pytest.raises(
        ValueError, match=r"parameters that are NaN or infinite already.*No checkpoint had been written"
    ):
        fit(lm, tmp_path, Break(), NonFiniteGuard())
    assert [name.endswith("rotation.Q") for name in read_json(tmp_path / "non_finite.json")["bad_parameters"]] == [True]


def test_a_report_that_cannot_be_written_hides_nothing(library, tmp_path, monkeypatch):
    def refuse(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("radargate_pl.callbacks.non_finite.write_json", refuse)
    with pytest.raises(ValueError, match=r"at optimiser step 1\. The update was not made; the details could not be"):
        fit(gated_lm(library), tmp_path, BadGradient(math.nan, batch=0), NonFiniteGuard())


def test_with_the_guard_every_bit_is_as_without(library, tmp_path):
    results = []
    for name, callbacks in (("with", [NonFiniteGuard()]), ("without", [])):
        lm = gated_lm(library)
        results.append(weights_and_moments(lm, fit(lm, tmp_path / name, *callbacks)))
    assert_same(*results)


def stand_in(scaler=None):
    strategy = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), reduce=lambda value, reduce_op: value)
    facts = {"global_step": 0, "current_epoch": 0, "global_rank": 0, "world_size": 1, "precision": "16-mixed"}
    return SimpleNamespace(
        strategy=strategy, datamodule=None, accumulate_grad_batches=1, gradient_clip_val=None, **facts
    )


def test_a_search_may_try_what_is_infinite():
    guard, run = NonFiniteGuard(), stand_in()
    guard.on_train_batch_start(run, None, {"task": torch.tensor([0]), "id": ["a"]}, 0)
    guard.on_before_backward(run, None, torch.tensor(math.inf))
    guard.on_before_optimizer_step(run, None, object.__new__(NevergradSearch))


def test_under_16_mixed_only_the_loss_counts(tmp_path):
    """The scaler leaves out steps with infinite gradients, and the loss it hands on is scaled."""
    run = stand_in(SimpleNamespace(get_scale=lambda: 1024.0))
    run.default_root_dir = tmp_path
    module = torch.nn.Linear(1, 1, bias=False)
    module.device, module.task_names = torch.device("cpu"), ("a",)
    module.weight.grad = torch.full((1, 1), math.inf)
    optimizer, guard = torch.optim.SGD(module.parameters(), lr=0.5), NonFiniteGuard()
    batch = {"task": torch.tensor([0, 0]), "id": ["x", "y"]}
    for loss in (torch.tensor(3.0 * 1024), torch.tensor(math.nan)):
        guard.on_train_batch_start(run, module, batch, 0)
        guard.on_before_backward(run, module, loss)
        if loss.isfinite():
            assert float(guard._batches[0].weighted_loss) == 3.0
            guard.on_before_optimizer_step(run, module, optimizer)
    with pytest.raises(ValueError, match="a loss of nan at optimiser step 1"):
        guard.on_before_optimizer_step(run, module, optimizer)
    assert read_json(tmp_path / "non_finite.json")["bad_gradients"] == {}


def test_two_processes_stop_together_and_each_names_its_own_examples(library, tmp_path):
    """Only the second one's loss is infinite and no gradient is: without an agreement the first would wait for ever."""
    lm = gated_lm(library)
    step = lm.training_step
    rows = rows_of(8)
    both = [[batch_of(rows[:2]), batch_of(rows[2:4])], [batch_of(rows[4:6]), batch_of(rows[6:])]]

    def training_step(batch, batch_idx):
        out = step(batch, batch_idx)
        is_bad = lm.trainer.global_rank == 1 and batch_idx == 1
        return {**out, "loss": out["loss"] + (math.inf if is_bad else 0.0)}

    class OwnBatches(FixedBatches):
        def train_dataloader(self):
            self.train = both[self.trainer.global_rank]
            return super().train_dataloader()

    lm.training_step = training_step
    run = trainer(tmp_path, max_steps=3, callbacks=[NonFiniteGuard()], devices=2, strategy="ddp_fork", **NO_VALIDATION)
    with pytest.raises(Exception, match="at optimiser step 2"):
        run.fit(lm, datamodule=OwnBatches())
    for rank, losses in ((0, [float]), (1, [str])):
        report = read_json(tmp_path / f"non_finite.rank{rank}.json")
        assert (report["rank"], report["world_size"], report["step"], report["loss"]) == (rank, 2, 2, "inf")
        assert [type(batch["loss"]) for batch in report["micro_batches"]] == losses
        assert [example["id"] for example in report["micro_batches"][0]["examples"]] == both[rank][1]["id"]


# ---- ResourceGuard: memory ----


def real_out_of_memory(batch, batch_idx):
    return torch.empty(2**56)


def raising(error):
    def training_step(batch, batch_idx):
        raise error

    return training_step


@pytest.mark.parametrize(
    "step",
    [
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")),
        raising(RuntimeError("HIP out of memory")),
        raising(MemoryError()),
        real_out_of_memory,
    ],
    ids=["cuda", "text", "python", "real"],
)
def test_out_of_memory_in_a_fit_names_shapes_and_levers_in_order(library, tmp_path, capsys, step):
    lm = gated_lm(library)
    lm.training_step = step
    batches = FixedBatches([batch_of(rows_of(4))], batch_size=4)
    batches.max_length = 96
    with pytest.raises((RuntimeError, MemoryError)) as error:
        fit(lm, tmp_path, ResourceGuard(), module=batches, accumulate_grad_batches=2, **NO_VALIDATION)
    assert is_out_of_memory(error.value)
    said = capsys.readouterr().err
    lines = said[said.index("out of memory\n") :].splitlines()
    shape = tuple(batches.train[0]["input_ids"].shape)
    assert f"input_ids {shape}" in lines[1]
    assert "peak memory: " in lines[1]
    assert lines[3].startswith(
        "  1. data.init_args.batch_size: 2 (now 4) with trainer.accumulate_grad_batches: 4 (now 2)"
    )
    assert lines[4].startswith("  2. model.network.init_args.gradient_checkpointing: true")
    assert lines[5].startswith("  3. a shorter data.init_args.max_length (now 96)")
    assert lines[6].startswith("  4. model.network.init_args.quantization: 4bit")


def test_levers_that_are_pulled_already_are_left_out(library, tmp_path, capsys):
    lm = gated_lm(library, gradient_checkpointing=True)
    lm.training_step = raising(MemoryError())
    with pytest.raises(MemoryError):
        fit(lm, tmp_path, ResourceGuard(), module=FixedBatches([batch_of(rows_of(1))], batch_size=1), **NO_VALIDATION)
    said = capsys.readouterr().err
    assert "batch_size" not in said
    assert "gradient_checkpointing" not in said
    assert "  1. a shorter data.init_args.max_length" in said


def test_other_errors_and_other_commands_get_no_advice(library, tmp_path, capsys):
    lm = gated_lm(library)
    lm.training_step = raising(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit(lm, tmp_path, ResourceGuard())
    lm = gated_lm(library)
    lm.validation_step = raising(MemoryError())
    with pytest.raises(MemoryError):
        trainer(tmp_path, callbacks=[ResourceGuard()]).validate(lm, datamodule=two_row_batches(), verbose=False)
    assert "what helps" not in capsys.readouterr().err


def test_out_of_memory_is_seen_behind_another_error():
    wrapped = ValueError("a batch could not be collated")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(ValueError("out of memory cards"))


# ---- ResourceGuard: disks ----

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr("radargate_pl.callbacks.resource_guard.rank_zero_info", lines.append)
    return lines


def set_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free() if callable(free) else free))


def test_a_full_disk_refuses_the_fit_before_the_first_step(library, tmp_path, monkeypatch):
    set_free(monkeypatch, 150_000_000)
    lm = gated_lm(library)
    before = {}

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            before["trained"] = True

    with pytest.raises(
        ValueError, match=r"at least 200 MB free .* run folder .*: 150 MB free.*default_root_dir or TMPDIR"
    ):
        fit(lm, tmp_path, ResourceGuard(), Watch())
    assert not before


def test_a_disk_that_fills_up_warns_once_and_the_fit_goes_on(library, tmp_path, monkeypatch, said):
    run = None

    def free():
        return 10**8 if run is not None and run.global_step >= 2 else 10**11

    set_free(monkeypatch, free)
    run = trainer(tmp_path, max_steps=4, callbacks=[ResourceGuard(every_n_steps=1)])
    run.fit(gated_lm(library), datamodule=two_row_batches())
    assert run.global_step == 4
    (warning,) = said
    assert warning.startswith("warning: run folder ")
    assert "100 MB free" in warning


@pytest.mark.parametrize(("every", "looks"), [(2, 3), (100, 1)])
def test_disks_are_looked_at_every_n_steps(library, tmp_path, monkeypatch, every, looks):
    seen = []
    monkeypatch.setattr(ResourceGuard, "_warn", lambda self, trainer: seen.append(trainer.global_step))
    options = {"steps": 4, "accumulate_grad_batches": 2, "module": two_row_batches(train=8)}
    fit(gated_lm(library), tmp_path, ResourceGuard(every_n_steps=every), **options)
    assert len(seen) == looks


def test_limits_of_zero_switch_the_looks_off(library, tmp_path, monkeypatch, said):
    set_free(monkeypatch, 0)
    assert fit(gated_lm(library), tmp_path, ResourceGuard(warn_below_gb=0, stop_below_mb=0), steps=1).global_step == 1
    assert not said


def test_one_file_system_counts_once_and_two_twice(tmp_path, monkeypatch):
    run = SimpleNamespace(default_root_dir=tmp_path / "not/there/yet")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert [disk.label for disk in disks(run)] == ["run folder"]
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one file system")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(memory))
    assert [disk.label for disk in disks(run)] == ["run folder", "temporary folder"]


def test_a_folder_that_is_not_there_yet_has_the_room_of_the_one_above(tmp_path):
    disk = Disk("run folder", tmp_path / "a/b/c")
    assert disk.folder == tmp_path
    assert disk.device == tmp_path.stat().st_dev
    assert 0 < disk.free <= shutil.disk_usage(tmp_path).total


@pytest.mark.parametrize("options", [{"warn_below_gb": -1}, {"stop_below_mb": -1}, {"every_n_steps": 0}])
def test_limits_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="Expected warn_below_gb"):
        ResourceGuard(**options)


# ---- ResourceGuard: records ----


def test_records_left_out_are_counted_by_task_also_from_the_cache(library, tmp_path, said):
    from radargate_pl.data import FlanMixture

    good = [{"source": f"q{i}", "target": "a"} for i in range(8)]
    broken = [{"source": "no answer"}, {"target": "no question"}, {"source": "q", "target": "long " * 40}]
    for name, records in (("add", [*good, *broken]), ("echo", good), ("turn", [*good, broken[0]])):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(text)
    options = {"validation_examples": 2, "max_length": 64, "prompt": "plain", "on_bad_record": "skip"}
    for folder in ("first", "again"):
        tasks = {name: str(tmp_path / f"{name}.jsonl") for name in ("add", "echo", "turn")}
        data = FlanMixture(tasks, "debug-tiny", **options)
        fit(gated_lm(library), tmp_path / folder, ResourceGuard(), steps=1, module=data)
    counted = [line for line in said if line.startswith("records left out")]
    assert counted == ["records left out (on_bad_record: skip): 4: add 3, turn 1"] * 2


def test_a_data_module_of_another_kind_may_know_nothing():
    assert skipped_records(None) == {}
    assert skipped_records(two_row_batches()) == {}
    assert skipped_records(SimpleNamespace(bad_records=SimpleNamespace(skipped={"a": 2, "b": 0}))) == {"a": 2}
