"""Answers of a given form: JSON of a schema, or of a grammar, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import UserError
from ...upstream import hugging_face

FORMS = (
    '{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": ...}}, '
    '{"type": "lark", "grammar": "..."} or {"type": "regex", "regex": "..."}'
)

# Small models would fill any room for white space.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """What makes an answer of a form, for one tokenizer."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def read(self, response_format: object) -> str | None:
        """The grammar, as llguidance writes it, of a request's `response_format`; None: any text.

        Raises:
            UserError: it is none of `FORMS`, or llguidance is missing or refuses it.
        """
        if response_format is None or response_format == {"type": "text"}:
            return None
        if not find_spec("llguidance"):
            raise UserError(
                "response_format needs llguidance: pip install 'mlx-loop[serve]', or leave it out"
            )
        from llguidance import LLMatcher

        grammar = _grammar(LLMatcher, response_format)
        with self._lock:
            problem = LLMatcher.validate_grammar(grammar, self._tokens)
        if problem:
            raise UserError(f"response_format: {' '.join(problem.split())[:300]}")
        return grammar

    def processor(self, grammar: str) -> Callable[[mx.array, mx.array], mx.array]:
        """mlx-lm's logits processor that lets only the tokens pass that the grammar allows.

        Args:
            grammar: as `read` gives it.
        """
        from llguidance import LLMatcher

        return _Form(LLMatcher(self._tokens, grammar), set(self._tokenizer.eos_token_ids))

    @cached_property
    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        ends = sorted(self._tokenizer.eos_token_ids)
        return from_tokenizer(hugging_face(self._tokenizer), eos_token=ends)


class _Form:
    """A matcher that reads the tokens after those of its first call."""

    def __init__(self, matcher: Any, ends: set[int]):
        self._matcher, self._ends = matcher, list(ends)
        self._read: int | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Args: tokens: so far; logits: (1, vocab)."""
        if self._read is None:
            self._read = tokens.size
        new = tokens[self._read :].tolist()
        self._read = tokens.size
        if new:
            self._matcher.consume_tokens(new)
        allowed = np.zeros(logits.shape[-1], bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        # Models pad their vocabulary.
        known = np.unpackbits(bits, bitorder="little")[: allowed.size]
        allowed[: known.size] = known
        if self._matcher.is_error():
            # Beyond llguidance's limits nothing can be said but the end.
            allowed[:] = False
            allowed[self._ends] = True
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype))


def _grammar(matcher: Any, given: object) -> str:
    form: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    kind = form.get("type")
    try:
        if kind == "json_object":
            return matcher.grammar_from_json_schema('{"type": "object"}', _COMPACT)
        if kind == "json_schema":
            schema = json.dumps(form["json_schema"]["schema"])
            return matcher.grammar_from_json_schema(schema, _COMPACT)
        if kind == "lark":
            return matcher.grammar_from_lark(form["grammar"])
        if kind == "regex":
            return matcher.grammar_from_regex(form["regex"])
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"response_format must be {FORMS}")
