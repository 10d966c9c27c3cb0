"""A slow loop that is hard to get wrong: every pass starts from a copy of the cache.

It knows neither rewinding nor tableaux: `anchored` written out, on deep copies of mlx-lm's
caches, with the package's rounding (`combine`), so that results can be compared to the bit.
"""

from __future__ import annotations

import copy

from mlx_loop.cache import histories
from mlx_loop.kernels import combine


def anchored_logits(model, tokens, cache, loop):
    """Logits (batch, length, vocab) of a model under `loop`; `cache` is updated in place."""
    layers, (start, stop) = model.layers, loop.window
    h = model.model.embed_tokens(tokens)
    masks = model.masks(h, [histories(entry)[0] for entry in cache])

    def plain_pass(x, first, end, entries):
        for i in range(first, end):
            x = layers[i](x, masks[i], entries[i])
        return x

    h = plain_pass(h, 0, start, cache)
    size = stop - start if loop.scope == "block" else 1
    for first in range(start, stop, size):
        before = copy.deepcopy(list(cache))
        kept = copy.deepcopy(before)
        natural = plain_pass(h, first, first + size, kept)
        x, gx, s = h, natural, 1 / loop.loops
        for _ in range(loop.loops - 1):
            x = combine((1 - s, s), (x, gx))
            gx = plain_pass(x, first, first + size, copy.deepcopy(before))
        rest = 1 - loop.beta
        h = combine((loop.beta, rest * (1 - s), rest * s), (natural, x, gx))
        if loop.cache == "last":
            kept = copy.deepcopy(before)
            plain_pass(h, first, first + size, kept)
        cache[first : first + size] = kept[first : first + size]
    h = model.model.norm(plain_pass(h, stop, len(layers), cache))
    return model.lm_head(h) if "lm_head" in model else model.model.embed_tokens.as_linear(h)


def doubled_window(model, window):
    """The plain mlx-lm model in which the window's layers stand twice: naive, K = 2, `own`."""
    start, stop = window
    double = copy.copy(plain(model))
    double.model = copy.copy(model.model)
    double.model.layers = model.layers[:stop] + model.layers[start:]
    return double


def plain(model):
    """mlx-lm's own model with the weights of a looped one."""
    cls = next(c for c in type(model).__mro__ if c.__module__.startswith("mlx_lm"))
    twin = cls.__new__(cls)
    dict.update(twin, model)
    vars(twin).update(vars(model))
    return twin
