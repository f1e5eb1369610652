"""Backbones in 4 and 8 bits: every gate fits, generates, is saved and loaded over them; exact where it can be."""

import copy
import functools
import itertools
import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from builders import NEEDED, assert_near
from safetensors.torch import load_file, save_file
from test_decoding import FIXED_LENGTH, prompts_of
from tiny_models import (
    assert_same_gradients,
    batch_of,
    gradients,
    left_padded,
    loss_of,
    model_folder,
    network_of,
)
from tiny_runs import adapters, fit, gated_lm
from torch import nn

from radargate_pl import notices, quantization
from radargate_pl.backbones import load_backbone
from radargate_pl.callbacks import RunCheckpoint
from radargate_pl.cli import main
from radargate_pl.gates import ALL_GATES, TaskGate
from radargate_pl.networks import GatedNetwork, NewExperts
from radargate_pl.quantization import Linear8bit, is_misread, loading_errors

ROOT = Path(__file__).parent.parent
REASON = "bitsandbytes is not installed (pip install 'radargate-pl[quantized]')"
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason=REASON)
BITS = [pytest.param(bits, marks=needs_bitsandbytes) for bits in ("4bit", "8bit")]
# The sixteen values of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
    ]
)


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch):
    """Quantised models are loaded onto the GPU where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def is_quantised(module):
    return isinstance(module, Linear8bit) or type(module).__name__ == "Linear4bit"


def quantised(model):
    """Path to quantised layer, inside mixtures or not."""
    return {path.removesuffix(".base_layer"): m for path, m in model.named_modules() if is_quantised(m)}


def widened(layer):
    """The weight that a quantised layer stands for, (out, in), by bitsandbytes' own reading."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if isinstance(layer, Linear8bit):
        return int8_vectorwise_dequant(layer.weight, layer.scale)
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def state_bytes(model):
    """Every tensor of a quantised backbone, the scales that are no parameters included."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".gate." not in name}
    assert any("absmax" in name or name.endswith("scale") for name in state)
    return state


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def factory_of(gate):
    return partial(gate, **NEEDED.get(gate, {}))


@torch.no_grad()
def logits(network, kind="llama"):
    return network.eval()(**batch_of(kind)).logits


@functools.cache
def widened_folder(kind, bits, dtype):
    """An ordinary model that holds the very weights a quantised one of this compute dtype stands for."""
    source = Path(model_folder(kind))
    folder = source.with_name(f"{source.name}-{bits}-{dtype}-widened")
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for path, layer in quantised(load_backbone(str(source), dtype, bits).model).items():
        assert tensors[f"{path}.weight"].shape == widened(layer).shape
        tensors[f"{path}.weight"] = widened(layer).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


# ---- what is held ----


@pytest.mark.parametrize("bits", BITS)
def test_each_weight_is_the_nearest_its_bits_can_hold(bits, caplog):
    notices.say_once.cache_clear()
    plain, narrow = (load_backbone(model_folder("llama"), "float32", kind) for kind in ("none", bits))
    assert narrow.fingerprint == plain.fingerprint
    linears = {path for path, module in plain.model.named_modules() if isinstance(module, nn.Linear)}
    assert set(quantised(narrow.model)) == linears - {"lm_head"}
    for path, layer in quantised(narrow.model).items():
        weight = plain.model.get_submodule(path).weight
        assert isinstance(layer, nn.Linear)
        assert (layer.out_features, layer.in_features) == weight.shape
        if bits == "8bit":
            largest = weight.abs().amax(1, keepdim=True)
            limit = largest * (0.5 / 127 + 2**-10)  # half a step, and the float16 it is rounded to before
            assert ((widened(layer) - weight).abs() <= limit).all()
            continue
        blocks = weight.reshape(-1, 64)
        nearest = (blocks / blocks.abs().amax(1, keepdim=True))[..., None].sub(NF4).abs().argmin(-1)
        expected = NF4[nearest] * blocks.abs().amax(1, keepdim=True)
        difference = (widened(layer).reshape(-1, 64) - expected).abs() / blocks.abs().amax(1, keepdim=True)
        misread = [record.message for record in caplog.records if "misreads 4-bit weights" in record.message]
        assert bool(misread) == is_misread(layer.weight)  # of these narrow rows, by some processors
        if not misread:
            assert difference.max() < 0.02  # the scales are quantised as well


@pytest.mark.parametrize("bits", BITS)
def test_memory_falls(bits, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 260}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    shutil.copy(f"{model_folder('llama')}/tokenizer.json", tmp_path)
    shutil.copy(f"{model_folder('llama')}/tokenizer_config.json", tmp_path)

    def held(kind, dtype):
        model = load_backbone(str(tmp_path), dtype, kind).model
        layers = "model.layers.0.self_attn", "model.layers.0.mlp"
        return sum(t.nbytes for name, t in model.state_dict().items() if name.startswith(layers))

    numbers = held("none", "float32") // 4
    limit = {"4bit": 4.5 / 8, "8bit": 8.3 / 8}[bits]
    assert held(bits, "float32") < limit * numbers
    assert held(bits, "bfloat16") < limit * numbers


# ---- what is computed ----


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", ALL_GATES)
def test_a_layer_is_the_quantised_base_plus_the_same_mixture(gate, dtype):
    """The mixture alone is that of a plain layer whose own weight is zero."""
    plain = network_of("llama", factory_of(gate), dtype=dtype).eval()
    limit = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    for bits in ("4bit", "8bit"):
        over_bits = network_of("llama", factory_of(gate), quantization=bits, dtype=dtype).eval()
        for network in (over_bits, plain):
            network.context.replace(torch.tensor([0, 2, -1]))
        for path, layer in over_bits.layers.items():
            x = torch.randn(3, 4, layer.in_features, generator=torch.Generator().manual_seed(1))
            x = x.to(plain.backbone.dtype)
            base = layer.base_layer(x)
            assert base.dtype == x.dtype
            assert_near(base.float(), x.float() @ widened(layer.base_layer).float().T, limit, path)
            plain.layers[path].base_layer.weight.data.zero_()
            assert torch.equal(layer(x), base + plain.layers[path](x)), path


@pytest.mark.parametrize(
    ("kind", "dtype"), [*itertools.product(("llama", "t5"), ("float32", "bfloat16")), ("mbart", "float32")]
)
@pytest.mark.parametrize("bits", BITS)
def test_logits_and_gradients_are_those_of_the_weights_it_stands_for(bits, kind, dtype):
    """Gates of early layers learn through the quantised layers behind them, with and without recomputation."""
    batch = batch_of(kind)
    plain = network_of(kind, backbone=widened_folder(kind, bits, dtype), dtype=dtype)
    expected, wanted = logits(plain, kind), gradients(plain, batch)
    for recomputes in (False, True):
        network = network_of(kind, quantization=bits, dtype=dtype, gradient_checkpointing=recomputes)
        assert network.backbone.dtype == getattr(torch, dtype) == logits(network, kind).dtype
        assert_near(logits(network, kind), expected, 1e-5, kind)
        found = gradients(network.train(), batch)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        assert_same_gradients(found, wanted, 1e-4)
        assert any(found[name].abs().max() > 0 for name in found if "layers.0" in name or "block.0" in name)
        banks = [layer.bank for layer in network.layers.values()]
        assert {weight.dtype for bank in banks for weight in bank.expert_weights(bank.names[0])} == {
            plain.backbone.dtype
        }


@pytest.mark.parametrize("bits", BITS)
def test_a_token_depends_on_no_other_row_and_on_no_padding(bits):
    """LLM.int8 fails here: the columns it spares from rounding are chosen over the whole batch."""
    network, batch = network_of("llama", quantization=bits), batch_of("llama")
    layer = next(iter(quantised(network.backbone).values()))
    x = torch.randn(5, layer.in_features)
    beside = torch.cat([x, 50 * torch.randn(2, layer.in_features)])  # far beyond the threshold of LLM.int8
    assert_near(layer(beside)[:5], layer(x), 1e-6, "rows")
    together = logits(network)
    assert_near(network(**left_padded(batch)).logits, together, 1e-5, "padding")
    of_row = network(**batch).example
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {n: v[row : row + 1] if n == "expert" else v[row : row + 1, :length] for n, v in batch.items()}
        assert_near(together[of_row == row], network(**alone).logits, 1e-5, f"row {row}")


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("bits", BITS)
def test_beams_with_the_cache_are_those_without(bits, kind):
    network, prompts = network_of(kind, quantization=bits), prompts_of(kind)
    cached = network.generate(**prompts, **FIXED_LENGTH, num_beams=2)
    assert torch.equal(cached, network.generate(**prompts, **FIXED_LENGTH, num_beams=2, use_cache=False))


@needs_bitsandbytes
def test_processors_with_bfloat16_do_not_repack_what_trains_on(monkeypatch):
    """There bitsandbytes rounds the scales at the first evaluation, and cuts every gradient from then on."""
    import bitsandbytes

    wanted = gradients(network_of("llama", quantization="4bit"), batch_of("llama"))
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    network = network_of("llama", quantization="4bit")
    before = state_bytes(network.backbone)
    logits(network)
    assert same(state_bytes(network.backbone), before)
    assert_same_gradients(gradients(network.train(), batch_of("llama")), wanted, 0.0)


@pytest.mark.parametrize("bits", BITS)
def test_a_moved_copied_or_cast_network_holds_the_same_bits(bits):
    network = network_of("opt", quantization=bits)  # its layers have biases
    layers, wanted = quantised(network.backbone), logits(network, "opt")
    assert all(layer.bias is not None for layer in layers.values())
    assert torch.equal(logits(copy.deepcopy(network).to("cpu"), "opt"), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        before = state_bytes(network.backbone)
        loss_of(network, batch_of("opt")).backward()
        assert same(state_bytes(network.backbone), before)
    assert torch.equal(logits(network, "opt"), wanted)
    before = {path: widened(layer) for path, layer in layers.items()}
    network.to(torch.bfloat16)  # what Lightning does for bf16-true
    assert all(torch.equal(widened(layer), before[path]) for path, layer in quantised(network.backbone).items())


# ---- fit, save, load ----


@pytest.mark.parametrize("gate", ALL_GATES)
@pytest.mark.parametrize("bits", BITS)
def test_every_gate_fits_generates_and_is_saved_and_loaded_with_the_backbone_untouched(bits, gate, tmp_path):
    network = network_of("llama", factory_of(gate), quantization=bits).train()
    before, start = state_bytes(network.backbone), {k: v.clone() for k, v in network.gate_state().items()}
    trained = [p for p in network.parameters() if p.requires_grad]
    loss = loss_of(network, batch_of("llama"))
    if loss.requires_grad:
        loss.backward()
        torch.optim.SGD(trained, lr=0.1).step()
        assert not same(network.gate_state(), start)
    assert loss.requires_grad is any(p.requires_grad and p.ndim > 1 for p in network.parameters())
    network.save_pretrained(tmp_path / "gate")
    assert json.loads((tmp_path / "gate" / "gate_config.json").read_text())["quantization"] == bits
    again = GatedNetwork.from_pretrained(tmp_path / "gate", dtype="float32")
    assert (again.quantization, again.describe()) == (bits, network.describe())
    assert torch.equal(logits(again), logits(network))
    answers = again.generate(**prompts_of("llama"), **FIXED_LENGTH)
    assert torch.equal(answers, network.generate(**prompts_of("llama"), **FIXED_LENGTH, use_cache=False))
    assert same(state_bytes(network.backbone), before)
    assert same(state_bytes(again.backbone), before)


@pytest.mark.parametrize(("bits", "precision"), [("4bit", "bf16-mixed"), ("8bit", "bf16-true"), ("4bit", "32-true")])
@needs_bitsandbytes
def test_a_run_is_resumed_over_the_same_bits_and_refused_over_others(bits, precision, tmp_path):
    library = adapters(tmp_path / "library")
    options = {"dtype": "bfloat16" if precision == "bf16-true" else "float32"}

    def run(kind, steps, resume=None):
        lm = gated_lm(library, quantization=kind, **options)
        fit(lm, tmp_path / "run", RunCheckpoint(), steps=steps, resume=resume, precision=precision)
        return lm

    first = run(bits, 2)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step=*2.ckpt")
    resumed = run(bits, 2, checkpoint)
    assert same(resumed.network.gate_state(), first.network.gate_state())
    assert {tensor.dtype for tensor in first.network.gate_state().values()} == {torch.float32}
    other = "none" if bits == "8bit" else "8bit"
    with pytest.raises(ValueError, match=rf"gate: saved with RadarGate\(.*\), backbone in {bits}, the configuration"):
        run(other, 4, checkpoint)


@pytest.mark.parametrize("bits", BITS)
def test_a_gate_over_other_bits_is_told_by_name(bits, tmp_path):
    network = network_of("llama", quantization=bits)
    network.save_pretrained(tmp_path / "gate")
    with pytest.warns(UserWarning, match=f"fitted over a backbone in {bits}, going on with none"):
        plain = GatedNetwork.from_pretrained(tmp_path / "gate", dtype="float32", quantization="none")
    assert plain.quantization == "none"
    assert same(plain.gate_state(), network.gate_state())
    path = tmp_path / "gate" / "gate_config.json"  # of a version that knew no quantisation
    config = json.loads(path.read_text())
    del config["quantization"]
    path.write_text(json.dumps(config))
    assert torch.equal(logits(GatedNetwork.from_pretrained(tmp_path / "gate", dtype="float32")), logits(plain))


@pytest.mark.parametrize("bits", BITS)
def test_experts_trained_over_few_bits_fit_the_full_backbone(bits, tmp_path):
    new = NewExperts(per="task", target_modules="all-linear", rank=2)
    options = {"backbone": model_folder("llama"), "dtype": "float32"}
    network = GatedNetwork(
        {"a": None, "b": None}, **options, new_experts=new, gate=TaskGate, train="experts", quantization=bits
    ).train()
    assert set(network.layers) == set(quantised(network.backbone))
    batch = {**batch_of("llama"), "expert": torch.tensor([0, 1, 0])}
    loss_of(network, batch).backward()
    torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0).step()
    network.save_experts(tmp_path / "experts")
    plain = GatedNetwork(**options, experts=str(tmp_path / "experts"), gate=TaskGate)
    assert plain.experts == ("a", "b")
    assert all(layer.bank.expert_weights("a")[1].abs().max() > 0 for layer in plain.layers.values())


@needs_bitsandbytes
def test_a_folder_quantised_by_transformers_is_taken_as_it_is(tmp_path):
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder("llama"), dtype=torch.float32, quantization_config=options
    )
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{model_folder('llama')}/{name}", tmp_path / "model")
    network = network_of("llama", backbone=str(tmp_path / "model"))
    assert set(quantised(network.backbone)) >= set(network.layers)
    for layer in quantised(network.backbone).values():
        x = torch.randn(2, layer.in_features)
        assert_near(layer(x), x @ widened(layer).T, 1e-6, "computed in the dtype asked for, not in that of the folder")
        assert not layer.support_avx512bf16_for_cpu
    assert any(gradient.abs().max() > 0 for gradient in gradients(network, batch_of("llama")).values())
    with pytest.raises(ValueError, match=r"quantization: 8bit, but .* is quantised by bitsandbytes"):
        load_backbone(str(tmp_path / "model"), "float32", "8bit")


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_the_overrides_set_it(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config", "configs/debug.yaml", "--config", f"configs/backbones/{name}.yaml", "--print_config"]
    assert main(["fit", *words]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["network"]["init_args"]["quantization"] == name


# ---- what is refused ----


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    for bits in ("4bit", "8bit"):
        with pytest.raises(ValueError, match=rf"bitsandbytes for quantization: {bits}.*radargate-pl\[quantized\]"):
            load_backbone("debug-tiny", "float32", bits)
    assert load_backbone("debug-tiny", "float32", "none").model.dtype == torch.float32


def test_another_word_and_a_gguf_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="quantization to be none, 4bit or 8bit, but got '3bit'"):
        load_backbone("debug-tiny", "float32", "3bit")
    config = transformers.LlamaConfig()
    with pytest.raises(ValueError, match=r"full precision with quantization: 4bit, but 'm.gguf' is a .gguf file"):
        quantization.loading_options("m.gguf", config, "4bit", is_gguf=True)


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), ImportError("bitsandbytes>=9 is needed")])
def test_a_device_or_version_that_cannot_is_a_sentence(error):
    with (
        pytest.raises(ValueError, match=f"load backbone 'b' with quantization: 4bit.*could not: {error}"),
        loading_errors("b", "4bit"),
    ):
        raise error
    with pytest.raises(type(error)), loading_errors("b", "none"):
        raise error
    with pytest.raises(torch.OutOfMemoryError), loading_errors("b", "4bit"):
        raise torch.OutOfMemoryError("too little")
