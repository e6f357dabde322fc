"""evaluate_split as a whole, in one process and in two."""

import io
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from pairtile.engine.data import DataConfig, ShardDataset
from pairtile.engine.errors import PairtileError
from pairtile.engine.evaluate import ClassificationConfig, SplitResult, embed_split, evaluate_split, make_encoder


def embedded(fake: ModuleType, count: int = 43) -> Any:
    return embed_split(
        make_encoder(fake.FakeModel(), fake.FakeSplit(count), batch_size=5, device="cpu"), fake.FakeSplit(count)
    )


def test_embeddings_have_one_row_per_image_and_per_distinct_caption(fake: ModuleType) -> None:
    found = embedded(fake)
    split = fake.FakeSplit()
    readable = [index for index in range(43) if index % 7 != 6]
    assert found.index.tolist() == readable
    assert found.keys == [f"key{index}" for index in readable]
    captions = {(c.text, split.sample(i)["id"]) for i in readable for c in split.sample(i)["texts"]}
    assert set(zip(found.texts, found.text_ids.tolist())) == captions
    assert len(found.texts) == len(captions)
    for text, image in zip(found.owner_text.tolist(), found.owner_image.tolist()):
        assert found.texts[text] in [c.text for c in split.sample(readable[image])["texts"]]
    assert found.ambiguous_captions() == 2
    assert len(found.skipped) == 6

    model = fake.FakeModel().eval()
    images = torch.stack([split.sample(index)["image"] for index in readable])
    torch.testing.assert_close(found.image_features, model.encode_image(images).detach())
    tokens = split.tokenizer.encode(found.texts, 12)
    torch.testing.assert_close(found.text_features, model.encode_text(*tokens).detach())


def test_every_text_is_encoded_once(fake: ModuleType) -> None:
    model, split = fake.FakeModel(), fake.FakeSplit()
    found = embed_split(make_encoder(model, split, batch_size=1000, device="cpu"), split)
    assert (model.image_forwards, model.text_forwards) == (1, 1)
    model = fake.FakeModel()
    embed_split(make_encoder(model, split, batch_size=1, device="cpu"), split)
    assert model.text_forwards == len(set(found.texts)) < len(found.texts)


def test_result_against_the_definition(fake: ModuleType) -> None:
    found, split = embedded(fake), fake.FakeSplit()
    result = fake.evaluate_fake(fake.FakeModel(), 43)
    samples = [split.sample(index) for index in found.index.tolist()]
    scores = found.text_features @ found.image_features.T

    def expected(images: list[int], by_drawing: bool) -> list[int]:
        ranks = []
        for text, text_id in enumerate(found.text_ids.tolist()):
            owners = found.owner_image[found.owner_text == text].tolist()
            if not set(owners) & set(images):
                continue
            drawings = {samples[owner]["drawing"] for owner in owners} - {-1} if by_drawing else set()
            right = [samples[i]["id"] == text_id or samples[i]["drawing"] in drawings for i in images]
            row = [float(scores[text, i]) for i in images]
            best = max(score for score, good in zip(row, right) if good)
            ranks.append(1 + sum(score >= best - 1e-6 for score, good in zip(row, right) if not good))
        return ranks

    everything = list(range(len(samples)))
    unseen = [i for i in everything if not samples[i]["flag"]]
    whole, part = result.subsets["val"], result.subsets["val/without_drawing_in_train"]
    for metrics, ranks in (
        (whole.text_to_image, expected(everything, True)),
        (whole.id_only.text_to_image, expected(everything, False)),
        (part.id_only.text_to_image, expected(unseen, False)),
    ):
        assert metrics.queries == len(ranks)
        assert metrics.recall_at_5 == pytest.approx(sum(rank <= 5 for rank in ranks) / len(ranks))
        assert metrics.median_rank == pytest.approx(torch.tensor(ranks).double().quantile(0.5).item())
    assert part.images == len(unseen)
    assert part.captions == part.text_to_image.queries
    assert whole.id_only.text_to_image.recall_at_1 <= whole.id_ceiling.text_to_image < 1
    assert whole.id_only.image_to_text.recall_at_1 <= whole.id_ceiling.image_to_text < 1
    assert result.skipped == {"undecodable image": 6}
    assert result.classification.excluded == sum(sample["kind"] is None for sample in samples)
    assert result.retrieval is result.subsets["val"]
    scalars = result.scalars()
    assert scalars["val/text_to_image/R@5"] == whole.text_to_image.recall_at_5
    assert scalars["val/kind/top1"] == result.classification.top1


def same(left: Any, right: Any) -> None:
    """Equal, but for the rounding of floats that batch composition changes."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            same(left[name], right[name])
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6, nan_ok=True)
    else:
        assert left == right


def test_two_ranks_give_the_result_of_one(fake: ModuleType, tmp_path: Path) -> None:
    """43 leaves the ranks unequal; of 1 sample the second rank gets none, yet runs as many forwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, fake.__file__, str(rank), "2", str(tmp_path), "43", "1"], env=environment)
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    for count in (43, 1):
        for name, scoring in (("result", {}), ("late", {"scores": "rerank", "rerank_top": 9})):
            files = [tmp_path / f"{count}-{name}{rank}.json" for rank in range(2)]
            first, second = (SplitResult.model_validate_json(file.read_text()) for file in files)
            same(first.model_dump(), fake.evaluate_fake(fake.FakeModel(), count, **scoring).model_dump())
            same(second.model_dump(), first.model_dump())
        assert (tmp_path / f"{count}-forwards0").read_text() == (tmp_path / f"{count}-forwards1").read_text()
        assert Image.open(tmp_path / f"{count}.png").width > 400


def test_every_module_returns_to_its_own_mode(fake: ModuleType) -> None:
    model = fake.FakeModel().train()
    model.frozen = torch.nn.Dropout().eval()
    fake.evaluate_fake(model, 9)
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_wrapped_models_and_autocast(fake: ModuleType) -> None:
    plain = fake.evaluate_fake(fake.FakeModel(), 43)
    wrapped = fake.evaluate_fake(SimpleNamespace(module=fake.FakeModel()), 43)
    # SimpleNamespace is no Module: eval mode has to reach the model inside.
    assert wrapped == plain
    half = fake.evaluate_fake(fake.FakeModel(), 43, autocast=torch.bfloat16)
    assert half.diagnostics.modality_gap == pytest.approx(plain.diagnostics.modality_gap, rel=0.02)
    assert half.diagnostics != plain.diagnostics


def test_a_broken_model_scores_zero(fake: ModuleType, tmp_path: Path) -> None:
    model = fake.FakeModel()
    model.image_weight.data.fill_(math.nan)
    result = fake.evaluate_fake(model, 43, contact_sheet=tmp_path / "sheet.png")
    assert result.retrieval.text_to_image.recall_at_10 == 0
    assert result.retrieval.image_to_text.recall_at_10 == 0
    assert result.classification.top5 == 0
    assert (tmp_path / "sheet.png").exists()


def test_flags_and_ids_that_the_data_lacks_are_left_out(fake: ModuleType) -> None:
    result = fake.evaluate_fake(fake.FakeModel(), 43, match_ids=("melody",), without_flags=("loud",))
    assert list(result.subsets) == ["val"]
    assert result.retrieval.id_only is None
    assert result.retrieval.id_ceiling is None


@pytest.mark.parametrize(
    ("classification", "message"),
    [
        ({"label": "colour"}, "no label 'colour' to classify; labels found: kind"),
        ({"label": "kind", "classes": {"Round": "round", "Flat": "flat"}}, "among the classes Round, Flat"),
    ],
)
def test_labels_that_the_data_lacks_are_named(fake: ModuleType, classification: dict, message: str) -> None:
    config = ClassificationConfig(**classification)
    with pytest.raises(PairtileError, match=message):
        evaluate_split(
            fake.FakeModel(), fake.FakeSplit(), split="val", batch_size=8, device="cpu", classification=config
        )


def test_classification_of_another_split_is_not_run(fake: ModuleType) -> None:
    config = ClassificationConfig(label="colour", split="test")
    result = evaluate_split(
        fake.FakeModel(), fake.FakeSplit(), split="val", batch_size=8, device="cpu", classification=config
    )
    assert result.classification is None


def test_an_empty_split_is_an_error(fake: ModuleType) -> None:
    with pytest.raises(PairtileError, match="no sample of 'val' could be read \\(it is empty\\)"):
        fake.evaluate_fake(fake.FakeModel(), 0)


def test_images_without_any_caption(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = fake.FakeSplit.sample
    monkeypatch.setattr(fake.FakeSplit, "sample", lambda self, index: {**sample(self, index), "texts": []})
    result = fake.evaluate_fake(fake.FakeModel(), 43, contact_sheet=tmp_path / "sheet.png")
    assert result.retrieval.captions == result.retrieval.text_to_image.queries == 0
    assert result.retrieval.image_to_text.excluded == 37
    assert not (tmp_path / "sheet.png").exists()
    assert SplitResult.model_validate_json(result.model_dump_json()).split == "val"


def test_shards_through_the_real_loader(fake_module: ModuleType, tmp_path: Path) -> None:
    """Six drawings of three ids and one file that is no image, read by pairtile.engine.data."""
    with tarfile.open(tmp_path / "val-000000.tar", "w") as shard:
        for number in range(7):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (40 * number, 255 - 40 * number, 128)).save(picture, format="PNG")
            about = {
                "id": number // 2,
                "captions": [f"thing {number // 2}"],
                "ids": {"drawing": number},
                "kind": "round",
            }
            about["flags"] = {"drawing_in_train": number < 2}
            content = b"no image" if number == 6 else picture.getvalue()
            for name, data in ((f"s{number}.png", content), (f"s{number}.json", json.dumps(about).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    config = DataConfig(root=str(tmp_path), context_length=12)
    dataset = ShardDataset(
        tmp_path / "val-000000.tar", config=config, tokenizer=fake_module.FakeTokenizer(), transform=pil_to_tensor
    )
    result = evaluate_split(
        fake_module.FakeModel(), dataset, split="val", batch_size=4, device="cpu", contact_sheet=tmp_path / "sheet.png"
    )
    whole, part = result.subsets["val"], result.subsets["val/without_drawing_in_train"]
    assert (whole.images, whole.captions, part.images, part.captions) == (6, 3, 4, 2)
    assert sum(result.skipped.values()) == 1
    assert Image.open(tmp_path / "sheet.png").width > 400
