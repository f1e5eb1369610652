"""Domain embeddings: against plain forwards of each text alone; their files; the command that makes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import assert_near
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import FIVE, SEQ2SEQ, batch_of, left_padded, model_folder
from tiny_runs import adapter_folder
from torch import Tensor

from radargate_pl.backbones import load_backbone, load_tokenizer
from radargate_pl.domain_command import main
from radargate_pl.domains import DOMAIN_FILE, domain_embedding, read_domain, write_domain

LENGTHS = (9, 6, 4, 1)


def inputs_of(kind: str, left: bool = False) -> dict[str, Tensor]:
    batch = batch_of(kind, LENGTHS)
    batch = left_padded(batch) if left else batch
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def mean_hidden(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The mean last hidden state of one text without padding, from the whole model, head and all; float64."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()(input_ids=ids[None])[0][0].double().mean(0)
    return model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0].double().mean(0)


def by_hand(model: torch.nn.Module, texts: list[Tensor]) -> Tensor:
    mean = torch.stack([mean_hidden(model, ids) for ids in texts]).mean(0)
    return (mean / mean.square().sum().sqrt()).float()


@pytest.mark.parametrize("kind", FIVE)
def test_each_text_counts_the_same_and_padding_for_nothing(kind: str) -> None:
    """Absolute positions inside mBART's encoder shift with padding at the left: there it is padded at the right."""
    model, batch = load_backbone(model_folder(kind), "float32").model, inputs_of(kind)
    texts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    expected = by_hand(model, texts)
    for left in (False,) if kind in SEQ2SEQ else (False, True):
        whole = inputs_of(kind, left)
        parts = [{name: tensor[rows] for name, tensor in whole.items()} for rows in (slice(0, 3), slice(3, 4))]
        for batches in ([whole], parts):
            found = domain_embedding(model, batches)
            assert_near(found, expected, 1e-5, kind)
    assert found.dtype == torch.float32
    assert found.norm().item() == pytest.approx(1, abs=1e-6)
    other = domain_embedding(model, [{name: tensor[:2] for name, tensor in whole.items()}])
    assert (other - found).abs().max() > 1e-3


def test_what_the_model_says_at_padding_may_be_anything() -> None:
    model, batch = load_backbone("debug-tiny", "float32").model, inputs_of("llama")
    expected = domain_embedding(model, [batch])

    def spoil(module: torch.nn.Module, given: tuple, output: Tensor) -> Tensor:
        return output.masked_fill(~batch["attention_mask"].bool().unsqueeze(-1), torch.nan)

    handle = model.model.norm.register_forward_hook(spoil)
    assert torch.equal(domain_embedding(model, [batch]), expected)
    handle.remove()


def test_nothing_to_embed_is_refused() -> None:
    model, batch = load_backbone("debug-tiny", "float32").model, inputs_of("llama")
    with pytest.raises(ValueError, match="at least one sample"):
        domain_embedding(model, [])
    with pytest.raises(ValueError, match="at least one token"):
        domain_embedding(model, [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}])


# Files.


def test_an_embedding_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_domain(tmp_path) is None
    embedding = torch.nn.functional.normalize(torch.randn(7), dim=0)
    write_domain(tmp_path, embedding, backbone_fingerprint="sha256:a", samples=5)
    assert [path.name for path in tmp_path.iterdir()] == [DOMAIN_FILE]
    assert torch.equal(read_domain(tmp_path), embedding)
    assert torch.equal(read_domain(tmp_path, backbone_fingerprint="sha256:a"), embedding)
    with safe_open(tmp_path / DOMAIN_FILE, framework="pt") as content:
        assert list(content.keys()) == ["domain"]
        assert content.metadata() == {"backbone": "sha256:a", "samples": "5"}
    with pytest.raises(ValueError, match=r"expected sha256:a, found sha256:b"):
        read_domain(tmp_path, backbone_fingerprint="sha256:b")


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / DOMAIN_FILE
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{DOMAIN_FILE} to be whole, but it is damaged"):
        read_domain(tmp_path)
    for tensors in ({"other": torch.ones(3)}, {"domain": torch.ones(3, 2)}, {"domain": torch.tensor([1.0, torch.nan])}):
        save_file(tensors, file)
        with pytest.raises(ValueError, match="damaged"):
            read_domain(tmp_path)


# The command.


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Three experts, two tasks of one category and one of its own name."""
    for seed, name in enumerate(("add", "text", "unused")):
        adapter_folder(tmp_path / "experts" / name, seed)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task, category in (("add", None), ("echo", "text"), ("turn", "text")):
        records = [{"source": f"{task} {i} " + "x" * (3 * i), "target": str(i), "category": category} for i in range(6)]
        lines = [json.dumps({k: v for k, v in record.items() if v is not None}) for record in records]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def command(library: Path, *words: str, tasks: tuple[str, ...] | None = None) -> int:
    given = tasks or (str(library / "tasks"),)
    options = ("--backbone", "debug-tiny", "--experts", str(library / "experts"), "--dtype", "float32")
    return main([*options, "--validation_examples", "2", *words, "--tasks", *given])


def texts_of(*records: tuple[str, int], length: int = 128) -> list[Tensor]:
    """Prompt, answer and end token as the mixture encodes them."""
    tokenizer = load_tokenizer("debug-tiny")
    texts = []
    for task, i in records:
        prompt = tokenizer(f"{task} {i} " + "x" * (3 * i) + "\n")["input_ids"]
        answer = [*tokenizer(str(i), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        texts.append(torch.tensor((prompt + answer)[:length]))
    return texts


def test_the_command_embeds_every_experts_training_records(
    library: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADARGATE_CACHE", str(library / "cache"))
    assert command(library, "--samples", "3") == 0
    said = capsys.readouterr().out
    assert "3 samples of add\n" in said
    assert "3 samples of echo, turn\n" in said
    assert "no task given belongs to ['unused']" in said
    backbone = load_backbone("debug-tiny", "float32")
    expected = {
        "add": texts_of(*(("add", i) for i in range(3))),
        "text": texts_of(("echo", 0), ("turn", 0), ("echo", 1)),
    }
    for name, texts in expected.items():
        found = read_domain(library / "experts" / name, backbone_fingerprint=backbone.fingerprint)
        assert_near(found, by_hand(backbone.model, texts), 1e-5, name)
    assert not (library / "experts" / "unused" / DOMAIN_FILE).exists()
    # Validation records (the last two) are never read, however many samples are asked for; long ones lose their end.
    assert command(library, "--samples", "99", "--max_length", "9", "--overwrite") == 0
    assert "4 samples of add\n" in capsys.readouterr().out
    texts = texts_of(*(("add", i) for i in range(4)), length=9)
    assert_near(read_domain(library / "experts" / "add"), by_hand(backbone.model, texts), 1e-5, "add")


def test_the_command_refuses_before_it_writes(
    library: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADARGATE_CACHE", str(library / "cache"))

    def refused(*words: str, tasks: tuple[str, ...] | None = None) -> str:
        assert command(library, *words, tasks=tasks) == 1
        return capsys.readouterr().err

    write_domain(library / "experts" / "add", torch.ones(3), backbone_fingerprint="x", samples=1)
    said = refused()
    assert "add/domain.safetensors" in said
    assert "--overwrite" in said
    assert not (library / "experts" / "text" / DOMAIN_FILE).exists()
    assert torch.equal(read_domain(library / "experts" / "add"), torch.ones(3))
    assert "{'other': None}. The experts are ['add', 'text', 'unused']" in refused(
        tasks=(f"other={library / 'tasks' / 'add.jsonl'}",)
    )
    assert "category_of as task=category, but got ['echo']" in refused("--category_of", "echo")
    assert "samples to be at least 1, but got 0" in refused("--samples", "0")
    assert "max_length to be at least 1, but got 0" in refused("--max_length", "0")
    shutil.rmtree(library / "experts" / "add")
    assert "'add': None" in refused()


def test_categories_may_be_given(library: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADARGATE_CACHE", str(library / "cache"))
    assert command(library, "--category_of", "turn=unused", "--samples", "2") == 0
    said = capsys.readouterr().out
    assert "2 samples of echo\n" in said
    assert "2 samples of turn\n" in said
    assert "no task given" not in said


def test_a_backbone_that_cannot_be_loaded_is_refused_by_name(library: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--experts", str(library / "experts"), "--tasks", str(library / "tasks"), "--validation_examples", "2"]
    assert main(["--backbone", "./nowhere", *words]) == 1
    assert "./nowhere" in capsys.readouterr().err
    assert not list((library / "experts").rglob(DOMAIN_FILE))
