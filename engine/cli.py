"""The ``pairtile`` command: prepare, train, evaluate, visualize, export, report, info."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import PairtileError
from .prepare.cli import prepare

app = typer.Typer(
    help="Contrastive vision-language models: prepare data, train under DeepSpeed, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(prepare, name="prepare")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the recipe")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a YAML file, or the name of a recipe that comes with pairtile")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(help="processes on this machine, through the deepspeed launcher")] = 1,
    dry_run: Annotated[
        bool, typer.Option(help="print the resolved recipe, parameters and memory; train nothing")
    ] = False,
) -> None:
    """Train a model. The same as `deepspeed --module pairtile.engine.train RECIPE`."""
    arguments = [recipe, *(overrides or []), *(["--dry-run"] if dry_run else [])]
    if ranks > 1:
        from .launch import launch

        raise typer.Exit(launch(ranks, arguments))
    from .train import exit_process, main

    code = main(arguments)
    if dry_run:
        raise typer.Exit(code)
    exit_process(code)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(help="shards by pattern, or a folder of shards with the run's splits; default: the run's"),
    ] = None,
    which: Annotated[str, typer.Option(help="best or last checkpoint")] = "best",
    out: Annotated[Path | None, typer.Option(help="where the results go; default RUN/eval-WHICH")] = None,
    scores: Annotated[
        str | None, typer.Option(help="what ranks: pooled, tokens (late interaction) or rerank; default: eval.scores")
    ] = None,
    rerank_top: Annotated[
        int | None, typer.Option(help="how many of the best by pooled embeddings rerank scores again")
    ] = None,
) -> None:
    """Print a model's scores, write them as JSON and Markdown and draw what it retrieves."""
    from .evaluation import evaluate_run

    options = {"eval.scores": scores, "eval.rerank_top": rerank_top}
    changes = [*(overrides or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]
    evaluate_run(run, data=data, overrides=changes, which=_checked(which), out=out)


@app.command()
def visualize(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option(help="shards by pattern, or a folder of shards; default: the run's")
    ] = None,
    split: Annotated[str | None, typer.Option(help="whose images; default: the first of data.val")] = None,
    count: Annotated[int, typer.Option(help="images, drawn at random")] = 8,
    seed: Annotated[int, typer.Option(help="of the choice")] = 0,
    which: Annotated[str, typer.Option(help="best or last checkpoint")] = "best",
    out: Annotated[Path | None, typer.Option(help="the PNG; default RUN/merged-SPLIT.png")] = None,
) -> None:
    """Draw which patches of an image became one token, beside the image."""
    from .evaluation import visualize_run

    drawn = visualize_run(
        run, data=data, overrides=overrides, which=_checked(which), split=split, count=count, seed=seed, out=out
    )
    typer.echo(f"drawn to {drawn}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder or a checkpoint")],
    out: Annotated[Path, typer.Option(help="the new folder")],
    which: Annotated[str, typer.Option(help="best or last checkpoint of a run folder")] = "best",
) -> None:
    """Copy a model into a folder of its own: safetensors, configuration, tokenizer."""
    from .export import export as export_model

    typer.echo(f"exported to {export_model(run, out, which=_checked(which))}")


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS.json...", help="what `make bench` wrote")],
    out: Annotated[Path, typer.Option(help="the folder of index.html, report.md and the plots")] = Path("report"),
    audit: Annotated[
        Path | None, typer.Option(help="what `python -m benchmarks.audit --json FILE` wrote: adds the GPU kernels")
    ] = None,
) -> None:
    """Draw what the benchmarks measured: Markdown, plots, and one page that works offline."""
    from ..report import ReportError, write_report

    try:
        typer.echo(f"drawn to {write_report(results, out, audit)}")
    except ReportError as error:
        raise PairtileError(str(error)) from None


@app.command()
def info() -> None:
    """What pairtile found on this machine, and which backend serves what."""
    from ..kernels import info as gather

    typer.echo(str(gather()))


def _checked(which: str) -> str:
    if which not in ("best", "last"):
        raise PairtileError(f"--which is {which!r}, expected best or last")
    return which


def run() -> int:
    """Run the command line; what a person can mend is one line on stderr and exit code 2."""
    try:
        app()
    except PairtileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
