"""A text: how well it is foreseen, and how far the prediction is from the un-looped model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...foreign import read_text
from ...generation.prompt import check_tokens, encode
from ...generation.sampling import check_finite
from ...models.looped import Looped
from ...models.together import logits, states
from ..comparison import CHUNK, kl
from ..likelihood import log_probabilities
from ..results import Row
from .task import Found, Task, place, spread

# Tokens of a text that are read at a time; each such piece is an item.
PIECE = 512


@dataclass(frozen=True)
class Text(Task):
    """A text in pieces; of each the mean loss and the KL to the un-looped model, in nats.

    Args:
        items: number of the piece and its tokens.
    """

    items: Sequence[Row]

    score = "loss"
    also = ("kl",)
    better = -1
    unit = "nats"
    no_choice = (
        "loss does not predict answers (the method's authors find held-out loss anti-correlated "
        "with accuracy in reasoning)"
    )

    @classmethod
    def read(cls, path: Path, tokenizer: TokenizerWrapper, limit: int | None, **_: Any) -> Text:
        """The text of a file."""
        return cls(read_pieces(path, tokenizer, limit))

    def length(self, tokenizer: TokenizerWrapper, item: Row) -> int:
        return len(item["tokens"])

    def measure(
        self, views: Sequence[Looped], tokenizer: TokenizerWrapper, items: Sequence[Row]
    ) -> Iterator[list[Found]]:
        """Layers below the windows are computed once for all views."""
        base = [] if views[0].is_unlooped else [views[0].with_loop(None)]
        for item in items:
            check_tokens(views[0], item["tokens"])
            tokens = mx.array(item["tokens"])[None]
            found = states([*base, *views], tokens)
            losses = [_loss(views[0], state, found[0], tokens) for state in found[len(base) :]]
            for view, loss in zip(views, losses, strict=True):
                check_finite(view.loop, mx.array([*loss.values()]))
            yield [Found(i, [place(item) | loss]) for i, loss in enumerate(losses)]


def _loss(model: Looped, state: mx.array, base: mx.array, tokens: mx.array) -> Row:
    """Mean loss of the tokens after the first, and mean KL(base || state)."""
    losses, divergences = [], []
    for start in range(0, tokens.shape[1] - 1, CHUNK):
        stop = min(start + CHUNK, tokens.shape[1] - 1)
        found, plain = (logits(model, x[..., start:stop, :]) for x in (state, base))
        losses.append(-log_probabilities(found, tokens[:, start + 1 : stop + 1, None])[..., 0])
        divergences.append(kl(plain, found))
        mx.eval(losses[-1], divergences[-1])
    loss, divergence = (float(mx.concatenate(x, axis=1).mean()) for x in (losses, divergences))
    return {"loss": loss, "kl": divergence}


def read_pieces(path: Path, tokenizer: TokenizerWrapper, limit: int | None) -> list[Row]:
    """A text in pieces of 512 tokens, `limit` of them evenly spread.

    Raises:
        UserError: it cannot be read, or is shorter than two tokens.
    """
    tokens = encode(tokenizer, read_text(path))
    pieces = [tokens[i : i + PIECE] for i in range(0, len(tokens), PIECE)]
    items = [{"item": i, "tokens": piece} for i, piece in enumerate(pieces) if len(piece) > 1]
    return spread(items, limit, path)
