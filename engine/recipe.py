"""A recipe: one YAML file that says everything about a training run.

``load_recipe(path, overrides)`` reads the file, applies ``key=value`` overrides, expands the model preset and
validates the result. Whatever is wrong comes back as one :class:`RecipeError` line that names the key.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .data import CaptionChoice, DataConfig
from .errors import RecipeError
from .evaluate import ClassificationConfig
from .merging import TokenMergingConfig
from .presets import expand_preset
from .strict import StrictModel

BEST_METRICS = ("R@1", "R@5", "R@10", "top1", "top5", "mean_per_class")  # higher is better
RECIPES = Path(__file__).parent / "recipes"


class VisionConfig(StrictModel):
    """The image tower.

    ``model`` is a name of timm's registry (``local-dir:PATH`` and ``hf-hub:OWNER/NAME`` included), built with
    ``args`` as keyword arguments; or ``target`` is the import path ``package.module:callable`` of any
    ``nn.Module`` that maps images [n, C, H, W] to features [n, ``out_dim``].
    """

    model: str | None = None
    target: str | None = None
    args: dict[str, Any] = {}
    out_dim: int | None = Field(None, gt=0, description="width of the features; needed with target")
    image_size: int = Field(224, gt=0)
    channels: Literal[1, 3] = 3
    mean: list[float] = [0.48145466, 0.4578275, 0.40821073]
    std: list[float] = [0.26862954, 0.26130258, 0.27577711]
    channels_last: bool = Field(False, description="memory format of the images; faster for convolutions")
    pretrained: bool = False
    frozen: bool = False
    token_merging: TokenMergingConfig | None = Field(None, description="none: every layer keeps all tokens")

    @model_validator(mode="after")
    def _pixel_statistics(self) -> VisionConfig:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) < self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> VisionConfig:
        if (self.model is None) == (self.target is None):
            raise ValueError("give either model (a timm name) or target (an import path)")
        if self.target is not None and self.out_dim is None:
            raise ValueError("target needs out_dim, the width of the features it returns")
        return self


class TextConfig(StrictModel):
    """The text tower.

    ``model`` is a transformers model type built from ``args`` (``clip_text_model``, ``bert``, ...), a local
    folder or a hub id; or ``target`` is the import path of any ``nn.Module`` that maps ``(input_ids,
    attention_mask)`` [n, L] to hidden states [n, L, ``out_dim``] or features [n, ``out_dim``].
    ``vocab_size``, ``pad_token_id`` and ``max_position_embeddings`` come from the tokenizer unless given.
    """

    model: str | None = None
    target: str | None = None
    args: dict[str, Any] = {}
    out_dim: int | None = Field(None, gt=0, description="width of the features; needed with target")
    pool: Literal["last", "first", "mean"] = Field(
        "last", description="last: the end-of-text token; first: a [CLS] token; mean: over all real tokens"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto: flash-attn where it is installed, else sdpa; on a CPU eager trains short texts faster",
    )
    pretrained: bool = False
    frozen: bool = False
    token_merging: TokenMergingConfig | None = Field(None, description="none: every layer keeps all tokens")

    @model_validator(mode="after")
    def _one_source(self) -> TextConfig:
        if (self.model is None) == (self.target is None):
            raise ValueError("give either model (a transformers model type, folder or hub id) or target")
        if self.target is not None and self.out_dim is None:
            raise ValueError("target needs out_dim, the width of the features it returns")
        return self


class TokensConfig(StrictModel):
    """Token embeddings beside the pooled ones: FILIP's patches and words (arXiv:2111.07783), for late interaction.

    Each tower's tokens go through a linear projection to one small width and are normalised. The patches are what
    timm's ``forward_features`` gives: the last feature map of a convolutional tower, the sequence of a transformer
    (one that averages normalises after it: with ``args: {fc_norm: false}`` every token is normalised). An image tower
    by import path returns its tokens [n, L, ``out_dim``] or a map [n, ``out_dim``, H, W] instead of pooled features.
    """

    dim: int = Field(256, gt=0, description="width of a token's embedding")
    prefix_tokens: bool = Field(False, description="class and register tokens of the image tower count as patches")
    special_tokens: bool = Field(True, description="begin and end tokens count as words; texts of no others keep them")


class ModelConfig(StrictModel):
    """Two towers, two projections into one space, and the learnable scale (and bias) of their similarity."""

    preset: str | None = Field(None, description="a name of presets.py; the other keys override what it sets")
    vision: VisionConfig
    text: TextConfig
    embed_dim: int | None = Field(
        512, gt=0, description="width of the pooled embeddings; null: they are the mean of the tokens', normalised"
    )
    tokens: TokensConfig | None = Field(None, description="token embeddings too; none: pooled ones alone")
    init_logit_scale: float = Field(1 / 0.07, gt=0)
    max_logit_scale: float = Field(100.0, gt=0)
    init_logit_bias: float | None = Field(None, description="none: the model has no bias; SigLIP starts at -10")

    @model_validator(mode="after")
    def _some_embedding(self) -> ModelConfig:
        if self.embed_dim is None and self.tokens is None:
            raise ValueError("embed_dim is null and there are no tokens to average: give a width, or set tokens.dim")
        return self


class ObjectiveConfig(StrictModel):
    """One term of the loss: ``weight`` times the objective ``name``, built with ``args``."""

    name: str
    weight: float = 1.0
    args: dict[str, Any] = {}


class TrainConfig(StrictModel):
    """Optimisation. Batches are counted over all ranks."""

    batch_size: int = Field(
        gt=0, description="pairs of one contrastive batch over all ranks; its other pairs are the negatives"
    )
    accumulation: int = Field(1, gt=0, description="batches per optimiser step; adds no negatives")
    cache_chunk: int | None = Field(
        None, gt=0, description="pairs that a rank embeds at a time; the negatives stay those of the whole batch"
    )
    steps: int | None = Field(None, gt=0, description="optimiser steps; give this or epochs")
    epochs: float | None = Field(None, gt=0)
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    grad_clip: float = Field(1.0, ge=0, description="maximum gradient norm; 0: none")
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    activation_checkpointing: bool = False
    seed: int = 0
    threads: int | None = Field(
        None, gt=0, description="CPU threads per rank; none: the cores divided by the local ranks"
    )
    timeout_minutes: float = Field(
        30.0,
        gt=0,
        description="without any movement of a rank, after which all stop and say which one; of several ranks",
    )
    log_every: int = Field(10, gt=0)
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: int = Field(2, gt=0)
    max_bad_batches: int = Field(10, gt=0, description="batches in a row with a non-finite loss before the run stops")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class EvalConfig(StrictModel):
    """What is evaluated, on the splits of ``data.val``."""

    splits: list[str] | None = Field(None, description="names in data.val; none: all of them")
    batch_size: int = Field(256, gt=0)
    scores: Literal["auto", "pooled", "tokens", "rerank"] = Field(
        "auto",
        description="pooled: cosine of the pooled embeddings; tokens: late interaction of all pairs; rerank: late "
        "interaction of the rerank_top best by the pooled ones; auto: tokens where the model has them",
    )
    rerank_top: int = Field(100, gt=0)
    captions: CaptionChoice | None = Field(None, description="which captions are candidates; none: as in data.captions")
    match_ids: list[str] = Field([], description="further ids whose equality makes a correct match (glyphs: drawing)")
    without_flags: list[str] = Field([], description="also report without the samples that carry these flags")
    classification: ClassificationConfig | None = None
    best: str | None = Field(
        None, description="metric that decides keep-best; none: text_to_image/R@1 of the first split"
    )
    contact_sheet: bool = True

    @field_validator("best")
    @classmethod
    def _higher_is_better(cls, value: str | None) -> str | None:
        if value is not None and value.rsplit("/", 1)[-1] not in BEST_METRICS:
            raise ValueError(f"must end with one of {', '.join(BEST_METRICS)}, for example val/text_to_image/R@1")
        return value


class Recipe(StrictModel):
    """A whole run."""

    name: str
    papers: list[str] = Field([], description="the papers whose system this recipe implements")
    about: str = ""
    output: str = Field("runs/{name}", description="the run folder; {name} is replaced")
    resume: Literal["auto", "never"] = "auto"
    data: DataConfig
    model: ModelConfig
    objectives: list[ObjectiveConfig] = [ObjectiveConfig(name="clip")]
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    deepspeed: dict[str, Any] = Field(
        {}, description="merged as it is over the DeepSpeed configuration made from train"
    )

    @field_validator("objectives")
    @classmethod
    def _some_objective(cls, value: list[ObjectiveConfig]) -> list[ObjectiveConfig]:
        if not value:
            raise ValueError("at least one objective is needed, for example [{name: clip}]")
        return value

    @model_validator(mode="after")
    def _channels(self) -> Recipe:
        expected = 1 if self.data.image_mode == "L" else 3
        if self.model.vision.channels != expected:
            raise ValueError(
                f"model.vision.channels is {self.model.vision.channels}, but images of data.image_mode "
                f"{self.data.image_mode} have {expected}; make them agree"
            )
        return self

    @model_validator(mode="after")
    def _tokens_to_score(self) -> Recipe:
        if self.eval.scores in ("tokens", "rerank") and self.model.tokens is None:
            raise ValueError(
                f"eval.scores is {self.eval.scores}, but the model has no token embeddings: set model.tokens.dim before "
                "training, or eval.scores=pooled"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.output.replace("{name}", self.name))


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override, expand and validate a recipe.

    Args:
        path: a YAML file, or the name of a recipe that comes with pairtile (``glyphs_clip``).
        overrides: ``dotted.key=value`` strings; the value is read as YAML.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    file = find_recipe(path)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{file} holds {type(raw).__name__}, expected a mapping with keys such as {_keys(Recipe)}")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_recipe(raw, source=str(file))


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data. Raises :class:`RecipeError` with one line."""
    return validate(Recipe, {**raw, "model": expand_preset(raw.get("model"))}, source)


def validate(model: type[Any], raw: Any, source: str) -> Any:
    """``model.model_validate`` whose failure is one readable line about the first problem."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(model, error)}") from None


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with pairtile."""
    for candidate in (Path(path), RECIPES / str(path), RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    raise RecipeError(f"no recipe {path}: neither a file nor one of those that come with pairtile ({shipped})")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r} is not of the form dotted.key=value, for example train.lr=0.001")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not readable as YAML") from None
    node: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = (
            node[int(part)]
            if isinstance(node, list) and part.isdigit() and int(part) < len(node)
            else _child(node, part)
        )
        if not isinstance(node, dict | list):
            raise RecipeError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a group of keys"
            )
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise RecipeError(f"override {override!r}: {'.'.join(parents)} is a list of {len(node)} entries")
        node[int(last)] = parsed
    else:
        node[last] = parsed


def _child(node: Any, part: str) -> Any:
    if isinstance(node, list):
        return None
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # an unknown key is the likeliest cause of a missing one, so it is told first
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {location}{_suggest(model, first['loc'])}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"missing key {location}{more}"
    given = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return f"{location}: {message[0].lower() + message[1:]}{given}{more}"


def _suggest(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    known = dict(_walk(model))
    group = ".".join(str(part) for part in location[:-1] if not isinstance(part, int))
    siblings = {key.rsplit(".", 1)[-1]: key for key in known if key.rpartition(".")[0] == group}
    near = difflib.get_close_matches(str(location[-1]), siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {siblings[near[0]]}?"
    everywhere: dict[str, str] = {}
    for key in known:
        everywhere.setdefault(key.rsplit(".", 1)[-1], key)
    near = difflib.get_close_matches(str(location[-1]), everywhere, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {everywhere[near[0]]}?"
    return f"; the keys of {group or 'a recipe'} are {', '.join(siblings)}"


def _walk(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    keys: list[tuple[str, Any]] = []
    for name, field in model.model_fields.items():
        keys.append((prefix + name, field))
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _walk(kind, f"{prefix}{name}.")
    return keys


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)
