"""The weights of the best evaluation so far."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .checkpoint import full_state_dict, replace_folder
from .errors import PairtileError
from .export import write_model_folder
from .recipe import Recipe
from .runtime import Runtime


def keep_best(
    recipe: Recipe, metrics: dict[str, float], step: int, engine: Any, runtime: Runtime, describe: dict[str, Any]
) -> None:
    """Keep the weights of the best evaluation so far in ``best/``. Every rank must call it.

    ``best/score.json`` holds the score, so that it belongs to the weights beside it whatever happened since.
    """
    name = recipe.eval.best or next(key for key in metrics if key.endswith("/text_to_image/R@1"))
    if name not in metrics:
        raise PairtileError(f"eval.best is {name!r}, which was not measured (measured: {', '.join(metrics)})")
    folder = recipe.run_dir / "best"
    score = folder / "score.json"
    saved = json.loads(score.read_text()) if score.is_file() else {}
    # a later step than this one: the run was killed and does those steps again
    known = saved.get("metric") == name and saved.get("step", step) < step
    better = not known or metrics[name] > saved["value"]
    runtime.barrier()  # every rank has read what rank 0 may now replace
    if not better or not math.isfinite(metrics[name]):
        return
    weights = full_state_dict(engine.module, runtime)

    def write(target: Path) -> None:
        write_model_folder(target, weights=weights, **describe)
        (target / score.name).write_text(json.dumps({"metric": name, "value": metrics[name], "step": step}))

    if runtime.is_main:
        replace_folder(folder, write)
    runtime.barrier()
