"""What the sub-commands do; `mlx_loop.screens.cli` has their options."""
