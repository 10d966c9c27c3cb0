"""`mlx_loop serve`: mlx-lm's server, with the loop settings in the model's name.

`names` reads settings, `desk` keeps batches, `turns` lets them alternate, `handler` speaks
HTTP and `comparing` feeds the page.
"""
