"""Shows what training sees: the mixture in numbers, and examples with the label mask visible."""

from typing import TYPE_CHECKING

from radargate_pl.data.examples import Example
from radargate_pl.data.records import SPLITS
from radargate_pl.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from radargate_pl.data.flan import FlanMixture

COLUMNS = ("train", "validation", "test", "truncated", "skipped", "per epoch", "share")


def preview(data: "FlanMixture", n: int) -> str:
    """Text of the mixture table and the first `n` examples of the first epoch.

    Args:
        data: A set-up FlanMixture.
        n: How many examples.
    """
    examples = data.examples("train")
    order = data.train_sampler().order(0)[:n].tolist()
    shown = [_example(data, number, examples[index]) for number, index in enumerate(order, start=1)]
    return "\n".join([_headline(data), "", *_table(data), "", *shown])


def _headline(data: "FlanMixture") -> str:
    encoder = data.encoder
    kind = "encoder-decoder" if encoder.is_encoder_decoder else "decoder-only"
    prompt = data.prompt
    if prompt == "chat" and not encoder.format.uses_chat_template:
        prompt = "plain (the tokenizer has no chat template)"
    day = f", prompts dated {encoder.prompt_date()}" if encoder.prompt_date() else ""
    return (
        f"FlanMixture: {len(data.tasks)} tasks, tokenizer {data.tokenizer_name} ({kind}), prompt {prompt!r}, "
        f"target {data.target}, max_length {data.max_length}, mixing {data.mixing}, "
        f"answers end with {encoder.answer_end()!r}{day}"
    )


def _table(data: "FlanMixture") -> list[str]:
    """One row a task; truncated counts all splits."""
    counts = data.epoch_counts()
    total = sum(counts.values())
    rows: list[tuple[str, ...]] = [("task", *COLUMNS)]
    for task in data.tasks:
        parts = [data.encoded[task.name, split] for split in SPLITS]
        numbers = [*map(len, parts), data.truncated(task), data.skipped(task), counts[task.name]]
        rows.append((task.name, *map(str, numbers), f"{100 * counts[task.name] / total:.1f} %"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *_right(row[1:], widths[1:])]) for row in rows]


def _right(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]


def _example(data: "FlanMixture", number: int, example: Example) -> str:
    """One example as the collator batches it, every token that carries loss in [[ ]]."""
    batch = data.collator()([example])
    inputs, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    carry_loss = [label != IGNORE_INDEX for label in labels]
    name = data.task_names[example.task]
    lines = [f"--- {number}: task {name}, id {example.record.id}, {len(inputs)} tokens, {sum(carry_loss)} carry loss"]
    tokenizer = data.encoder.tokenizer
    if data.encoder.is_encoder_decoder:
        lines += ["prompt:", tokenizer.decode(inputs), "answer (all tokens carry loss):"]
        lines += ["".join(f"[[{tokenizer.decode([label])}]]" for label in labels)]
    else:
        start = carry_loss.index(True)
        lines += ["prompt (no loss):", tokenizer.decode(inputs[:start])]
        lines += ["answer (tokens in [[ ]] carry loss):"]
        pairs = zip(inputs[start:], carry_loss[start:], strict=True)
        lines += [
            "".join(f"[[{tokenizer.decode([token])}]]" if loss else tokenizer.decode([token]) for token, loss in pairs)
        ]
    lines += [f"references: {list(example.record.targets)}", ""]
    return "\n".join(lines)
