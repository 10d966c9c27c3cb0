"""Command-line options that several commands share, each group beside what reads it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import several
from ..errors import UserError
from ..foreign import check_text, from_json, read_json, read_stdin
from ..presets import RECIPES
from ..settings import LoopConfig
from .fields import (
    SETTINGS,
    check_model,
    check_read,
    combinations,
    integrators_explained,
    parse_setting,
    parse_settings,
)

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..checkpoints.loading import LoopArgument
    from ..generation.sampling import Sampler
    from ..models.looped import Checkpoint, Looped

# --- What an option is, and when it does nothing ---


def add(
    group: argparse._ActionsContainer,
    flags: str,
    help_text: str,
    kind: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    default: Any = None,
    **more: Any,
) -> None:
    """Add an option, with its default in the help. Without a `kind` it is a switch."""
    if kind is None:
        group.add_argument(*flags.split(), action="store_true", help=help_text)
        return
    if default is not None:
        help_text += " (default: %(default)s)"
    if flags.startswith("-"):
        more.setdefault("action", Once)
    more |= {"type": kind, "metavar": metavar, "default": default, "help": help_text}
    group.add_argument(*flags.split(), **more)


class Once(argparse.Action):
    """Store a value, and refuse another one: of two, one would do nothing."""

    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.given:
            raise argparse.ArgumentError(self, "it is given twice")
        self.given = True
        setattr(namespace, self.dest, values)


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


LARGEST = 2**53  # whole numbers up to it are exact in every type
positive = number(int, 1, LARGEST, "a whole number from 1 up to 2^53")
from_zero = number(int, 0, LARGEST, "a whole number from 0 up to 2^53")
fraction = number(float, 0, 1, "a number from 0 to 1")
half = number(float, 0, 0.5, "a number from 0 to 0.5")


def temperature(text: str) -> float:
    """An argparse type: 0, or a temperature that does not make infinity of logits."""
    value = number(float, 0, 1000, "0 or a number from 0.001 to 1000")(text)
    return number(float, 0.001, 1000, "0 or a number from 0.001 to 1000")(text) if value else 0.0


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        value = from_json(text, text)
    except UserError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


# Options that do nothing without another one.
NEEDS = {
    "top_p": "temp",
    "min_p": "temp",
    "min_tokens_to_keep": "min_p",
    "top_k": "temp",
    "xtc_probability": "temp",
    "xtc_threshold": "xtc_probability",
    "kv_group_size": "kv_bits",
    "quantized_kv_start": "kv_bits",
    "num_draft_tokens": "draft",
}


def check_idle(args: argparse.Namespace) -> None:
    """Refuse options that others make idle. Their default is None, or an empty value.

    Raises:
        UserError: there is such an option.
    """
    for name, other in NEEDS.items():
        if not _is_given(args, other):
            refuse(args, (name,), f"without --{other.replace('_', '-')}")
    if _is_given(args, "ignore_chat_template"):
        names = ("system_prompt", "prefill_response", "chat_template_config")
        refuse(args, names, "with --ignore-chat-template")


def refuse(args: argparse.Namespace, names: tuple[str, ...], where: str) -> None:
    """Refuse those of the options `names` that are given, because nothing reads them.

    Raises:
        UserError: one is given; the message says that it does nothing `where`.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if _is_given(args, name)]
    if given:
        does = "does" if len(given) == 1 else "do"
        raise UserError(f"{' and '.join(given)} {does} nothing {where}")


def _is_given(args: argparse.Namespace, name: str) -> bool:
    value = vars(args).get(name)
    return value is not None and value is not False and value != {}


# --- Model ---


def add_model_options(parser: argparse.ArgumentParser, pipeline: bool = False) -> None:
    """--model and how it is loaded.

    Args:
        pipeline: whether there is --pipeline.
    """
    group = parser.add_argument_group("model")
    add_model_name(group)
    add(group, "--adapter-path", "LoRA adapters, as mlx-lm makes them", str, "DIR")
    add_trust(group)
    add(group, "--force", "try even a model that does not fit into memory")
    widths = ("float32", "float16", "bfloat16")
    add(group, "--dtype", "of the weights, else as stored", str, choices=widths)
    if pipeline:
        what = "on several machines: whole layers on each, rather than a share of every layer"
        add(group, "--pipeline", what)


def add_model_name(group: argparse._ActionsContainer) -> None:
    """--model."""
    what = "a folder, a Hugging Face repository, or a checkpoint that ships with mlx_loop"
    add(group, "--model", what, str, "NAME", "demo")


def add_trust(group: argparse._ActionsContainer) -> None:
    """--trust-remote-code."""
    what = "let the tokenizer run code that comes with the checkpoint"
    add(group, "--trust-remote-code", what)


# Commands that run on several machines: each has a share of the model, or the whole of it.
SHARED, WHOLE = ("chat", "generate", "serve"), ("evaluate", "sweep")
SEVERAL = SHARED + WHOLE


def load_from(args: argparse.Namespace) -> tuple[Looped, TokenizerWrapper]:
    """The model and tokenizer that the options ask for, with the loop settings they ask for."""
    _given_fields(args)
    model, tokenizer = _load(args)
    apply_loop(args, model)
    return model, tokenizer


def load_with_start(args: argparse.Namespace) -> tuple[Looped, TokenizerWrapper, LoopConfig]:
    """The model and tokenizer, and the settings from which options start."""
    model, tokenizer = _load(args)
    return model, tokenizer, _start(args, model.checkpoint)


def load_for_names(args: argparse.Namespace) -> tuple[Looped, TokenizerWrapper, LoopConfig]:
    """As `load_from`, and the settings to which a model's name adds."""
    given = _given_fields(args)
    model, tokenizer = load_from(args)
    return model, tokenizer, replace(_start(args, model.checkpoint), **given)


def _load(args: argparse.Namespace) -> tuple[Looped, TokenizerWrapper]:
    import mlx.core as mx

    from ..checkpoints.loading import load

    pipeline = getattr(args, "pipeline", False)
    if pipeline and several.count() == 1:
        refuse(args, ("pipeline",), "on one machine")
    return load(
        args.model,
        # Stages are cut where these settings do not loop.
        loop=_asked(args) if pipeline else "saved",
        pipeline=pipeline,
        dtype=args.dtype,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
        force=args.force,
        group=mx.distributed.init() if args.command in SHARED else None,
    )


# --- Loop ---


def add_plot(parser: argparse.ArgumentParser) -> None:
    """--plot, for `measure.plots.save`."""
    add(parser, "--plot", "draw them: FILE.png, and FILE-dark.png for dark pages", str, "FILE")


# Options that tell tokens of a prompt from those of its answer.
OF_ANSWERS = ("decode", "loop_prompt", "gate")

# The flags of fields whose own names are taken: --prompt is the text.
FLAGS = {"prompt": "loop-prompt"}


def add_loop_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """One option per field of `LoopConfig`.

    Args:
        several: whether each takes several values, which are all combined.
    """
    about = (
        "Some of the middle layers, the window, are applied K times in place of the"
        "\nplain pass over them. What is left out is as saved with the model, else the"
        "\npreset of its size."
    )
    if several:
        about += (
            "\nSeveral values, with commas between (semicolons for alpha, weights and"
            "\nguard), are all combined."
        )
    group = parser.add_argument_group("loop", about)
    what = "published settings to start from: the paper's, or its authors' for long answers"
    add(group, "--recipe", what, str, choices=list(RECIPES))
    for name, setting in SETTINGS.items():
        add(group, f"--{FLAGS.get(name, name)}", setting.help, str, setting.metavar)
    parser.add_argument_group("integrators", integrators_explained())


def apply_loop(args: argparse.Namespace, model: Looped) -> None:
    """Give a model the loop settings that the options ask for, on top of those saved with it."""
    given = _given_fields(args)
    if given or args.recipe is not None:
        loop = replace(_start(args, model.checkpoint), **given)
        check_read(given, [loop])
        check_model(given, model)
        model.loop = loop


def axes_from(args: argparse.Namespace) -> dict[str, list[Any]]:
    """The values of each loop option that is given, where options take several."""
    axes = _parsed(args, parse_settings)
    if "integrator" in axes:
        # What cannot be is said before a model is loaded.
        combinations(LoopConfig(), axes)
    return axes


def _given_fields(args: argparse.Namespace) -> dict[str, Any]:
    fields = _parsed(args, parse_setting)
    loop = LoopConfig(**fields)
    if loop.integrator is not None:
        check_read(fields, [loop])
    return fields


def _parsed(args: argparse.Namespace, parse: Callable[[str, str], Any]) -> dict[str, Any]:
    texts = {name: getattr(args, FLAGS.get(name, name).replace("-", "_")) for name in SETTINGS}
    return {name: parse(name, text) for name, text in texts.items() if text is not None}


def _start(args: argparse.Namespace, checkpoint: Checkpoint | None) -> LoopConfig:
    from ..checkpoints.loading import saved_loop

    assert checkpoint is not None  # The model was loaded from there.
    start = saved_loop(checkpoint) if args.recipe is None else RECIPES[args.recipe]
    return start or LoopConfig()


def _asked(args: argparse.Namespace) -> LoopArgument:
    """The settings that the options ask for, before the model is loaded."""
    from ..checkpoints.loading import find, read_config
    from ..models.looped import Checkpoint

    given = _given_fields(args)
    if not given and args.recipe is None:
        return "saved"
    path = find(args.model)
    return replace(_start(args, Checkpoint(path, read_config(path))), **given)


# --- Prompt ---


THE_PROMPT = "the prompt; - or nothing reads standard input"


def add_prompt_options(parser: argparse.ArgumentParser, what: str = THE_PROMPT) -> None:
    """--prompt, and --ignore-chat-template; what the template is given is in another group."""
    add(parser, "--prompt -p", what, str, "TEXT")
    add(parser, "--ignore-chat-template", "give the prompt to the model as it is")


def read_prompt(prompt: str | None) -> str:
    """The prompt of `--prompt`, or standard input for - or nothing."""
    if prompt in (None, "-") and several.launched():
        raise UserError('several machines cannot read one standard input: give --prompt "..."')
    if prompt is None and sys.stdin.isatty():
        raise UserError('there is no prompt: give --prompt "..." or pipe one in')
    text = read_stdin() if prompt is None or prompt == "-" else prompt
    check_text(text)
    if not text.strip():
        raise UserError('the prompt is empty: give --prompt "..." or pipe one in')
    return text


def add_template_options(parser: argparse._ActionsContainer) -> None:
    """What the chat template is given besides the prompt."""
    add(parser, "--system-prompt", "the system message", str, "TEXT")
    add_template_config(parser)


def add_template_config(parser: argparse._ActionsContainer) -> None:
    """--chat-template-config."""
    what = "more arguments for the chat template"
    parser.add_argument(
        "--chat-template-config",
        type=json_object,
        action=Once,
        default={},
        metavar="JSON",
        help=what,
    )


def render_prompt(
    args: argparse.Namespace,
    tokenizer: TokenizerWrapper,
    prompt: str,
    begun: Sequence[dict[str, str]] = (),
) -> list[int]:
    """Token ids of `prompt` in the chat template, unless it is to be ignored.

    Args:
        begun: the answer's beginning, of `begun_answer`.
    """
    from ..generation.prompt import encode, render

    if args.ignore_chat_template:
        return encode(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}, *begun]
    return render(tokenizer, messages, args.system_prompt, args.chat_template_config)


def begun_answer(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> list[dict[str, str]]:
    """The assistant's message that --prefill-response begins, or nothing."""
    begun = args.prefill_response
    if begun is None:
        return []
    check_text(begun)
    if not begun.strip():
        raise UserError("--prefill-response is empty: give the first words of the answer")
    if not tokenizer.has_chat_template:
        raise UserError(
            "--prefill-response needs a model with a chat template: end --prompt with the first "
            "words of the answer instead"
        )
    return [{"role": "assistant", "content": begun}]


def add_prefill_option(group: argparse._ActionsContainer) -> None:
    """--prefill-step-size."""
    what = (
        "prompt tokens processed at a time, those of a batch together; Ctrl-C is heard in between "
        "(default: 512, on a CPU 64; mlx-lm has 2048)"
    )
    add(group, "--prefill-step-size", what, positive, "N")


def prefill_step_from(args: argparse.Namespace) -> int:
    """Prompt tokens to process at a time."""
    import mlx.core as mx

    from ..generation.prefill import CPU_STEP, GPU_STEP

    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return args.prefill_step_size or (CPU_STEP if on_cpu else GPU_STEP)


# --- Generation ---


_SAMPLING = {
    "temp": (
        temperature,
        "T",
        "sampling temperature; 0 is greedy (default: 0, of chat what the checkpoint says)",
    ),
    "top_p": (fraction, "P", "sample from the likeliest tokens that make up this probability"),
    "min_p": (fraction, "P", "drop tokens less likely than this times the likeliest"),
    "min_tokens_to_keep": (positive, "N", "tokens that --min-p keeps in any case (default: 1)"),
    "top_k": (from_zero, "K", "sample from the K likeliest tokens"),
    "xtc_probability": (fraction, "P", "how often to apply XTC sampling"),
    "xtc_threshold": (half, "P", "XTC: leave out tokens above this probability (default: 0.1)"),
}


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How tokens are chosen and how many."""
    group = parser.add_argument_group("generation")
    add_max_tokens(group, max_tokens)
    for name, (kind, metavar, what) in _SAMPLING.items():
        add(group, f"--{name.replace('_', '-')}", what, kind, metavar)
    add(group, "--seed", "of the random numbers", from_zero, "N")
    add_template_options(group)


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """What else steers an answer, and ends it."""
    group = parser.add_argument_group("answer")
    what = "above 1: make tokens among the latest 20 less likely; mlx-lm's repetition penalty"
    penalty = number(float, math.nextafter(0, 1), 10, "a number above 0, at most 10")
    add(group, "--repetition-penalty", what, penalty, "P")
    what = "tokens that end the answer, beside the model's own; as texts or numbers"
    add(group, "--extra-eos-token", what, str, "TOKEN", nargs="+")


def add_max_tokens(group: argparse._ActionsContainer, default: int | None, more: str = "") -> None:
    """--max-tokens."""
    add(group, "--max-tokens -m", f"the most tokens of an answer{more}", positive, "N", default)


def sampler_from(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> Sampler:
    """The sampler that the options ask for."""
    from ..generation.sampling import Sampler

    special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    values = {name: getattr(args, name) for name in _SAMPLING}
    given = {name: value for name, value in values.items() if value is not None}
    return Sampler(**given, xtc_special_tokens=special)


def sampling_given(args: argparse.Namespace) -> bool:
    """Whether an option says how to sample."""
    return any(getattr(args, name) is not None for name in _SAMPLING)


def suggested_sampling(model: Looped) -> dict[str, float]:
    """What a checkpoint's generation_config.json says of sampling, as options of it."""
    assert model.checkpoint is not None  # It was loaded from there.
    file = model.checkpoint.path / "generation_config.json"
    try:
        config = read_json(file)
        if not config["do_sample"]:
            return {}
        names = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p", "top_k": "top_k"}
        found = {name: config.get(theirs) for name, theirs in names.items()}
        return {n: _SAMPLING[n][0](str(value)) for n, value in found.items() if value is not None}
    except (OSError, ValueError, LookupError, TypeError, argparse.ArgumentTypeError):
        return {}


def generation_from(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Arguments of `stream_generate` that the options ask for."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors

    draft = draft_from(args, tokenizer)
    for token in args.extra_eos_token or ():
        _add_end(tokenizer, token)
    more: dict[str, Any] = {}
    if args.repetition_penalty is not None:
        if args.draft is not None:
            raise UserError(
                "--repetition-penalty does not work with --draft: leave one of them out"
            )
        processors = make_logits_processors(repetition_penalty=args.repetition_penalty)
        more["logits_processors"] = processors
    seed = args.seed
    if seed is None and several.count() > 1:
        # All machines have to draw the same tokens.
        seed = several.from_first(lambda: int(mx.random.randint(0, 1 << 20)))
    if seed is not None:
        mx.random.seed(seed)
    return {
        "max_tokens": args.max_tokens,
        "sampler": sampler_from(args, tokenizer),
        "prefill_step_size": prefill_step_from(args),
        **more,
        **kv_from(args),
        **draft,
    }


def _add_end(tokenizer: TokenizerWrapper, token: str) -> None:
    known = tokenizer.get_vocab()
    if token not in known and token not in map(str, known.values()):
        raise UserError(
            f"--extra-eos-token {token!r} is no token of this model: give one of its tokens, or "
            "its number"
        )
    tokenizer.add_eos_token(token)


# --- Cache ---


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Size and precision of the key/value cache, and how the prompt is fed."""
    group = parser.add_argument_group("cache")
    add(group, "--max-kv-size", "keep the first 4 and the latest tokens, N in all", positive, "N")
    add_kv_options(group)


def add_kv_options(group: argparse._ActionsContainer) -> None:
    """Precision of the key/value cache, and how the prompt is fed."""
    add(group, "--kv-bits", "quantise keys and values", int, choices=(2, 3, 4, 5, 6, 8))
    what = "values that share a scale (default: 64)"
    add(group, "--kv-group-size", what, int, choices=(32, 64, 128))
    what = "quantise from this many tokens on (default: 5000)"
    add(group, "--quantized-kv-start", what, from_zero, "N")
    add_prefill_option(group)


def kv_from(args: argparse.Namespace) -> dict[str, Any]:
    """mlx-lm's arguments for the precision of the cache."""
    start = args.quantized_kv_start
    return {
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size or 64,
        "quantized_kv_start": 5000 if start is None else start,
    }


# --- Speculative decoding ---

# What drafts without a model of its own.
DRAFTS = ("self", "lookup")


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Speculative decoding: who drafts, and how much."""
    group = parser.add_argument_group(
        "speculative decoding",
        "Tokens are drafted cheaply and checked several at a time: the same answer,\nsooner.",
    )
    what = (
        "what drafts: self, the model without its loops; lookup, the text so far; or a small model "
        "with the same tokens"
    )
    add(group, "--draft --draft-model", what, str, "{self,lookup,MODEL}")
    what = (
        "the most tokens to draft at a time; how many is decided by how many were right before "
        "(default: 8)"
    )
    add(group, "--num-draft-tokens", what, positive, "N")


def draft_from(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Arguments of `stream_generate` that the options of speculative decoding ask for."""
    from ..checkpoints.loading import load
    from ..generation.speculative import NUM_DRAFT_TOKENS, ModelDraft

    draft: Any = args.draft
    if draft not in (None, *DRAFTS):
        model, its_tokenizer = load(draft, loop=None)
        if its_tokenizer.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"--draft {draft} has {its_tokenizer.vocab_size} tokens and the model has "
                f"{tokenizer.vocab_size}: use a model with the same tokenizer, self or lookup"
            )
        draft = ModelDraft(model)
    return {"draft": draft, "num_draft_tokens": args.num_draft_tokens or NUM_DRAFT_TOKENS}


def parse_draft(text: str) -> str | None:
    """What `/draft` asks for: one of `DRAFTS`, or None for off.

    Raises:
        UserError: anything else.
    """
    if text not in (*DRAFTS, "off"):
        raise UserError("write /draft self, /draft lookup or /draft off")
    return None if text == "off" else text
