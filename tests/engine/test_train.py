"""The trainer in one process; ranks, launchers and kills have files of their own."""

import io
import json
import math
import pickle
import shutil
import tarfile
from itertools import pairwise

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from curves import losses
from pairtile.engine.checkpoint import list_checkpoints, read_trainer_state
from pairtile.engine.errors import PairtileError
from pairtile.engine.optimizer import build_optimizer, learning_rate
from pairtile.engine.progress import rewind
from pairtile.engine.recipe import TrainConfig, parse_recipe
from pairtile.engine.train import main, train


def test_a_run_leaves_everything_a_person_looks_for(tiny):
    result = train(parse_recipe(tiny(**{"train.save_every": 2, "train.eval_every": 2, "eval.contact_sheet": True})))
    run = result.run_dir
    assert result.step == 4
    assert not result.interrupted
    assert sorted(losses(run)) == [1, 2, 3, 4]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000002", "step-00000004"]
    assert (run / "best" / "model.safetensors").is_file()
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "eval" / "step-00000004" / "unseen.png").stat().st_size > 10_000
    config = (run / "config.yaml").read_text()
    assert "# torch: " in config
    assert "# git: " in config
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    for name in ("loss", "accuracy", "scale", "lr", "grad_norm", "samples_per_second", "memory_gib"):
        assert math.isfinite(line[name])
    assert "unseen/text_to_image/R@1" in result.metrics


def test_resume_continues_the_curve_bit_for_bit(tiny, tmp_path):
    whole = train(parse_recipe(tiny(output=str(tmp_path / "whole"), **{"train.steps": 6})))
    recipe = parse_recipe(
        tiny(output=str(tmp_path / "parts"), **{"train.steps": 6, "train.save_every": 1, "train.keep_last": 9})
    )
    train(recipe)
    checkpoints = list_checkpoints(recipe.run_dir / "checkpoints")
    # as a kill while step 4 was being written would leave it
    checkpoints[3].rename(checkpoints[3].with_name(".partial-00000004"))
    for late in checkpoints[4:]:
        shutil.rmtree(late)
    train(recipe)
    assert losses(recipe.run_dir) == losses(whole.run_dir)
    assert not list((recipe.run_dir / "checkpoints").glob(".partial-*"))


def test_a_kill_in_the_last_evaluation_is_made_up_for(tiny):
    recipe = parse_recipe(tiny())
    folder = train(recipe).run_dir
    # as the kill leaves it: everything saved, nothing evaluated
    shutil.rmtree(folder / "eval")
    shutil.rmtree(folder / "best")
    result = train(recipe)
    assert "unseen/text_to_image/R@1" in result.metrics
    score = json.loads((folder / "best" / "score.json").read_text())
    assert (score["metric"], score["step"]) == ("unseen/text_to_image/R@1", 4)


def test_best_is_kept_and_replaced_only_by_better(tiny):
    result = train(parse_recipe(tiny(**{"train.steps": 12, "train.eval_every": 2})))
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["unseen/text_to_image/R@1"] for line in lines if line["kind"] == "eval"}
    assert sorted(scores) == [2, 4, 6, 8, 10, 12]
    kept = json.loads((result.run_dir / "best" / "score.json").read_text())
    assert kept["value"] == max(scores.values())
    assert kept["step"] == min(step for step, value in scores.items() if value == max(scores.values()))


def test_starting_afresh_moves_the_earlier_run_away(tiny):
    train(parse_recipe(tiny()))
    result = train(parse_recipe(tiny(resume="never", **{"train.seed": 5, "train.steps": 2})))
    assert sorted(losses(result.run_dir)) == [1, 2]
    assert sorted(losses(result.run_dir / "previous-1")) == [1, 2, 3, 4]
    assert [path.name for path in list_checkpoints(result.run_dir / "checkpoints")] == ["step-00000002"]
    # and the new run is what goes on from here
    assert sorted(losses(train(parse_recipe(tiny(**{"train.seed": 5, "train.steps": 3}))).run_dir)) == [1, 2, 3]


def test_resume_refuses_another_model(tiny):
    train(parse_recipe(tiny()))
    with pytest.raises(PairtileError, match=r"model\.embed_dim was 32 and is 16 now"):
        train(parse_recipe(tiny(**{"model.embed_dim": 16})))
    with pytest.raises(PairtileError, match=r"model\.text\.frozen was False and is True now"):
        train(parse_recipe(tiny(**{"model.text.frozen": True})))


def test_a_checkpoint_that_was_being_removed_is_no_obstacle(tiny):
    recipe = parse_recipe(tiny(**{"train.save_every": 2}))
    folder = train(parse_recipe(tiny(**{"train.save_every": 2, "train.steps": 2}))).run_dir / "checkpoints"
    (folder / "step-00000004").mkdir()
    (folder / "step-00000004" / "model.safetensors").touch()
    train(recipe)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000004"]


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tiny, monkeypatch):
    from pairtile.engine import checkpoint

    train(parse_recipe(tiny(**{"train.steps": 2})))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_model_folder", full)
    with pytest.raises(PairtileError, match="No space left on device; make room or set another output") as caught:
        train(parse_recipe(tiny()))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert train(parse_recipe(tiny())).step == 4


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            {"gradient_accumulation_steps": 4},
            "deepspeed.gradient_accumulation_steps is set by the trainer: set train.accumulation",
        ),
        ({"zero_optimization": {"stage": 3}}, "set train.zero_stage"),
        ({"optimizer": {"type": "Adam"}}, "set train.lr"),
        ({"bf16": {"enabled": True}}, "set train.precision"),
        ({"zero_optimization": {"reduce_bucket_sise": 3}}, "DeepSpeed refuses"),
    ],
)
def test_deepspeed_block(tiny, block, expected):
    with pytest.raises(PairtileError, match=expected) as caught:
        train(parse_recipe(tiny(deepspeed=block, **{"train.zero_stage": 2})))
    assert "\n" not in str(caught.value)


def test_deepspeed_block_is_passed_through_with_numbers_as_people_write_them(tiny):
    block = {"zero_optimization": {"reduce_bucket_size": "5e5"}}
    assert train(parse_recipe(tiny(deepspeed=block, **{"train.zero_stage": 2}))).step == 4


def test_a_finished_run_does_nothing_more(tiny):
    recipe = parse_recipe(tiny())
    train(recipe)
    before = (recipe.run_dir / "metrics.jsonl").read_text()
    assert train(recipe).step == 4
    assert (recipe.run_dir / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("key", ["train.batch_size", "train.seed", "train.accumulation"])
def test_resume_refuses_what_would_change_the_data(tiny, key):
    train(parse_recipe(tiny()))
    with pytest.raises(PairtileError, match=rf"cannot resume .*{key} was .* and is 16 now"):
        train(parse_recipe(tiny(**{key: 16})))
    assert train(parse_recipe(tiny(**{key: 16, "resume": "never", "train.steps": 1}))).step == 1


def test_activation_checkpointing_changes_nothing(tiny, tmp_path):
    curves = []
    for on in (False, True):
        changes = {"train.activation_checkpointing": on, "output": str(tmp_path / f"run-{on}")}
        curves.append(losses(train(parse_recipe(tiny(**changes))).run_dir))
    # the same operations on the same numbers; recomputation may pick other kernels for views, hence not bitwise
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_accumulation_averages_batches_and_adds_no_negatives(tiny, tmp_path):
    still = {"train.lr": 1e-12}
    apart = train(parse_recipe(tiny(output=str(tmp_path / "apart"), **still, **{"train.steps": 6})))
    together = train(
        parse_recipe(tiny(output=str(tmp_path / "together"), **still, **{"train.accumulation": 3, "train.steps": 2}))
    )
    state, _ = read_trainer_state(list_checkpoints(together.run_dir / "checkpoints")[-1])
    assert (state.step, state.batch_index) == (2, 6)
    single = losses(apart.run_dir)
    expected = {1: (single[1] + single[2] + single[3]) / 3, 2: (single[4] + single[5] + single[6]) / 3}
    # float32 means of three numbers of size 5, and weights that moved by 1e-12 per step
    assert losses(together.run_dir) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_objectives(tiny, name):
    result = train(
        parse_recipe(tiny(objectives=[{"name": name}], **{"model.init_logit_bias": -10.0, "train.steps": 12}))
    )
    curve = losses(result.run_dir)
    assert curve[12] < curve[1]


def test_several_terms_are_logged_apart(tiny):
    objectives = [{"name": "clip", "weight": 0.5}, {"name": "siglip", "weight": 2.0}]
    result = train(parse_recipe(tiny(objectives=objectives, **{"model.init_logit_bias": -10.0, "train.steps": 1})))
    line = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(line["loss/clip"] + line["loss/siglip"])


def test_wrong_objective(tiny):
    for objective, expected in (
        ({"name": "clop"}, "did you mean clip"),
        ({"name": "clip", "args": {"nosuch": 1}}, "no argument 'nosuch'"),
        ({"name": "siglip"}, "model.init_logit_bias"),
        ({"name": "clip", "args": {"strategy": "rung"}}, "rung"),
    ):
        with pytest.raises(PairtileError, match=expected):
            train(parse_recipe(tiny(objectives=[objective])))


def test_a_small_drift_of_the_scale_survives_bf16(tiny):
    # bf16 has 8 bits: near log(100) = 4.6 its steps are 0.03, so a parameter kept in bf16 would not move at all
    changes = {"train.precision": "bf16", "train.lr": 1e-4, "train.weight_decay": 0.0, "model.init_logit_scale": 90.0}
    for stage in (0, 2):
        result = train(
            parse_recipe(tiny(output=tiny()["output"] + str(stage), **changes, **{"train.zero_stage": stage}))
        )
        lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        scales = [line["scale"] for line in lines if line["kind"] == "train"]
        steps = [abs(math.log(after / before)) for before, after in pairwise(scales)]
        assert all(1e-6 < step < 2e-4 for step in steps), scales


class NanWhenDark(nn.Module):
    """Gives NaN for a batch that holds an image whose pixels are all 0 after normalisation's shift."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 16)

    def forward(self, images):
        pixels = images.flatten(1)
        dark = (pixels.max(dim=1).values == pixels.min(dim=1).values).any()
        return self.linear(pixels) + torch.where(dark, float("nan"), 0.0)


def with_dark_images(shards, target, every):
    """A copy of the data set in which one image in ``every`` is black."""
    black = io.BytesIO()
    Image.new("L", (16, 16), 0).save(black, "PNG")
    target.mkdir()
    (target / "tokenizer.json").write_bytes((shards / "tokenizer.json").read_bytes())
    source = shards / "train-000000.tar"
    with tarfile.open(source) as old, tarfile.open(target / "train-000000.tar", "w") as new:
        for position, member in enumerate(m for m in old if m.isfile()):
            data = old.extractfile(member).read()
            if member.name.endswith(".png") and (position // 2) % every == 0:
                data = black.getvalue()
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return target


class InfiniteGradient(torch.autograd.Function):
    """Identity whose gradient overflows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Exploding(nn.Module):
    """A tower whose loss is finite and whose gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 16)

    def forward(self, images):
        return InfiniteGradient.apply(self.linear(images.flatten(1)))


VISION = {"target": f"{__name__}:NanWhenDark", "out_dim": 16, "image_size": 16, "channels": 1}


def test_nan_batches_are_skipped_and_named(tiny, glyph_shards, tmp_path, capfd):
    data = with_dark_images(glyph_shards, tmp_path / "dark", every=97)
    changes = {"data.root": str(data), "data.val": {}, "model.vision": VISION, "train.steps": 12, "eval.splits": []}
    result = train(parse_recipe(tiny(**changes)))
    assert result.step == 12
    assert all(math.isfinite(loss) for loss in losses(result.run_dir).values())
    bad = [json.loads(line) for line in (result.run_dir / "bad_batches.jsonl").read_text().splitlines()]
    state, _ = read_trainer_state(list_checkpoints(result.run_dir / "checkpoints")[-1])
    assert state.bad_batches == len(bad) >= 1
    assert state.batch_index == 12 + len(bad)
    error = capfd.readouterr().err
    assert f"rank 0, step {bad[0]['step']}, batch {bad[0]['batch']}: the loss is not finite; batch skipped" in error
    assert bad[0]["keys"][0] in error


def test_endless_nan_stops_the_run(tiny, glyph_shards, tmp_path):
    data = with_dark_images(glyph_shards, tmp_path / "dark", every=1)
    changes = {"data.root": str(data), "data.val": {}, "model.vision": VISION, "train.max_bad_batches": 3}
    with pytest.raises(PairtileError, match="not finite for 3 batches in a row"):
        train(parse_recipe(tiny(**changes)))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_that_are_not_finite_never_reach_the_weights(tiny, stage, capfd):
    vision = {**VISION, "target": f"{__name__}:Exploding"}
    changes = {"model.vision": vision, "train.steps": 3, "train.zero_stage": stage}
    result = train(parse_recipe(tiny(**changes)))
    weights = load_file(list_checkpoints(result.run_dir / "checkpoints")[-1] / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    curve = losses(result.run_dir)
    assert len(set(curve.values())) == 3, "the text tower goes on learning"
    assert "rank 0, step 1, batch 0: gradients are not finite; replaced by 0" in capfd.readouterr().err
    with pytest.raises(PairtileError, match="not finite for 2 batches in a row"):
        train(parse_recipe(tiny(**changes, resume="never", **{"train.max_bad_batches": 2})))


def test_bad_samples_are_counted_and_listed(tiny, glyph_shards, tmp_path):
    data = tmp_path / "broken"
    data.mkdir()
    (data / "tokenizer.json").write_bytes((glyph_shards / "tokenizer.json").read_bytes())
    raw = bytearray((glyph_shards / "train-000000.tar").read_bytes())
    first = raw.find(b"\x89PNG")
    raw[first + 16 : first + 60] = bytes(44)
    (data / "train-000000.tar").write_bytes(raw)
    changes = {"data.root": str(data), "data.val": {}, "train.steps": None, "train.epochs": 1.0}
    result = train(parse_recipe(tiny(**changes)))
    listed = [json.loads(line) for line in (result.run_dir / "skipped.jsonl").read_text().splitlines()]
    state, _ = read_trainer_state(list_checkpoints(result.run_dir / "checkpoints")[-1])
    assert [entry["reason"] for entry in listed] == ["undecodable image"]
    assert state.skipped_samples == {"undecodable image": 1}


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def hostile_shards(folder, shards, trace):
    """Real samples of the data set with everything wrong that people meet, and a second shard that ends too soon."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((shards / "tokenizer.json").read_bytes())
    with tarfile.open(shards / "train-000000.tar") as old:
        good = [(member.name, old.extractfile(member).read()) for member in old if member.isfile()][:400]
    wide = io.BytesIO()
    Image.new("L", (20_000, 20)).save(wide, "PNG")
    picture = next(data for name, data in good if name.endswith(".png"))
    extra = [
        ("undecodable.png", b"\x89PNG not a picture"), ("undecodable.txt", b"LATIN SMALL LETTER A"),
        ("silent.png", picture), ("silent.txt", b"  "),
        ("lonely.txt", b"LATIN SMALL LETTER B"),
        ("wide.png", wide.getvalue()), ("wide.txt", b"LATIN SMALL LETTER C"),
        ("../../escaped.png", picture), ("../../escaped.txt", b"LATIN SMALL LETTER D"),
        ("pickled.png", picture), ("pickled.txt", b"LATIN SMALL LETTER E"), ("pickled.pickle", pickle.dumps(Bomb(trace))),
        ("pickled.pyd", b"MZ"),
    ]  # fmt: skip
    for name, members in (("train-000000.tar", good[:300] + extra), ("train-000001.tar", good[300:])):
        with tarfile.open(folder / name, "w") as tar:
            for member, data in members:
                header = tarfile.TarInfo(member)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    whole = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").write_bytes(whole[: len(whole) * 2 // 3])
    return folder


def test_training_goes_on_beside_hostile_inputs(tiny, glyph_shards, tmp_path, capsys):
    data = hostile_shards(tmp_path / "inner" / "data", glyph_shards, tmp_path / "executed")
    changes = {"data.root": str(data), "data.val": {}, "train.steps": None, "train.epochs": 3.0}
    result = train(parse_recipe(tiny(**changes)))
    assert all(math.isfinite(loss) for loss in losses(result.run_dir).values())
    printed = capsys.readouterr().out
    for reason in ("truncated tar", "unsafe path", "unsafe file type"):
        assert reason in printed
    listed = [json.loads(line) for line in (result.run_dir / "skipped.jsonl").read_text().splitlines()]
    found = {(entry["key"].rsplit("/", 1)[-1], entry["reason"]) for entry in listed}
    print(found)
    reasons = {reason for _, reason in found}
    assert {"undecodable image", "empty caption", "missing member", "image too large"} <= reasons
    state, _ = read_trainer_state(list_checkpoints(result.run_dir / "checkpoints")[-1])
    assert sum(state.skipped_samples.values()) == len(listed)
    assert not (tmp_path / "executed").exists()
    assert not list(tmp_path.rglob("escaped*"))


def test_dry_run_prints_recipe_parameters_and_memory_and_trains_nothing(write_recipe, tmp_path, capsys):
    assert main([str(write_recipe()), "train.zero_stage=3", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for expected in ("zero_stage: 3", "parameters", "memory per rank", "training samples"):
        assert expected in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.batchsize=3"], "unknown key train.batchsize; did you mean train.batch_size?"),
        (["train.lr=fast"], "train.lr"),
        (["data.root=/nosuch/folder"], "/nosuch/folder"),
        (["data.train=nosuch-*.tar"], "nosuch-*.tar"),
        (["data.val.more=nosuch-*.tar"], "nosuch-*.tar"),
        (["eval.splits=[nosuch]"], "eval.splits names 'nosuch'"),
        (["output=/proc/nosuch"], "cannot write to the run folder /proc/nosuch"),
        (["train.batch_size=100000"], "100000"),
        (["eval.best=nosuch/text_to_image/R@1"], "eval.best is 'nosuch/text_to_image/R@1'"),
        (["eval.best=unseen/text_to_image/median_rank"], "eval.best: must end with one of R@1"),
        (
            ["model.vision={target: 'torch.nn:Flatten', out_dim: 9, image_size: 16, channels: 1}"],
            "do not pass through the towers",
        ),
        (["model.preset=[1]"], "unknown model.preset [1]"),
        (["model.vision.mean=[]"], "model.vision: mean has 0 values for 1 channels"),
    ],
)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(write_recipe, capsys, overrides, expected):
    assert main([str(write_recipe()), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error


def test_world_size_that_does_not_divide_the_batch(write_recipe, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main([str(write_recipe())]) == 2
    assert "train.batch_size 32 is not divisible by the 3 ranks; take 30 or 33" in capsys.readouterr().err


def test_learning_rate_schedule():
    config = TrainConfig(batch_size=8, steps=100, lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] > 0.1
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(99, 100, config.model_copy(update={"schedule": "constant"})) == 1.0


def test_vectors_do_not_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = build_optimizer(model, TrainConfig(batch_size=8, steps=1, weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.3, 1), (0.0, 3)]
    with pytest.raises(PairtileError, match="every parameter is frozen"):
        build_optimizer(model.requires_grad_(False), TrainConfig(batch_size=8, steps=1))


def test_metrics_are_rewound_and_half_a_line_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    rewind(file, "step", 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
