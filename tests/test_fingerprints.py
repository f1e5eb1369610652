"""Fingerprints see every byte, name, shape and dtype, and nothing else."""

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from radargate_pl.fingerprints import check_fingerprint, fingerprint_state, fingerprint_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64)}


def fingerprint(folder, tensors, extra=None, metadata=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return fingerprint_tensors([folder / "model.safetensors"], extra)


def test_the_same_tensors_elsewhere_have_the_same_fingerprint(tmp_path):
    one = fingerprint(tmp_path / "one", TENSORS)
    assert one.startswith("sha256:")
    assert len(one) == 7 + 64
    turned = dict(reversed(TENSORS.items()))
    assert fingerprint(tmp_path / "other", turned, metadata={"format": "pt", "note": "another"}) == one


def test_shards_do_not_matter(tmp_path):
    one = fingerprint(tmp_path / "one", TENSORS)
    files = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, (name, tensor) in zip(files, TENSORS.items(), strict=True):
        save_file({name: tensor}, file)
    assert fingerprint_tensors(files) == fingerprint_tensors(files[::-1]) == one


@pytest.mark.parametrize(
    "changed",
    [
        {**TENSORS, "a.weight": TENSORS["a.weight"] + torch.eye(2, 3) * 1e-6},
        {**TENSORS, "a.weight": TENSORS["a.weight"].reshape(3, 2)},
        {**TENSORS, "b": TENSORS["b"].view(torch.float64)},
        {"a": TENSORS["a.weight"], "b": TENSORS["b"]},
        {**TENSORS, "c": torch.zeros(1)},
        {"b": TENSORS["b"]},
    ],
    ids=["value", "shape", "dtype", "name", "one more", "one less"],
)
def test_any_change_of_the_tensors_changes_it(tmp_path, changed):
    assert fingerprint(tmp_path / "one", TENSORS) != fingerprint(tmp_path / "other", changed)


def test_extra_values_enter(tmp_path):
    found = {fingerprint(tmp_path / "one", TENSORS, extra) for extra in (None, {"r": 8}, {"r": 4}, {"alpha": 8})}
    assert len(found) == 4


def test_a_gguf_file_counts_as_a_whole(tmp_path):
    for name, content in (("one", b"GGUF tensors"), ("same", b"GGUF tensors"), ("other", b"GGUF Tensors")):
        (tmp_path / f"{name}.gguf").write_bytes(content)
    one, same, other = (fingerprint_tensors([tmp_path / f"{name}.gguf"]) for name in ("one", "same", "other"))
    assert one == same != other


def test_memory_stays_small(tmp_path):
    save_file({"large": torch.zeros(16 << 20)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    fingerprint_tensors([tmp_path / "model.safetensors"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20  # of 64 MiB


def test_tensors_in_memory(tmp_path):
    one = fingerprint_state(TENSORS)
    assert one == fingerprint_state(dict(reversed(TENSORS.items())))
    assert one != fingerprint_state({**TENSORS, "b": TENSORS["b"] + 1})
    assert one != fingerprint_state({**TENSORS, "b": TENSORS["b"].reshape(2, 2)})
    halves = TENSORS["a.weight"].to(torch.bfloat16)
    assert fingerprint_state({"a": halves}) != fingerprint_state({"a": halves.to(torch.float16)})


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a weights file at .*gone.safetensors, but there is none"):
        fingerprint_tensors([tmp_path / "gone.safetensors"])


def test_no_file_at_all():
    with pytest.raises(ValueError, match="at least one tensor"):
        fingerprint_tensors([])


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 8, (4).to_bytes(8, "little") + b"[1]}", b"\x02" + bytes(7) + b"[]"]
)
def test_a_damaged_header(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="its header is damaged"):
        fingerprint_tensors([file])


def test_a_file_that_ends_early(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="it ends early"):
        fingerprint_tensors([file])


def test_a_difference_is_shown_with_both_values():
    check_fingerprint("the backbone", "sha256:1", "sha256:1")
    with pytest.raises(ValueError, match=r"Expected the backbone .* expected sha256:1, found sha256:2"):
        check_fingerprint("the backbone", "sha256:1", "sha256:2")


def test_it_equals_a_calculation_by_hand(tmp_path):
    import hashlib

    tensor = torch.tensor([1.0, 2.0])
    entry = ["w", [2], "F32", hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]
    text = json.dumps([[entry], {"r": 8}], separators=(",", ":"))
    expected = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint(tmp_path / "one", {"w": tensor}, {"r": 8}) == expected
