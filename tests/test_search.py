"""NevergradSearch: the objective, the best kept, exact resumption, and everything that would search nothing refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_runs import FixedBatches, adapters, batch_of, fit, gated_lm, rows_of
from torch import Tensor, nn

from radargate_pl.callbacks import RunCheckpoint
from radargate_pl.gates import LoraHub, StretchGate
from radargate_pl.losses import example_mean_cross_entropy
from radargate_pl.module import AdaptedLM
from radargate_pl.search import WORST, NevergradSearch

TARGET = torch.tensor([0.5, -1.0, 0.25])


def weights_of(layers: int = 2, count: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(count)) for _ in range(layers)]


def distance(weights: list[nn.Parameter], seen: list[Tensor] | None = None) -> Callable[[], Tensor]:
    """The loss of a toy problem; remembers what it was called with."""

    def closure() -> Tensor:
        assert all(torch.equal(w, weights[0]) for w in weights)
        assert not torch.is_grad_enabled()
        if seen is not None:
            seen.append(weights[0].detach().clone())
        return (weights[0] - TARGET).square().sum()

    return closure


def searched(steps: int, **options: object) -> tuple[NevergradSearch, list[nn.Parameter], list[Tensor]]:
    weights, seen = weights_of(), []
    search = NevergradSearch(weights, **options)
    for _ in range(steps):
        search.step(distance(weights, seen))
    return search, weights, seen


@pytest.mark.parametrize("algorithm", ["NGOpt", "OnePlusOne", "CMA"])  # the last does not begin at 0 by itself
def test_it_minimises_loss_plus_penalty_within_the_bounds_and_leaves_the_best(algorithm: str) -> None:
    search, weights, seen = searched(40, penalty=0.05, bound=0.8, algorithm=algorithm)
    assert torch.equal(seen[0], torch.zeros(3))
    assert max(float(w.abs().max()) for w in seen) <= 0.8 + 1e-6
    objectives = [float((w - TARGET).square().sum() + 0.05 * w.abs().mean()) for w in seen]
    assert search.losses == pytest.approx(objectives, rel=1e-6)
    best = min(range(40), key=objectives.__getitem__)
    assert search.best[1] == search.losses[best]
    for parameter in weights:
        assert torch.equal(parameter, seen[best])
    assert min(objectives) < 0.35 * objectives[0]
    assert len({tuple(w.tolist()) for w in seen}) > 30


def test_the_penalty_pulls_towards_zero() -> None:
    free, held = (searched(40, penalty=penalty)[1][0] for penalty in (0.0, 2.0))
    assert held.abs().sum() < 0.8 * free.abs().sum()


@pytest.mark.parametrize("count", [1, 3, 9, 20, 40])
def test_the_first_candidate_is_the_bare_backbone_whatever_the_number_of_experts(count: int) -> None:
    weights = weights_of(count=count)
    search = NevergradSearch(weights, budget=40)
    for _ in range(3):
        search.step(lambda: weights[0].detach().sum())
    assert not search.candidates[0].any()
    assert search.candidates[1].any()


def test_after_every_step_the_best_so_far_is_in_the_gates() -> None:
    weights, seen = weights_of(), []
    search = NevergradSearch(weights, budget=12)
    for step in range(12):
        search.step(distance(weights, seen))
        best = min(range(step + 1), key=search.losses.__getitem__)
        assert torch.equal(weights[1], seen[best])


def test_the_same_seed_gives_the_same_search_and_leaves_the_runs_own_numbers_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (searched(15, seed=7, algorithm="OnePlusOne")[0] for _ in range(2))
    other = searched(15, seed=8, algorithm="OnePlusOne")[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert first.losses == second.losses
    assert first.losses != other.losses


@pytest.mark.parametrize("algorithm", ["NGOpt", "CMA"])
def test_a_restored_search_goes_on_exactly(algorithm: str, tmp_path: Path) -> None:
    options = {"budget": 10, "algorithm": algorithm}
    whole, expected, _ = searched(10, **options)
    half, _, _ = searched(5, **options)
    torch.save(half.state_dict(), tmp_path / "state")
    weights = weights_of()
    resumed = NevergradSearch(weights, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for _ in range(5):
        resumed.step(distance(weights))
    assert resumed.losses == whole.losses
    assert torch.equal(torch.stack(resumed.candidates), torch.stack(whole.candidates))
    assert torch.equal(weights[0], expected[0])


def test_a_search_that_has_not_begun_is_restored_too() -> None:
    fresh = NevergradSearch(weights_of())
    fresh.load_state_dict(NevergradSearch(weights_of()).state_dict())
    assert fresh.losses == []


def test_another_search_does_not_go_on_with_this_ones_candidates() -> None:
    state = searched(6, algorithm="OnePlusOne")[0].state_dict()
    with pytest.raises(ValueError, match=r"propose candidate \d of the checkpoint again.*budget, bound, seed"):
        NevergradSearch(weights_of(), algorithm="OnePlusOne", seed=1).load_state_dict(state)


def test_a_loss_that_is_not_finite_is_the_worst() -> None:
    weights = weights_of()
    search = NevergradSearch(weights, budget=5)
    for loss in (1.0, float("nan"), float("inf"), 0.5):
        search.step(lambda loss=loss: torch.tensor(loss))
    assert search.losses[1:3] == [WORST, WORST]
    assert torch.equal(weights[0].double(), search.candidates[3].float().double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget of at least 1.* got budget=0"),
        ({"bound": 0.0}, "bound above 0.*bound=0"),
        ({"penalty": -1.0}, "penalty of at least 0.*penalty=-1"),
        ({"algorithm": "Adam"}, "algorithm to be an optimiser of nevergrad.*but got 'Adam'"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NevergradSearch(weights_of(), **options)


@pytest.mark.parametrize("shapes", [[(3,), (2,)], [(2, 3)]], ids=str)
def test_parameters_that_are_no_weights_of_lorahub_are_refused(shapes: list) -> None:
    with pytest.raises(ValueError, match=r"weights of LoraHub.*train: gate"):
        NevergradSearch([nn.Parameter(torch.zeros(shape)) for shape in shapes])


def test_a_step_too_many_and_a_step_without_closure_are_refused() -> None:
    search, weights, _ = searched(2, budget=2)
    with pytest.raises(ValueError, match=r"at most budget=2 steps.*larger budget"):
        search.step(distance(weights))
    with pytest.raises(ValueError, match="other than 16-mixed"):
        search.step()


def test_without_nevergrad_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ValueError, match=r"pip install 'radargate-pl\[search\]'"):
        NevergradSearch(weights_of())


def test_a_method_of_nevergrads_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    search, weights, _ = searched(1)
    monkeypatch.setattr(search._method, "ask", lambda: 1 / 0)
    with pytest.raises(ValueError, match=r"NGOpt to propose candidate 2 of 40.*division by zero.*OnePlusOne"):
        search.step(distance(weights))


def test_a_search_that_stops_early_lets_the_process_end() -> None:
    """nevergrad runs scipy's methods in threads that wait for a next loss; a reference cycle keeps them from ending."""
    code = """if True:
        import torch
        from radargate_pl.search import NevergradSearch
        weights = torch.nn.Parameter(torch.zeros(9))
        search = NevergradSearch([weights], budget=40)
        for _ in range(5):
            search.step(lambda: weights.detach().square().sum())
        search.itself = search
        print("done")
    """
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# ---- in Lightning's loop, over the random experts of a tiny backbone


def few_shot(rows: int = 4, batches: int = 1) -> FixedBatches:
    chosen = rows_of(rows * batches)
    return FixedBatches(
        [batch_of(chosen[i * rows : (i + 1) * rows]) for i in range(batches)], [batch_of(rows_of(6))], batch_size=rows
    )


def hub_lm(folder: Path, budget: int = 10, gate: type = LoraHub, **options: object) -> AdaptedLM:
    optimizer = options.pop("optimizer", partial(NevergradSearch, budget=budget))
    lm = gated_lm(adapters(folder), gate, optimizer=optimizer, combine="separate")
    for name, value in options.items():
        setattr(lm, name, value)
    return lm


def hub_weights(lm: AdaptedLM) -> Tensor:
    found = {path: layer.gate.weights.detach() for path, layer in lm.built_network.layers.items()}
    first = next(iter(found.values()))
    assert all(torch.equal(weights, first) for weights in found.values())
    return first.clone()


def test_a_fit_is_no_worse_than_the_bare_backbone_and_reports_what_it_found(tmp_path: Path) -> None:
    lm, data = hub_lm(tmp_path / "experts"), few_shot()
    run = fit(lm, tmp_path, steps=10, module=data)
    search = run.optimizers[0]
    assert len(search.losses) == 10
    (batch,) = data.train
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    def loss_at(weights: Tensor) -> float:
        with torch.no_grad():
            for layer in lm.built_network.layers.values():
                layer.gate.weights.copy_(weights)
            return float(example_mean_cross_entropy(*lm.built_network(**inputs), len(batch["task"])))

    found = hub_weights(lm)
    assert torch.equal(found, search.best[0].float())
    assert found.abs().max() > 0.01
    bare, after = loss_at(torch.zeros(3)), loss_at(found)
    assert search.losses[0] == pytest.approx(bare, abs=1e-6)
    assert search.best[1] == pytest.approx(after + 0.05 * float(found.abs().mean()), abs=1e-6)
    assert search.best[1] < search.losses[0]
    assert after < bare
    assert float(run.callback_metrics["val/loss"]) > 0
    lm.built_network.save_pretrained(tmp_path / "gate")
    again = type(lm.built_network).from_pretrained(tmp_path / "gate")
    assert torch.equal(next(iter(again.layers.values())).gate.weights, found)


def test_a_run_that_is_resumed_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    whole = hub_lm(tmp_path / "experts")
    run = fit(whole, tmp_path / "whole", steps=10, module=few_shot())
    fit(hub_lm(tmp_path / "experts"), tmp_path / "half", RunCheckpoint(), steps=5, module=few_shot())
    resumed = hub_lm(tmp_path / "experts")
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    again = fit(resumed, tmp_path / "half", RunCheckpoint(), steps=10, module=few_shot(), resume=last)
    assert again.optimizers[0].losses == run.optimizers[0].losses
    assert torch.equal(hub_weights(resumed), hub_weights(whole))


CONSTANT = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)


@pytest.mark.parametrize(
    ("make", "data", "options", "message"),
    [
        (partial(hub_lm, optimizer=partial(torch.optim.AdamW, lr=0.1)), few_shot(), {}, "LoraHub.* and AdamW"),
        (partial(hub_lm, gate=StretchGate), few_shot(), {}, "weights of LoraHub"),
        (partial(hub_lm, budget=1), few_shot(), {}, "at most budget=1 steps, but the trainer takes 2"),
        (hub_lm, few_shot(batches=2), {}, "'batches an epoch': 2"),
        (hub_lm, few_shot(), {"accumulate_grad_batches": 2}, "'trainer.accumulate_grad_batches': 2"),
        (hub_lm, few_shot(), {"gradient_clip_val": 1.0}, r"without \['trainer.gradient_clip_val'\]"),
        (partial(hub_lm, lr_multipliers={"weights": 2.0}), few_shot(), {}, r"without \['model.lr_multipliers'\]"),
        (partial(hub_lm, lr_scheduler_factory=CONSTANT), few_shot(), {}, r"without \['model.lr_scheduler'\]"),
    ],
    ids=["other optimiser", "other gate", "budget", "batches", "accumulation", "clipping", "multipliers", "schedule"],
)
def test_what_would_search_nothing_is_refused_at_the_start(
    make: Callable, data: FixedBatches, options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(make(tmp_path / "experts"), tmp_path, steps=2, module=data, **options)
