"""Gradient caching at a batch whose activations do not fit: peak memory, and the same curve where they do.

``python -m benchmarks.gradient_caching`` trains a ViT-tiny at 32 pixels and a small text transformer on noise, three times,
each in a process of its own: a step of `--batch` pairs in chunks, then ten steps of `--small-batch` pairs in chunks and
whole. Memory is the process' own peak (VmHWM), libraries, data and optimiser included. Fails above `--limit` or where the two
curves differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pairtile.engine import GradientCache
from pairtile.engine.model import DualEncoder
from pairtile.engine.recipe import ModelConfig
from pairtile.kernels import ClipLoss

from .peak import _status

_ROOT = Path(__file__).resolve().parent.parent
_GIB = 2**30
_VOCABULARY, _LENGTH = 1000, 16
_TOLERANCE = 1e-5  # float32: the same operations, added up in another order, through ten steps of Adam


def _model(patch: int) -> DualEncoder:
    vision = {"model": "vit_tiny_patch16_224", "args": {"img_size": 32, "patch_size": patch}, "image_size": 32}
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = ModelConfig.model_validate({"vision": vision, "text": {"model": "clip_text_model", "args": sizes}})
    torch.manual_seed(0)
    return DualEncoder(config, vocab_size=_VOCABULARY, pad_id=0, context_length=_LENGTH)


def _train(batch: int, chunk: int, steps: int, patch: int) -> dict[str, Any]:
    """Losses, seconds and peak memory of a few steps on one batch; a chunk of 0 passes it whole."""
    model = _model(patch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    input_ids = torch.randint(1, _VOCABULARY, (batch, _LENGTH))
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    loss_of = ClipLoss()
    cache = GradientCache(model, chunk) if chunk else None
    losses, began = [], time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        output = (cache or model)(images, input_ids, mask)
        loss = loss_of(output.image_features, output.text_features, output.logit_scale)
        if cache is None:
            loss.backward()
        else:
            cache.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "seconds": time.perf_counter() - began, "peak": _status("VmHWM")}


def _in_a_child(*arguments: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gradient_caching", "--child", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=_ROOT, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient_caching", description=__doc__)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--small-batch", type=int, default=256)
    parser.add_argument("--patch", type=int, default=8, help="side of a patch in pixels; 8 gives 16 patches")
    parser.add_argument("--limit", type=float, default=6.0, help="GiB")
    parser.add_argument("--child", type=int, nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(_train(*given.child)))
        return 0
    large = _in_a_child(given.batch, given.chunk, 1, given.patch)
    met = large["peak"] < given.limit * _GIB
    print(
        f"batch {given.batch:,} in chunks of {given.chunk}: peak {large['peak'] / _GIB:.2f} GiB (limit {given.limit:g}), "
        f"loss {large['losses'][0]:.6f}, {large['seconds']:.0f} s a step"
    )
    cached = _in_a_child(given.small_batch, given.small_batch // 4, 10, given.patch)
    whole = _in_a_child(given.small_batch, 0, 10, given.patch)
    worst = max(abs(a - b) / abs(b) for a, b in zip(cached["losses"], whole["losses"]))
    print(
        f"batch {given.small_batch:,}, 10 steps: in 4 chunks {cached['peak'] / _GIB:.2f} GiB, whole {whole['peak'] / _GIB:.2f}"
    )
    for name, run in (("in 4 chunks", cached), ("whole", whole)):
        print(f"  {name:<12}" + " ".join(f"{loss:.6f}" for loss in run["losses"]))
    print(f"largest relative difference {worst:.1e} (limit {_TOLERANCE:g})")
    return 0 if met and worst <= _TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
