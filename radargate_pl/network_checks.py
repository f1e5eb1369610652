"""What can be wrong with a network's arguments, backbone and batches (layer 3)."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from radargate_pl.chat_template import turn_end, whole_tokens
from radargate_pl.gates import Context, TaskGate
from radargate_pl.moe import MoELinear
from radargate_pl.new_experts import NewExperts

if TYPE_CHECKING:
    from radargate_pl.networks import GatedNetwork


_GIVE_TRAINED = (
    " Each of these needs the trained experts as given ones: --model.network.init_args.experts RUN/experts "
    "--model.network.init_args.train gate --trainer.default_root_dir ANOTHER, and no --ckpt_path."
)


def check_arguments(experts: Any, new_experts: NewExperts | None, train: str, dropout: float) -> NewExperts | None:
    """Refuse arguments that do not fit together.

    Returns:
        The new experts to make: none where given experts stay frozen, so that one config of a backbone, which names its
        target modules, goes on top of the fit of experts and of that of a gate.

    Raises:
        ValueError: naming the argument.
    """
    if experts and train == "gate":
        new_experts = None
    if experts and new_experts is not None:
        raise ValueError("Expected either experts or new_experts, but got both. Remove one of them.")
    if train not in ("gate", "experts", "both"):
        raise ValueError(f"Expected train to be 'gate', 'experts' or 'both', but got {train!r}.")
    if new_experts is not None and train == "gate":
        raise ValueError(
            "Expected train to be 'experts' or 'both' with new_experts (they start at zero), but got 'gate'."
        )
    if not experts and new_experts is None and train != "gate":
        raise ValueError(f"Expected experts or new_experts with train: {train}, but there are no experts to train.")
    if not 0 <= dropout < 1:
        raise ValueError(f"Expected dropout to be in [0, 1), but got {dropout}.")
    return new_experts


def _check_special_tokens(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer whose padding or end has no row in the embedding: torch would say "index out of range"."""
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    named = {
        "pad_token": tokenizer.pad_token_id,
        "eos_token": tokenizer.eos_token_id,
        "bos_token": tokenizer.bos_token_id,
    }
    named["end of a turn"] = turn_end(tokenizer)
    beyond = [f"{name} is {number}" for name, number in named.items() if number is not None and number >= rows]
    if beyond:
        raise ValueError(
            f"Expected the tokenizer of the backbone to use ids below {rows}, the rows of its embedding, but "
            f"{', '.join(beyond)}. Set another token in tokenizer_config.json (pad_token may be the end token), or "
            "give the model an embedding of that size (resize_token_embeddings) and save it."
        )
    more = sorted(text for text, number in whole_tokens(tokenizer).items() if number >= rows)
    if more:
        shown = ", ".join(more[:5]) + (f" and {len(more) - 5} more" if len(more) > 5 else "")
        rank_zero_warn(f"The embedding has {rows} rows and none for {shown}; a text must not hold these.")


@contextmanager
def ids_within_embedding(model: PreTrainedModel, ids: Tensor) -> Iterator[None]:
    """Turn the embedding's "index out of range" into a sentence.

    Args:
        model: the backbone.
        ids: what it reads, (examples, length) int64.

    Raises:
        ValueError: naming the id and the number of rows.
    """
    try:
        yield
    except IndexError as error:
        embedding: Any = model.get_input_embeddings()
        rows, largest = int(embedding.weight.shape[0]), int(ids.max()) if ids.numel() else -1
        if largest < rows:
            raise
        raise ValueError(
            f"Expected token ids below {rows}, the rows of the backbone's embedding, but a text holds a token with id "
            f"{largest}: the tokenizer has tokens that the model has not. Use the tokenizer of this model, or give the "
            "model an embedding of that size (resize_token_embeddings) and save it."
        ) from error


def check_backbone(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a model whose labelled positions cannot be had, or whose tokenizer names tokens it does not have.

    Args:
        model: the backbone.
        tokenizer: its tokenizer.

    Raises:
        ValueError: naming the model's class and what it lacks.
    """
    _check_special_tokens(model, tokenizer)
    kind = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"Expected a backbone with output embeddings (a language model's head), but {kind} has none. Choose a "
            "causal or sequence-to-sequence language model."
        )


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Whether the model's forward has ``position_ids`` (models with ALiBi or recurrence have none)."""
    return "position_ids" in inspect.signature(model.forward).parameters


def check_expert_ids(context: Context, rows: int, experts: tuple[str, ...]) -> None:
    """Refuse expert ids that are not one per example, or that are none of the library's.

    Args:
        context: holding the batch's ids.
        rows: number of examples.
        experts: names of the library.

    Raises:
        ValueError: naming what was found.
    """
    if context.expert is None or context.active is None:
        return
    if context.expert.shape != (rows,):
        raise ValueError(
            f"Expected expert to hold one id for each of the {rows} examples, but got shape "
            f"{tuple(context.expert.shape)}."
        )
    unknown = [index for index in context.active if not 0 <= index < len(experts)]
    if unknown:
        raise ValueError(
            f"Expected expert ids from 0 to {len(experts) - 1} ({', '.join(experts)}), or -1 for none, but got "
            f"{unknown}."
        )


@contextmanager
def known_batch(
    network: "GatedNetwork", input_ids: Tensor, expert: Tensor | None, tokens: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """Let the gates know a batch while the block runs.

    Args:
        network: of the gates.
        input_ids: (examples, length) int64.
        expert: id of each example's own expert, (examples,) int64, or ``None``.
        tokens: stream name to the mask of real tokens, (examples, length) bool.

    Raises:
        ValueError: see `check_expert_ids`.
    """
    with network.context.batch(None if expert is None else expert.to(input_ids.device), tokens):
        check_expert_ids(network.context, input_ids.shape[0], network.experts)
        yield


def new_context(model: PreTrainedModel) -> Context:
    """Return what gates are to know, nothing of which stays when the backbone is called by itself.

    Args:
        model: the backbone; its encoder or decoder may be called by themselves, too.
    """
    context = Context()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.register_forward_pre_hook(context.leave_behind)
    return context


def goes_by_task(network: "GatedNetwork") -> bool:
    """Whether an example is answered by the expert of its own task (TaskGate)."""
    return any(isinstance(layer.gate, TaskGate) for layer in network.layers.values())


def check_experts_of_tasks(network: "GatedNetwork") -> None:
    """Refuse to train experts by the task they belong to when they belong to none: nothing would train.

    Raises:
        ValueError: naming tasks and experts.
    """
    if goes_by_task(network) and network.train_part != "gate" and max(network.expert_of_task.values(), default=0) < 0:
        raise ValueError(
            f"Expected TaskGate to know an expert of some task of {list(network.expert_of_task)}, but the experts "
            f"{list(network.experts)} belong to none. Choose another gate, or new_experts.per: task."
        )


def check_expert_of(network: "GatedNetwork", task: str) -> None:
    """Refuse to test by the task's own expert where there is none: the bare backbone would answer, unnoticed.

    Args:
        network: with any gate.
        task: name of a task to be answered.

    Raises:
        ValueError: naming task and experts; or new experts are as they start, which is the bare backbone too.
    """
    if network.new_experts is not None and not any(_has_moved(layer) for layer in network.layers.values()):
        raise ValueError(
            f"Expected trained experts to answer {task!r}, but {', '.join(network.experts)} are new: every B is zero. "
            "Set --ckpt_path best."
        )
    if goes_by_task(network) and network.expert_of_task.get(task, -1) < 0:
        raise ValueError(
            f"Expected TaskGate to know an expert of {task!r}, but the experts {list(network.experts)} belong to other "
            "tasks. Choose one for all (--model.network.init_args.gate DirectLoRA "
            "--model.network.init_args.gate.expert NAME), another gate, or for the bare backbone "
            "--model.network.init_args.experts '[]'." + (_GIVE_TRAINED if network.new_experts else "")
        )


def _has_moved(layer: MoELinear) -> bool:
    return any(bool(layer.bank.expert_weights(name)[1].any()) for name in layer.bank.names)


def check_shared_A(layers: Mapping[str, MoELinear]) -> None:
    """Refuse experts that do not have one A per layer (HydraLoRA).

    Raises:
        ValueError: naming the first layer where they differ.
    """
    for path, layer in layers.items():
        if layer.bank.num_experts > 1 and not layer.bank.shares_A:
            raise ValueError(
                f"Expected experts that share their A with share_A: true, but {', '.join(layer.bank.names)} have A of "
                f"their own at {path}. Train them with new_experts: {{share_A: true}}, or set share_A: false."
            )


def prompt_length(input_ids: Tensor, is_encoder_decoder: bool, generation_kwargs: dict[str, Any]) -> int:
    """Return how many ids ``generate`` puts before the newly generated ones.

    Raises:
        ValueError: for ``return_dict_in_generate``, whose answer is no tensor.
    """
    if generation_kwargs.get("return_dict_in_generate"):
        raise ValueError(
            "Expected return_dict_in_generate to be off: generate returns the new ids only. Call "
            "network.backbone.generate for more, inside `with network.context.batch(expert=ids):` under TaskGate."
        )
    if not is_encoder_decoder:
        return input_ids.shape[1]
    return int(generation_kwargs["decoder_input_ids"].shape[1])
