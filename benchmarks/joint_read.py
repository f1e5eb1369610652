"""What projections that share an input would gain from one product in training: latents and scores, there and back.

    python benchmarks/joint_read.py                      # q and v of SmolLM2-135M, 5 and 40 experts, 512 tokens
    python benchmarks/joint_read.py --projections 3

An upper bound: everything else of a layer stays as it is. One after the other in turns; medians in milliseconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--projections", type=int, default=2, help="that read one input")
    parser.add_argument("--experts", type=int, nargs="+", default=[5, 40])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of experts and input")
    return parser.parse_args(words)


def forms(experts: int, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A forward and backward of every projection's latents and scores, alone and as one."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, options.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    count, ranks, width, tokens = options.projections, experts * options.rank, options.width, options.tokens
    lora_A = [random(ranks, width).to(dtype) for _ in range(count)]
    theta = [random(experts, width).requires_grad_() for _ in range(count)]
    x = random(tokens, width).to(dtype).requires_grad_()
    of_latents = [random(tokens, ranks).to(dtype) for _ in range(count)]
    of_scores, together = [random(tokens, experts) for _ in range(count)], torch.cat(lora_A)

    def alone() -> None:
        made = [(F.linear(x, A), F.linear(x.float(), rows)) for A, rows in zip(lora_A, theta, strict=True)]
        latents, scores = zip(*made, strict=True)
        torch.autograd.backward([*latents, *scores], [*of_latents, *of_scores])

    def joint() -> None:
        latents = F.linear(x, together).split(ranks, 1)
        scores = F.linear(x.float(), torch.cat(theta)).split(experts, 1)
        torch.autograd.backward([*latents, *scores], [*of_latents, *of_scores])

    return {"alone": alone, "joint": joint}


def measure(experts: int, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of both forms."""
    found = forms(experts, options)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(options.rounds + 3):
        for name, run in found.items():
            begun = time.perf_counter()
            run()
            seconds[name] += [time.perf_counter() - begun] if turn >= 3 else []
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    options = parsed(words)
    for experts in options.experts:
        found = measure(experts, options)
        alone, joint = found["alone"], found["joint"]
        print(f"{experts} experts: alone {alone:.2f} ms, joint {joint:.2f} ms, gain {alone - joint:.2f} ms a layer")


if __name__ == "__main__":
    main()
