"""`python -m mlx_loop` is the command `mlx_loop`."""

from .screens.cli import main

raise SystemExit(main())
