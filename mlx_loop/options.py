"""Command-line options that several commands share, and how settings are written as text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .config import CHOICES, INTEGRATORS, LoopConfig
from .errors import UserError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .loop import Looped


def parse_setting(name: str, text: str) -> Any:
    """The value of the `LoopConfig` field `name` that `text` means.

    Raises:
        UserError: `text` is not of the field's form, or no such field.
    """
    if name not in _PARSERS:
        raise UserError(f"unknown loop setting {name!r}; known are {', '.join(_PARSERS)}")
    parse, form = _PARSERS[name]
    try:
        return parse(text)
    except ValueError as error:
        raise UserError(f"{name} {text!r} is not valid: write {form}") from error


def _window(text: str) -> tuple:
    start, stop = text.split(":")
    return (float(start), float(stop)) if "." in text else (int(start), int(stop))


def _decode(text: str) -> str | int:
    return text if text in ("full", "bypass") else int(text)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(","))


def _alpha(text: str) -> float | tuple[float, ...]:
    return _floats(text) if "," in text else float(text)


def _choice(*values: str) -> tuple[Callable[[str], str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(text)
        return text

    return parse, "one of " + ", ".join(values)


_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "loops": (int, "a whole number from 1 up"),
    "window": (_window, "start:stop, as layers (15:19) or fractions of the depth (0.4:0.5)"),
    "integrator": _choice(*INTEGRATORS),
    "beta": (float, "a number from 0 to 1"),
    "scope": _choice(*CHOICES["scope"]),
    "routing": _choice(*CHOICES["routing"]),
    "norm": _choice(*CHOICES["norm"]),
    "cache": _choice(*CHOICES["cache"]),
    "decode": (_decode, "full, bypass or a number of tokens"),
    "alpha": (_alpha, "a number, or one per loop with commas between"),
    "momentum": (float, "a number from 0 to below 1"),
    "memory": (int, "a whole number from 1 up"),
    "damping": (float, "a number above 0, at most 1"),
    "weights": (_floats, "loops + 1 numbers with commas between"),
}

_HELP = {
    "loops": "how often the window is applied (K); 1 is the plain model",
    "window": "the layers that loop, half open: 15:19 is layers 15 to 18; or fractions, 0.4:0.5",
    "integrator": "how the loops make one step: " + ", ".join(INTEGRATORS),
    "beta": "anchored: weight of the plain pass, 0 to 1",
    "scope": "block: iterate the whole window; layer: each layer before the next",
    "routing": "experts: live, or frozen as the plain pass chose them",
    "norm": "free, or interpolated: iterates follow the norm of the plain pass",
    "cache": "keys and values to keep: of the first pass, of a last one, or own for each pass",
    "decode": "which generated tokens loop: full (all), bypass (none), or the first N",
    "alpha": "ema, heavy_ball, norm_stab, input_anchor: step size; ema also one per loop (0.5,0.3)",
    "momentum": "heavy_ball: momentum",
    "memory": "anderson: how many earlier iterates are mixed",
    "damping": "anderson: damping",
    "weights": "poly_blend: weights of x, g(x), g(g(x)), ... (0.2,0.3,0.5)",
}


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return value


def _chat_template(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("it must be a JSON object")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model and how it is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="a folder, a Hugging Face repository, or a checkpoint that ships with mlx_loop "
        "(default: %(default)s)",
    )
    group.add_argument("--adapter-path", metavar="DIR", help="LoRA adapters, as mlx-lm makes them")
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the tokenizer run code that comes with the checkpoint",
    )


def add_loop_options(parser: argparse.ArgumentParser) -> None:
    """One option per field of `LoopConfig`."""
    group = parser.add_argument_group(
        "loop", "What is left out is as saved with the model, else the preset of its size."
    )
    for name in _PARSERS:
        group.add_argument(f"--{name}", metavar=name[0].upper(), help=_HELP[name])


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How tokens are chosen and how many."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-tokens",
        "-m",
        type=positive,
        default=max_tokens,
        metavar="N",
        help="the most tokens of an answer (default: %(default)s)",
    )
    group.add_argument(
        "--temp",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0, the default, is greedy",
    )
    for name, help_text in (
        ("top-p", "sample from the likeliest tokens that make up this probability"),
        ("min-p", "drop tokens less likely than this times the likeliest"),
        ("xtc-probability", "how often to apply XTC sampling"),
    ):
        group.add_argument(f"--{name}", type=float, default=0.0, metavar="P", help=help_text)
    group.add_argument(
        "--xtc-threshold",
        type=float,
        default=0.1,
        metavar="P",
        help="XTC: probability above which tokens are left out",
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens"
    )
    group.add_argument("--seed", type=int, default=None, help="of the random numbers")
    group.add_argument("--system-prompt", metavar="TEXT", help="the system message")
    group.add_argument(
        "--chat-template-config",
        type=_chat_template,
        default={},
        metavar="JSON",
        help="more arguments for the chat template",
    )


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Size and precision of the key/value cache, and how the prompt is fed."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--max-kv-size",
        type=positive,
        metavar="N",
        help="keep the first 4 and the latest tokens, N in all",
    )
    group.add_argument(
        "--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantise keys and values"
    )
    group.add_argument(
        "--kv-group-size",
        type=int,
        default=64,
        choices=(32, 64, 128),
        help="values that share a scale (default: %(default)s)",
    )
    group.add_argument(
        "--quantized-kv-start",
        type=int,
        default=5000,
        metavar="N",
        help="quantise from this many tokens on (default: %(default)s)",
    )
    group.add_argument(
        "--prefill-step-size",
        type=positive,
        default=2048,
        metavar="N",
        help="prompt tokens processed at a time (default: %(default)s)",
    )


def load_from(args: argparse.Namespace) -> tuple[Looped, TokenizerWrapper]:
    """The model and tokenizer that the options ask for, with the loop settings they ask for."""
    from .loading import load, saved_loop

    given = {
        name: parse_setting(name, getattr(args, name))
        for name in _PARSERS
        if getattr(args, name) is not None
    }
    LoopConfig(**given)
    model, tokenizer = load(
        args.model, adapter_path=args.adapter_path, trust_remote_code=args.trust_remote_code
    )
    if given:
        model.loop = replace(saved_loop(model) or LoopConfig(), **given)
    return model, tokenizer


def generation_from(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Arguments of `stream_generate` that the options ask for."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    if args.kv_bits is not None and args.max_kv_size is not None:
        raise UserError(
            "--kv-bits does not work with --max-kv-size: mlx-lm cannot quantise a "
            "rotating cache; leave one out"
        )
    if args.seed is not None:
        mx.random.seed(args.seed)
    return {
        "max_tokens": args.max_tokens,
        "sampler": make_sampler(
            args.temp,
            args.top_p,
            args.min_p,
            top_k=args.top_k,
            xtc_probability=args.xtc_probability,
            xtc_threshold=args.xtc_threshold,
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        ),
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
        "prefill_step_size": args.prefill_step_size,
    }
