"""Train a two-tower model from a recipe: ``deepspeed --module pairtile.engine.train RECIPE [key=value ...]``.

The same module runs under ``torchrun -m`` and, as one process, under ``python -m``. It reads from top to bottom in
the order in which things happen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .best import keep_best
from .checkpoint import (
    Layout,
    TrainerState,
    find_source,
    load_checkpoint,
    save_checkpoint,
)
from .data import Batch, build_loader
from .deepspeed_config import deepspeed_config
from .errors import PairtileError, RankFailure, RecipeError
from .evaluation import RESULTS, evaluate_model, headline, open_splits
from .export import build_model
from .gradient_cache import check_batch_statistics
from .guard import GradientGuard
from .incidents import BAD_BATCHES, SKIPPED, count_skipped, non_finite, report_bad_batch, stop_if_hopeless
from .model import DualEncoder, DualOutput
from .objectives import WeightedSum, check_objectives
from .optimizer import build_optimizer, learning_rate
from .passes import Passes
from .plan import (
    check_batch,
    check_forward,
    check_run_dir,
    describe_plan,
    open_training_data,
    refused_members,
    total_steps,
)
from .progress import RunLog, rewind
from .recipe import Recipe, load_recipe
from .runtime import Runtime, environment_rank, seed_step, start
from .statistics import in_batch_accuracy
from .versions import write_config
from .watch import EXIT_OTHER_RANK, Watch


@dataclass(frozen=True)
class TrainResult:
    """What a finished (or interrupted) run leaves."""

    run_dir: Path
    step: int
    interrupted: bool
    metrics: dict[str, float]


def train(recipe: Recipe) -> TrainResult:
    """Run a recipe in this process, as one rank of however many were started. SIGTERM makes it save and return.

    Raises:
        PairtileError: something in the recipe, the data or the file system has to be mended by a person.
    """
    with termination_requested() as requested, Watch() as watch:
        return _train(recipe, requested, watch)


def _train(recipe: Recipe, requested: Callable[[], bool], watch: Watch) -> TrainResult:
    # What can be wrong is found before anything is started.
    check_objectives(recipe.objectives)
    check_batch(recipe, environment_rank()[2])
    check_run_dir(recipe)
    dataset, tokenizer = open_training_data(recipe)
    splits = open_splits(recipe, tokenizer)
    timeout = recipe.train.timeout_minutes
    # the watch, which names the rank that hangs, speaks before the exchange that waits for it gives up
    runtime = start(recipe.train.threads, timeout_minutes=timeout + 2)
    watch.begin(runtime.rank, runtime.world_size, timeout=60 * timeout, device=runtime.device)

    # The model. Every rank draws the same weights from the seed; DeepSpeed broadcasts those of rank 0 all the same.
    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe.model, recipe.data, tokenizer)
    check_forward(model, recipe)
    if recipe.train.activation_checkpointing:
        model.enable_activation_checkpointing()
    if recipe.train.cache_chunk is not None:
        check_batch_statistics(model.train())
    objective = WeightedSum(recipe.objectives, runtime.group)
    steps = total_steps(recipe, len(dataset))
    guard = GradientGuard(model)

    # Where to start.
    run_dir, checkpoints = recipe.run_dir, recipe.run_dir / "checkpoints"
    layout = Layout(
        runtime.world_size,
        recipe.train.zero_stage,
        recipe.train.batch_size,
        recipe.train.accumulation,
        recipe.train.seed,
        len(dataset),
    )
    source = find_source(run_dir, layout, model.config, runtime, resume=recipe.resume == "auto")
    engine = initialize(model.to(runtime.device), recipe, runtime, universal=source.universal)
    load_checkpoint(source, engine)
    passes = Passes.of(engine, recipe.train, runtime)
    state = source.state
    describe = {"model": model.config, "data": recipe.data, "tokenizer": tokenizer}
    if runtime.is_main:
        write_config(recipe, run_dir / "config.yaml", runtime.world_size)
        rewind_run(run_dir, state)
    runtime.barrier()
    log = RunLog(run_dir, total_steps=steps, start_step=state.step, enabled=runtime.is_main)
    for line in refused_members({"train": dataset, **splits}):
        log.say(line)
    if state.step:
        log.say(f"resumed at step {state.step} of {steps}")
    loader = iter(
        build_loader(
            dataset, batch_size=recipe.train.batch_size, rank=runtime.rank, world_size=runtime.world_size,
            start_batch=state.batch_index,
        )
    )  # fmt: skip

    def evaluate_if_due() -> dict[str, float]:
        folder = run_dir / "eval" / f"step-{state.step:08d}"
        due = state.step == steps or is_due(state.step, recipe.train.eval_every)
        if not splits or not due or (folder / RESULTS).is_file():
            return {}
        watch.at(state.step, "evaluation")
        _, metrics = evaluate_model(model, splits, recipe.eval, runtime, folder, precision=recipe.train.precision)
        log.evaluation(state.step, metrics)
        log.say(headline(metrics))
        keep_best(recipe, metrics, state.step, engine, runtime, describe)
        return metrics

    # The loop: one turn is one optimiser step.
    bad_in_a_row, interrupted = 0, False
    with closing(log):
        metrics = evaluate_if_due() if state.step else {}  # a run that was killed in it makes up for it
        while state.step < steps and not interrupted:
            began = time.perf_counter()
            logged = is_due(state.step + 1, recipe.train.log_every) or state.step + 1 == steps
            lr = learning_rate(state.step, steps, recipe.train)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            engine.train()
            losses: list[dict[str, Tensor]] = []
            while len(losses) < recipe.train.accumulation:
                watch.at(state.step + 1, "data")
                batch = next_batch(loader, state, runtime)
                count_skipped(batch, state, run_dir)
                seed_step(recipe.train.seed, runtime.rank, state.batch_index)
                watch.at(state.step + 1, "forward")
                output = passes.forward(batch)
                watch.at(state.step + 1, "loss")
                terms = objective.terms(output, batch)
                loss = torch.stack(list(terms.values())).sum()
                flags = runtime.gather_flags(*non_finite(output, loss), requested())
                interrupted |= any(flag[2] for flag in flags)  # acted on when this step is complete
                state.batch_index += 1
                if any(flag[0] or flag[1] for flag in flags):
                    bad_in_a_row += 1
                    report_bad_batch("the loss is not finite; batch skipped", batch, state, flags, run_dir, runtime)
                    stop_if_hopeless(bad_in_a_row, recipe, state)
                    continue
                watch.at(state.step + 1, "backward")
                passes.backward(loss)
                flags = runtime.gather_flags(guard.take())
                if any(flag[0] for flag in flags):
                    bad_in_a_row += 1
                    report_bad_batch("gradients are not finite; replaced by 0", batch, state, flags, run_dir, runtime)
                    stop_if_hopeless(bad_in_a_row, recipe, state)
                else:
                    bad_in_a_row = 0
                norm = gradient_norm(engine) if logged else None
                watch.at(state.step + 1, "optimiser step")
                passes.step()
                losses.append({name: value.detach() for name, value in terms.items()})
            state.step += 1
            state.seconds += time.perf_counter() - began
            log.advance(state.step, recipe.train.batch_size * recipe.train.accumulation)
            if logged:
                log.train(state.step, statistics(losses, output, norm, lr, runtime))
            log.pause()
            watch.at(state.step, "checkpoint")
            if state.step == steps or interrupted or is_due(state.step, recipe.train.save_every):
                save_checkpoint(checkpoints, engine, state, layout, runtime, describe, recipe.train.keep_last)
            if not interrupted:
                metrics = evaluate_if_due() or metrics
            log.go_on()

        if interrupted:
            log.say(f"asked to stop: saved step {state.step} of {steps}; the same command goes on from here")
        if state.skipped_samples:
            log.say(f"samples left out, by reason (rank 0; all in {run_dir / SKIPPED}): {state.skipped_samples}")
        runtime.barrier()
    return TrainResult(run_dir, state.step, interrupted, metrics)


def initialize(model: DualEncoder, recipe: Recipe, runtime: Runtime, *, universal: bool) -> Any:
    """The DeepSpeed engine around the model."""
    import deepspeed

    config = deepspeed_config(recipe, runtime.world_size)
    if universal:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    optimizer = build_optimizer(model, recipe.train)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except Exception as error:
        if not recipe.deepspeed:
            raise
        reason = " ".join(str(error).split())[:300]
        raise PairtileError(
            f"DeepSpeed refuses the configuration with the recipe's deepspeed block: {reason}"
        ) from None
    return engine


def rewind_run(run_dir: Path, state: TrainerState) -> None:
    """Forget what a killed run did after its checkpoint: it is done again."""
    for listing in (SKIPPED, BAD_BATCHES):
        rewind(run_dir / listing, "batch", state.batch_index - 1)
    for folder in (run_dir / "eval").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > state.step:
            shutil.rmtree(folder)


def next_batch(loader: Iterator[Batch], state: TrainerState, runtime: Runtime) -> Batch:
    """The next batch. Raises :class:`PairtileError` if there is none: the other ranks would wait for this one."""
    batch = next(loader, None)
    if batch is None:
        raise PairtileError(
            f"the loader of rank {runtime.rank} ended before batch {state.batch_index}; every rank needs the same number of "
            "batches, so it must not end: leave out at the end of an epoch what does not fill a batch on all ranks"
        )
    return batch


def gradient_norm(engine: Any) -> Callable[[], float | None]:
    """The norm of the averaged gradient before clipping. ZeRO computes it in its step; ZeRO 0 keeps it to itself."""
    if engine.zero_optimization_stage() > 0:
        return engine.get_global_grad_norm
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return lambda: float(norm)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def statistics(
    losses: list[dict[str, Tensor]],
    output: DualOutput,
    norm: Callable[[], float | None] | None,
    lr: float,
    runtime: Runtime,
) -> dict[str, float]:
    """The numbers of one step: the loss and its terms averaged over the accumulated batches."""
    terms = {name: float(torch.stack([loss[name] for loss in losses]).mean()) for name in losses[0]}
    image_to_text, text_to_image = in_batch_accuracy(output, runtime)
    values = {"loss": sum(terms.values()), "accuracy": (image_to_text + text_to_image) / 2}
    if len(terms) > 1:
        values |= {f"loss/{name}": value for name, value in terms.items()}
    values |= {"scale": float(output.logit_scale.detach()), "lr": lr}
    if norm is not None and (gradient := norm()) is not None:
        values["grad_norm"] = float(gradient)
    if output.logit_bias is not None:
        values["bias"] = float(output.logit_bias.detach())
    return values


@contextmanager
def termination_requested() -> Iterator[Callable[[], bool]]:
    """SIGTERM (schedulers send it before they take a machine away) becomes a flag that the loop asks for."""
    received = False

    def note(signum: int, frame: Any) -> None:
        nonlocal received
        received = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code: 0 done or asked to stop, 2 something to mend, 3 another rank failed."""
    parser = argparse.ArgumentParser(prog="python -m pairtile.engine.train", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with pairtile")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=0.001")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe, parameters and memory; train nothing"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_intermixed_args(argv)
    # torch renames collectives under DeepSpeed's and our feet; not the user's to mend
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    rank = os.environ.get("RANK", "0")
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if not arguments.dry_run:
            train(recipe)
        elif rank == "0":
            print(describe_plan(recipe, environment_rank()[2]))
    except RecipeError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except PairtileError as error:
        print(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return EXIT_OTHER_RANK if isinstance(error, RankFailure) else 2
    return 0


def exit_process(code: int) -> None:
    """Leave without interpreter teardown: a gloo thread that outlives the group would abort a finished run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    exit_process(main())
