"""Compare loop settings, the same as `mlx_loop compare`: python scripts/compare.py --help."""

import sys

from mlx_loop.screens.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
