from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import (
    CATEGORIES,
    FixedBatches,
    RecordingLogger,
    adapters,
    batch_of,
    expert_lm,
    gated_lm,
    rows_of,
    trainer,
)

from radargate_pl.gates import UniformGate
from radargate_pl.losses import example_mean_cross_entropy, token_cross_entropy
from radargate_pl.module import AdaptedLM

SGD = partial(torch.optim.SGD, lr=0.5)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


def split(rows, sizes):
    """Batches of the given sizes from consecutive rows."""
    batches, start = [], 0
    for size in sizes:
        batches.append(batch_of(rows[start : start + size]))
        start += size
    return batches


def fitted(lm, folder, batches, batch_size=None, **options):
    """State after one epoch over the batches."""
    torch.manual_seed(0)
    fit = trainer(folder, **{"max_epochs": 1, "limit_val_batches": 0, **options})
    fit.fit(lm, datamodule=FixedBatches(batches, batch_size=batch_size))
    return {name: value.clone() for name, value in lm.network.trainable_state().items()}


def assert_same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    assert found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance, msg=name)


# ---- the loss and its accumulation ----


def test_the_step_is_the_mean_over_examples(library, tmp_path):
    lm, batch = gated_lm(library), batch_of(rows_of(3))
    fitted(lm, tmp_path, [batch], max_steps=0)
    labelled = lm.network(batch["input_ids"], batch["attention_mask"], batch["labels"])
    losses = token_cross_entropy(labelled.logits, labelled.targets)
    by_hand = sum(losses[labelled.example == i].mean() for i in range(3)) / 3
    lm.trainer.fit_loop.epoch_loop._results.clear()
    torch.testing.assert_close(lm.model_step(batch, "train").loss, by_hand)


@pytest.mark.parametrize("batch_size", [None, 4, 2], ids=["unknown", "4", "2"])
@pytest.mark.parametrize(
    ("sizes", "accumulate"), [([2, 2], 2), ([3, 1], 2), ([1, 1, 2], 3), ([1, 3], 4)], ids=str
)  # the last: the epoch ends before the window is full
def test_accumulated_batches_equal_one_batch(library, tmp_path, sizes, accumulate, batch_size):
    rows = rows_of(4)
    whole = fitted(gated_lm(library, optimizer=SGD), tmp_path, split(rows, [4]))
    parts = fitted(
        gated_lm(library, optimizer=SGD), tmp_path, split(rows, sizes), batch_size, accumulate_grad_batches=accumulate
    )
    assert_same(parts, whole)
    start = fitted(gated_lm(library, optimizer=SGD), tmp_path, split(rows, [4]), max_steps=0)
    assert any(not torch.equal(start[name], whole[name]) for name in whole)


def test_the_logged_loss_is_that_of_the_whole_optimiser_step(library, tmp_path):
    rows, logger = rows_of(6), RecordingLogger()
    lm = gated_lm(library, lr=0.0)
    fitted(lm, tmp_path, split(rows, [3, 1, 2]), accumulate_grad_batches=2, logger=logger)
    with torch.no_grad():
        expected = []
        for batch, count in ((batch_of(rows[:4]), 4), (batch_of(rows[4:]), 2)):
            labelled = lm.network(batch["input_ids"], batch["attention_mask"], batch["labels"])
            expected.append(float(example_mean_cross_entropy(*labelled, count)))
    logged = logger.values("train/loss")
    assert [step for step, _ in logged] == [0, 1]
    assert [value for _, value in logged] == pytest.approx(expected, rel=1e-5)


def test_gates_are_clipped_together_as_torch_does(library, tmp_path):
    batch, limit = batch_of(rows_of(4)), 0.01
    start = fitted(gated_lm(library, optimizer=SGD), tmp_path, [batch], max_steps=0)
    free = fitted(gated_lm(library, optimizer=SGD), tmp_path, [batch])
    clipped = fitted(gated_lm(library, optimizer=SGD), tmp_path, [batch], gradient_clip_val=limit)
    steps = {name: free[name] - start[name] for name in free}
    norm = torch.cat([step.flatten() for step in steps.values()]).norm() / 0.5
    assert norm > 2 * limit
    expected = {name: start[name] + step * limit / norm for name, step in steps.items()}
    assert_same(clipped, expected, tolerance=2e-6)


# ---- experts that train together ----


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.02}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_experts_trained_together_equal_each_trained_alone(tmp_path, options, kind):
    # SGD shows the gradients' sizes; AdamW their drift: momentum must not move an expert that a batch does not use.
    optimizer = SGD if kind == "sgd" else partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    rows = rows_of(18)
    groups = [rows[0:5], rows[5:9], [row for row in rows[9:12] if row[0] != "add"], rows[12:18]]
    together = fitted(expert_lm(optimizer), tmp_path, [batch_of(group) for group in groups], batch_size=4, **options)
    window = options.get("accumulate_grad_batches", 1)
    for task in CATEGORIES:
        own = [[row for row in group if row[0] == task] for group in groups]
        # the alone run sees this task's examples of each optimiser step as one batch
        steps = [[row for rows in own[i : i + window] for row in rows] for i in range(0, len(own), window)]
        alone_options = {name: value for name, value in options.items() if name != "accumulate_grad_batches"}
        alone = fitted(expert_lm(optimizer), tmp_path, [batch_of(step) for step in steps if step], **alone_options)
        mine = {name for name in together if name.endswith(f".{task}")}
        assert len(mine) == 8
        assert_same({name: together[name] for name in mine}, {name: alone[name] for name in mine})


def test_a_shared_a_hears_of_all_examples(tmp_path):
    rows = rows_of(6)
    shared = fitted(expert_lm(SGD, share_A=True), tmp_path, [batch_of(rows)])
    first = {name: value for name, value in shared.items() if name.endswith("lora_A.add")}
    for name, value in first.items():
        assert torch.equal(value, shared[name.replace(".add", ".echo")])


# ---- optimiser and schedule ----


def test_the_schedule_advances_once_per_optimiser_step(library, tmp_path):
    rates = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if pl_module.completed_step is not None:
                rates.append(pl_module.completed_step.learning_rate)

    base = gated_lm(library, optimizer=partial(torch.optim.SGD, lr=1.0))
    halving = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    lm = AdaptedLM(base.network_factory, base.optimizer_factory, halving)
    fitted(lm, tmp_path, split(rows_of(6), [1] * 6), accumulate_grad_batches=2, callbacks=[Watch()])
    assert rates == [1.0, 0.5, 0.25]


def test_the_optimiser_gets_only_what_trains(library, tmp_path):
    lm = gated_lm(library)
    fitted(lm, tmp_path, [batch_of(rows_of(2))])
    trained = {id(parameter) for group in lm.trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {id(p) for name, p in lm.network.named_parameters() if ".gate." in name}


def test_nothing_to_train_is_said_by_name(library, tmp_path):
    with pytest.raises(ValueError, match=r"UniformGate\(\).*nothing to train; use validate or test"):
        fitted(gated_lm(library, UniformGate), tmp_path, [batch_of(rows_of(2))])


def test_a_schedule_that_waits_for_a_metric_is_refused(library, tmp_path):
    base = gated_lm(library)
    lm = AdaptedLM(base.network_factory, base.optimizer_factory, torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match=r"lr_scheduler.*ReduceLROnPlateau"):
        fitted(lm, tmp_path, [batch_of(rows_of(2))])


def test_only_gate_parameters_move(library, tmp_path):
    lm = gated_lm(library)
    before = {}

    class Remember(Callback):
        def on_fit_start(self, trainer, pl_module):
            before.update({name: value.clone() for name, value in pl_module.network.named_parameters()})

    fitted(lm, tmp_path, split(rows_of(12), [4, 4, 4]), callbacks=[Remember()])
    moved = {name for name, value in lm.network.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".gate." in name}


# ---- expert ids, gates on request ----


def test_task_indices_become_expert_ids(library, tmp_path):
    lm = gated_lm({"turn": f"{library}/turn", "add": f"{library}/add"})
    fitted(lm, tmp_path, [batch_of(rows_of(2))], max_steps=0)
    assert lm.network.experts == ("turn", "add")
    assert lm.expert_ids(torch.tensor([0, 1, 2, 2])).tolist() == [1, -1, 0, 0]


def test_gates_come_only_on_the_steps_asked_for_and_detached(library, tmp_path):
    seen = []

    class Ask(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.request_gates(self.wants)

        def wants(self, stage, step):
            return stage == "train" and step == 1

        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            seen.append(outputs["gates"])

        def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
            assert outputs["gates"] is None

    torch.manual_seed(0)
    lm = gated_lm(library)
    data = FixedBatches(split(rows_of(6), [2, 2, 2]), [batch_of(rows_of(2))])
    trainer(tmp_path, max_epochs=1, callbacks=[Ask()]).fit(lm, datamodule=data)
    assert [gates is None for gates in seen] == [True, False, True]
    assert set(seen[1]) == set(lm.network.layers)
    for output in seen[1].values():
        assert not output.weights.requires_grad
        assert not output.logits.requires_grad


# ---- evaluation ----


def evaluation_by_hand(lm, batches):
    """Token-pooled loss and exact match per task, with plain Python sums."""
    sums = {}
    for batch in batches:
        with torch.no_grad():
            labelled = lm.network(batch["input_ids"], batch["attention_mask"], batch["labels"])
        losses = token_cross_entropy(labelled.logits, labelled.targets)
        hits = labelled.logits.argmax(-1) == labelled.targets
        for row, task in enumerate(batch["task"].tolist()):
            entry = sums.setdefault(list(CATEGORIES)[task], [0.0, 0, 0, 0])
            mine = labelled.example == row
            entry[0] += float(losses[mine].sum())
            entry[1] += int(mine.sum())
            entry[2] += bool(hits[mine].all())
            entry[3] += 1
    return {task: (loss / tokens, exact / n, n) for task, (loss, tokens, exact, n) in sums.items()}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_scores_per_task_and_their_plain_mean(library, tmp_path, stage):
    rows = [*rows_of(5), ("add", "zz:", "bbbb"), ("echo", "y:", "a")]
    batches = split(rows, [4, 3])
    lm = gated_lm(library)
    torch.manual_seed(0)
    (logged,) = getattr(trainer(tmp_path), stage)(lm, datamodule=FixedBatches(evaluation=batches), verbose=False)
    prefix = {"validate": "val", "test": "test"}[stage]
    expected = evaluation_by_hand(lm, batches)
    for task, (loss, exact, n) in expected.items():
        assert logged[f"{prefix}/{task}/loss"] == pytest.approx(loss, rel=1e-6)
        assert logged[f"{prefix}/{task}/exact_match"] == pytest.approx(exact)
        assert lm.task_results[task].n == n
    assert logged[f"{prefix}/loss"] == pytest.approx(sum(v[0] for v in expected.values()) / 3, rel=1e-6)
    assert logged[f"{prefix}/exact_match"] == pytest.approx(sum(v[1] for v in expected.values()) / 3)


def test_teacher_forced_exact_match_is_what_greedy_decoding_says(library, tmp_path):
    rows = rows_of(12, ["add"])
    lm = gated_lm(library, lr=3e-2)
    fitted(lm, tmp_path, [batch_of(rows)] * 40, max_steps=40)
    batch = batch_of(rows)
    lm.network.eval()
    labelled = lm.network(batch["input_ids"], batch["attention_mask"], batch["labels"])
    hits = labelled.logits.argmax(-1) == labelled.targets
    exact = [bool(hits[labelled.example == i].all()) for i in range(12)]
    assert len(set(exact)) == 2, "the fixture must hold right and wrong answers"
    for row, (_, prompt, answer) in enumerate(rows):
        ids = lm.network.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        (text,) = lm.generate(ids, torch.ones_like(ids), batch["task"][row : row + 1])
        assert (text == answer) == exact[row]


def test_a_run_to_max_steps_ends_with_a_validation(library, tmp_path):
    validated = []

    class Watch(Callback):
        def on_validation_end(self, trainer, pl_module):
            validated.append(trainer.global_step)

    data = FixedBatches(split(rows_of(8), [2] * 4), [batch_of(rows_of(3))])
    fit = trainer(tmp_path, max_steps=7, val_check_interval=5, check_val_every_n_epoch=None, callbacks=[Watch()])
    fit.fit(gated_lm(library), datamodule=data)
    assert validated == [5, 7]


def test_predict_answers_with_id_task_and_references(library, tmp_path):
    prompts = batch_of([("echo", "ab:", ""), ("add", "cd:", "")])
    prompts["input_ids"], prompts["attention_mask"] = prompts["input_ids"][:, :3], prompts["attention_mask"][:, :3]
    lm = gated_lm(library)
    (answers,) = trainer(tmp_path).predict(lm, datamodule=FixedBatches(evaluation=[prompts]))
    assert [(answer["id"], answer["task"]) for answer in answers] == [("echo-ab:", "echo"), ("add-cd:", "add")]
    assert all(isinstance(answer["prediction"], str) and answer["references"] == [""] for answer in answers)


def test_a_trainer_without_tasks_is_refused(library, tmp_path):
    lm = gated_lm(library)
    loader = FixedBatches([batch_of(rows_of(2))]).train_dataloader()
    with pytest.raises(ValueError, match=r"datamodule that has `categories`.*NoneType"):
        trainer(tmp_path, max_steps=1).fit(lm, loader, loader)
