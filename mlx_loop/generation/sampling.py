"""How tokens are drawn from log-probabilities, and how drafted tokens are checked against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc

from ..errors import UserError


def check_finite(loop: object, total: mx.array) -> None:
    """Refuse predictions that are no numbers, from which any token may be drawn. It waits.

    Args:
        loop: the settings that they come from.
        total: log-probabilities that can be, or logsumexps of logits; any shape.

    Raises:
        UserError: one of them is NaN or infinite.
    """
    if not mx.isfinite(total).all().item():
        raise not_finite(loop)


def not_finite(loop: object) -> UserError:
    """What to say of predictions that are no numbers."""
    return UserError(
        f"the model predicts NaN or infinity with loop {loop or 'off'}: if it does so without "
        "a loop, its weights are damaged or need --dtype float32; else loop less"
    )


@dataclass(frozen=True)
class Sampler:
    """mlx-lm's `make_sampler`, which also tells the distribution that it draws from.

    A call takes log-probabilities (rows, vocab) and gives a token for each row, as mlx-lm's
    samplers do. Arguments are those of `make_sampler`; without any, the likeliest token.
    """

    temp: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: Sequence[int] = ()

    def __call__(self, logprobs: mx.array) -> mx.array:
        return self.draw(self.logits(logprobs))

    def logits(self, logprobs: mx.array) -> mx.array:
        """Logits (rows, vocab) of what tokens are drawn from; -inf: never."""
        if self.temp == 0:
            return logprobs
        # XTC tosses a coin for the whole of its input, so each row goes through on its own.
        rows = [self._filtered(row) for row in mx.split(logprobs, logprobs.shape[0])]
        return mx.concatenate(rows) * (1 / self.temp)

    def draw(self, logits: mx.array) -> mx.array:
        """A token for each row of what `logits` gave, (rows,)."""
        return mx.argmax(logits, axis=-1) if self.temp == 0 else mx.random.categorical(logits)

    def verify(
        self, logprobs: mx.array, drafted: mx.array, draft_logits: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Speculative sampling: drafts to keep, so that tokens are distributed as without them.

        A draft x is kept with probability min(1, p(x) / q(x)); one that is not is replaced by a
        draw from the residual, max(p - q, 0) normalised. Leviathan, Kalman, Matias, Fast
        Inference from Transformers via Speculative Decoding (arXiv 2211.17192, section 2.3);
        Chen et al. (arXiv 2302.01318, algorithm 2).

        Args:
            logprobs: the model's, (n + 1, vocab), after each draft and before the first.
            drafted: (n,), int.
            draft_logits: (n, vocab), which the drafts were drawn from, as `logits` gave them;
                None: drafts that nothing was drawn for.

        Returns:
            How many drafts are kept, the first ones, and the token that follows them; scalars.
        """
        logits, count = self.logits(logprobs), drafted.shape[0]
        if self.temp == 0:
            best = self.draw(logits)
            return _first(drafted == best[:count], best)
        p = mx.softmax(logits.astype(mx.float32), axis=-1)
        at = drafted[:, None]
        if draft_logits is None:
            q = (mx.arange(p.shape[-1]) == at).astype(mx.float32)
        else:
            q = mx.softmax(draft_logits.astype(mx.float32), axis=-1)
        ratio = mx.take_along_axis(p[:count], at, 1) / mx.take_along_axis(q, at, 1)
        kept = mx.random.uniform(shape=(count,)) < ratio[:, 0]
        residual = mx.concatenate([mx.maximum(p[:count] - q, 0), p[count:]])
        # Nothing is left where p and q are the same but for rounding.
        residual = mx.where(mx.any(residual > 0, axis=-1, keepdims=True), residual, p)
        return _first(kept, mx.random.categorical(mx.log(residual)))

    def _filtered(self, logprobs: mx.array) -> mx.array:
        if 0 < self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        # To keep all tokens is as good as no limit, here and below.
        if self.min_p and self.min_tokens_to_keep < logprobs.shape[-1]:
            logprobs = apply_min_p(logprobs, self.min_p, self.min_tokens_to_keep)
        if self.xtc_probability:
            special = list(self.xtc_special_tokens)
            logprobs = apply_xtc(logprobs, self.xtc_probability, self.xtc_threshold, special)
        cuts = 0 < self.top_k < logprobs.shape[-1]
        return apply_top_k(logprobs, self.top_k) if cuts else logprobs


def _first(kept: mx.array, followers: mx.array) -> tuple[mx.array, mx.array]:
    """Drafts before the first one that is not kept, and the token that takes its place."""
    count = mx.cumprod(kept.astype(mx.int32)).sum()
    return count, followers[count]
