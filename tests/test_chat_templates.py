"""Where an answer ends and which day a prompt prints: one notion for training, scoring, generation and every resume."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from transformers import AutoModelForCausalLM, AutoTokenizer

from radargate_pl import chat_template
from radargate_pl.backbones import load_tokenizer, resolve_backbone
from radargate_pl.chat_template import (
    checked_date,
    control_tokens,
    end_token,
    end_tokens,
    prints_date,
    render_prompt,
    turn_end,
    whole_tokens,
)
from radargate_pl.cli import main
from radargate_pl.data import BenchmarkData, FlanMixture
from radargate_pl.data.benchmark_encoding import AskedAs, RequestEncoder
from radargate_pl.data.benchmark_items import Item
from radargate_pl.data.cache import content_key
from radargate_pl.data.common_day import take_common_day
from radargate_pl.data.prompts import RecordEncoder
from radargate_pl.data.records import BadRecords, Record
from radargate_pl.data.tokenised_tasks import TokenisedTasks
from radargate_pl.generation import generate_texts
from radargate_pl.kept_settings import BEFORE, keep_settings, kept_by
from radargate_pl.networks import GatedNetwork

TURN = "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
OPENING = "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + OPENING
DATED = "{{'Today: ' + strftime_now('%d %b %Y') + '\n'}}" + CHATML


def save_backbone(folder: Path, template: str | dict[str, str] | None, eos: str = "</s>") -> str:
    """The built-in tiny backbone with ChatML's tokens and another chat template."""
    base = resolve_backbone("debug-tiny")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    model.resize_token_embeddings(264)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_backbone(tmp_path_factory.mktemp("chatml"), CHATML)


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_backbone(tmp_path_factory.mktemp("dated"), DATED)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the day it is, for this package and for the templates of transformers."""
    from transformers.utils import chat_template_utils

    def set_day(year: int, month: int, day: int) -> None:
        class Day(date):
            @classmethod
            def today(cls) -> date:
                return date(year, month, day)

        class Moment:
            @staticmethod
            def now() -> date:
                return date(year, month, day)

        monkeypatch.setattr(chat_template, "date", Day)
        monkeypatch.setattr(chat_template_utils, "datetime", Moment)

    return set_day


@pytest.mark.parametrize(
    ("closing", "expected"),
    [
        ("{{ m['content'] }}<|im_end|>\n", "<|im_end|>"),
        ("{{ m['content'] }}\n<|im_end|>", "<|im_end|>"),
        ("{{ m['content'] | trim }} </s>", "</s>"),
        ("{{ m['content'] }} and more<|im_end|>", None),
        ("{{ m['content'] }}\n", None),
        ("{{ raise_exception('a system turn first') }}", None),
    ],
)
def test_the_end_is_what_the_template_writes_behind_the_answer(chatml: str, closing: str, expected: str | None) -> None:
    tokenizer = load_tokenizer(chatml)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>" + closing + "{% endfor %}"
    found = turn_end(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == expected
    assert end_token(tokenizer, is_chat=True) == (tokenizer.eos_token_id if expected is None else found)
    assert end_token(tokenizer, is_chat=False) == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "demand",
    [
        "{% if messages|length % 2 == 0 %}{{ raise_exception('the user speaks last') }}{% endif %}",
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}",
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}",
    ],
)
def test_the_end_is_found_in_templates_that_make_demands(chatml: str, demand: str) -> None:
    tokenizer = load_tokenizer(chatml)
    tokenizer.chat_template = {"default": demand + CHATML, "tools": "{{ raise_exception('never') }}"}
    assert turn_end(tokenizer) == 261


@pytest.mark.parametrize("configured", [None, 2, [2, 5]])
def test_generation_stops_at_the_ends_of_all_three(chatml: str, configured: Any) -> None:
    own = {None: set(), 2: {2}}.get(configured, {2, 5}) if not isinstance(configured, list) else set(configured)
    assert set(end_tokens(load_tokenizer(chatml), configured)) == own | {2, 261}


@pytest.mark.parametrize("tokenizer_end", ["</s>", "<|im_end|>"])
def test_labels_and_generation_agree_on_the_end(tmp_path: Path, tokenizer_end: str) -> None:
    """Gemma's case (the turn ends otherwise than the text) and Qwen's (the generation settings name a third)."""
    backbone = save_backbone(tmp_path, CHATML, tokenizer_end)
    encoder = RecordEncoder(load_tokenizer(backbone), max_length=64)
    encoded = encoder.encode([Record("a", "q", ("red",), "f:1")], "t", BadRecords("raise"))
    assert encoder.tokenizer.decode(encoded.answer(0)) == "red<|im_end|>"
    assert encoder.answer_end() == "<|im_end|>"
    network = GatedNetwork(backbone=backbone, dtype="float32", experts=[])
    assert encoder.end in network.end_ids
    with torch.no_grad():  # the head says <|im_end|> whatever it reads
        network.backbone.lm_head.weight.zero_()
        network.backbone.lm_head.weight[261] = 1.0
        network.backbone.model.norm.weight.abs_()
    network.backbone.lm_head.register_forward_hook(
        lambda _, __, y: torch.nn.functional.one_hot(torch.full(y.shape[:-1], 261), y.shape[-1]).float()
    )
    ids = torch.tensor([encoded.prompt(0)])
    assert generate_texts(network, ids, torch.ones_like(ids), max_new_tokens=9) == [("", 1)]


def test_generation_past_the_network_stops_too_and_an_end_is_never_forced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = save_backbone(tmp_path, CHATML)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "forced_eos_token_id": 2}))
    with caplog.at_level("INFO"):
        network = GatedNetwork(backbone=backbone, dtype="float32", experts=[])
    assert network.backbone.generation_config.eos_token_id == [2, 261]
    assert "forced_eos_token_id of the backbone's generation settings is not applied" in caplog.text
    ids = torch.tensor([[5, 6, 7]])
    options = {"do_sample": False, "max_new_tokens": 3}
    new = network.backbone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    assert torch.equal(new[:, 3:], network.generate(ids, torch.ones_like(ids), **options))


def test_a_model_whose_parts_name_one_end_keeps_its_settings() -> None:
    network = GatedNetwork(backbone="debug-tiny", dtype="float32", experts=[])
    assert network.backbone.generation_config.eos_token_id == 2
    assert network.end_ids == (2,)


def test_a_text_token_beyond_the_embedding_is_one_sentence(tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.add_tokens(["<new-a>", "<new-b>", "<new-c>"])
    tokenizer.save_pretrained(backbone)
    with pytest.warns(UserWarning, match="The embedding has 264 rows and none for <new-"):
        network = GatedNetwork(backbone=backbone, dtype="float32", experts=[])
    ids = torch.tensor([[5, 6, 264]])
    for ask in (
        lambda: network(ids, torch.ones_like(ids), ids),
        lambda: network.generate(ids, torch.ones_like(ids), max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=r"Expected token ids below 264, .* a text holds a token with id 264"):
            ask()


def test_an_old_end_can_be_asked_for(chatml: str) -> None:
    tokenizer = load_tokenizer(chatml)
    old = RecordEncoder(tokenizer, answer_end="eos")
    assert (old.end, RecordEncoder(tokenizer).end, RecordEncoder(tokenizer, prompt="plain").end) == (2, 261, 2)
    assert old.key() != RecordEncoder(tokenizer).key()


def test_a_day_is_printed_as_the_clock_would_print_it(dated: str, clock: Any) -> None:
    tokenizer = load_tokenizer(dated)
    tokenizer.chat_template = "\n{{ strftime_now('%A %-d. %B %Y, %y%m%d %j %F 100 %%d') }}" + CHATML
    clock(2026, 11, 5)
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert render_prompt(tokenizer, "x", "2026-11-05") == theirs
    assert "Thursday 5. November 2026, 261105 309 2026-11-05 100 %d" in theirs


@pytest.mark.parametrize(
    "how",
    [
        "{% macro f() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ f() }}",
        "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%F') %}"
        "{% else %}{% set date_string = 'never' %}{% endif %}{% endif %}{{ date_string }}",
        "{% set now = strftime_now %}{{ now('%F') }}",
        "{{ strftime_now(format='%F') }}",
        "{{ strftime_now('%F %H:%M:%S')[:10] }}",
        "{{ strftime_now('%Y')|int + 0 }}-12-01",
    ],
)
def test_the_day_is_fixed_however_a_template_asks_for_it(dated: str, clock: Any, how: str) -> None:
    tokenizer = load_tokenizer(dated)
    tokenizer.chat_template = how + CHATML
    clock(2031, 1, 5)
    assert render_prompt(tokenizer, "x", "2026-12-01").startswith("2026-12-01<|im_start|>")


def test_prompts_keep_the_day_of_the_run_when_the_clock_passes_midnight(dated: str, clock: Any) -> None:
    tokenizer, bad = load_tokenizer(dated), BadRecords("raise")
    assert prints_date(tokenizer)
    clock(2026, 11, 30)
    encoder = RecordEncoder(tokenizer, max_length=200)
    key, records = encoder.key(), [Record("a", "q", ("a",), "f:1")]
    before = encoder.encode(records, "t", bad)
    clock(2026, 12, 1)
    assert "30 Nov 2026" in tokenizer.decode(before.prompt(0))
    assert encoder.encode(records, "t", bad).prompt(0) == before.prompt(0) == encoder.prompt("q").ids
    assert encoder.key() == key
    assert RecordEncoder(tokenizer, max_length=200).key() != key, "tokens of another day are others"
    assert RecordEncoder(tokenizer, max_length=200, date="2026-11-30").key() == key


@pytest.mark.parametrize("change", ["template", "branch", "printed token", "token in a branch"])
def test_the_key_of_tokens_holds_the_template_and_what_it_renders(chatml: str, change: str) -> None:
    """The text, since no one rendering walks every branch of it; the rendering, since the text names the day only."""
    tokenizer, other = load_tokenizer(chatml), load_tokenizer(chatml)
    long = "{% if messages[0].content|length > 3 %}long {{ bos_token }}{% endif %}"
    for one in (tokenizer, other):
        one.chat_template = (long if "branch" in change else "{{ bos_token }}") + CHATML
    if change == "template":
        other.chat_template = other.chat_template.replace("assistant", "model")
    elif change == "branch":
        other.chat_template = other.chat_template.replace("long", "wide")
    else:
        other.bos_token = "<unk>"
    before, after = RecordEncoder(tokenizer, max_length=200), RecordEncoder(other, max_length=200)
    assert before.prompt("1 + 1").ids != after.prompt("1 + 1").ids
    assert before.key() != after.key()


@pytest.mark.parametrize("text", ["30.11.2026", "tomorrow", "2026-13-01"])
def test_what_is_no_date_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"Expected date to be a day as 2026-11-30, .* but got '{text}'"):
        checked_date(text)


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}",
        {"tool_use": "x", "rag": "y"},
        "{% for m in %}",
        "{{ ['a', 'b'] | random }}",
        "{% if messages[0]['content'] is string %}{{ nothing.field }}{% endif %}",
    ],
)
def test_a_template_that_refuses_a_question_is_one_sentence(chatml: str, template: Any) -> None:
    tokenizer = load_tokenizer(chatml)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="Expected the tokenizer's chat template to render one turn of a user"):
        RecordEncoder(tokenizer).encode([Record("a", "q", ("a",), "f:1")], "t", BadRecords("raise"))


def test_named_templates_without_a_default_are_named(chatml: str) -> None:
    tokenizer = load_tokenizer(chatml)
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(
        ValueError, match=r"but it says: there are several, rag, tool_use, and none is called default\. S"
    ):
        RecordEncoder(tokenizer)


def test_a_pad_token_beyond_the_embedding_is_refused_by_name(tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["one", "two", "three"])
    tokenizer.pad_token = "three"
    tokenizer.save_pretrained(backbone)
    with pytest.raises(ValueError, match=r"ids below 264, the rows of its embedding, but pad_token is 26\d"):
        GatedNetwork(backbone=backbone, dtype="float32", experts=[])


def test_control_tokens_in_data_are_text_in_answers_and_named_in_prompts(chatml: str) -> None:
    encoder = RecordEncoder(load_tokenizer(chatml), prompt="plain", max_length=64)
    records = [Record("a", "a </s> b", ("<s>x</s>y",), "f:7"), Record("b", "q", ("x",), "f:8")]
    with pytest.warns(UserWarning, match="reads as a control token") as warned:
        encoder.say_control_text(records, "t")
    told = [str(warning.message) for warning in warned]
    assert "task t: 1 sources hold text that the tokenizer reads as a control token ('</s>' in f:7). Prompts" in told[0]
    assert "task t: 1 answers hold text that the tokenizer reads as a control token ('<s>' in f:7). It is " in told[1]
    encoded = encoder.encode(records, "t", BadRecords("raise"))
    answer = encoded.answer(0)
    assert encoder.tokenizer.decode(answer[:-1]) == "<s>x</s>y"
    assert [token for token in answer if token < 4] == [encoder.end], "one end, at the end"
    assert encoder.tokenizer.decode(encoded.answer(1)) == "x</s>"


def test_control_tokens_are_said_with_five_places_also_when_the_cache_has_the_tokens(
    chatml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "cache"))
    (path := tmp_path / "t.jsonl").write_text('{"source": "<|im_end|>q", "target": "a"}\n' * 9)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"task t: 9 sources .*'<\|im_end\|>' in .*t.jsonl:1, .*:5 and 4 more"):
            FlanMixture(str(path), chatml, validation_examples=2).prepare_data()


def test_a_cache_of_an_earlier_version_with_control_tokens_in_answers_is_not_taken(
    chatml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "cache"))
    odd, plain = [Record("a", "q", ("x</s>y",), "f:1")], [Record("a", "q", ("xy",), "f:1")]
    encoder = RecordEncoder(load_tokenizer(chatml))
    tasks = TokenisedTasks(encoder, BadRecords("raise"))
    assert tasks._key(plain) == content_key(plain, encoder.key()), "ordinary data keep their place"
    assert tasks._key(odd) != content_key(odd, encoder.key())


def test_words_that_a_tokenizer_keeps_whole_are_no_control_tokens(chatml: str) -> None:
    tokenizer = load_tokenizer(chatml)
    tokenizer.add_tokens(["<think>"])
    assert "<think>" in whole_tokens(tokenizer)
    assert {"<s>", "<|im_end|>"} <= control_tokens(tokenizer).keys()
    assert "<think>" not in control_tokens(tokenizer)


def test_an_end_inside_an_answer_that_stays_a_token_is_a_bad_record(chatml: str) -> None:
    """A tokenizer that does not know its turn's end for a special token cannot write it as text."""
    tokenizer = load_tokenizer(chatml)
    tokenizer.add_tokens(["<turn>"])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<turn>")
    encoder, bad = RecordEncoder(tokenizer, max_length=90), BadRecords("raise")
    assert encoder.answer_end() == "<turn>"
    encoder.encode([Record("a", "q", ("x<turn>y",), "f:1"), Record("b", "q", ("x",), "f:2")], "t", bad)
    assert [text for text in bad.problems if "the answer holds '<turn>', the token that ends answers" in text]
    assert len(bad.problems) == 1


def test_a_benchmark_names_two_starts_and_control_tokens_too(chatml: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(chatml)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    with pytest.warns(UserWarning, match="prompts begin with two <s>"):
        encoder = RequestEncoder(tokenizer, AskedAs("<s>{source}"))
    item = Item("1", "t", "a</s>", ("x", "y"), 0, ("x",), "f:1")
    for ask in (
        lambda: encoder.ranking([item], BadRecords("raise")),
        lambda: RequestEncoder(tokenizer).generation([item], 4, BadRecords("raise")),
    ):
        with pytest.warns(UserWarning, match=r"task t: 1 sources .*'</s>' in f:1"):
            ask()


def test_an_encoder_names_two_ends(chatml: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(chatml)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    with pytest.warns(UserWarning, match="prompts end with two </s>"):
        encoder = RecordEncoder(tokenizer, prompt="{source}</s>", is_encoder_decoder=True)
    answer = encoder.encode([Record("a", "q", ("x</s>y",), "f:1")], "t", BadRecords("raise")).answer(0)
    assert answer.count(2) == 1, "an answer of a sequence of its own is text as well"


def test_two_starts_are_named(chatml: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(chatml)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    with pytest.warns(UserWarning, match="begin with two <s>.*special_tokens: false"):
        RecordEncoder(tokenizer, prompt="<s>[INST] {source} [/INST]")
    RecordEncoder(tokenizer, prompt="<s>[INST] {source} [/INST]", special_tokens=False)
    RecordEncoder(tokenizer, prompt="{source}:")


@pytest.fixture
def home(tmp_path: Path, dated: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and a config of a fit whose prompts are dated."""
    monkeypatch.chdir(tmp_path)
    for name in ("add", "cut"):
        rows = [{"source": f"{i} {name} 1", "target": str(i + 1)} for i in range(12)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load((Path(__file__).parent.parent / "configs/debug.yaml").read_text())
    config["trainer"] |= {"default_root_dir": "run", "max_steps": 2, "val_check_interval": 1}
    config["model"]["network"]["init_args"]["backbone"] = dated
    config["model"]["network"]["init_args"]["gate"] = {"class_path": "radargate_pl.gates.StretchGate"}
    config["data"]["init_args"] |= {"tasks": ["add.jsonl", "cut.jsonl"], "validation_examples": 2, "max_length": 200}
    Path("fit.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def data_of(path: str) -> Any:
    return yaml.safe_load(Path(path).read_text())["data"]["init_args"]


def test_a_run_keeps_its_day_and_end_through_resume_and_other_commands(home: Path, clock: Any) -> None:
    clock(2026, 11, 30)
    assert main(["fit", "--config", "fit.yaml"]) == 0
    assert (data_of("run/config.yaml")["date"], data_of("run/config.yaml")["answer_end"]) == ("2026-11-30", "template")
    gate = json.loads(Path("run/gate/gate_config.json").read_text())
    assert (gate["answer_end"], gate["prompt_date"]) == ("<|im_end|>", "2026-11-30")
    clock(2026, 12, 2)
    assert main(["fit", "--config", "fit.yaml", "--ckpt_path", "auto", "--trainer.max_steps", "3"]) == 0
    assert data_of("run/config.yaml")["date"] == "2026-11-30"
    words = ["--config", "fit.yaml", "--ckpt_path", "run", "--trainer.default_root_dir", "predicted"]
    assert main(["validate", *words]) == 0
    assert data_of("predicted/config.yaml")["date"] == "2026-11-30"


@pytest.mark.parametrize("end", ["template", "eos"])
def test_a_checkpoint_and_a_gate_away_from_their_run_still_say_day_and_end(home: Path, clock: Any, end: str) -> None:
    clock(2026, 11, 30)
    assert main(["fit", "--config", "fit.yaml", "--data.answer_end", end]) == 0
    shutil.copy("run/checkpoints/last.ckpt", "alone.ckpt")
    shutil.copytree("run/gate", "elsewhere/gate")
    clock(2026, 12, 2)
    backbone = yaml.safe_load(Path("fit.yaml").read_text())["model"]["network"]["init_args"]["backbone"]

    def arguments() -> Any:
        return Namespace(data=Namespace(init_args={"date": None, "answer_end": None, "tokenizer": backbone}))

    for place in ("alone.ckpt", "elsewhere/gate", "run/gate", "run/checkpoints/last.ckpt"):
        keep_settings(config := arguments(), Path(place))
        assert (config.data.init_args["date"], config.data.init_args["answer_end"]) == ("2026-11-30", end), place
    if end == "template":
        words = ["--config", "fit.yaml", "--ckpt_path", "alone.ckpt", "--trainer.default_root_dir", "validated"]
        assert main(["validate", *words]) == 0
        assert data_of("validated/config.yaml")["answer_end"] == end
        assert data_of("validated/config.yaml")["date"] == "2026-11-30"
    (config := arguments()).data.init_args |= {"date": "2026-01-01", "answer_end": "eos"}
    keep_settings(config, Path("alone.ckpt"))
    assert config.data.init_args == {"date": "2026-01-01", "answer_end": "eos", "tokenizer": backbone}, "typed"


def test_a_checkpoint_and_a_gate_of_an_earlier_version_say_its_end(tmp_path: Path) -> None:
    old = Path(__file__).parent / "old_runs"
    found = sorted(old.rglob("*.ckpt"))[0]
    shutil.copy(found, tmp_path / "alone.ckpt")
    assert kept_by(tmp_path / "alone.ckpt") == kept_by(found) == BEFORE
    for gate in old.rglob("gate_config.json"):
        assert kept_by(gate.parent) == BEFORE


def test_files_that_say_day_and_end_and_are_damaged_are_named(tmp_path: Path) -> None:
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate/gate_config.json").write_text("{")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("data: [")
    places = {"gate": "gate/gate_config.json", "run/checkpoints/a.ckpt": "run/config.yaml"}
    for given, named in places.items():
        with pytest.raises(ValueError, match=rf"Expected .*{named} to be .*whole.* damaged"):
            kept_by(tmp_path / given)


def test_a_file_that_is_no_checkpoint_is_said_before_it_is_asked_for_a_day(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save([1, 2], "alone.ckpt")
    assert main(["validate", "--config", "fit.yaml", "--ckpt_path", "alone.ckpt"]) == 1
    assert "Expected alone.ckpt to be a checkpoint written by radargate" in capsys.readouterr().err


class _Processes:
    """Stands for a trainer of two processes whose first one has another day."""

    world_size = 2

    def __init__(self, day: str) -> None:
        self.strategy = self
        self.day = day

    def broadcast(self, _: str) -> str:
        return self.day


def test_all_processes_take_the_day_of_the_first(dated: str, clock: Any, home: Path) -> None:
    clock(2026, 12, 1)
    data = FlanMixture("add.jsonl", dated, validation_examples=2, max_length=200)
    data.prepare_data()
    data.trainer = _Processes("2026-11-30")  # type: ignore[assignment]
    data.setup("fit")
    text = data.encoder.tokenizer.decode(data.encoded["add", "train"].prompt(0))
    assert (data.date, "30 Nov 2026" in text) == ("2026-11-30", True)
    other = SimpleNamespace(trainer=_Processes("2026-11-30"), date="2026-11-30")
    assert not take_common_day(other)


def test_a_benchmark_keeps_the_day_of_the_fit_and_shows_it(dated: str, clock: Any, home: Path) -> None:
    Path("root").mkdir()
    Path("root/gsm8k.jsonl").write_text('{"question": "1?", "answer": "so #### 1"}\n' * 3)
    clock(2031, 1, 5)
    data = BenchmarkData(
        tasks="gsm8k", tokenizer=dated, root="root", prompt="chat", date="2026-11-30", max_new_tokens=9
    )
    assert "prompts dated 2026-11-30" in data.preview(1)
    prompt = load_tokenizer(dated).decode(data.requests("gsm8k")[0].rows[0].prompt)
    assert "Today: 30 Nov 2026" in prompt
    data.trainer = _Processes("2026-12-01")  # type: ignore[assignment]
    data.setup("test")
    assert "Today: 01 Dec 2026" in load_tokenizer(dated).decode(data.requests("gsm8k")[0].rows[0].prompt)


def test_the_harness_asks_on_the_day_of_the_fit(dated: str, clock: Any) -> None:
    pytest.importorskip("lm_eval")
    from radargate_pl.harness_model import GatedHFLM

    network = GatedNetwork(backbone=dated, dtype="float32", experts=[])
    network.prompt_date = "2026-11-30"
    clock(2031, 1, 5)
    model = GatedHFLM(network, None, 1)
    assert "Today: 30 Nov 2026" in model.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_run_of_an_earlier_version_keeps_its_end(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "fit.yaml", "--data.answer_end", "eos"]) == 0
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    del stored["data"]["init_args"]["answer_end"], stored["data"]["init_args"]["date"]
    Path("run/config.yaml").write_text(yaml.safe_dump(stored))
    assert main(["fit", "--config", "fit.yaml", "--ckpt_path", "auto", "--trainer.max_steps", "3"]) == 0
    assert data_of("run/config.yaml")["answer_end"] == "eos"


def test_another_day_is_refused_on_resume_and_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "fit.yaml", "--data.date", "2026-11-30"]) == 0
    words = ["--ckpt_path", "auto", "--trainer.max_steps", "3", "--data.date", "2026-12-01"]
    assert main(["fit", "--config", "fit.yaml", *words]) != 0
    told = capsys.readouterr().err
    assert "task add, cut: date was '2026-11-30' and is '2026-12-01'" in told


def test_a_date_without_quotation_marks_is_a_date(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fit.yaml").write_text(
        Path("fit.yaml").read_text().replace("max_length: 200", "max_length: 200\n    date: 2026-11-30")
    )
    assert main(["fit", "--config", "fit.yaml", "--preview"]) == 0
    assert "prompts dated 2026-11-30" in capsys.readouterr().out


@pytest.mark.parametrize("tried", ["record", "benchmark"])
def test_a_template_that_drops_the_question_is_refused(chatml: str, tried: str) -> None:
    """One for pictures goes through the parts of a message; a text has characters for parts, and none is shown."""
    tokenizer = load_tokenizer(chatml)
    parts = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    tokenizer.chat_template = CHATML.replace("{{'<|im_start|>' + m['role'] + '\n' + m['content']", parts + "{{''")
    with pytest.raises(ValueError, match="chat template to show a user's question, but it leaves it out"):
        RecordEncoder(tokenizer) if tried == "record" else RequestEncoder(tokenizer, AskedAs("chat"))


def test_the_preview_names_end_and_day(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "fit.yaml", "--preview", "--data.date", "2026-11-30"]) == 0
    shown = capsys.readouterr().out
    assert "answers end with '<|im_end|>', prompts dated 2026-11-30" in shown
