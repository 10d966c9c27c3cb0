"""What the sub-commands do; `mlx_loop.cli` has their options."""
