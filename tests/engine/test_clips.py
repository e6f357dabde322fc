"""Clips: read from animated images, through a tower of frames, with TempMe's merging across them; glyphs in motion."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from curves import losses
from pairtile.engine import load
from pairtile.engine.data import DataConfig, ShardDataset, build_image_transform, decode_image, iterate_split
from pairtile.engine.data.images import decode_clip
from pairtile.engine.data.schema import BadSample
from pairtile.engine.errors import PairtileError
from pairtile.engine.evaluate.contact_sheet import side_by_side
from pairtile.engine.evaluation import evaluate_run, visualize_run
from pairtile.engine.model import DualEncoder
from pairtile.engine.prepare import prepare_glyph_clips
from pairtile.engine.prepare.glyph_clips import encode_clip
from pairtile.engine.prepare.motion import MOTIONS, move
from pairtile.engine.recipe import load_recipe, parse_recipe
from pairtile.engine.train import train
from pairtile.kernels.token_merging import merged_sizes

FRAMES = 4
SMALL = {
    "size": 16, "frames": FRAMES, "fonts": ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif"], "limit": 120,
    "samples_per_shard": 200, "vocab_size": 400, "workers": 1, "progress": False,
}  # fmt: skip
VIT = {
    "model": "vit_tiny_patch16_224",
    "args": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2},
    "image_size": 16,
    "channels": 1,
}
TEMPME = {"method": "tempme", "r": 4, "clips": {"join": {1: 2, 2: 2}}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    prepare_glyph_clips(folder, **SMALL)
    return folder


@pytest.fixture
def clips(tiny, shards):
    def make(merging=TEMPME, **changes):
        data = {"data.root": str(shards), "data.frames": FRAMES, "data.val": {"pairs": "pairs-*.tar"}}
        return tiny(**{**data, "model.vision": {**VIT, "token_merging": merging}, **changes})

    return make


def read(folder, split):
    config = DataConfig(root=str(folder), image_mode="L", frames=FRAMES)
    data = ShardDataset(
        f"{split}-*.tar", config=config, tokenizer=None, transform=build_image_transform(config, 16, False)
    )
    assert data.counts == {}
    (batch,) = iterate_split(data, batch_size=10_000)
    assert batch.skipped == []
    return batch


# ---- reading --------------------------------------------------------------------------------------------------------


def animated(frames: int, format: str, size: int = 8) -> bytes:
    """Grey images of the values 0, 10, 20, ..."""
    pages = [Image.new("L", (size, size), 10 * each) for each in range(frames)]
    data = io.BytesIO()
    pages[0].save(data, format=format, save_all=True, append_images=pages[1:])
    return data.getvalue()


@pytest.mark.parametrize("format", ["TIFF", "GIF", "PNG"])
@pytest.mark.parametrize(("frames", "values"), [(4, [10, 30, 50, 70]), (8, [0, 10, 20, 30, 40, 50, 60, 70])])
def test_frames_are_evenly_spaced(format, frames, values):
    found = decode_clip(animated(8, format), frames)
    assert [frame.convert("L").getpixel((0, 0)) for frame in found] == values


def test_a_single_image_stands_still_and_limits_count_all_frames():
    assert len(decode_clip(animated(1, "PNG"), 3)) == 3
    with pytest.raises(BadSample, match="8 x 8 pixels, 10 frames"):
        decode_clip(animated(10, "TIFF"), 2, max_pixels=8 * 8 * 9)
    assert decode_image(animated(10, "TIFF"), max_pixels=64).size == (8, 8), "an image is its first frame"


def test_a_page_that_is_larger_than_the_first_is_not_decoded():
    pages, data = [Image.new("L", (side, side)) for side in (8, 3000)], io.BytesIO()
    pages[0].save(data, format="TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(BadSample, match="frame 1 has 3000 x 3000 pixels, the first 8 x 8"):
        decode_clip(data.getvalue(), 2, max_pixels=10_000)


def test_the_frames_of_a_clip_are_augmented_alike():
    config = DataConfig(
        root=".", image_mode="L", frames=3, augment=["RandomHorizontalFlip", {"RandomCrop": {"padding": 4}}]
    )
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    found = build_image_transform(config, 16, True)([frame] * 3)
    assert found.shape == (3, 1, 16, 16)
    assert torch.equal(found[0], found[2])


# ---- glyphs in motion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOTIONS)
def test_motions(name):
    glyph = np.full((10, 10), 255, dtype=np.uint8)
    glyph[2:8, 4:6] = 0
    pages = 255 - move(glyph, MOTIONS.index(name), size=16, frames=5, seed=3).astype(np.float64)
    assert pages.shape == (5, 16, 16)
    ink = pages.sum((1, 2))
    rows, columns = (np.arange(16) @ pages.sum(axis).T / ink for axis in (2, 1))
    across, down = columns[-1] - columns[0], rows[-1] - rows[0]
    wide = (pages.max(1) > 100).sum(1)
    expected = {
        "moving left": across < -3, "moving right": across > 3, "moving up": down < -3, "moving down": down > 3,
        "growing": ink[-1] > 2 * ink[0], "shrinking": ink[0] > 2 * ink[-1],
        "turning left": wide[-1] > 2 * wide[0], "turning right": wide[-1] > 2 * wide[0],
        "standing still": np.ptp(pages, 0).max() == 0,
    }  # fmt: skip
    assert expected[name]
    if name.startswith("moving"):
        assert min(abs(across), abs(down)) < 1e-9
        # the whole glyph stays inside
        assert np.ptp(ink) == 0


def test_clips_of_glyphs(shards, tmp_path):
    splits = {name: read(shards, name) for name in ("train", "font", "unseen", "pairs")}
    seen = {tuple(each) for each in zip(splits["train"].labels["character"], splits["train"].labels["motion"])}
    pairs = list(zip(splits["pairs"].labels["character"], splits["pairs"].labels["motion"]))
    assert not seen & set(pairs)
    assert {character for character, _ in pairs} == {character for character, _ in seen}
    assert not {character for character, _ in seen} & set(splits["unseen"].labels["character"])
    assert set(splits["font"].labels["font"]) == {"DejaVu Serif"}
    assert {motion for _, motion in seen} == set(MOTIONS)
    train_split = splits["train"]
    assert train_split.images.shape[1:] == (FRAMES, 1, 16, 16)
    for row in (0, 17):
        name, motion = train_split.captions[row][0].text, train_split.labels["motion"][row]
        assert name.endswith(f" {motion}")
        assert int(train_split.ids[row]) == 16 * ord(train_split.labels["character"][row]) + MOTIONS.index(motion)
    assert prepare_glyph_clips(shards, **SMALL).reused
    prepare_glyph_clips(tmp_path / "again", **{**SMALL, "workers": 2})
    one, two = (
        hashlib.sha256((each / "train-000000.tar").read_bytes()).digest() for each in (shards, tmp_path / "again")
    )
    assert one == two
    with pytest.raises(PairtileError, match="frames at least 2"):
        prepare_glyph_clips(tmp_path / "other", **{**SMALL, "frames": 1})


# ---- towers ---------------------------------------------------------------------------------------------------------


def encoder_of(raw) -> DualEncoder:
    torch.manual_seed(0)
    recipe = parse_recipe(raw)
    return DualEncoder(recipe.model, vocab_size=300, pad_id=0, context_length=16, frames=recipe.data.frames).eval()


def test_a_clip_is_the_mean_of_its_frames_at_their_times(clips):
    model = encoder_of(clips(merging=None))
    images = torch.randint(0, 256, (2, FRAMES, 1, 16, 16), dtype=torch.uint8)
    found = model.encode_image(images, normalize=False)
    backwards = model.encode_image(images.flip(1), normalize=False)
    assert not torch.allclose(found, backwards), "a motion and its reverse differ"
    torch.nn.init.zeros_(model.frame_positions.weight)
    found = model.encode_image(images, normalize=False)
    single = encoder_of(clips(merging=None, **{"data.frames": None}))
    single.load_state_dict(model.state_dict(), strict=False)
    alone = torch.stack([single.encode_image(images[:, each], normalize=False) for each in range(FRAMES)]).mean(0)
    # float32 in 3 layers
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(PairtileError, match=r"expected clips \[n, 4, channels"):
        model.encode_image(images[:, :2])


def test_tempme_trains_and_evaluates(clips, tmp_path):
    curves = []
    for on in (False, True):
        changes = {"train.activation_checkpointing": on, "output": str(tmp_path / f"run-{on}"), "train.zero_stage": 2}
        run = train(parse_recipe(clips(**changes, **{"train.steps": 4, "eval.contact_sheet": on}))).run_dir
        curves.append(losses(run))
    # recomputation joins and merges the same; it may pick other kernels for views, hence not bitwise
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0][4] < curves[0][1]
    encoder = load(run)
    frames = [Image.new("L", (20, 20), 40 * each) for each in range(FRAMES)]
    assert encoder.encode_image([frames, frames]).shape == (2, 32)
    # of 16 patches 12 leave a frame; 17 of 24, less 2, a pair of frames; 21 of 30, less 2, the clip
    assert merged_sizes(encoder.model.vision).shape[:2] == (2, 1 + 19)
    assert (merged_sizes(encoder.model.vision).sum(1) == FRAMES * 17).all()
    assert 0 <= evaluate_run(run, say=lambda line: None)[0].retrieval.text_to_image.recall_at_1 <= 1
    assert encoder.encode_image([]).shape == (0, 32)
    with Image.open(visualize_run(run, count=2)) as picture:
        assert picture.width > 4 * 224, "two clips, each beside its regions"


def test_patches_of_all_frames_take_part_in_late_interaction(clips):
    model = encoder_of(clips(**{"model.tokens": {"dim": 8}}))
    images = torch.randint(0, 256, (2, FRAMES, 1, 16, 16), dtype=torch.uint8)
    assert model.encode_image_tokens(images).tokens.shape == (2, 19, 8)
    model.merge_tokens(parse_recipe(clips(merging=None)).model)
    assert model.encode_image_tokens(images).tokens.shape == (2, FRAMES * 16, 8)


def test_the_shipped_recipe_leaves_so_many_tokens():
    recipe = load_recipe("glyph_clips_tempme", ["data.root=."])
    model = DualEncoder(recipe.model, vocab_size=300, pad_id=0, context_length=32, frames=recipe.data.frames).eval()
    assert model.encode_image(torch.zeros(1, 8, 1, 32, 32, dtype=torch.uint8)).shape == (1, 256)
    assert merged_sizes(model.vision).shape[:2] == (2, 39)


def test_a_clip_is_drawn_as_its_frames():
    clip = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    assert side_by_side(clip)[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 255]]


def test_encoded_clips_keep_equal_frames():
    assert len(decode_clip(encode_clip(np.zeros((3, 8, 8), dtype=np.uint8)), 3)) == 3
