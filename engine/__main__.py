"""Entry of the ``pairtile`` command and of ``python -m pairtile.engine``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

USAGE = """usage: pairtile COMMAND ...

  info       what pairtile found on this machine
  prepare    make shards: glyphs, or your own images and captions
  train      train a two-tower model from a recipe
  evaluate   retrieval and classification scores of a trained model
  export     copy a trained model into a folder of its own
  report     draw what the benchmarks measured

This installation has the kernels alone (`from pairtile.kernels import ClipLoss`), so only `info` works here.
For the other commands: pip install 'pairtile[train]'"""


def main() -> None:
    """Run the command line; without the packages of ``[train]``, say how to get them."""
    if find_spec("typer") is not None and find_spec("pydantic") is not None:
        from .cli import run

        sys.exit(run())
    arguments = sys.argv[1:]
    if arguments == ["info"]:
        from ..kernels import info

        print(info())
        sys.exit(0)
    wants_help = not arguments or arguments[0] in ("-h", "--help")
    print(USAGE, file=sys.stdout if wants_help else sys.stderr)
    sys.exit(0 if wants_help else 2)


if __name__ == "__main__":
    main()
