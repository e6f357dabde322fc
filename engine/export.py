"""Models on disk: safetensors, a JSON configuration and the tokenizer. Nothing here reads or writes a pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .data import DataConfig, Tokenizer, build_image_transform, load_tokenizer
from .errors import PairtileError
from .model import DualEncoder, Embedded, required_tokens
from .recipe import ModelConfig, validate
from .tokens import Tokens

FORMAT = "pairtile-dual-encoder/1"
WEIGHTS = "model.safetensors"
#: PIL images, or uint8 pixels; a clip is a sequence of images.
Images: TypeAlias = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | Tensor


def write_model_folder(
    folder: Path, *, weights: dict[str, Tensor], model: ModelConfig, data: DataConfig, tokenizer: Tokenizer
) -> None:
    """Write ``model.safetensors``, ``config.json`` and the tokenizer into an existing folder."""
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    document = {
        "format": FORMAT,
        "pairtile": version("pairtile"),
        "model": model.model_dump(mode="json"),
        "text": _text_sizes(tokenizer, data),
        "data": data.model_dump(
            mode="json", include={"image_mode", "resize", "frames", "context_length", "max_pixels"}
        ),
    }
    (folder / "config.json").write_text(json.dumps(document, indent=2))
    tokenizer.save(folder)


def build_model(model: ModelConfig, data: DataConfig, tokenizer: Tokenizer) -> DualEncoder:
    """A freshly initialised model for this tokenizer."""
    return DualEncoder(model, **_text_sizes(tokenizer, data), frames=data.frames)


def _text_sizes(tokenizer: Tokenizer, data: DataConfig) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "context_length": data.context_length,
        "special_ids": tokenizer.special_ids(),
    }


def export(run: str | Path, out: str | Path, *, which: str = "best") -> Path:
    """Copy a run's model into a folder of its own that :func:`load` reads.

    Args:
        run: a run folder, a checkpoint or an exported folder.
        out: the new folder; it must not exist or be empty.
        which: ``best`` or ``last`` checkpoint of a run folder.

    Raises:
        PairtileError: there is no model, or ``out`` is not empty.
    """
    source, target = find_model(run, which), Path(out)
    if target.exists() and any(target.iterdir()):
        raise PairtileError(f"{target} is not empty; give a new folder")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and file.name not in ("trainer.json", "score.json"):
                shutil.copy2(file, partial / file.name)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except OSError as error:
        raise PairtileError(f"cannot write {target}: {error.strerror}") from None
    return target


def find_model(path: str | Path, which: str = "best") -> Path:
    """The folder with the weights: ``path`` itself, or the best or last checkpoint of the run folder ``path``."""
    root = Path(path)
    if (root / WEIGHTS).is_file():
        return root
    if which == "best" and (root / "best" / WEIGHTS).is_file():
        return root / "best"
    checkpoints = sorted(file.parent for file in root.glob("checkpoints/step-*/trainer.json"))
    if checkpoints:
        return checkpoints[-1]
    raise PairtileError(f"no model in {root}: expected {WEIGHTS} there, in {root}/best or in {root}/checkpoints/step-*")


def load(
    path: str | Path, *, device: str | torch.device = "cpu", which: str = "best", allow_targets: bool = False
) -> Encoder:
    """A trained model, ready to embed images and texts.

    Args:
        path: an exported folder, a checkpoint or a run folder.
        device: where to put it.
        which: ``best`` or ``last``, for a run folder.
        allow_targets: build towers that config.json names by import path. That calls whatever it names: allow it
            for folders that you trust.

    Raises:
        PairtileError: the folder holds no model, one of another format, or one with import paths.
    """
    folder = find_model(path, which)
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PairtileError(f"{folder}/config.json is not readable: {error}") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT or not {"model", "data", "text"} <= document.keys():
        raise PairtileError(f"{folder}/config.json has format {found!r}, expected {FORMAT!r} with model, data and text")
    config: ModelConfig = validate(ModelConfig, document["model"], f"{folder}/config.json")
    targets = [tower.target for tower in (config.vision, config.text) if tower.target is not None]
    if targets and not allow_targets:
        raise PairtileError(
            f"{folder}/config.json builds a tower by calling {', '.join(targets)}; if you trust it, load with allow_targets=True"
        )
    # the weights come from the safetensors file: nothing is fetched, and no tower reads another file
    config.vision.pretrained = config.text.pretrained = False
    data = validate(DataConfig, {"root": str(folder), **document["data"]}, f"{folder}/config.json")
    model = DualEncoder(config, **document["text"], frames=data.frames)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS, device="cpu"))
    except (RuntimeError, SafetensorError) as error:
        raise PairtileError(
            f"{folder}/{WEIGHTS} does not fit config.json: {' '.join(str(error).split())[:300]}"
        ) from None
    return Encoder(model.to(device).eval(), load_tokenizer(str(folder)), data)


class Encoder:
    """A trained :class:`DualEncoder` with its tokenizer and image transform."""

    def __init__(self, model: DualEncoder, tokenizer: Tokenizer, data: DataConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.data = data
        self.transform = build_image_transform(data, model.config.vision.image_size, train=False)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def encode_image(self, images: Images, *, normalize: bool = True, batch_size: int = 256) -> Tensor:
        """Images -> float32 [n, embed_dim], of unit length unless ``normalize`` is False.

        Args:
            images: a PIL image, a sequence of them (any size and mode), or an uint8 tensor [n, C, H, W] that has
                the model's size already. A model of clips takes a sequence of clips, each as many PIL images as
                ``data.frames`` says, or uint8 [n, T, C, H, W].
        """
        return torch.cat([part.pooled.float() for part in self._embed_images(images, normalize, batch_size)])

    def encode_text(self, texts: str | Sequence[str], *, normalize: bool = True, batch_size: int = 256) -> Tensor:
        """Texts -> float32 [n, embed_dim], of unit length unless ``normalize`` is False."""
        return torch.cat([part.pooled.float() for part in self._embed_texts(texts, normalize, batch_size)])

    def encode_image_tokens(self, images: Images, *, normalize: bool = True, batch_size: int = 256) -> Tokens:
        """Images as for :meth:`encode_image` -> their patches: float32 [n, patches, dim] and a mask bool [n, patches].

        Of unit length unless ``normalize`` is False; ``pairtile.kernels.maxsim`` takes both.

        Raises:
            PairtileError: the model has no token embeddings.
        """
        return self._tokens(self._embed_images(images, normalize, batch_size))

    def encode_text_tokens(
        self, texts: str | Sequence[str], *, normalize: bool = True, batch_size: int = 256
    ) -> Tokens:
        """Texts -> their words: float32 [n, context_length, dim] and a mask bool [n, context_length]; otherwise as above."""
        return self._tokens(self._embed_texts(texts, normalize, batch_size))

    @torch.inference_mode()
    def _embed_images(self, images: Images, normalize: bool, batch_size: int) -> list[Embedded]:
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, Tensor):
            every = [self.transform(image) for image in images]
            images = torch.stack(every) if every else torch.empty((0, *self.transform.shape), dtype=torch.uint8)
        expected = self.transform.shape
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images: got {images.dtype} {list(images.shape)}, expected uint8 [n, {', '.join(map(str, expected))}]; "
                "PIL images of any size are resized for you"
            )
        return [self.model.embed_image(part.to(self.device), normalize) for part in images.split(batch_size)]

    @torch.inference_mode()
    def _embed_texts(self, texts: str | Sequence[str], normalize: bool, batch_size: int) -> list[Embedded]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        input_ids, attention_mask = self.tokenizer.encode(texts, self.data.context_length)
        parts = zip(input_ids.split(batch_size), attention_mask.split(batch_size))
        return [self.model.embed_text(ids.to(self.device), mask.to(self.device), normalize) for ids, mask in parts]

    @staticmethod
    def _tokens(parts: list[Embedded]) -> Tokens:
        every = [required_tokens(part.tokens) for part in parts]
        return Tokens(torch.cat([part.tokens.float() for part in every]), torch.cat([part.mask for part in every]))


__all__: list[Any] = ["Encoder", "build_model", "export", "find_model", "load", "write_model_folder"]
