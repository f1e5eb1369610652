"""How time, products and memory of a training step grow with the number of experts, against their formulas.

    python benchmarks/scaling_law.py --runs runs/scaling_law             # n = 1 to 1,024
    python benchmarks/scaling_law.py --counts 1,4,16 --rounds 2

The backbone is a random Llama (see --width and --depth); q_proj and v_proj carry random experts and RadarGate with
k = 2. The same mixture made dense (every output of every expert) runs beside it as long as it fits. The backbone's own
products, bytes and time are measured without experts and taken off. Products are counted in torch's operations, native
code is timed. Writes scaling_law.json, .md and .png.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from costs.backbones import ALPHA
from costs.case import Case, with_gradient_at_input
from costs.counting import count
from costs.formulas import Size, kept_numbers, minimal_products, naive_products, plain_products, trained_numbers
from costs.machine import machine
from costs.memory import peak_of
from costs.naive import put_naive
from costs.ours import MODES, choose_mixture, gate_of, wake
from costs.rows import OURS, TARGETS, Row
from costs.scaling_report import draw, markdown
from costs.timing import Stopwatch, spread, take_turns
from torch import Tensor, nn

from radargate_pl.adapters import target_linears
from radargate_pl.experts import ExpertBank
from radargate_pl.gates import Context
from radargate_pl.moe import attach, moe_layers

RANK, TOP_K, ANGLE_RANK = 8, 2, 8
KINDS = ("plain", "eager", "naive")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs/scaling_law")
    parser.add_argument("--counts", default="1,2,4,8,16,32,64,128,256,512,1024", help="numbers of experts")
    parser.add_argument("--largest_naive", type=int, default=64, help="the dense form stops here")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without_memory", action="store_true", help="no process for each point's peak memory")
    parser.add_argument("--memory_of", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def backbone_of(options: argparse.Namespace) -> Any:
    """A random frozen Llama that asks for a gradient at its input embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = options.width
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": options.depth}
    config = LlamaConfig(vocab_size=512, hidden_size=width, intermediate_size=2 * width, **heads)
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config).to(options.device).requires_grad_(False).eval()
    with_gradient_at_input(model)
    return model


def put_experts(model: nn.Module, kind: str, n: int, options: argparse.Namespace) -> list[Size]:
    """Give q_proj and v_proj their experts; return the sizes of the layers."""
    linears = target_linears(model, TARGETS["qv"])
    sizes = [Size(n, min(TOP_K, n), RANK, ANGLE_RANK, li.in_features, li.out_features) for li in linears.values()]
    if n == 0:
        return sizes
    if kind == "naive":
        put_naive(model, TARGETS["qv"], n, RANK, ALPHA / RANK, options.seed)
        return sizes
    generator = torch.Generator().manual_seed(options.seed)
    banks = {path: _bank(linear, n, generator) for path, linear in linears.items()}
    row = Row("step", OURS, n=n, k=min(TOP_K, n), mode=kind)
    for seed, layer in enumerate(attach(model, banks, gate_of(row), context=Context()).values()):
        choose_mixture(layer, MODES[kind])
        wake(layer, seed)
    model.to(options.device)
    return sizes


def set_mixture(model: nn.Module, mode: str) -> None:
    """Choose the form of all mixtures: nothing can count the products of native code."""
    for layer in moe_layers(model).values():
        choose_mixture(layer, MODES[mode])


def _bank(linear: nn.Linear, n: int, generator: torch.Generator) -> ExpertBank:
    lora_A, lora_B = {}, {}
    for index in range(n):
        lora_A[f"e{index}"] = torch.randn(RANK, linear.in_features, generator=generator) / linear.in_features**0.5
        lora_B[f"e{index}"] = torch.randn(linear.out_features, RANK, generator=generator) * 0.01
    return ExpertBank(lora_A, lora_B, dict.fromkeys(lora_A, ALPHA / RANK))


def forward_of(model: Any, options: argparse.Namespace) -> Callable[[], Tensor]:
    """A forward to a scalar through the body; the head is the same for all and left out."""
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(0, 512, (options.batch, options.length), generator=generator).to(options.device)
    return lambda: model.model(ids, use_cache=False).last_hidden_state.square().mean()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Count and time every number of experts."""
    counts = [int(word) for word in options.counts.split(",")]
    limits = {"naive": options.largest_naive}
    plan = [("none", 0), *((kind, n) for kind in KINDS for n in counts if n <= limits.get(kind, n))]
    cases: dict[Row, Case] = {}
    points: list[dict[str, Any]] = []
    for kind, n in plan:
        model = backbone_of(options)
        sizes = put_experts(model, kind, n, options)
        forward = forward_of(model, options)
        set_mixture(model, "torch" if kind == "eager" else kind)
        counted = count(forward)
        set_mixture(model, kind)
        row = Row("step", kind, n=n)
        cases[row] = Case(lambda forward=forward: forward().backward(), model)
        tokens = options.batch * options.length
        points.append({"kind": kind, "n": n, "tokens": tokens, **formulas_of(kind, sizes, tokens), **counted._asdict()})
        print(f"{kind}, n = {n}: counted", flush=True)
    seconds, failed = take_turns(cases, options.rounds, options.seed, Stopwatch(torch.device(options.device)))
    for row, point in zip(cases, points, strict=True):
        values = list(seconds[row].values())
        point |= {"seconds": statistics.median(values), "spread": spread(values)} if row not in failed else {}
        point["peak"] = None if options.without_memory else peak_apart(point["kind"], point["n"], options)
    names = ("width", "depth", "batch", "length", "rounds", "seed", "device")
    settings = {name: getattr(options, name) for name in names} | {"rank": RANK, "k": TOP_K, "angle rank": ANGLE_RANK}
    return {"machine": machine(torch.device(options.device)), "settings": settings, "points": points}


def formulas_of(kind: str, sizes: list[Size], tokens: int) -> dict[str, int]:
    """What the formulas say about a step: products, and numbers."""
    if kind == "none":
        return {}
    products = naive_products if kind == "naive" else plain_products
    return {
        "products_formula": tokens * sum(map(products, sizes)),
        "products_minimum": tokens * sum(map(minimal_products, sizes)),
        "kept_minimum": tokens * sum(map(kept_numbers, sizes)) * torch.float32.itemsize,
        "trains": sum(map(trained_numbers, sizes)),
    }


def peak_apart(kind: str, n: int, options: argparse.Namespace) -> int | None:
    """Peak memory of the steps in a fresh process, without imports; ``None`` if it failed."""
    names = ("width", "depth", "batch", "length", "seed", "device", "threads")
    words = [f"--{name}={getattr(options, name)}" for name in names if getattr(options, name) is not None]
    command = [sys.executable, str(Path(__file__).resolve()), *words, f"--memory_of={kind},{n}"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])["peak"] if lines and not done.returncode else None


def peak_here(options: argparse.Namespace) -> dict[str, int]:
    """The same in this process."""
    kind, _, n = options.memory_of.partition(",")

    def build() -> Case:
        model = backbone_of(options)
        put_experts(model, kind, int(n), options)
        forward = forward_of(model, options)
        return Case(lambda: forward().backward(), model)

    backbone_of(options)  # imports what transformers imports late
    return peak_of(build, torch.device(options.device))[0]


def main(words: list[str] | None = None) -> None:
    """Measure, write and draw."""
    options = parsed(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(peak_here(options)))
        return
    report = measure(options)
    folder = Path(options.runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling_law.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "scaling_law.md").write_text(markdown(report) + "\n")
    draw(report, folder / "scaling_law.png")
    print((folder / "scaling_law.md").read_text())


if __name__ == "__main__":
    main()
