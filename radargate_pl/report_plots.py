"""Pictures of finished runs: loss curves, angles per layer, angles per expert and layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radargate_pl.report_runs import Group, read_angles, read_losses, rms_by_layer, split_layer

DPI = 150


def draw_all(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw everything the runs hold data for.

    Args:
        groups: runs to compare.
        folder: where the PNG files go; made if need be.

    Returns:
        The files written.

    Raises:
        ValueError: without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("Expected matplotlib for --plots, but it is not installed: pip install matplotlib") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [*draw_losses(groups, folder), *draw_angles_by_layer(groups, folder), *draw_heat_maps(groups, folder)]


def draw_losses(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Training loss against optimiser steps: raw values faint, their moving average strong, one colour per run.

    Args:
        groups: runs to compare; seeds share a colour.
        folder: where ``losses.png`` goes.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    smoothed: list[float] = []
    for index, group in enumerate(groups):
        label: str | None = group.name
        for run in group.runs:
            curve = read_losses(run.folder)
            if curve is None:
                continue
            steps, raw, average = curve
            color = f"C{index % 10}"
            axes.plot(steps, raw, color=color, linewidth=0.7, alpha=0.3 if average else 1.0)
            axes.plot(steps, average or raw, color=color, linewidth=1.8, label=label)
            smoothed += average or raw
            label = None  # one entry in the legend for all seeds
    if not smoothed:
        pyplot.close(figure)
        return []
    low, high = min(smoothed), max(smoothed)
    margin = 0.15 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)  # single batches may leave the picture: the curves are what matters
    axes.set(
        xlabel="optimiser step", ylabel="training loss (nats per answer token)", title="Training loss, raw and EMA"
    )
    return [_save(figure, axes, folder / "losses.png")]


def draw_angles_by_layer(groups: Sequence[Group], folder: Path) -> list[Path]:
    """RMS angle of each layer at the last validation, one line per run and kind of layer.

    Args:
        groups: runs to compare; of several seeds the first is drawn.
        folder: where ``angles_by_layer.png`` goes.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    styles: dict[str, str] = {}
    for index, group in enumerate(groups):
        points: dict[str, list[tuple[int, float]]] = {}
        for position, (layer, angle) in enumerate(rms_by_layer(read_angles(group.runs[0].folder)).items()):
            block, module = split_layer(layer)
            points.setdefault(module, []).append((position if block is None else block, angle))
        for module, line in points.items():
            style = styles.setdefault(module, ("-", "--", ":", "-.")[len(styles) % 4])
            blocks, angles = zip(*sorted(line), strict=True)
            label = f"{group.name}, {module}"
            axes.plot(blocks, angles, style, color=f"C{index % 10}", marker="o", markersize=3, label=label)
    if not styles:
        pyplot.close(figure)
        return []
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(
        xlabel="block of the backbone", ylabel="RMS angle (rad)", title="How far each layer rotates, last validation"
    )
    return [_save(figure, axes, folder / "angles_by_layer.png")]


def draw_heat_maps(groups: Sequence[Group], folder: Path) -> list[Path]:
    """RMS angle of each expert at each layer at the last validation, one picture per run that rotates.

    Args:
        groups: runs; of several seeds the first is drawn.
        folder: where ``angles_<run>.png`` go.
    """
    return [path for group in groups for path in _heat_map(group, folder)]


def _heat_map(group: Group, folder: Path) -> list[Path]:
    from matplotlib import pyplot

    rows = read_angles(group.runs[0].folder)
    if not rows:
        return []
    modules: dict[str, list[str]] = {}
    for row in rows:
        layers = modules.setdefault(split_layer(row["layer"])[1], [])
        layers += [row["layer"]] if row["layer"] not in layers else []
    experts = list(dict.fromkeys(row["expert"] for row in rows))
    angles = {(row["layer"], row["expert"]): float(row["angle_rms"]) for row in rows}
    highest = max((angle for angle in angles.values() if angle == angle), default=1.0) or 1.0
    height = 1.1 + len(modules) * (0.75 + 0.3 * len(experts))
    width = max(6.0, 3.0 + 0.25 * max(map(len, modules.values())))
    figure, panels = pyplot.subplots(len(modules), 1, figsize=(width, height), layout="constrained", squeeze=False)
    for axes, (module, layers) in zip(panels[:, 0], modules.items(), strict=True):
        values = [[angles.get((layer, expert), float("nan")) for layer in layers] for expert in experts]
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=highest, cmap="viridis")
        blocks = [split_layer(layer)[0] for layer in layers]
        shown = range(0, len(layers), max(1, -(-len(layers) // 20)))
        axes.set_xticks(list(shown), [str(index if blocks[index] is None else blocks[index]) for index in shown])
        axes.set_yticks(range(len(experts)), experts)
        axes.set_title(module, fontsize=10, loc="left")
    panels[-1, 0].set_xlabel("block of the backbone")
    figure.suptitle(f"{group.name}: RMS angle per expert and layer, step {rows[0]['step']}", fontsize=11)
    figure.colorbar(image, ax=panels[:, 0].tolist(), label="RMS angle (rad)")
    name = "".join(letter if letter.isalnum() else "_" for letter in group.name.lower())
    return [_write(figure, folder / f"angles_{name}.png")]


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return _write(figure, path)


def _write(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path
