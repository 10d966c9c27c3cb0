"""What a request may hold: whatever else would end mlx-lm's generation thread, or keep it busy."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any, NoReturn

from ...errors import UserError

# mlx-lm hands numbers on to arrays, and texts to an automaton.
LARGEST_NUMBER = 1e9
MOST_STOPS, LONGEST_STOP = 16, 256


def read(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body, without the fields that say nothing.

    Raises:
        UserError: it is none.
    """
    try:
        body = json.loads(raw.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    # null is what clients write for a field that is left out.
    return {name: value for name, value in body.items() if value is not None}


def check(body: dict[str, Any], vocabulary: int, reserved: Container[str]) -> None:
    """Refuse what mlx-lm would not, and write what it would misread as it reads it.

    Args:
        vocabulary: logits of the model.
        reserved: arguments of a chat template that are the tokenizer's, and not the template's.

    Raises:
        UserError: names the field, and says what is allowed.
    """
    for name, value in body.items():
        number = isinstance(value, int | float)
        if number and name != "seed" and not abs(value) <= LARGEST_NUMBER:
            raise UserError(f"{name} must be between -1e9 and 1e9")
    for name in ("n", "best_of"):
        if body.get(name, 1) != 1:
            raise UserError(f"{name} must be 1: ask several times instead")
    if body.pop("draft_model", "default_model") != "default_model" or "adapters" in body:
        raise UserError(
            "draft_model and adapters are what the server was started with: leave them out"
        )
    seed = body.get("seed", 0)
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        raise UserError("seed must be a whole number from 0 up, below 2^63")
    if isinstance(body.get("top_k"), int) and body["top_k"] >= vocabulary:
        raise UserError(f"top_k must be below {vocabulary}, the tokens of the model")
    threshold = body.get("xtc_threshold", 0)
    if isinstance(threshold, int | float) and not 0 <= threshold <= 0.5:
        raise UserError("xtc_threshold must be between 0 and 0.5")
    _check_logprobs(body)
    _check_bias(body.get("logit_bias", {}), vocabulary)
    _check_stops(body.get("stop", []))
    options = body.get("stream_options", {})
    if not isinstance(options, Mapping):
        raise UserError('stream_options must be an object: {"include_usage": true}')
    if options:
        body["stream_options"] = {"include_usage": bool(options.get("include_usage"))}
    template = body.get("chat_template_kwargs", {})
    if not isinstance(template, Mapping) or any(name in reserved for name in template):
        raise UserError(
            "chat_template_kwargs must be an object of arguments of the model's own template"
        )
    if not isinstance(body.get("role_mapping", {}), Mapping):
        raise UserError("role_mapping must be an object")
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError("tools must be a list of objects")


def check_prompt(body: Mapping[str, Any]) -> None:
    """Refuse a text completion's `prompt` that is no text.

    Raises:
        UserError: as `check`.
    """
    if not isinstance(body.get("prompt"), str):
        raise UserError("prompt must be a text; ask once for each of several")


def check_messages(body: Mapping[str, Any]) -> None:
    """Refuse `messages` of a form that no chat template reads, and images.

    Raises:
        UserError: as `check`.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError('messages must be a list: [{"role": "user", "content": "..."}]')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError("each of messages must be an object with a role, a text")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        texts = all(
            isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str)
            for p in parts
        )
        if not texts or not isinstance(content, str | list | None):
            raise UserError("content must be a text, or a list of parts of the type text")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise UserError("tool_calls must be a list of objects")


def _check_logprobs(body: dict[str, Any]) -> None:
    count = body.get("logprobs")
    if isinstance(count, int) and not isinstance(count, bool):
        # OpenAI's text completions give a number here, mlx-lm takes that of chats.
        body["logprobs"], body["top_logprobs"] = True, count
    if body.get("top_logprobs") == 0:
        del body["top_logprobs"]
    if "top_logprobs" in body:
        body.setdefault("logprobs", True)


def _check_bias(bias: object, vocabulary: int) -> None:
    try:
        fits = isinstance(bias, Mapping) and all(
            0 <= int(token) < vocabulary and abs(float(value)) <= LARGEST_NUMBER
            for token, value in bias.items()
        )
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UserError(f"logit_bias must be an object of numbers by token, 0 to {vocabulary - 1}")


def _check_stops(stops: object) -> None:
    texts = [stops] if isinstance(stops, str) else stops
    if (
        not isinstance(texts, list)
        or len(texts) > MOST_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in texts)
    ):
        raise UserError(
            f"stop must be a text or at most {MOST_STOPS} of them, each of 1 to {LONGEST_STOP} "
            "characters"
        )


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")
