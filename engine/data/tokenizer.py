"""Text to token ids: one small class over fast tokenizers, and the training of one at prepare time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from ..errors import PairtileError

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
_MEMO_ENTRIES = 200_000
_MEMO_CHARACTERS = 256


class Tokenizer:
    """A `tokenizers.Tokenizer` with the calls that the engine needs.

    Attributes:
        vocab_size: number of ids, added tokens included. pad_id: the id that fills rows; masked wherever it does.
    """

    def __init__(self, backend: tokenizers.Tokenizer, pad_id: int) -> None:
        backend.no_padding()
        self.backend = backend
        self.pad_id = pad_id
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._length: int | None = None
        # Captions repeat from epoch to epoch; most of a batch's tokenisation is then a look-up.
        self._memo: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str], context_length: int, pad_to: str = "context") -> tuple[Tensor, Tensor]:
        """(input_ids int64 [n, L], attention_mask bool [n, L]), padded on the right.

        A long text is cut so that its last token is still the end token. L is ``context_length``, or with
        ``pad_to="longest"`` the longest row's length (at least 1).
        """
        if context_length != self._length:
            self.backend.enable_truncation(context_length)
            self._length = context_length
            self._memo.clear()
        memo = self._memo
        missing = list({text: None for text in texts if text not in memo})
        fresh = dict(zip(missing, (e.ids for e in self.backend.encode_batch_fast(missing)))) if missing else {}
        rows = [memo[text] if text in memo else fresh[text] for text in texts]
        if len(memo) < _MEMO_ENTRIES:
            memo.update((text, ids) for text, ids in fresh.items() if len(text) <= _MEMO_CHARACTERS)
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        width = context_length if pad_to == "context" else max(1, int(lengths.max(initial=1)))
        mask = np.arange(width) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        ids[mask] = np.fromiter((i for row in rows for i in row), dtype=np.int64, count=int(lengths.sum()))
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def special_ids(self) -> list[int]:
        """The ids of tokens that stand for no text: begin, end, padding and the like."""
        return sorted(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def save(self, folder: str | Path) -> Path:
        """Write ``folder/tokenizer.json``, from which `load_tokenizer` makes the same tokenizer."""
        path = Path(folder) / "tokenizer.json"
        token = self.backend.id_to_token(self.pad_id) or PAD
        self.backend.enable_padding(pad_id=self.pad_id, pad_token=token)  # the file's record of the pad id
        self.backend.no_truncation()
        self._length = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.backend.save(str(path))
        except Exception as error:  # the Rust side raises a bare Exception
            raise PairtileError(f"cannot write {path}: {error}") from None
        finally:
            self.backend.no_padding()
        return path

    def __getstate__(self) -> dict[str, object]:
        return {"backend": self.backend, "pad_id": self.pad_id}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _pad_id(backend: tokenizers.Tokenizer) -> int:
    """The pad id that the file states, else that of a token with a customary name, else 0."""
    if backend.padding:
        return int(backend.padding["pad_id"])
    named = (backend.token_to_id(name) for name in (PAD, "[PAD]", "<|pad|>", "<|endoftext|>", "</s>"))
    return next((i for i in named if i is not None), 0)


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """A tokenizer from a ``tokenizer.json``, from a folder with one, from a transformers folder, or by hub id.

    Code from the hub is never run.

    Raises:
        PairtileError: nothing is there, or what is there is not a fast tokenizer.
    """
    path = Path(path_or_id).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file() and (path.is_file() or not (path / "tokenizer_config.json").is_file()):
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise PairtileError(f"{file} is not a tokenizer file of the tokenizers library: {error}") from None
        return Tokenizer(backend, _pad_id(backend))
    if path.is_dir() and not (path / "tokenizer_config.json").is_file():
        raise PairtileError(
            f"no tokenizer.json in {path}; prepare the data set with `pairtile prepare`, which trains one, "
            "or set data.tokenizer to a local path or a hub id"
        )
    return _from_transformers(str(path_or_id))


def _from_transformers(source: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # not found, offline, not a tokenizer: transformers raises many kinds
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PairtileError(f"no tokenizer at {source!r}, neither as a local path nor as a hub id: {line}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise PairtileError(f"the tokenizer of {source!r} has no fast version (tokenizer.json); choose another")
    pad_id = next((i for i in (loaded.pad_token_id, loaded.eos_token_id) if i is not None), 0)
    return Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), pad_id)


def train_tokenizer(captions: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Train a byte-level BPE on captions and write it to ``path`` (a folder or a .json file).

    Texts are normalised (NFKC) and lower-cased; any text can be encoded, there is no unknown token. Rows read
    ``<bos> ... <eos>``; ids 0, 1, 2 are pad, begin, end.

    Raises:
        PairtileError: ``vocab_size`` below 259 (256 bytes and 3 special tokens), or no permission to write.
    """
    if vocab_size < 259:
        raise PairtileError(f"vocab_size must be at least 259 (256 bytes and 3 special tokens), got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 2)]
    )
    tokenizer = Tokenizer(backend, 0)
    target = Path(path)
    folder = target.parent if target.suffix == ".json" else target
    written = tokenizer.save(folder)
    if target.suffix == ".json" and written != target:
        written.replace(target)
    return tokenizer
