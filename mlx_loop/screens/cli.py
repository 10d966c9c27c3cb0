"""The command `mlx_loop`: sub-commands, their help, and how errors reach people."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..errors import INTERRUPTED, USER_ERROR, UserError
from .options import (
    add_cache_options,
    add_draft_options,
    add_loop_options,
    add_model_name,
    add_model_options,
    add_prefill_option,
    add_quantization_options,
    add_sampling_options,
    add_template_options,
    add_trust,
    fraction,
    from_zero,
    positive,
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", "-p", metavar="TEXT", help="the prompt; - or nothing reads standard input"
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="give the prompt to the model as it is"
    )


def _chat(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_loop_options(parser)
    add_sampling_options(parser, max_tokens=512)
    add_cache_options(parser)
    add_draft_options(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
    _add_prompt_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--prompt-cache-file", metavar="FILE", help="go on from what `mlx_loop cache_prompt` saved"
    )
    add_model_options(parser)
    add_loop_options(parser)
    add_sampling_options(parser, max_tokens=256)
    add_cache_options(parser)
    add_draft_options(parser)


def _cache_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", "-p", metavar="TEXT", help="the prompt; - or nothing reads standard input"
    )
    parser.add_argument(
        "--prompt-cache-file", metavar="FILE", required=True, help="the file to write"
    )
    add_model_options(parser)
    add_loop_options(parser)
    add_cache_options(parser)


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", "-p", metavar="TEXT", help="answer this and leave; - reads standard input"
    )
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="FIELDS",
        help='one more setting to compare, as "loops=6 beta=0.3"; may be given several times',
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="give the prompt to the model as it is"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    add_model_options(parser)
    add_loop_options(parser, several=True)
    add_sampling_options(parser, max_tokens=256)
    add_prefill_option(parser)
    add_draft_options(parser)


def _trace(parser: argparse.ArgumentParser) -> None:
    _add_prompt_options(parser)
    parser.add_argument("--tokens", action="store_true", help="show a line for each token too")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw them: FILE.png, and FILE-dark.png for dark pages",
    )
    add_template_options(parser)
    add_model_options(parser)
    add_loop_options(parser)


def _sweep(parser: argparse.ArgumentParser) -> None:
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--task",
        metavar="FILE",
        help='questions, one JSON object a line with "messages" and "answer"; demo: those that '
        "ship with mlx_loop",
    )
    data.add_argument("--text", metavar="FILE", help="a text: loss and KL instead of answers")
    parser.add_argument(
        "--out",
        default="sweep.jsonl",
        metavar="FILE",
        help="where results are appended; what it holds is not done again (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="N items, evenly spread; default: all"
    )
    parser.add_argument("--best", action="store_true", help="print the LoopConfig to use")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw them: FILE.png, and FILE-dark.png for dark pages"
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=positive,
        default=64,
        metavar="N",
        help="the most tokens of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="questions that are answered at a time (default: %(default)s)",
    )
    add_model_options(parser)
    add_loop_options(parser, several=True)
    add_template_options(parser)


def _quantize(parser: argparse.ArgumentParser) -> None:
    add_model_name(parser)
    parser.add_argument(
        "--mlx-path",
        default="mlx_model",
        metavar="DIR",
        help="the folder to write (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    add_trust(parser)
    add_quantization_options(parser)
    add_loop_options(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        metavar="MODEL",
        help="a folder, a Hugging Face repository (its weights are not downloaded), or a "
        "checkpoint that ships with mlx_loop (default: %(default)s)",
    )
    parser.add_argument(
        "--ram",
        type=positive,
        default=16,
        metavar="GB",
        help="memory of the Mac in question (default: %(default)s)",
    )
    add_loop_options(parser)


def _upload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--path", required=True, metavar="DIR", help="a folder that mlx_loop has written"
    )
    parser.add_argument(
        "--upload-repo", required=True, metavar="NAME", help="the repository, such as you/qwen3-4b"
    )


def _evaluate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("problems")
    group.add_argument(
        "--tasks",
        default="niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt,cwe,fwe",
        metavar="NAMES",
        help="RULER's tasks with commas between: niah_single_1 to _3, niah_multikey_1 to _3, "
        "niah_multivalue, niah_multiquery, vt, cwe, fwe, qa; ruler: all but qa; lm_eval:NAME: a "
        "task of lm-evaluation-harness (default: %(default)s)",
    )
    group.add_argument(
        "--lengths",
        type=_lengths,
        default=[4096],
        metavar="N,N,...",
        help="RULER: context lengths in tokens, prompt and answer together (default: 4096)",
    )
    group.add_argument(
        "--limit",
        type=positive,
        default=100,
        metavar="N",
        help="problems of each task and length; RULER's paper has 500 (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=from_zero, default=42, metavar="N", help="of the problems (default: 42)"
    )
    group.add_argument("--filler", metavar="FILE", help="a text to hide needles in, else our own")
    group.add_argument(
        "--documents",
        metavar="FILE",
        help='for qa: lines of {"question": TEXT, "answers": [...], "documents": [...]}',
    )
    group.add_argument(
        "--no-answer-prefix",
        action="store_true",
        help="do not give the model the beginning of its answer, as RULER does",
    )
    group.add_argument(
        "--include-path", metavar="DIR", help="a folder with lm-evaluation-harness tasks of yours"
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--out",
        default="evaluation",
        metavar="DIR",
        help="the folder of the study; what it holds is not done again (default: %(default)s)",
    )
    group.add_argument(
        "--holdout",
        type=fraction,
        metavar="P",
        help="choose the best setting on a share 1 - P of the problems and report it on the rest",
    )
    group.add_argument(
        "--trace",
        type=from_zero,
        default=2,
        metavar="N",
        help="problems of each length on which drift is measured (default: %(default)s)",
    )
    group.add_argument(
        "--reference", action="store_true", help="show the paper's numbers beside yours"
    )
    add_model_options(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights, else as stored"
    )
    add_loop_options(parser, several=True)
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="prompts that are answered at a time (default: %(default)s)",
    )
    add_prefill_option(group)
    add_template_options(group)


def _lengths(text: str) -> list[int]:
    return [positive(length) for length in text.split(",")]


COMMANDS = {
    "chat": (
        _chat,
        "talk to a looped model",
        """examples:
  mlx_loop chat                                     the demo model that ships with mlx_loop
  mlx_loop chat --model mlx-community/Qwen3-4B-Instruct-2507-4bit
  mlx_loop chat --loops 6 --integrator anchored --beta 0.3
  mlx_loop chat --loops 1                           the plain model
  mlx_loop chat --loops 6 --draft self              the same answers, sooner
In the chat, /help lists what can be changed while it runs.""",
    ),
    "generate": (
        _generate,
        "answer one prompt",
        """examples:
  mlx_loop generate --prompt "What is 12 + 30?"
  echo "What is 12 + 30?" | mlx_loop generate --loops 6 --json""",
    ),
    "compare": (
        _compare,
        "see what several loop settings make of a prompt, side by side",
        """examples:
  mlx_loop compare                                  interactive: no loop, 2, 3 and 6 loops
  mlx_loop compare --integrator naive,euler,anchored --loops 4
  mlx_loop compare --setting "loops=3 cache=own" --setting "loops=2 integrator=rk4"
  mlx_loop compare --prompt "What is 12 + 30?" --loops 1,3,6 --json
The un-looped model is always among them. In the session, /help lists what can be changed.""",
    ),
    "trace": (
        _trace,
        "look inside a loop: does it converge, drift or diverge?",
        """examples:
  mlx_loop trace --prompt "What is 12 + 30?"
  mlx_loop trace --prompt "What is 12 + 30?" --integrator naive --loops 8 --plot trace.png
  mlx_loop trace --prompt - --tokens < question.txt
docs/trace.md says what each number means.""",
    ),
    "sweep": (
        _sweep,
        "try many loop settings on a task or a text",
        """examples:
  mlx_loop sweep --task demo --limit 200 --plot sweep.png
  mlx_loop sweep --task mine.jsonl --window 3:7,4:8,5:9 --loops 2,4,8 --integrator euler,anchored
  mlx_loop sweep --text book.txt --loops 2,3,4 --best
Ctrl-C stops after the results at hand are written; the same command goes on from there.""",
    ),
    "evaluate": (
        _evaluate,
        "long-context and other tasks under many loop settings, with honest statistics",
        """examples:
  mlx_loop evaluate --tasks ruler --lengths 4096,16384 --loops 1,2,3,4,6,8,12
  mlx_loop evaluate --tasks lm_eval:arc_challenge,lm_eval:gsm8k --loops 2,3 --holdout 0.5
  mlx_loop evaluate --tasks niah_single_1 --lengths 384 --limit 20 --loops 2,4 --no-answer-prefix
Every setting gets the same problems and is compared with the un-looped model problem by problem.
DIR/report.html shows the result. Ctrl-C stops after the batch at hand; the same command goes on.
docs/evaluation.md explains tasks, statistics and files.""",
    ),
    "cache_prompt": (
        _cache_prompt,
        "process a long prompt once and keep its cache in a file",
        """example:
  mlx_loop cache_prompt --prompt - --prompt-cache-file book.safetensors < book.txt
  mlx_loop generate --prompt-cache-file book.safetensors --prompt "Who is the narrator?" """,
    ),
    "quantize": (
        _quantize,
        "write a checkpoint in fewer bits, ready to loop",
        """examples:
  mlx_loop quantize --model Qwen/Qwen3-4B-Instruct-2507 --mlx-path qwen3-4b-4bit
  mlx_loop quantize --model Qwen/Qwen3-4B-Instruct-2507 --q-recipe window8 --dry-run
  mlx_loop quantize --model Qwen/Qwen3-4B-Instruct-2507 --bits-per-weight 4.5 --loops 4
The checkpoint may be larger than memory: it is read, quantised and written matrix by matrix.
Plain mlx-lm and LM Studio load the folder as the un-looped model.""",
    ),
    "plan": (
        _plan,
        "say what a model needs of memory, and which Mac has it",
        """examples:
  mlx_loop plan Qwen/Qwen3-4B-Instruct-2507 --ram 8
  mlx_loop plan Qwen/Qwen3-30B-A3B --ram 24 --loops 6 --cache own""",
    ),
    "upload": (
        _upload,
        "share a saved or quantised model on the Hugging Face hub",
        """example:
  hf auth login
  mlx_loop upload --path qwen3-4b-4bit --upload-repo you/Qwen3-4B-Instruct-2507-looped-4bit""",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="mlx_loop",
        description="Loop the middle layers of a language model: more compute, no more memory.",
        epilog="`mlx_loop COMMAND --help` shows the options and examples of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mlx_loop {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, (add_options, summary, epilog) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command)
        command.set_defaults(command=name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 2 for a mistake of the user, 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return import_module(f".commands.{args.command}", __package__).run(args)
    except UserError as error:
        print(f"mlx_loop {args.command}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
