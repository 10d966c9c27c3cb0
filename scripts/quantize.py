"""Quantise a checkpoint, the same as `mlx_loop quantize`: python scripts/quantize.py --help."""

import sys

from mlx_loop.screens.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
