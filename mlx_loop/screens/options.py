"""Command-line options that several commands share, and how settings are written as text."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..presets import RECIPES
from ..settings import CHOICES, Guard, LoopConfig

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..generation.sampling import Sampler
    from ..models.looped import Looped


@dataclass(frozen=True)
class Setting:
    """A field of `LoopConfig` as text.

    `parse` makes the value of a text that has the `form`, else raises ValueError; `metavar` and
    `help` explain it on the command line.
    """

    parse: Callable[[str], Any]
    form: str
    metavar: str
    help: str


def parse_setting(name: str, text: str) -> Any:
    """The value of the `LoopConfig` field `name` that `text` means.

    Raises:
        UserError: `text` is not of the field's form, or no such field.
    """
    setting = SETTINGS.get(name)
    if setting is None:
        raise UserError(f"unknown loop setting {name!r}; known are {', '.join(SETTINGS)}")
    try:
        return setting.parse(text)
    except ValueError as error:
        raise UserError(f"{name} {text!r} is not valid: write {setting.form}") from error


# What drafts without a model of its own.
DRAFTS = ("self", "lookup")


def parse_draft(text: str) -> str | None:
    """What `/draft` asks for: one of `DRAFTS`, or None for off.

    Raises:
        UserError: anything else.
    """
    if text not in (*DRAFTS, "off"):
        raise UserError("write /draft self, /draft lookup or /draft off")
    return None if text == "off" else text


# Their values have commas in them, so several values have semicolons between.
_WITH_COMMAS = ("alpha", "weights", "guard")


def parse_settings(name: str, text: str) -> list[Any]:
    """Several values of the `LoopConfig` field `name`, with commas between.

    Raises:
        UserError: as `parse_setting`.
    """
    values = text.split(";" if name in _WITH_COMMAS else ",")
    return [parse_setting(name, value.strip()) for value in values]


def parse_config(text: str) -> dict[str, Any]:
    """Fields of one setting, `loops=6 beta=0.3`.

    Raises:
        UserError: something that is not FIELD=VALUE, or as `parse_setting`.
    """
    fields = {}
    for pair in text.split():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f'{pair!r} is not FIELD=VALUE: write for example "loops=6 beta=0.3"')
        fields[name] = parse_setting(name, value)
    return fields


def combinations(start: LoopConfig, axes: Mapping[str, Sequence[Any]]) -> list[LoopConfig]:
    """`start` with every combination of the fields' values.

    Raises:
        UserError: values that do not fit each other.
    """
    return [
        replace(start, **dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    ]


def _window(text: str) -> tuple:
    start, stop = text.split(":")
    return (float(start), float(stop)) if "." in text else (int(start), int(stop))


def _decode(text: str) -> str | int:
    return text if text in ("full", "bypass") else int(text)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(","))


def _alpha(text: str) -> float | tuple[float, ...]:
    return _floats(text) if "," in text else float(text)


def _guard(text: str) -> Guard | None:
    if text in ("on", "off"):
        return Guard() if text == "on" else None
    growth, _, band = text.partition(",")
    if not band:
        return Guard(float(growth))
    low, high = band.split(":")
    return Guard(float(growth), (float(low), float(high)))


def _choice(field: str, help_text: str, metavar: str = "") -> Setting:
    values = CHOICES[field]

    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(text)
        return text

    shown = metavar or "{" + ",".join(values) + "}"
    return Setting(parse, "one of " + ", ".join(values), shown, help_text)


SETTINGS: dict[str, Setting] = {
    "loops": Setting(
        int,
        "a whole number from 1 up",
        "K",
        "how often the window is applied; 1 is the plain model",
    ),
    "window": Setting(
        _window,
        "start:stop, as layers (15:19) or fractions of the depth (0.4:0.5)",
        "START:STOP",
        "the layers that loop, half open: 15:19 is layers 15 to 18; or fractions, 0.4:0.5",
    ),
    "integrator": _choice(
        "integrator", "how the loops make one step: " + ", ".join(CHOICES["integrator"]), "NAME"
    ),
    "beta": Setting(
        float, "a number from -1 to 2", "B", "anchored: weight of the plain pass, mostly 0 to 1"
    ),
    "horizon": Setting(
        float,
        "a number above 0, at most 16",
        "T",
        "euler, anchored, Runge-Kutta: the time that the K steps take together; 1 is a plain pass",
    ),
    "scope": _choice("scope", "iterate the whole window, or each layer before the next"),
    "routing": _choice("routing", "choose experts in each pass, or as the plain pass chose them"),
    "norm": _choice("norm", "interpolated: iterates follow the norm of the plain pass"),
    "cache": _choice(
        "cache",
        "keys and values to keep: of the first pass, a last one (an answer then depends on whether "
        "its prompt was processed at once or turn by turn), or own for each pass",
    ),
    "decode": Setting(
        _decode,
        "full, bypass or a number of tokens",
        "{full,bypass,N}",
        "which generated tokens loop: all, none, or the first N",
    ),
    "alpha": Setting(
        _alpha,
        "a number, or one per loop with commas between",
        "A",
        "ema, heavy_ball, norm_stab, input_anchor: step size; ema also one per loop (0.5,0.3)",
    ),
    "momentum": Setting(float, "a number from 0 to below 1", "M", "heavy_ball: momentum"),
    "memory": Setting(
        int, "a whole number from 1 up", "N", "anderson: how many earlier iterates are mixed"
    ),
    "damping": Setting(float, "a number above 0, at most 1", "D", "anderson: damping"),
    "weights": Setting(
        _floats,
        "loops + 1 numbers with commas between",
        "W,W,...",
        "poly_blend: weights of x, g(x), g(g(x)), ...",
    ),
    "guard": Setting(
        _guard,
        "on, off, a growth (1.5), or growth,low:high (1.5,0.8:1.2)",
        "{on,off,GROWTH,LOW:HIGH}",
        "take the plain pass where a token's loop goes astray: its residual grows by more than "
        "GROWTH, or its norm leaves LOW to HIGH times the plain pass's (on: 1.5,0.8:1.2)",
    ),
}


def number(kind: type, low: float, high: float, form: str) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` from `low` to `high`; `form` says so in words."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {form}")
        return value

    return parse


positive = number(int, 1, math.inf, "a whole number from 1 up")
from_zero = number(int, 0, math.inf, "a whole number from 0 up")
temperature = number(float, 0, math.inf, "a number from 0 up")
fraction = number(float, 0, 1, "a number from 0 to 1")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model and how it is loaded."""
    group = parser.add_argument_group("model")
    add_model_name(group)
    group.add_argument("--adapter-path", metavar="DIR", help="LoRA adapters, as mlx-lm makes them")
    add_trust(group)
    group.add_argument(
        "--force", action="store_true", help="try even a model that does not fit into memory"
    )


def add_model_name(group: argparse._ActionsContainer) -> None:
    """--model."""
    group.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="a folder, a Hugging Face repository, or a checkpoint that ships with mlx_loop "
        "(default: %(default)s)",
    )


def add_trust(group: argparse._ActionsContainer) -> None:
    """--trust-remote-code."""
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the tokenizer run code that comes with the checkpoint",
    )


def add_quantization_options(parser: argparse.ArgumentParser) -> None:
    """Widths, named as mlx-lm names them, and the recipe."""
    group = parser.add_argument_group("quantisation")
    group.add_argument(
        "--q-bits", type=int, metavar="N", help="2, 3, 4, 5, 6 or 8 bits (default: 4)"
    )
    group.add_argument(
        "--q-group-size",
        type=int,
        metavar="N",
        help="weights that share a scale: 32, 64 or 128 (default: 64)",
    )
    group.add_argument(
        "--q-mode",
        choices=("affine", "mxfp4", "nvfp4", "mxfp8"),
        default="affine",
        help="number format; all but affine have one width and group size (default: %(default)s)",
    )
    group.add_argument(
        "--q-recipe",
        choices=("uniform", "window8", "budget"),
        help="uniform: the same bits everywhere; window8: the looped layers in 8 bits; budget: "
        "bits where the looped model's output needs them most",
    )
    group.add_argument(
        "--bits-per-weight",
        type=number(float, 0, 16, "a number of bits"),
        metavar="B",
        help="what the recipe budget may spend, scales included",
    )
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="text on which the recipe budget measures (default: one that ships with mlx_loop)",
    )


def add_loop_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """One option per field of `LoopConfig`.

    Args:
        several: whether each takes several values, which are all combined.
    """
    about = "What is left out is as saved with the model, else the preset of its size."
    if several:
        about += (
            "\nSeveral values, with commas between (semicolons for alpha, weights and"
            "\nguard), are all combined."
        )
    group = parser.add_argument_group("loop", about)
    group.add_argument(
        "--recipe",
        choices=list(RECIPES),
        help="published settings to start from: the paper's, or its authors' for long answers",
    )
    for name, setting in SETTINGS.items():
        group.add_argument(f"--{name}", metavar=setting.metavar, help=setting.help)


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
        type=temperature,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0, the default, is greedy",
    )
    for name, help_text in (
        ("top-p", "sample from the likeliest tokens that make up this probability"),
        ("min-p", "drop tokens less likely than this times the likeliest"),
        ("xtc-probability", "how often to apply XTC sampling"),
    ):
        group.add_argument(f"--{name}", type=fraction, default=0.0, metavar="P", help=help_text)
    group.add_argument(
        "--xtc-threshold",
        type=fraction,
        default=0.1,
        metavar="P",
        help="XTC: probability above which tokens are left out",
    )
    group.add_argument(
        "--top-k",
        type=from_zero,
        default=0,
        metavar="K",
        help="sample from the K likeliest tokens",
    )
    group.add_argument("--seed", type=from_zero, help="of the random numbers")
    add_template_options(group)


def add_template_options(parser: argparse._ActionsContainer) -> None:
    """What the chat template is given besides the prompt."""
    parser.add_argument("--system-prompt", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--chat-template-config",
        type=_json_object,
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
        type=from_zero,
        default=5000,
        metavar="N",
        help="quantise from this many tokens on (default: %(default)s)",
    )
    add_prefill_option(group)


def add_prefill_option(parser: argparse._ActionsContainer) -> None:
    """How the prompt is fed."""
    parser.add_argument(
        "--prefill-step-size",
        type=positive,
        metavar="N",
        help="prompt tokens processed at a time (default: 2048, or 512 with --kv-bits, whose "
        "attention needs more memory for each)",
    )


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Speculative decoding: who drafts, and how much."""
    group = parser.add_argument_group(
        "speculative decoding",
        "Tokens are drafted cheaply and checked several at a time: the same answer, sooner.",
    )
    group.add_argument(
        "--draft",
        metavar="{self,lookup,MODEL}",
        help="what drafts: self, the model without its loops; lookup, the text so far; or a small "
        "model with the same tokens",
    )
    group.add_argument(
        "--num-draft-tokens",
        type=positive,
        default=8,
        metavar="N",
        help="the most tokens to draft at a time; how many is decided by how many were right "
        "before (default: %(default)s)",
    )


def load_from(args: argparse.Namespace) -> tuple[Looped, TokenizerWrapper]:
    """The model and tokenizer that the options ask for, with the loop settings they ask for."""
    LoopConfig(**_given(args))
    model, tokenizer = _load(args)
    apply_loop(args, model)
    return model, tokenizer


def apply_loop(args: argparse.Namespace, model: Looped) -> None:
    """Give a model the loop settings that the options ask for, on top of those saved with it."""
    given = _given(args)
    if given or args.recipe is not None:
        model.loop = replace(_start(args, model), **given)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {
        name: parse_setting(name, getattr(args, name))
        for name in SETTINGS
        if getattr(args, name) is not None
    }


def axes_from(args: argparse.Namespace) -> dict[str, list[Any]]:
    """The values of each loop option that is given, where options take several."""
    return {
        name: parse_settings(name, getattr(args, name))
        for name in SETTINGS
        if getattr(args, name) is not None
    }


def load_with_start(
    args: argparse.Namespace,
) -> tuple[Looped, TokenizerWrapper, LoopConfig]:
    """The model and tokenizer, and the settings from which options start."""
    model, tokenizer = _load(args)
    return model, tokenizer, _start(args, model)


def _load(args: argparse.Namespace) -> tuple[Looped, TokenizerWrapper]:
    from ..checkpoints.loading import load

    return load(
        args.model,
        dtype=getattr(args, "dtype", None),
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
        force=args.force,
    )


def _start(args: argparse.Namespace, model: Looped) -> LoopConfig:
    from ..checkpoints.loading import saved_loop

    start = saved_loop(model) if args.recipe is None else RECIPES[args.recipe]
    return start or LoopConfig()


def generation_from(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Arguments of `stream_generate` that the options ask for."""
    import mlx.core as mx

    if args.seed is not None:
        mx.random.seed(args.seed)
    return {
        "max_tokens": args.max_tokens,
        "sampler": sampler_from(args, tokenizer),
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
        "prefill_step_size": prefill_step_from(args),
    }


def sampler_from(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> Sampler:
    """The sampler that the options ask for."""
    from ..generation.sampling import Sampler

    return Sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    )


def draft_from(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Arguments of `stream_generate` that the options of speculative decoding ask for."""
    from ..checkpoints.loading import load
    from ..generation.speculative import ModelDraft

    draft: Any = args.draft
    if draft not in (None, *DRAFTS):
        model, its_tokenizer = load(draft, loop=None)
        if its_tokenizer.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"--draft {draft} has {its_tokenizer.vocab_size} tokens and the model has "
                f"{tokenizer.vocab_size}: use a model with the same tokenizer, self or lookup"
            )
        draft = ModelDraft(model)
    return {"draft": draft, "num_draft_tokens": args.num_draft_tokens}


def prefill_step_from(args: argparse.Namespace) -> int:
    """Prompt tokens to process at a time."""
    from ..generation.prefill import prefill_step

    return args.prefill_step_size or prefill_step(args.kv_bits)
