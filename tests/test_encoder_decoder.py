"""Encoder-decoders: what the decoder begins with, scores that say what is answered, layers by a dense oracle."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from builders import assert_near
from reference import Expert, dense_layer
from safetensors.torch import load_file
from tiny_models import (
    EOS,
    NAMES,
    PAD,
    ROOT,
    SEQ2SEQ,
    SIZES,
    TARGETS,
    VOCABULARY,
    batch_of,
    experts_folder,
    model_folder,
    network_of,
)

from radargate_pl.backbones import is_encoder_decoder, load_tokenizer
from radargate_pl.data.prompts import RecordEncoder
from radargate_pl.data.records import BadRecords, Record
from radargate_pl.decoder_start import decoder_inputs
from radargate_pl.gates import StretchGate
from radargate_pl.losses import IGNORE_INDEX
from radargate_pl.metrics import score_examples
from radargate_pl.networks import GatedNetwork
from radargate_pl.records import record_gates

START = {"t5": (PAD,), "mt5": (PAD,), "mbart": (EOS,)}
WORDS = {"own": [], "language": ["e"], "two": ["</s>", "e"]}  # tokens of debug-tiny are bytes


def word_ids(words, kind):
    return tuple(load_tokenizer("debug-tiny").convert_tokens_to_ids(words)) or START[kind]


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_the_decoder_reads_what_transformers_own_shift_gives(kind):
    """Where labels end with the token that mBART's shift takes for the first one, as ours do."""
    network, batch = network_of(kind), batch_of(kind)
    labels = batch["labels"].clone()
    for row, length in enumerate((labels != IGNORE_INDEX).sum(1).tolist()):
        labels[row, length - 1] = EOS
    found = decoder_inputs(labels, START[kind], PAD)
    assert torch.equal(found.input_ids, network.backbone.prepare_decoder_input_ids_from_labels(labels))
    assert torch.equal(found.targets, labels)
    assert torch.equal(found.tokens, labels != IGNORE_INDEX)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_teacher_forced_exact_match_is_greedy_decoding(kind, words):
    """What is answered greedily counts as exact, at any other token it does not; rows of other lengths beside it."""
    network, batch = network_of(kind, decoder_start=WORDS[words]), batch_of(kind, (7, 4, 6))
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask", "expert")}
    answers = network.generate(**prompts, do_sample=False, max_new_tokens=5)
    assert answers.shape == (3, 5)
    labels = answers.clone()
    labels[1, 3:] = labels[2, 1:] = IGNORE_INDEX
    exact = score_examples(*network(**prompts, labels=labels), 3).exact
    assert exact.tolist() == [True, True, True]
    for position in range(3):
        other = labels.clone()
        other[:2, position] = (other[:2, position] + 1) % VOCABULARY
        assert score_examples(*network(**prompts, labels=other), 3).exact.tolist() == [False, False, True]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", SEQ2SEQ)
@torch.no_grad()
def test_the_decoder_begins_with_the_words_given(kind, words):
    """Logits of plain transformers, one example at a time, with the first tokens written by hand."""
    network, batch = network_of(kind, experts=[], decoder_start=WORDS[words]), batch_of(kind)
    model = getattr(transformers, type(network.backbone).__name__).from_pretrained(model_folder(kind)).eval()
    start = word_ids(WORDS[words], kind)
    labelled = network(**{**batch, "expert": None})
    for row in range(3):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        answer = batch["labels"][row][batch["labels"][row] != IGNORE_INDEX]
        read = torch.cat([torch.tensor(start), answer[:-1]])
        logits = model(input_ids=prompt[None], decoder_input_ids=read[None]).logits[0, len(start) - 1 :]
        assert_near(labelled.logits[labelled.example == row], logits, 1e-3, f"row {row}")  # mT5's do not stay small
        assert labelled.targets[labelled.example == row].tolist() == answer.tolist()
        written = [*start]
        for _ in range(3):
            logits = model(input_ids=prompt[None], decoder_input_ids=torch.tensor([written])).logits[0, -1]
            written.append(int(logits.argmax()))
        mine = network.generate(prompt[None], torch.ones_like(prompt)[None], do_sample=False, max_new_tokens=3)
        assert mine[0].tolist() == written[len(start) :]


def test_beams_and_choices_begin_with_the_words_too():
    network, batch = network_of("mbart", decoder_start=["</s>", "e"]), batch_of("mbart")
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask", "expert")}
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "min_new_tokens": 4}
    several = network.generate(**prompts, **options)
    assert several.shape == (6, 4)
    assert torch.equal(several, network.generate(**prompts, **options, use_cache=False))
    assert torch.equal(several[::2], network.generate(**prompts, **{**options, "num_return_sequences": 1}))


def backbone_with(kind: str, folder: str, **settings: object) -> str:
    """The tiny model with other generation settings, as a hub's generation_config.json may hold."""
    target = ROOT / folder
    if not target.exists():
        model = getattr(transformers, type(network_of(kind, experts=[]).backbone).__name__)
        model = model.from_pretrained(model_folder(kind))
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        model.save_pretrained(target)
        load_tokenizer("debug-tiny").save_pretrained(target)
    return str(target)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_a_models_own_generation_settings_do_not_make_greedy_something_else(kind):
    """Beams (Marian), repetitions (BART), a forced end (mBART) and an end token that is not the tokenizer's."""
    spoilt = backbone_with(
        kind,
        f"{kind}-spoilt",
        num_beams=4,
        no_repeat_ngram_size=1,
        forced_eos_token_id=9,
        eos_token_id=11,
        min_length=9,
    )
    plain, other = network_of(kind), network_of(kind, backbone=spoilt)
    batch = batch_of(kind)
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask", "expert")}
    for new in (4, 7):
        expected = plain.generate(**prompts, do_sample=False, max_new_tokens=new)
        assert torch.equal(other.generate(**prompts, do_sample=False, max_new_tokens=new), expected)
    beams = {"do_sample": False, "num_beams": 3, "max_new_tokens": 4}
    assert torch.equal(other.generate(**prompts, **beams), plain.generate(**prompts, **beams))


def test_a_forced_first_token_is_part_of_the_start():
    """BART forces <s> behind </s>: it is read, not predicted, and is no part of an answer."""
    forced = network_of("mbart", backbone=backbone_with("mbart", "mbart-forced", forced_bos_token_id=7))
    words = network_of("mbart", decoder_start=["</s>", load_tokenizer("debug-tiny").convert_ids_to_tokens(7)])
    batch = batch_of("mbart")
    assert torch.equal(forced(**batch).logits, words(**batch).logits)
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask", "expert")}
    options = {"do_sample": False, "max_new_tokens": 4}
    assert torch.equal(forced.generate(**prompts, **options), words.generate(**prompts, **options))


def test_what_cannot_be_a_start_is_refused():
    with pytest.raises(ValueError, match=r"single tokens of the backbone's tokenizer, but '<2en>' is none"):
        network_of("mbart", experts=[], decoder_start=["<2en>"])
    with pytest.raises(ValueError, match=r"for an encoder-decoder backbone only, but got \['e'\]"):
        network_of("llama", experts=[], decoder_start=["e"])
    nameless = backbone_with("mbart", "mbart-nameless", decoder_start_token_id=None)
    config = json.loads((ROOT / "mbart-nameless/config.json").read_text())
    (ROOT / "mbart-nameless/config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    with pytest.raises(ValueError, match=r"no decoder_start_token_id\. It is a language's token in multilingual"):
        network_of("mbart", experts=[], backbone=nameless)
    assert network_of("mbart", experts=[], backbone=nameless, decoder_start=["e"]).decoder_start == ["e"]


def test_the_gate_folder_keeps_the_start(tmp_path):
    network, batch = network_of("mbart", "stretch", decoder_start=["</s>", "e"]), batch_of("mbart")
    network.save_pretrained(tmp_path / "gate")
    again = GatedNetwork.from_pretrained(tmp_path / "gate", dtype="float32")
    assert again.decoder_start == ["</s>", "e"]
    assert torch.equal(again(**batch).logits, network.eval()(**batch).logits)


def test_m2m100_has_no_shift_of_its_own_and_needs_none(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = transformers.M2M100Config(**SIZES, **sizes, decoder_start_token_id=EOS, init_std=0.3)
    transformers.M2M100ForConditionalGeneration(config).save_pretrained(tmp_path)
    load_tokenizer("debug-tiny").save_pretrained(tmp_path)
    network, batch = network_of("t5", experts=[], backbone=str(tmp_path)), batch_of("t5")
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    answers = network.generate(**prompts, do_sample=False, max_new_tokens=4)
    assert score_examples(*network(**prompts, labels=answers), 3).exact.all()


def read_experts(kind: str, path: str) -> list[Expert]:
    """The experts of one layer from their files."""
    found = []
    for name in NAMES:
        tensors = load_file(f"{experts_folder(kind)}/{name}/adapter_model.safetensors")
        key = f"base_model.model.{path}"
        if f"{key}.lora_A.weight" in tensors:  # scaling is alpha / r = 2 in all of them
            found.append(Expert(tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"], 2.0))
    return found


LAYERS = {
    "t5": (
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.v",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ),
    "mt5": ("encoder.block.1.layer.1.DenseReluDense.wo", "decoder.block.0.layer.0.SelfAttention.v"),
    "mbart": ("model.encoder.layers.1.self_attn.v_proj", "model.decoder.layers.1.encoder_attn.q_proj"),
}


@pytest.mark.parametrize("gate", ["radar", "stretch"])
@pytest.mark.parametrize("kind", SEQ2SEQ)
@torch.no_grad()
def test_layers_of_both_streams_equal_the_dense_reference_whatever_the_padding(kind, gate):
    """Real tokens of a padded batch against the oracle, and against the same example alone."""
    network, batch = network_of(kind, gate), batch_of(kind)
    for path in LAYERS[kind]:
        layer, seen = network.layers[path], []
        handle = layer.register_forward_hook(lambda _, args, output, seen=seen: seen.append((args[0], output)))
        with record_gates(network.backbone) as outputs:
            network(**batch)
        handle.remove()
        ((x, y),) = seen
        real = outputs[path].tokens
        reads = "encoder" if "encoder." in path or path.endswith("EncDecAttention.v") else "decoder"
        assert real.sum(1).tolist() == ([9, 6, 4] if reads == "encoder" else [5, 3, 4]), path
        state, experts = dict(layer.named_parameters()), read_experts(kind, path)
        assert len(experts) == layer.bank.num_experts > 0
        name, options = type(layer.gate).__name__, {"top_k": min(2, len(experts)), "scorer": "x"}
        dense = dense_layer(x[real], experts, state, gate=name, renormalize="auto", temperature=1.0, **options)
        assert_near(y[real], dense.output, 1e-4, path)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_every_target_of_the_tiny_models_is_met_in_both_streams(kind):
    network = network_of(kind)
    for stream in ("encoder", "decoder"):
        names = {path.rpartition(".")[2] for path in network.layers if f"{stream}." in path}
        assert names == set().union(*TARGETS[kind])
    assert is_encoder_decoder(model_folder(kind))
    assert not is_encoder_decoder(model_folder("llama"))


def like_indicbart(folder) -> str:
    """A tokenizer that closes texts as ALBERT's does, with language tokens beside; IndicBART's is one."""
    from tokenizers import processors

    tokenizer = load_tokenizer("debug-tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[CLS]", "[SEP]", "<2en>", "<2hi>"]})
    marks = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    closing = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    tokenizer.backend_tokenizer.post_processor = closing
    tokenizer.save_pretrained(folder)
    return str(folder)


def encoded(tokenizer, **options):
    encoder = RecordEncoder(tokenizer, is_encoder_decoder=True, max_length=40, **options)
    packed = encoder.encode([Record("a", "Wer?", ("Ich",), "x:1")], "t", BadRecords("raise"))
    return [tokenizer.decode(ids) for ids in (packed.prompt(0), packed.answer(0))]


def test_prompts_that_write_their_special_tokens_themselves(tmp_path):
    tokenizer = load_tokenizer_at(like_indicbart(tmp_path))
    assert encoded(tokenizer) == ["[CLS]Wer?[SEP]", "Ich</s>"]
    assert encoded(tokenizer, prompt="{source} </s> <2en>", special_tokens=False) == ["Wer? </s> <2en>", "Ich</s>"]
    one = RecordEncoder(tokenizer, is_encoder_decoder=True)
    other = RecordEncoder(tokenizer, is_encoder_decoder=True, special_tokens=False)
    assert one.key() != other.key()  # the cache tells them apart


def load_tokenizer_at(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_indicbarts_tokenizer_keeps_vowel_signs_and_capitals(tmp_path):
    """By default transformers' AlbertTokenizer would drop them, and its model card says so in code alone."""
    text = "\u092e\u0948\u0902 Ab"  # a syllable with two signs above it
    letters = [*("<pad>", "<unk>", "[CLS]", "[SEP]", "</s>"), "\u2581", *sorted({*text, *text.lower()} - {" "})]
    vocabulary = [(letter, 0.0 if letter.startswith(("<", "[")) else -1.0) for letter in letters]
    transformers.AlbertTokenizer(vocab=vocabulary, eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mbart", "is_encoder_decoder": True}))
    spoilt, tokenizer = load_tokenizer_at(tmp_path), load_tokenizer(str(tmp_path))
    assert spoilt.decode(spoilt(text, add_special_tokens=False)["input_ids"]).strip() == "\u092e ab"  # or no test
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() == text


def test_a_language_token_before_the_answer_is_the_decoders_and_no_label():
    """mBART-50's tokenizer puts the target's language before a target; labels hold the answer alone."""
    letters = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "\u2581Wer?Ich")]
    tokenizer = transformers.MBart50Tokenizer(vocab=letters, src_lang="de_DE", tgt_lang="en_XX")
    assert tokenizer.convert_ids_to_tokens(tokenizer(text_target="Ich")["input_ids"])[0] == "en_XX"  # or no test
    encoder = RecordEncoder(tokenizer, is_encoder_decoder=True, max_length=40)
    packed = encoder.encode([Record("a", "Wer?", ("Ich",), "x:1")], "t", BadRecords("raise"))
    prompt, answer = (tokenizer.convert_ids_to_tokens(ids) for ids in (packed.prompt(0), packed.answer(0)))
    assert (prompt[0], prompt[-1]) == ("de_DE", "</s>")
    assert "".join(answer) == "\u2581Ich</s>"


def test_stretch_gate_scores_the_decoder_prefix_like_any_token():
    network = network_of("mbart", StretchGate, decoder_start=["</s>", "e"])
    with record_gates(network.backbone) as outputs:
        network(**batch_of("mbart"))
    path = "model.decoder.layers.0.self_attn.q_proj"
    assert outputs[path].weights.shape[:2] == (3, 6)
    assert outputs[path].tokens.sum(1).tolist() == [6, 4, 5]
