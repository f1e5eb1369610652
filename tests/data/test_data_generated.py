"""reasoning-gym tasks and data sets in the hub's layout."""

import sys

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from radargate_pl.data.library import Limits, read_tasks
from radargate_pl.data.procedural import ProceduralSource, default_sizes
from radargate_pl.data.records import BadRecords
from radargate_pl.data.sources import expand


def read(tasks, validation=5, train=20, test=10):
    sizes = default_sizes(train, validation, test)
    found = read_tasks(expand(tasks, sizes), Limits(train, validation, test), BadRecords("raise"))
    return {task.name: task for task in found}


class TestReasoningGym:
    @pytest.fixture(autouse=True)
    def needs_reasoning_gym(self):
        pytest.importorskip("reasoning_gym", reason="reasoning-gym is an optional extra")

    def test_splits_and_category(self):
        task = read("reasoning_gym:chain_sum?min_terms=2&max_terms=2")["chain_sum"]
        assert {split: len(records) for split, records in task.records.items()} == {
            "train": 20,
            "validation": 5,
            "test": 10,
        }
        assert task.category == "arithmetic"
        assert task.records["train"][0].source == "State the final answer to the following arithmetic problem: 4 + 3 ="
        assert task.records["train"][0].targets == ("7",)

    def test_later_splits_ask_nothing_that_was_asked_before_and_have_fresh_ids(self):
        # 19 x 19 questions at most, so that repeats are certain.
        records = read("reasoning_gym:chain_sum?min_terms=2&max_terms=2&max_digits=1", 20, 100, 20)["chain_sum"].records
        train, validation, test = (records[split] for split in ("train", "validation", "test"))
        asked = [{record.source for record in split} for split in (train, validation, test)]
        assert not asked[0] & asked[1]
        assert not (asked[0] | asked[1]) & asked[2]
        numbers = [int(record.id.removeprefix("chain_sum-")) for record in (*train, *validation, *test)]
        assert numbers == sorted(set(numbers))
        assert numbers[:100] == list(range(100))

    def test_same_examples_whatever_the_run_seed_and_others_for_another_seed_option(self, monkeypatch):
        first = read("reasoning_gym:lcm")["lcm"]
        monkeypatch.setenv("PL_GLOBAL_SEED", "7")
        assert read("reasoning_gym:lcm")["lcm"].records == first.records
        monkeypatch.delenv("PL_GLOBAL_SEED")
        assert read("reasoning_gym:lcm?seed=7")["lcm"].records != first.records

    def test_a_name_for_a_variant(self):
        assert list(read(["reasoning_gym:lcm", {"short": "reasoning_gym:lcm?max_numbers=2"}])) == ["lcm", "short"]

    @pytest.mark.parametrize(
        ("task", "reason"),
        [
            ("chain_some", r"task of reasoning-gym.*'chain_some'; nearest: chain_sum"),
            ("chain_sum?max_term=2", r"options of reasoning_gym:chain_sum among .*max_terms.*got \['max_term'\]"),
            ("chain_sum?min_terms=0", r"valid options for reasoning_gym:chain_sum.*min_terms must be positive"),
            ("chain_sum?min_terms=two", r"valid options for reasoning_gym:chain_sum"),
            ("count_bits?max_n=7", r"reasoning_gym:count_bits to have 5 validation questions.*Lower max_examples"),
        ],
    )
    def test_faults(self, task, reason):
        with pytest.raises(ValueError, match=reason):
            read(f"reasoning_gym:{task}", train=200)


def test_reasoning_gym_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    source = ProceduralSource("chain_sum", "chain_sum", default_sizes(1, 0, 0))
    with pytest.raises(ValueError, match=r'pip install "radargate-pl\[quickstart\]"'):
        list(source.lines())


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set as it lies on the hub: a card that names the configs, Parquet files for each split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "gsm"
    (folder / "main").mkdir(parents=True)
    card = (
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
        "  - split: test\n    path: main/test-*\n- config_name: extra\n  data_files: extra.parquet\n---\n"
    )
    (folder / "README.md").write_text(card)
    for split, count in (("train", 12), ("test", 3)):
        table = pa.table({"question": [f"{split}{i}?" for i in range(count)], "answer": [str(i) for i in range(count)]})
        pq.write_table(table, folder / "main" / f"{split}-00000-of-00001.parquet")
    extra = {"premise": [f"p{i}" for i in range(8)], "question": ["?"] * 8, "verdict": ["yes"] * 8}
    pq.write_table(pa.table(extra), folder / "extra.parquet")
    return folder


class TestHub:
    def test_local_folder_in_the_hubs_layout(self, hub_folder):
        task = read(f"hub:{hub_folder}?config=main")["gsm"]
        assert [record.source for record in task.records["train"]] == [f"train{i}?" for i in range(7)]
        assert [record.source for record in task.records["validation"]] == [f"train{i}?" for i in range(7, 12)]
        assert [record.targets for record in task.records["test"]] == [("0",), ("1",), ("2",)]
        assert task.records["test"][2].where == f"{hub_folder} test:3"

    def test_columns_of_other_names(self, hub_folder):
        tasks = read({"entail": f"hub:{hub_folder}?config=extra&source=premise&target=verdict"}, validation=1)
        assert tasks["entail"].records["train"][0].source == "p0"
        assert tasks["entail"].records["train"][0].targets == ("yes",)

    def test_class_labels_become_their_names_and_hidden_ones_bad_records(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        labels = datasets.Features(
            {"source": datasets.Value("string"), "target": datasets.ClassLabel(names=["n", "y"])}
        )
        rows = datasets.Dataset.from_dict({"source": ["a", "b", "c"], "target": [1, 0, -1]}, features=labels)
        (tmp_path / "cls").mkdir()
        rows.select([0, 1]).to_parquet(tmp_path / "cls" / "train.parquet")
        records = read(f"hub:{tmp_path / 'cls'}", validation=0)["cls"].records["train"]
        assert [record.targets for record in records] == [("y",), ("n",)]
        rows.to_parquet(tmp_path / "cls" / "train.parquet")
        with pytest.raises(ValueError, match="train:3: record without targets"):
            read(f"hub:{tmp_path / 'cls'}", validation=0)

    def test_copied_folder_is_found_before_the_hub_is_asked(self, hub_folder, cache):
        (cache / "datasets").mkdir(parents=True)
        hub_folder.rename(cache / "datasets" / "openai--gsm8k")
        assert len(read("openai/gsm8k?config=main")["gsm8k"].records["train"]) == 7

    def test_no_network_and_nothing_cached(self, cache, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="neither") as caught:
            read("openai/gsm8k?config=main&revision=abc")
        assert "hf download openai/gsm8k --repo-type dataset --revision abc --local-dir openai--gsm8k" in str(
            caught.value
        )
        assert str(cache / "datasets" / "openai--gsm8k") in str(caught.value)

    def test_unknown_config_and_column(self, hub_folder):
        with pytest.raises(ValueError, match=r"to be a data set that loads, but: .*main"):
            read(f"hub:{hub_folder}?config=nope")
        with pytest.raises(ValueError, match=r"Expected columns \['problem'\].*it has question, answer"):
            read(f"hub:{hub_folder}?config=main&source=problem")
