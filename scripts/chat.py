"""Chat with a looped model, the same as `mlx_loop chat`: python scripts/chat.py --help."""

import sys

from mlx_loop.screens.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
