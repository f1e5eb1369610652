"""Chat templates: a prompt as the model's own turns, on one fixed date, and the token that closes a turn (layer 3)."""

import re
from collections.abc import Iterable
from datetime import date, datetime
from functools import lru_cache
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

# No template writes this by itself; what follows it in an assistant's turn closes the turn.
_TEXT = "Qv7answerZk"
_CODE = re.compile(r"%[-_^#0]?[A-Za-z%]")  # what strftime fills in
_DRAWS = re.compile(r"\|\s*random\b")
_DAYS = (date(2001, 2, 3), date(2022, 11, 24))


def today() -> str:
    """The date of this day, as ISO 8601 writes it."""
    return date.today().isoformat()


def checked_date(text: str | date | None) -> str:
    """A date as ISO 8601 writes it; today's for None.

    Args:
        text: e.g. ``2026-11-30``, or a date, which YAML makes of one without quotation marks.

    Raises:
        ValueError: when it is no date.
    """
    if text is None:
        return today()
    try:
        return date.fromisoformat(str(text)).isoformat()
    except ValueError as error:
        raise ValueError(
            f"Expected date to be a day as 2026-11-30, or null for the day the run starts, but got {text!r}."
        ) from error


def render_prompt(tokenizer: Any, source: str, day: str) -> str:
    """A question as the user's turn, and the opening of the assistant's.

    Args:
        tokenizer: with a chat template.
        source: the question.
        day: the date that a template may print, ISO 8601; never the clock's, or a run went on with other prompts after
            midnight.

    Raises:
        ValueError: when the template refuses a single turn of a user, or there are several and no default.
    """
    return _rendered(tokenizer, [{"role": "user", "content": source}], day, opens=True)


def check_shows_question(tokenizer: Any) -> None:
    """Refuse a chat template that leaves the question out, as those for pictures do with a turn that is plain text.

    Args:
        tokenizer: with a chat template.

    Raises:
        ValueError: when it does, or as `render_prompt`.
    """
    if _TEXT not in render_prompt(tokenizer, _TEXT, _DAYS[0].isoformat()):
        raise ValueError(
            "Expected the tokenizer's chat template to show a user's question, but it leaves it out: it may take "
            "turns in parts (pictures and text) only. Set prompt: plain, or a template of your own with {source} in it."
        )


def prints_date(tokenizer: Any) -> bool:
    """Whether the chat template writes the date into a prompt."""
    first, second = (render_prompt(tokenizer, "", day.isoformat()) for day in _DAYS)
    return first != second


def dated_template(tokenizer: Any, day: str | None) -> str | None:
    """The chat template with its clock set to a day, for those who render it themselves.

    Args:
        tokenizer: with or without a chat template.
        day: ISO 8601; today's for None.

    Returns:
        The default template; ``None`` where there is none, or it asks for no date.
    """
    own = tokenizer.chat_template
    template = own.get("default") if isinstance(own, dict) else own
    return _on_day(template, day or today()) if template and "strftime_now" in template else None


def turn_end(tokenizer: Any) -> int | None:
    """The id of the token that the chat template writes behind an assistant's turn.

    Args:
        tokenizer: with or without a chat template.

    Returns:
        The first token behind the answer, if it is one of the tokens added to the vocabulary (``<|im_end|>``); ``None``
        where there is no template, or it writes text or nothing there.
    """
    if not tokenizer.chat_template:
        return None
    text = _answered(tokenizer)
    _, found, rest = text.rpartition(_TEXT)
    rest = rest.lstrip()
    whole = whole_tokens(tokenizer)
    behind = [token for token in whole if found and rest.startswith(token)]
    return whole[max(behind, key=len)] if behind else None


def _answered(tokenizer: Any) -> str:
    """A chat whose answer is known; some templates want the user to speak last, and some a system turn first."""
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": _TEXT}
    for turns in ([asked, answered], [asked, answered, asked], [{"role": "system", "content": "s"}, asked, answered]):
        try:
            return _rendered(tokenizer, turns, _DAYS[0].isoformat(), opens=False)
        except ValueError:  # said where a prompt is rendered
            continue
    return ""


def end_token(tokenizer: Any, is_chat: bool) -> int:
    """The id that closes an answer in training: what the chat template closes a turn with, else the end token.

    Args:
        tokenizer: with an end token.
        is_chat: whether prompts are rendered by the chat template.
    """
    end = turn_end(tokenizer) if is_chat else None
    return int(tokenizer.eos_token_id) if end is None else end


def end_tokens(tokenizer: Any, configured: int | list[int] | None = None) -> tuple[int, ...]:
    """Ids at which a generation stops: the model's own, the tokenizer's and the chat template's, sorted.

    Args:
        tokenizer: of the model.
        configured: ``eos_token_id`` of the model's generation configuration.
    """
    own = {number for number in (tokenizer.eos_token_id, turn_end(tokenizer)) if number is not None}
    return with_configured(own, configured)


def with_configured(ends: Iterable[int], configured: int | list[int] | None) -> tuple[int, ...]:
    """Ids of ends, and those that a generation configuration names, sorted.

    Args:
        ends: see `end_tokens`.
        configured: ``eos_token_id`` of the generation configuration: none, one or several.
    """
    named = [] if configured is None else configured if isinstance(configured, list | tuple) else [configured]
    return tuple(sorted({int(number) for number in (*ends, *named)}))


def set_ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Let every generation of a model stop where its answers end, also one that goes past `GatedNetwork.generate`.

    Args:
        model: its generation configuration is changed in place, and stays as it is where it names these ends already.
        tokenizer: of the model.

    Returns:
        The ends that the tokenizer and its chat template name.
    """
    settings, own = model.generation_config, end_tokens(tokenizer)
    ends = with_configured(own, settings.eos_token_id)
    if set(with_configured((), settings.eos_token_id)) != set(ends):
        settings.eos_token_id = list(ends)
    if getattr(settings, "forced_eos_token_id", None) is not None:
        settings.forced_eos_token_id = None
        rank_zero_info(
            "forced_eos_token_id of the backbone's generation settings is not applied: an answer that max_new_tokens "
            "cuts keeps its last token and has no end."
        )
    return own


def _rendered(tokenizer: Any, turns: list[dict[str, str]], day: str, opens: bool) -> str:
    try:
        template = _on_day(_default(tokenizer.chat_template), day)
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=opens)
    except Exception as error:  # jinja2's, a template's own raise_exception, and transformers' on several templates
        raise ValueError(
            "Expected the tokenizer's chat template to render one turn of a user, but it says: "
            f"{str(error).rstrip('.')}. Set prompt: plain, or a template of your own with {{source}} in it, or give "
            "the tokenizer another chat template."
        ) from error
    return str(text)


def _default(template: str | dict[str, str]) -> str:
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise ValueError(f"there are several, {', '.join(sorted(template))}, and none is called default")
    return template["default"]


@lru_cache(maxsize=32)
def _on_day(template: str, day: str) -> str:
    """The template with a clock that stands: transformers gives templates no other date than that of this moment."""
    if _DRAWS.search(template):
        raise ValueError("it draws at random, so that no two runs had the same prompts")
    if "strftime_now" not in template:
        return template
    then, text = datetime.fromisoformat(day), "format.replace('%%', '\x00')"
    for code in sorted(set(_CODE.findall(template)) - {"%%"}):
        text += f".replace('{code}', {then.strftime(code)!r})"
    # The last piece prints nothing; behind a block, Jinja would drop a line break that the template begins with.
    clock = f"{text}.replace('\x00', '%')"
    return f"{{% macro strftime_now(format) %}}{{{{ {clock} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def whole_tokens(tokenizer: Any) -> dict[str, int]:
    """Tokens that a text becomes whole wherever it stands, such as ``</s>`` or ``<think>``: their text, and their ids.

    Args:
        tokenizer: of the model.
    """
    added = {str(token): int(number) for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    return {text: number for text, number in {**added, **_named(tokenizer)}.items() if text.strip()}


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Those of `whole_tokens` that stand for no text: start, end, padding and the like; not ``<think>`` or ``<table>``.

    Args:
        tokenizer: of the model.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special = {str(token): int(number) for number, token in added if getattr(token, "special", False)}
    return {text: number for text, number in {**special, **_named(tokenizer)}.items() if text.strip()}


def _named(tokenizer: Any) -> dict[str, int]:
    return {str(token): int(tokenizer.convert_tokens_to_ids(str(token))) for token in tokenizer.all_special_tokens}
