"""Which backbones take PEFT's adapters: tiny random models of every kind, this package's logits against PEFT's own.

    python benchmarks/compatibility.py                        # every kind, as a table in Markdown; some minutes
    python benchmarks/compatibility.py --kinds llama gpt2     # some

Per kind and set of layers an adapter is made and saved by PEFT, and read by `GatedNetwork` under the one-hot gate of
that expert. Compared are the logits of labelled positions of a padded batch in float32, bit for bit, and the tokens of
a greedy generation from left-padded prompts. The last row of a kind is `all-linear`.
"""

import argparse
import inspect
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compatibility_backbones import KINDS, VOCABULARY, Kind
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from radargate_pl.gates import DirectLoRA
from radargate_pl.networks import GatedNetwork

PAD, IGNORE = 3, -100
ROWS, LENGTH, ANSWER, NEW_TOKENS = 3, 20, 7, 8
FAILURES = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
SHORTER_BY = {1: 5, 2: 9}  # row of the batch to how many of its tokens are padding


class PeftFailsError(Exception):
    """PEFT itself cannot do this, so there is nothing to compare with."""


class Outcome(NamedTuple):
    """What came of one kind and set of layers.

    Attributes:
        difference: largest of a logit from PEFT's; 0 where all are the same bits.
        effect: largest change of a logit by the adapter, so that 0 above means something.
        same_tokens: whether a greedy generation writes what PEFT's does; ``None`` where PEFT's cannot generate.
    """

    difference: float
    effect: float
    same_tokens: bool | None


def make_backbone(kind: Kind, folder: Path, tokenizer: Path) -> None:
    """Save a model with random weights, large enough that every layer changes the logits, with a byte tokenizer."""
    config = AutoConfig.for_model(kind.model_type, **kind.options)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.generation_config.forced_eos_token_id = None  # BART's, which this package says it does not apply
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def auto_class(config: Any) -> Any:
    """The class that transformers loads such a model with."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def read(folder: Path) -> nn.Module:
    """The saved backbone, by transformers alone."""
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(backbone: Path, targets: list[str] | str, folder: Path) -> None:
    """Save an adapter with random A and B, by PEFT."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    get_peft_model(read(backbone), config).save_pretrained(folder, save_embedding_layers=False)


def batch(side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, length), shorter rows padded on one side."""
    ids = torch.randint(4, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row, count in SHORTER_BY.items():
        mask[row, slice(0, count) if side == "left" else slice(LENGTH - count, LENGTH)] = 0
    return ids.where(mask.bool(), PAD), mask


def inputs_of(model: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What PEFT's model is called with, the labels for `GatedNetwork`, and which positions of the logits they are."""
    ids, mask = batch("right")
    if model.config.is_encoder_decoder:
        labels = torch.randint(4, VOCABULARY, (ROWS, ANSWER), generator=torch.Generator().manual_seed(8))
        labels[1, 4:] = IGNORE
        start = torch.full((ROWS, 1), model.config.decoder_start_token_id)
        shown = torch.cat([start, labels[:, :-1]], 1)
        real = {"decoder_attention_mask": (shown != IGNORE).long()}
        return (
            {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shown.where(shown != IGNORE, PAD), **real},
            labels,
            labels != IGNORE,
        )
    labels = ids.where(mask.bool(), IGNORE)
    labels[:, :6] = IGNORE
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return given, labels, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE


@torch.no_grad()
def compare(backbone: Path, adapter: Path, generates: bool = True) -> Outcome:
    """This package's logits and tokens against PEFT's.

    Args:
        backbone: its folder.
        adapter: a PEFT folder.
        generates: whether tokens are compared too.

    Raises:
        ValueError: this package refuses backbone or adapter.
        PeftFailsError: there is nothing to compare with.
    """
    model = read(backbone)
    given, labels, kept = inputs_of(model)
    try:
        peft = PeftModel.from_pretrained(model, adapter).eval()
        expected = peft(**given, use_cache=False).logits[kept]
        with peft.disable_adapter():
            bare = peft(**given, use_cache=False).logits[kept]
    except FAILURES as error:
        raise PeftFailsError(one_line(error)) from error
    gate = partial(DirectLoRA, expert="one")
    network = GatedNetwork(backbone=str(backbone), dtype="float32", experts={"one": str(adapter)}, gate=gate).eval()
    found = network(given["input_ids"], given["attention_mask"], labels).logits
    return Outcome(
        float((found - expected).abs().max()),
        float((expected - bare).abs().max()),
        same_tokens(peft, network) if generates else None,
    )


def same_tokens(peft: PeftModel, network: GatedNetwork) -> bool | None:
    """Whether both write the same; what one goes on writing after the end of the other's answer does not count."""
    ids, mask = batch("right" if network.is_encoder_decoder else "left")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    start = 1 if network.is_encoder_decoder else LENGTH
    try:
        expected = peft.generate(input_ids=ids, attention_mask=mask, pad_token_id=PAD, **options)[:, start:]
    except FAILURES:
        return None
    found = network.generate(ids, mask, **options)
    shared = min(found.shape[1], expected.shape[1])
    return torch.equal(found[:, :shared], expected[:, :shared])


def rows_of(name: str, scratch: Path, tokenizer: Path) -> list[str]:
    """One kind's rows of the table."""
    kind, backbone = KINDS[name], scratch / "backbone"
    make_backbone(kind, backbone, tokenizer)
    rows = []
    for number, (label, targets) in enumerate({**kind.targets, "all-linear": "all-linear"}.items()):
        shown = label if targets == "all-linear" else f"{label}: {', '.join(f'`{target}`' for target in targets)}"
        rows.append(f"| {name} | {shown} | {' | '.join(cells(backbone, targets, scratch / str(number)))} |")
    return rows


def cells(backbone: Path, targets: list[str] | str, adapter: Path) -> tuple[str, str]:
    """What came of one pair, as two cells."""
    try:
        make_adapter(backbone, targets, adapter)
    except FAILURES as error:
        return f"PEFT cannot: {one_line(error)}", "-"
    try:
        return words(compare(backbone, adapter))
    except PeftFailsError as error:
        return f"PEFT cannot: {error}", "-"
    except ValueError as error:
        return f"refused: {one_line(error).partition(f'({adapter}): ')[2] or one_line(error)}", "-"
    except FAILURES as error:
        return f"fails: {type(error).__name__}: {one_line(error)}", "-"


def words(outcome: Outcome) -> tuple[str, str]:
    """An outcome as two cells."""
    logits = "the same bits" if outcome.difference == 0 else f"differ by {outcome.difference:.1e}"
    if outcome.effect == 0:
        logits = "the adapter changes nothing"
    return logits, {True: "the same", False: "others", None: "-"}[outcome.same_tokens]


def one_line(error: Exception) -> str:
    """The first problem that an error names, cut for a cell."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[min(1, len(lines) - 1)][:200].replace("|", "/")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Print the table, a row as soon as it is known."""
    from radargate_pl.backbones import resolve_backbone

    options = parsed(arguments)
    torch.set_num_threads(1)
    print("| backbone | adapter on | logits | greedy tokens |\n|---|---|---|---|", flush=True)
    tokenizer, rows = resolve_backbone("debug-tiny"), []
    for name in options.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            for row in rows_of(name, Path(scratch), tokenizer):
                rows.append(row)
                print(row, flush=True)
    equal = sum("| the same bits |" in row for row in rows)
    print(f"\n{equal} of {len(rows)} pairs of {len(options.kinds)} kinds: the same bits.")


if __name__ == "__main__":
    main()
