"""The command `mlx_loop`, which is also `python -m mlx_loop`."""

import os
import signal

from .errors import INTERRUPTED

# Until `main` listens nothing has begun that would have to end well.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))

from .screens.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
