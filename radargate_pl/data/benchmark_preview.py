"""Shows what a test asks: the benchmarks in numbers, and prompts as the model reads them."""

from typing import TYPE_CHECKING

from radargate_pl.data.benchmark_items import Item

if TYPE_CHECKING:
    from radargate_pl.data.benchmark_data import BenchmarkData

COLUMNS = ("examples", "shown", "truncated", "protocol", "score", "prompt version", "prompt")


def preview(data: "BenchmarkData", n: int) -> str:
    """Text of the table of tasks and the first `n` items of the first.

    Args:
        data: A set-up BenchmarkData.
        n: How many items.
    """
    rows: list[tuple[str, ...]] = [("task", *COLUMNS)]
    for name, benchmark in data.benchmarks.items():
        counts = (len(data.items(name)), len(data.reserved_ids(name)), len(data.truncated[name]))
        asked = repr(data.asked_as(benchmark).prompt or "standard")
        kind = (data.protocol_of(benchmark), benchmark.metrics[0], benchmark.prompt_version, asked)
        rows.append((name, *map(str, counts), *kind))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [data.encoder_of(benchmark).format for benchmark in data.benchmarks.values()]
    day = f", prompts dated {data.date}" if any(one.prints_date for one in formats) else ""
    lines = [f"BenchmarkData: {len(data.task_names)} tasks, tokenizer {data.tokenizer_name}{day}", ""]
    lines += ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    first = data.task_names[0]
    is_private = data.benchmarks[first].is_private
    return "\n".join([*lines, "", *(_item(item, is_private) for item in data.items(first)[:n])])


def _item(item: Item, is_private: bool) -> str:
    if is_private:
        return f"{item.where} (its authors ask to keep examples out of texts)"
    choices = "".join(f"\n  {'*' if i == item.answer_index else ' '} {text}" for i, text in enumerate(item.choices))
    answer = choices or f"\n  * {' | '.join(item.references)}"
    return f"{item.where} ({item.id})\n{item.prompt}{answer}\n"
