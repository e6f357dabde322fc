"""Tokenizer: special tokens, truncation, padding, round trips through files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import tokenizers

from pairtile.engine.data import Tokenizer, load_tokenizer, train_tokenizer
from pairtile.engine.errors import PairtileError

CAPTIONS = ["GREEK SMALL LETTER ALPHA", "LATIN CAPITAL LETTER A WITH ACUTE", "LEFTWARDS ARROW"] * 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(CAPTIONS, 300, folder), folder


def test_rows(trained: tuple[Tokenizer, Path]) -> None:
    tokenizer, _ = trained
    ids, mask = tokenizer.encode(["greek small letter alpha", "a"], 12)
    assert ids.shape == mask.shape == (2, 12)
    assert ids[:, 0].tolist() == [1, 1]
    assert [int(row[length - 1]) for row, length in zip(ids, mask.sum(1))] == [2, 2]
    assert (ids[~mask] == tokenizer.pad_id).all()
    assert mask[:, 0].all()
    assert (mask.int().diff(dim=1) <= 0).all()
    assert 259 < tokenizer.vocab_size <= 300


def test_case_and_width_are_normalised(trained: tuple[Tokenizer, Path]) -> None:
    ids, _ = trained[0].encode(["Greek SMALL", "greek small", "Ｇｒｅｅｋ small"], 16)
    assert ids[0].tolist() == ids[1].tolist() == ids[2].tolist()


def test_truncation_keeps_the_end(trained: tuple[Tokenizer, Path]) -> None:
    ids, mask = trained[0].encode(["latin capital letter a with acute and much more text"], 5)
    assert mask.all()
    assert (ids[0, 0], ids[0, -1]) == (1, 2)


def test_padding_to_the_longest(trained: tuple[Tokenizer, Path]) -> None:
    tokenizer = trained[0]
    ids, mask = tokenizer.encode(["greek", "a b c d"], 32, pad_to="longest")
    full, _ = tokenizer.encode(["greek", "a b c d"], 32)
    assert ids.shape[1] == int(mask.sum(1).max()) < 32
    assert full[:, : ids.shape[1]].tolist() == ids.tolist()
    assert tokenizer.encode([], 8, pad_to="longest")[0].shape == (0, 1)


def test_a_new_length_is_not_answered_from_memory(trained: tuple[Tokenizer, Path]) -> None:
    text = ["latin capital letter a with acute"]
    long, _ = trained[0].encode(text, 30)
    short, _ = trained[0].encode(text, 4)
    again, _ = trained[0].encode(text, 30)
    assert short.shape == (1, 4)
    assert long.tolist() == again.tolist()


def test_any_text_can_be_encoded(trained: tuple[Tokenizer, Path]) -> None:
    text = "tabs\tand 漢字 и 🦊"
    ids, mask = trained[0].encode([text], 64)
    assert trained[0].backend.decode(ids[0][mask[0]].tolist()).strip() == text


def test_save_and_load(trained: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    tokenizer, folder = trained
    expected = tokenizer.encode(CAPTIONS, 10)[0].tolist()
    tokenizer.save(tmp_path / "copy")
    for source in (folder, folder / "tokenizer.json", tmp_path / "copy"):
        loaded = load_tokenizer(source)
        assert loaded.encode(CAPTIONS, 10)[0].tolist() == expected
        assert (loaded.pad_id, loaded.vocab_size) == (tokenizer.pad_id, tokenizer.vocab_size)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(CAPTIONS, 10)[0].tolist() == expected


def test_a_foreign_pad_id_survives(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "[PAD]": 2}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id == 2
    Tokenizer(backend, 1).save(tmp_path)
    assert load_tokenizer(tmp_path).pad_id == 1


def test_training_is_deterministic(trained: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    train_tokenizer(CAPTIONS, 300, tmp_path / "own.json")
    assert (tmp_path / "own.json").read_bytes() == (trained[1] / "tokenizer.json").read_bytes()


def test_transformers_folder(trained: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(trained[1] / "tokenizer.json"), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(CAPTIONS, 10)[0].tolist() == trained[0].encode(CAPTIONS, 10)[0].tolist()


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PairtileError, match="at least 259"):
        train_tokenizer(CAPTIONS, 100, tmp_path)
    with pytest.raises(PairtileError, match=r"no tokenizer\.json in .*pairtile prepare"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PairtileError, match="is not a tokenizer file"):
        load_tokenizer(tmp_path)
