"""Throughput of `radargate test` by generation against plain `generate` of transformers, on the same batches.

    python benchmarks/generation_throughput.py --root DATA --task gsm8k --limit 32 --max_new_tokens 64

Twice, without experts and with RadarGate over several, both take turns batch by batch: the frozen backbone alone with
transformers' own stop strings, then the whole test step with judging, the summary of the gates and the answers written
to disk. DATA holds the benchmark's file. Random experts are too quiet to change an answer, so that both write the same
tokens in the same steps; experts of `--experts` answer with other texts, and tokens a second are compared.
`--without_stop_strings` leaves those out on both sides, so that transformers spends no time on them.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from radargate_pl.backbones import load_backbone
from radargate_pl.callbacks import BenchmarkWriter
from radargate_pl.data import BenchmarkData
from radargate_pl.gates import RadarGate
from radargate_pl.module import AdaptedLM
from radargate_pl.networks import GatedNetwork, NewExperts

QUIET = 1e-6  # standard deviation of B


class PlainGenerate(Callback):
    """Generates for every batch with a plain backbone before the test step does.

    Args:
        loaded: the backbone.
    """

    def __init__(self, loaded: Any) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.seconds, self.tokens = 0.0, 0

    @torch.no_grad()
    def on_test_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        """Take a turn; the end tokens and stop strings count as generated."""
        self.model.to(batch["input_ids"].device)
        prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
        options = {"stop_strings": list(batch["stop"]), "tokenizer": self.tokenizer} if batch["stop"] else {}
        begun = time.perf_counter()
        ids = self.model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=batch["max_new_tokens"],
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        new = ids[:, prompt["input_ids"].shape[1] :].tolist()
        self.seconds += time.perf_counter() - begun
        self.tokens += sum(_length(row, self.tokenizer.pad_token_id) for row in new)


class Stopwatch(Callback):
    """Times the test step and what the callbacks before this one do behind it."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self._begun = 0.0, 0, 0.0

    def on_test_batch_start(self, *_: Any) -> None:
        """Begin."""
        self._begun = time.perf_counter()

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Add up."""
        self.seconds += time.perf_counter() - self._begun
        self.tokens += outputs["tokens"]


def _length(row: list[int], pad: int) -> int:
    """Tokens up to the first padding, which is one more where the end token pads."""
    return row.index(pad) + 1 if pad in row else len(row)


@torch.no_grad()
def random_experts(folder: str, backbone: str, count: int) -> str:
    """Experts of rank 8 on q_proj and v_proj with tiny random updates; returns their folder."""
    torch.manual_seed(0)
    new = NewExperts(per="mixture", count=count)
    network = GatedNetwork({"any": None}, backbone=backbone, dtype="float32", new_experts=new, train="experts")
    for layer in network.layers.values():
        for name in layer.bank.names:
            layer.bank.expert_weights(name)[1].normal_(std=QUIET)
    network.save_experts(folder)
    return folder


def measure(options: argparse.Namespace, experts: str | list[str], run: Path) -> float:
    """Let both take turns, and print; returns tokens a second of the test by those of plain `generate`."""
    lm = AdaptedLM(lambda tasks: GatedNetwork(tasks, backbone=options.backbone, experts=experts, gate=RadarGate))
    settings = {name: getattr(options, name) for name in ("root", "limit", "batch_size", "max_new_tokens")}
    data = BenchmarkData([options.task], tokenizer=options.backbone, protocol="generation", **settings)
    if options.without_stop_strings:
        data.sources = [replace(source, benchmark=replace(source.benchmark, stop=())) for source in data.sources]
    plain, tested = PlainGenerate(load_backbone(options.backbone)), Stopwatch()
    trainer = Trainer(
        default_root_dir=run,
        callbacks=[plain, BenchmarkWriter(overwrite=True), tested],
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    trainer.test(lm, datamodule=data, verbose=False)
    network = lm.built_network
    print(f"\n{options.task}, {options.limit} examples, batches of {options.batch_size}: {network.describe()}", end="")
    print(f" over {len(network.experts)} experts" if network.experts else "")
    for name, found in (("generate of transformers", plain), ("radargate test", tested)):
        print(f"{name}: {found.tokens} tokens in {found.seconds:.2f} s, {found.tokens / found.seconds:.1f} tokens/s")
    ratio = tested.tokens / tested.seconds / (plain.tokens / plain.seconds)
    print(f"ratio: {ratio:.3f}", flush=True)
    return ratio


def main() -> None:
    """Measure the backbone alone and RadarGate over experts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder with the file of the benchmark")
    parser.add_argument("--runs", default="runs/generation_throughput")
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--backbone", default="smollm2-135m-q4")
    parser.add_argument("--experts", help="folder of experts; without, --num_experts random ones")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[5], help="how many random ones, one run each")
    parser.add_argument(
        "--without_stop_strings", action="store_true", help="answers end at the end token or the limit, on both sides"
    )
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    options = parser.parse_args()
    measure(options, [], Path(options.runs) / "bare")
    for count in [0] if options.experts else options.num_experts:
        with tempfile.TemporaryDirectory() as folder:
            experts = options.experts or random_experts(folder, options.backbone, count)
            measure(options, experts, Path(options.runs) / (f"experts_{count}" if count else "experts"))


if __name__ == "__main__":
    main()
