"""Where adapters are found and what they are called."""

import shutil

import pytest
from tiny_adapters import llama, save_with_peft

from radargate_pl.adapters import load_adapters, resolve_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def adapter(tmp_path):
    """A good adapter called `good`, to be spoilt."""
    save_with_peft(tmp_path / "good", llama(), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return tmp_path / "good"


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")


def test_a_folder_of_folders_sorted_by_name(tmp_path):
    folders(tmp_path, "qasc", "aqua", "v1.0", ".half-written")
    (tmp_path / "README.md").write_text("not a folder")
    assert resolve_adapters(str(tmp_path)) == {
        name: tmp_path / at for name, at in (("aqua", "aqua"), ("qasc", "qasc"), ("v1_0", "v1.0"))
    }
    assert resolve_adapters(str(tmp_path / "aqua")) == {"aqua": tmp_path / "aqua"}


def test_lists_and_names_keep_their_order(tmp_path):
    folders(tmp_path, "b", "a")
    where = [str(tmp_path / name) for name in ("b", "a")]
    assert list(resolve_adapters(where)) == ["b", "a"]
    assert list(resolve_adapters({"second": where[1], "first": where[0]}).items()) == [
        ("second", tmp_path / "a"),
        ("first", tmp_path / "b"),
    ]
    assert resolve_adapters([]) == {}
    assert load_adapters([], llama()) == []


def test_names_that_cannot_be_used(tmp_path):
    folders(tmp_path, "x/a", "y/a", "v.1", "v_1")
    with pytest.raises(ValueError, match=r"both called 'a'. Name them: experts: {name: path or hub id}"):
        resolve_adapters([str(tmp_path / "x/a"), str(tmp_path / "y/a")])
    with pytest.raises(ValueError, match=r"Expected expert names of letters, digits, _ and -, but got 'v.1'"):
        resolve_adapters({"v.1": str(tmp_path / "x/a")})
    shutil.rmtree(tmp_path / "x")
    shutil.rmtree(tmp_path / "y")
    with pytest.raises(ValueError, match=r"Two folders in .* give the name 'v_1'"):
        resolve_adapters(str(tmp_path))


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder .*gone"):
        resolve_adapters(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"holds no PEFT folders"):
        resolve_adapters(str(tmp_path))
    folders(tmp_path, "run/experts/a")
    with pytest.raises(ValueError, match=r"'.*run/experts' has no adapter_config.json"):
        resolve_adapters(str(tmp_path / "run"))


def test_a_hub_id_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf download someone/lora") as error:
        resolve_adapters(["someone/lora"])
    assert "models--someone--lora" in str(error.value)


def test_a_hub_id_that_is_asked_for(adapter, monkeypatch):
    asked = []

    def download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        return str(adapter)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (found,) = load_adapters({"mine": "someone/lora"}, llama())
    assert found.name == "mine"
    files = ["adapter_config.json", "adapter_model.safetensors", "expert.json", "domain.safetensors"]
    assert asked == [("someone/lora", files)]
