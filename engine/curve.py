"""The curves of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from .progress import METRICS


def draw_curve(run_dir: Path) -> Path | None:
    """Draw loss, in-batch accuracy and text-to-image R@1 over the steps into ``RUN/curve.png``, from metrics.jsonl.

    Returns None when the run has logged nothing.
    """
    file = run_dir / METRICS
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    training = [line for line in lines if line["kind"] == "train"]
    if not training:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    evaluations = [line for line in lines if line["kind"] == "eval"]
    recalls = sorted(
        {key for line in evaluations for key in line if key.endswith("text_to_image/R@1") and "without" not in key}
    )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), dpi=120, layout="constrained")
    steps = [line["step"] for line in training]
    left.plot(steps, [line["loss"] for line in training], color="#1f5fa8", linewidth=1.6)
    left.set(xlabel="step", ylabel="loss", title="training loss", yscale="log")
    right.plot(
        steps,
        [line["accuracy"] for line in training],
        color="#9aa5b1",
        linewidth=1.2,
        label="in-batch accuracy (training)",
    )
    for key in recalls:
        points = [(line["step"], line[key]) for line in evaluations if key in line]
        right.plot(*zip(*points), marker="o", markersize=4, linewidth=1.6, label=key)
    right.set(xlabel="step", ylim=(0, 1), title="accuracy and retrieval")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    target = run_dir / "curve.png"
    figure.savefig(target)
    pyplot.close(figure)
    return target
