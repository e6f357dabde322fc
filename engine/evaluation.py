"""Evaluation of a recipe's splits: by the trainer between steps, and by ``pairtile evaluate`` afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .curve import draw_curve
from .data import ShardDataset, Tokenizer
from .errors import PairtileError, RecipeError
from .evaluate import SplitResult, evaluate_split, print_results, to_markdown, write_json
from .evaluate.merged_sheet import draw_merged_tokens
from .export import Encoder, find_model, load
from .model import DualEncoder
from .plan import check_forward, open_split, refused_members
from .recipe import EvalConfig, Recipe, load_recipe
from .runtime import Runtime

RESULTS = "results.json"


def open_splits(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, ShardDataset]:
    """The evaluation splits by name. Raises :class:`PairtileError` for an unknown name or missing shards."""
    known = recipe.data.val
    wanted = list(known) if recipe.eval.splits is None else recipe.eval.splits
    for name in wanted:
        if name not in known:
            raise RecipeError(
                f"eval.splits names {name!r}, which is not in data.val (there: {', '.join(known) or 'none'})"
            )
    best = recipe.eval.best
    if best is not None and best.split("/")[0] not in wanted:
        raise RecipeError(
            f"eval.best is {best!r}, which is of no evaluated split (evaluated: {', '.join(wanted) or 'none'})"
        )
    return {name: open_split(recipe, known[name], tokenizer, train=False) for name in wanted}


def evaluate_model(
    model: DualEncoder, splits: dict[str, ShardDataset], config: EvalConfig, runtime: Runtime, folder: Path, *,
    precision: str, about: dict[str, Any] | None = None,
) -> tuple[list[SplitResult], dict[str, float]]:  # fmt: skip
    """Evaluate every split and write ``results.json``, ``results.md`` and a contact sheet a split into ``folder``.

    Collective: every rank calls it and gets the same results, and the flat metrics for logs.
    """
    results = []
    scores = config.scores
    if scores == "auto":
        scores = "pooled" if model.config.tokens is None else "tokens"
    for name, dataset in splits.items():
        wanted = config.classification
        with gathering_on_access(model):
            result = evaluate_split(
                model,
                dataset,
                split=name,
                batch_size=config.batch_size,
                device=runtime.device,
                group=runtime.group,
                rank=runtime.rank,
                world_size=runtime.world_size,
                match_ids=config.match_ids,
                without_flags=config.without_flags,
                classification=wanted if wanted is not None and wanted.split in (None, name) else None,
                autocast=torch.bfloat16 if precision == "bf16" else None,
                contact_sheet=folder / f"{name}.png" if config.contact_sheet else None,
                scores=scores,
                rerank_top=config.rerank_top,
            )
        results.append(result)
    if runtime.is_main and results:
        write_json(folder / RESULTS, results, **(about or {}))
        (folder / "results.md").write_text(to_markdown(results), encoding="utf-8")
    return results, {key: value for result in results for key, value in result.scalars().items()}


def evaluate_run(
    run: Path, *, data: str | None = None, overrides: list[str] | None = None, which: str = "best", out: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[SplitResult]:  # fmt: skip
    """Evaluate a trained model, print the table and draw the contact sheets (``pairtile evaluate``).

    Args:
        run: the folder of a run, whose ``config.yaml`` says what is evaluated and how.
        data: a folder of shards with the same splits, or shards by pattern; by default the recipe's.
        overrides: ``key=value`` changes to the run's recipe, such as ``eval.batch_size=64``. Of the model those of
            ``token_merging`` have an effect: a tower can merge other tokens than it was trained with.
        which: ``best`` or ``last`` checkpoint.
        out: where the results go; by default ``RUN/eval-best`` or ``RUN/eval-last``.

    Raises:
        PairtileError: no run, no model or no shards.
    """
    recipe, source, encoder, splits = open_run(run, data, overrides, which)
    for line in refused_members(splits):
        say(line)
    folder = out or run / f"eval-{which}"
    runtime = Runtime(0, 0, 1, encoder.device, None)
    about = {"model": str(source), "data": recipe.data.root}
    results, _ = evaluate_model(
        encoder.model, splits, recipe.eval, runtime, folder, precision=recipe.train.precision, about=about
    )
    print_results(results)
    sheets = ", ".join(str(folder / f"{name}.png") for name in splits) if recipe.eval.contact_sheet else "none"
    say(f"model: {source}\nresults: {folder / RESULTS}\ncurve: {draw_curve(run)}\ncontact sheets: {sheets}")
    return results


def open_run(
    run: Path, data: str | None, overrides: list[str] | None, which: str
) -> tuple[Recipe, Path, Encoder, dict[str, ShardDataset]]:
    """The recipe of a run with changes, the folder of its model, the model, and the evaluation splits.

    Raises:
        PairtileError: no run, no model or no shards.
    """
    if not (run / "config.yaml").is_file():
        raise PairtileError(f"{run} is not a run folder: no config.yaml in it")
    recipe = load_recipe(run / "config.yaml", overrides)
    if data is not None:
        recipe = _with_data(recipe, data)
    source = find_model(run, which)
    encoder = load(source, device="cuda" if torch.cuda.is_available() else "cpu")
    encoder.model.merge_tokens(recipe.model)
    check_forward(encoder.model, recipe)
    splits = open_splits(recipe, encoder.tokenizer)
    if not splits:
        raise PairtileError(
            f"{run}/config.yaml names no evaluation split; add data.val, for example data.val.val='val-*.tar'"
        )
    return recipe, source, encoder, splits


@contextmanager
def gathering_on_access(model: nn.Module) -> Iterator[None]:
    """Let ZeRO-3 gather a parameter that a module reads of its child (CLIP's text tower reads its positions' shape).

    It does so while a flag on each module is up, which the engine raises in its own forward; evaluation calls the
    towers directly. Without ZeRO-3 there is no such flag and nothing happens.
    """
    flagged = [module._parameters for module in model.modules() if hasattr(module._parameters, "_in_forward")]
    for parameters in flagged:
        parameters._in_forward = True
    try:
        yield
    finally:
        for parameters in flagged:
            parameters._in_forward = False


def visualize_run(
    run: Path, *, data: str | None = None, overrides: list[str] | None = None, which: str = "best", split: str | None = None,
    count: int = 8, seed: int = 0, out: Path | None = None,
) -> Path:  # fmt: skip
    """Draw which patches of some images a trained model merges (``pairtile visualize``).

    Args:
        run, data, which: as for :func:`evaluate_run`.
        overrides: ``key=value`` changes, such as ``model.vision.token_merging={r: 16}`` for a model trained without.
        split: whose images; by default the first.
        count: how many, drawn at random by ``seed``.
        out: the PNG; by default ``RUN/merged-SPLIT.png``.

    Returns:
        The PNG.

    Raises:
        PairtileError: no run, no model, no shards, no such split, or an image tower that merges nothing.
    """
    recipe, _, encoder, splits = open_run(run, data, overrides, which)
    name = next(iter(splits)) if split is None else split
    if name not in splits:
        raise PairtileError(f"there is no split {name!r} to draw from; known are {', '.join(splits)}")
    if recipe.model.vision.token_merging is None:
        raise PairtileError(
            "the image tower of this run merges no tokens; say how it should, for example "
            "model.vision.token_merging='{r: 16}'"
        )
    encoder.model.merge_tokens(recipe.model, trace_source=True)
    path = out or run / f"merged-{name}.png"
    draw_merged_tokens(path, encoder.model, splits[name], count=count, seed=seed)
    return path


def _with_data(recipe: Recipe, data: str) -> Recipe:
    if Path(data).is_dir():
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": data})})
    splits = {"data": str(Path(data).absolute())}
    evaluation = recipe.eval.model_copy(update={"splits": None, "best": None})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"val": splits}), "eval": evaluation})


def headline(metrics: dict[str, float]) -> str:
    """One line for the person who watches a run."""
    shown = {key: value for key, value in metrics.items() if key.endswith("R@1") and "without" not in key}
    return "eval  " + "  ".join(f"{key} {value:.1%}" for key, value in shown.items())
