import errno
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import (
    CATEGORIES,
    LAYERS,
    FixedBatches,
    adapter_folder,
    adapters,
    batch_of,
    expert_lm,
    gated_lm,
    rows_of,
    trainer,
)

from radargate_pl.atomic_files import link_or_copy, save_atomically, write_json, write_text
from radargate_pl.callbacks import ExactResume, RunCheckpoint
from radargate_pl.checkpoint import load_checkpoint, restore_network, store_network
from radargate_pl.gates import RadarGate, StretchGate, UniformGate


class FakeNetwork:
    """What a checkpoint sees of a network."""

    combine = "sum"

    def __init__(self, gate="RadarGate(top_k=2)", shape=(2, 3), experts=None, backbone="sha256:b", names=("P", "Q")):
        self.gate = gate
        self.fingerprints = {"backbone": backbone, "experts": experts or {"e0": "sha256:0", "e1": "sha256:1"}}
        self.state = {f"layer.gate.rotation.{name}": torch.randn(shape) for name in names}
        self.loaded = None

    def identity(self):
        return {"config": {}, "tokenizer": "sha256:0", "chat_template": None}

    def describe(self):
        return self.gate

    def checkpoint_state(self):
        return self.state

    def load_checkpoint_state(self, state):
        self.loaded = dict(state)


def saved(network=None):
    checkpoint = {"state_dict": {"network.backbone.huge": torch.zeros(3)}, "global_step": 4}
    store_network(checkpoint, network or FakeNetwork())
    return checkpoint


# ---- what is stored, what is refused ----


def test_only_what_trains_is_stored_and_comes_back():
    network = FakeNetwork()
    checkpoint = saved(network)
    assert set(checkpoint["state_dict"]) == {"layer.gate.rotation.P", "layer.gate.rotation.Q"}
    assert checkpoint["radargate"]["gate"] == "RadarGate(top_k=2)"
    other = FakeNetwork()
    restore_network(checkpoint, other, is_resuming=True)
    assert all(torch.equal(other.loaded[name], network.state[name]) for name in network.state)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (FakeNetwork(gate="UniformGate()"), r"gate: .*RadarGate\(top_k=2\).*UniformGate\(\)"),
        (FakeNetwork(backbone="sha256:c"), "backbone: fingerprint sha256:b in the checkpoint, sha256:c now"),
        (
            FakeNetwork(experts={"e0": "sha256:0", "e1": "sha256:9"}),
            "expert e1: fingerprint sha256:1 in the checkpoint, sha256:9 now",
        ),
        (FakeNetwork(experts={"e0": "sha256:0"}), "expert e1: fingerprint sha256:1 in the checkpoint, absent now"),
        (
            FakeNetwork(experts={"e1": "sha256:1", "e0": "sha256:0"}),
            r"order \['e0', 'e1'\] in the checkpoint, \['e1', 'e0'\] now",
        ),
        (FakeNetwork(names=("P", "Q", "R")), r"missing in the checkpoint: layer\.gate\.rotation\.R"),
        (FakeNetwork(names=("P",)), r"the network does not have: layer\.gate\.rotation\.Q"),
        (FakeNetwork(shape=(2, 4)), r"layer\.gate\.rotation\.P: shape \(2, 3\) in the checkpoint, \(2, 4\)"),
    ],
    ids=["gate", "backbone", "expert", "expert-absent", "order", "missing", "extra", "shape"],
)
@pytest.mark.parametrize("is_resuming", [True, False])
def test_another_network_is_refused_by_name_with_both_values(network, message, is_resuming):
    with pytest.raises(ValueError, match=message):
        restore_network(saved(), network, is_resuming=is_resuming)
    assert network.loaded is None


def test_a_test_of_trained_experts_on_other_tasks_is_told_the_way(tmp_path):
    fit(expert_lm(partial(torch.optim.AdamW, lr=1e-2)), tmp_path, 1)
    lm = expert_lm(partial(torch.optim.AdamW, lr=1e-2))
    others = data()
    others.categories = {"sst2": None}
    others.task_names = ("sst2",)
    with pytest.raises(ValueError, match=r"--model\.network\.init_args\.experts RUN/experts"):
        trainer(tmp_path).test(lm, datamodule=others, ckpt_path=tmp_path / "checkpoints" / "last.ckpt", verbose=False)


def test_all_differences_are_told_at_once():
    network = FakeNetwork(gate="StretchGate()", names=("W",), backbone="sha256:x")
    with pytest.raises(ValueError, match="does not fit") as refusal:
        restore_network(saved(), network, is_resuming=False)
    assert str(refusal.value).count("\n  - ") == 4


def test_the_cause_stands_first_and_five_examples_are_shown():
    before, after = ({f"{kind}{index}": f"sha256:{kind}{index}" for index in range(9)} for kind in "ab")
    names = [f"P{index}" for index in range(30)]
    with pytest.raises(ValueError, match="does not fit") as refusal:
        restore_network(
            saved(FakeNetwork(experts=before, names=names)),
            FakeNetwork(experts=after, names=names, shape=(5, 5)),
            is_resuming=True,
        )
    lines = str(refusal.value).splitlines()
    assert (
        lines[1]
        == "  - other experts: a0, a1, a2, a3, a4 and 4 more in the checkpoint, b0, b1, b2, b3, b4 and 4 more now"
    )
    assert len(lines) == 1 + 1 + 6 + 6 + 1
    assert sum("shape" in line for line in lines) == 5
    assert lines[-2] == "  - and 25 more"


def test_other_arguments_of_the_same_gate_stop_a_resumed_fit_and_warn_otherwise():
    network = FakeNetwork(gate="RadarGate(top_k=3)")
    with pytest.raises(ValueError, match=r"RadarGate\(top_k=2\).*RadarGate\(top_k=3\)"):
        restore_network(saved(), network, is_resuming=True)
    with pytest.warns(UserWarning, match=r"RadarGate\(top_k=2\).*RadarGate\(top_k=3\); going on"):
        restore_network(saved(), network, is_resuming=False)
    assert network.loaded


def test_a_foreign_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"written by radargate.*'epoch', 'state_dict'"):
        restore_network({"epoch": 1, "state_dict": {}}, FakeNetwork(), is_resuming=True)


def test_a_newer_format_is_refused():
    checkpoint = saved()
    checkpoint["radargate"]["format_version"] = 99
    with pytest.raises(ValueError, match="format_version <= 1, but got 99"):
        restore_network(checkpoint, FakeNetwork(), is_resuming=True)


# ---- files of real fits ----


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


def data(count=4, evaluation=True):
    batches = [batch_of(rows_of(12)[3 * i : 3 * i + 3]) for i in range(count)]
    return FixedBatches(batches, [batch_of(rows_of(3))] if evaluation else ())


def fit(lm, folder, steps, resume=None, **options):
    torch.manual_seed(0)
    defaults = {"max_steps": steps, "callbacks": [RunCheckpoint()], "limit_val_batches": 0}
    run = trainer(folder, **{**defaults, **options})
    run.fit(lm, datamodule=data(), ckpt_path=resume)
    return run


def last(folder):
    return load_checkpoint(str(folder / "checkpoints" / "last.ckpt"))


def test_the_file_of_a_gate_holds_exactly_the_gate(library, tmp_path):
    fit(gated_lm(library), tmp_path, 2)
    checkpoint = last(tmp_path)  # opens with weights_only=True
    names = ("gate.rotation.P", "gate.rotation.Q", "gate.scorer.weight")
    assert set(checkpoint["state_dict"]) == {f"{layer}.{name}" for layer in LAYERS for name in names}
    assert checkpoint["global_step"] == 2
    assert {"optimizer_states", "lr_schedulers", "loops", "callbacks"} <= set(checkpoint)
    assert "hyper_parameters" not in checkpoint
    assert set(checkpoint["radargate"]["fingerprints"]["experts"]) == set(CATEGORIES)
    held = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert (tmp_path / "checkpoints/last.ckpt").stat().st_size < 3 * 4 * held + 60_000  # no backbone hides in it


def test_the_file_of_experts_holds_exactly_the_experts(tmp_path):
    fit(expert_lm(partial(torch.optim.AdamW, lr=1e-2)), tmp_path, 1)
    names = {f"{layer}.bank.{part}.{task}" for layer in LAYERS for part in ("lora_A", "lora_B") for task in CATEGORIES}
    assert set(last(tmp_path)["state_dict"]) == names


def test_a_resumed_fit_equals_one_that_never_stopped(library, tmp_path):
    options = {"limit_val_batches": 1}
    whole = gated_lm(library)
    fit(whole, tmp_path / "whole", 4, **options)
    fit(gated_lm(library), tmp_path / "parts", 2, **options)
    resumed = gated_lm(library)
    run = fit(resumed, tmp_path / "parts", 4, tmp_path / "parts/checkpoints/last.ckpt", **options)
    assert run.global_step == 4
    first, second = whole.network.trainable_state(), resumed.network.trainable_state()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    moments = [last(tmp_path / part)["optimizer_states"][0]["state"] for part in ("whole", "parts")]
    for index, state in moments[0].items():
        assert torch.equal(state["exp_avg"], moments[1][index]["exp_avg"])


@pytest.mark.parametrize("limit_val_batches", [0, 1])
def test_a_fit_that_goes_on_from_the_ends_of_two_epochs_counts_them_as_one_that_never_stopped(
    library, tmp_path, limit_val_batches
):
    def go(name, steps, resume=None):
        callbacks = [RunCheckpoint(every_n_steps=1, keep=-1), ExactResume()]
        options = {"callbacks": callbacks, "limit_val_batches": limit_val_batches, "val_check_interval": 2}
        fit(gated_lm(library), tmp_path / name, steps, resume, check_val_every_n_epoch=None, **options)

    def at(name, step):
        return tmp_path / name / f"checkpoints/step={step:08d}.ckpt"

    go("whole", 10)  # epochs of four batches
    go("first", 10, at("whole", 4))
    go("second", 10, at("first", 8))
    for name, steps in (("first", (5, 8, 10)), ("second", (9, 10))):
        for step in steps:
            expected, found = load_checkpoint(str(at("whole", step))), load_checkpoint(str(at(name, step)))
            assert found["epoch"] == expected["epoch"]
            counts = [one["loops"]["fit_loop"]["epoch_progress"] for one in (expected, found)]
            assert counts[0] == counts[1], (name, step)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_gates_stay_float32_move_and_survive_save_and_resume_bit_for_bit(library, tmp_path, precision):
    seen = {}

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["start"] = {name: value.clone() for name, value in pl_module.network.trainable_state().items()}
            seen["backbone"] = {p.dtype for n, p in pl_module.network.named_parameters() if ".gate." not in n}
            seen["scores"] = pl_module.scores.loss_sum.dtype

    lm = gated_lm(library, lr=1e-4, dtype="float32" if precision == "32-true" else "bfloat16")
    options = {"precision": precision, "limit_val_batches": 1}
    fit(lm, tmp_path, 3, callbacks=[Watch(), RunCheckpoint()], **options)
    end = lm.network.trainable_state()
    assert seen["backbone"] == {torch.float32 if precision == "32-true" else torch.bfloat16}
    assert seen["scores"] == torch.float64
    assert {value.dtype for value in end.values()} == {torch.float32}
    for name, value in end.items():
        assert not torch.equal(value, seen["start"][name]), f"{name} did not move"
        assert torch.equal(value, last(tmp_path)["state_dict"][name])
        assert not torch.equal(value, value.bfloat16().float()), "a fixture that bf16 could hold shows nothing"
    resumed = gated_lm(library, lr=1e-4, dtype="float32" if precision == "32-true" else "bfloat16")
    fit(resumed, tmp_path, 5, tmp_path / "checkpoints/last.ckpt", callbacks=[Watch(), RunCheckpoint()], **options)
    for name, value in end.items():
        assert torch.equal(seen["start"][name], value), f"{name} changed on the way through the file"
    assert {value.dtype for value in resumed.network.trainable_state().values()} == {torch.float32}


def test_real_refusals(library, tmp_path):
    fit(gated_lm(library), tmp_path, 1)
    path = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=r"gate: .*RadarGate.*StretchGate"):
        fit(gated_lm(library, StretchGate), tmp_path, 2, path)
    with pytest.raises(ValueError, match=r"gate: .*RadarGate.*UniformGate"):
        trainer(tmp_path).test(gated_lm(library, UniformGate), datamodule=data(), ckpt_path=path, verbose=False)
    gate = partial(RadarGate, top_k=2, rotation_rank=4, angle_norm="none")
    with pytest.raises(ValueError, match=r"angle_norm=rms.*angle_norm=none"):
        fit(gated_lm(library, gate), tmp_path, 2, path)
    other = {name: f"{library}/{name}" for name in CATEGORIES}
    other["echo"] = str(adapter_folder(tmp_path / "new" / "echo", seed=77))
    with pytest.raises(ValueError, match=r"expert echo: fingerprint sha256:\w+ in the checkpoint, sha256:\w+ now"):
        fit(gated_lm(other), tmp_path, 2, path)


# ---- files that are whole or absent ----


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OSError, match=r"last\.ckpt: No space left on device; the file that was there is whole"
    ) as error:
        save_atomically(path, write)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_during_a_fit_stops_it_with_the_old_checkpoint_whole(library, tmp_path, monkeypatch):
    fit(gated_lm(library), tmp_path, 1)
    before = (tmp_path / "checkpoints/last.ckpt").read_bytes()
    whole_save = torch.save

    def save(checkpoint, file):
        whole_save(checkpoint, file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"step=00000002\.ckpt: No space left.*nothing was left behind"):
        fit(gated_lm(library), tmp_path, 2, tmp_path / "checkpoints/last.ckpt")
    assert (tmp_path / "checkpoints/last.ckpt").read_bytes() == before
    names = {item.name for item in (tmp_path / "checkpoints").iterdir()}
    assert names == {f"{name}.ckpt{suffix}" for name in ("step=00000001", "last") for suffix in ("", ".sha256")}


def test_any_other_error_while_writing_leaves_nothing_behind(tmp_path):
    def write(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_atomically(tmp_path / "a" / "x", write)
    assert list((tmp_path / "a").iterdir()) == []


def test_a_second_name_outlives_the_first(tmp_path):
    first, second = tmp_path / "step=1.ckpt", tmp_path / "best.ckpt"
    write_text(first, "one")
    link_or_copy(first, second)
    link_or_copy(first, second)  # again: the same file under both names already
    write_text(first, "two")
    assert second.read_text() == "one"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["best.ckpt", "step=1.ckpt"]


def test_without_hard_links_a_copy_is_made(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("os.link", refuse)
    write_text(tmp_path / "a", "one")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "one"


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [1.5, float("inf")], "c": (None, "t")})
    text = "".join((tmp_path / "x.json").read_text().split())
    assert text == '{"a":null,"b":[1.5,null],"c":[null,"t"]}'


def test_another_combination_is_refused_when_training_goes_on_and_warned_about_otherwise():
    checkpoint, network = {}, FakeNetwork()
    store_network(checkpoint, network)
    network.combine = "gram_schmidt"
    with pytest.raises(ValueError, match="combine: saved with sum, the configuration has gram_schmidt"):
        restore_network(checkpoint, network, is_resuming=True)
    with pytest.warns(UserWarning, match="combine: saved with sum, the configuration has gram_schmidt"):
        restore_network(checkpoint, network, is_resuming=False)
