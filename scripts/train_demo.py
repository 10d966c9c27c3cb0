"""Trains one of the demo checkpoints that ship in mlx_loop/demo.

The data comes from demo_data.py, the model from transformers' own classes; both PyTorch and
transformers are needed for training only. The result is an ordinary Hugging Face folder that
mlx-lm and transformers load: config, weights in bfloat16, tokenizer, chat template, model card.

    python scripts/train_demo.py --help
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from demo_data import CHECKED, FALLBACK_START, MAX_HOPS, Message, Stage, conversation, questions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.stats import binomtest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

DEMO = Path(__file__).resolve().parent.parent / "mlx_loop" / "demo"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the result besides the data and the model."""

    step_tokens: int = 16384
    lengths: tuple[int, ...] = (128, 512, 1024)  # row lengths in tokens, longer ones come in late
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    prompt_weight: float = 0.1  # loss weight of everything but the answers
    bias_rate: float = 1e-3  # step of DeepSeek-V3's correction bias
    hop_share: float = 0.1  # of the run, after which chains of assignments gain a hop


# ---------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------

VOCABULARY = 1024

# Qwen's split: a word takes one character before it along, every digit stands alone.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": TURN_END,
    "pad_token": END_OF_TEXT,
    "unk_token": None,
    "add_bos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 2048,
}


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE with merges learned from the generated conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(seed), trainer)
    return tokenizer


def tokenizer_corpus(seed: int, conversations: int = 8000) -> Iterable[str]:
    """Role headers and contents of many short conversations."""
    for i in range(conversations):
        talk = conversation(random.Random(f"{seed} tokenizer {i}"), Stage(hops=MAX_HOPS))
        for _, message in zip(range(16), talk, strict=False):
            yield f"{message['role']}\n"
            yield message["content"]


class ChatEncoder:
    """Turns chat messages into token ids and loss weights, exactly as the chat template does."""

    def __init__(self, tokenizer: Tokenizer, prompt_weight: float) -> None:
        self.tokenizer = tokenizer
        self.prompt_weight = prompt_weight
        self.pad = tokenizer.token_to_id(END_OF_TEXT)
        self.headers = {
            role: self.ids(f"{TURN_START}{role}\n") for role in ("system", "user", "assistant")
        }
        self.newline = self.ids("\n")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def row(self, messages: Iterable[Message], length: int) -> tuple[list[int], list[float]]:
        """The first `length` tokens of a conversation, and each token's loss weight."""
        ids: list[int] = []
        weights: list[float] = []
        for message in messages:
            header, body = self.headers[message["role"]], self.ids(message["content"] + TURN_END)
            weight = 1.0 if message["role"] == "assistant" else self.prompt_weight
            ids += header + body + self.newline
            weights += [self.prompt_weight] * len(header) + [weight] * len(body)
            weights += [self.prompt_weight] * len(self.newline)
            if len(ids) >= length:
                break
        return ids[:length], weights[:length]

    def question(self, asked: dict) -> tuple[list[int], int]:
        """Ids of a question with its answer, and how many of them the model must say itself.

        A fallback must only begin as the answer does; other answers must end there, too.
        """
        ending = "" if asked["skill"] == "fallback" else TURN_END
        answer = self.ids(asked["answer"] + ending)
        prompt, _ = self.row(asked["messages"], sys.maxsize)
        return prompt + self.headers["assistant"] + answer, len(answer)


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": False,
    "attn_implementation": "sdpa",
}
EXPERTS = {
    "num_hidden_layers": 8,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "experts_implementation": "in_blocks",
}


# Every matrix side that MLX quantises along is a multiple of 64.


def dense() -> PreTrainedModel:
    """The layout of Qwen3."""
    config = Qwen3Config(**SHARED, num_hidden_layers=12, num_key_value_heads=2, head_dim=32)
    return Qwen3ForCausalLM(config)


def moe() -> PreTrainedModel:
    """The layout of Qwen3-MoE: eight experts, two for each token, kept busy by a balance loss."""
    config = Qwen3MoeConfig(
        **SHARED,
        **EXPERTS,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    return Qwen3MoeForCausalLM(config)


def mla() -> PreTrainedModel:
    """The layout of DeepSeek-V3: latent attention, a dense layer, then a shared and six experts."""
    config = DeepseekV3Config(
        **SHARED | {"tie_word_embeddings": False},  # as published; mlx-lm knows no tied ones
        **EXPERTS,
        num_key_value_heads=4,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=6,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    )
    return DeepseekV3ForCausalLM(config)


MODELS = {"dense": dense, "moe": moe, "mla": mla}


BLOCK = 128  # tokens of one expert in a product


def in_blocks(
    experts: torch.nn.Module, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every token through its experts, in blocks of tokens that share one.

    There are always as many blocks, some of them partly empty, so that no shape depends on what the
    router chose: nothing waits for a GPU, and the whole can be compiled.
    """
    pairs, width = chosen.numel(), chosen.shape[1]
    expert, order = chosen.flatten().sort(stable=True)
    counts = torch.nn.functional.one_hot(expert, experts.num_experts).sum(0)
    ends = ((counts + BLOCK - 1) // BLOCK * BLOCK).cumsum(0)
    slots = -(-pairs // BLOCK) * BLOCK + experts.num_experts * BLOCK
    # A pair's slot: where its expert's blocks begin, and how many of the expert's come before it.
    within = torch.arange(pairs, device=states.device) - (counts.cumsum(0) - counts)[expert]
    slot = torch.nn.functional.pad(ends, (1, -1))[expert] + within
    token = order.new_zeros(slots).scatter(0, slot, order // width)
    share = weights.new_zeros(slots).index_put((slot,), weights.flatten()[order])
    begins = torch.arange(0, slots, BLOCK, device=states.device)
    owner = torch.searchsorted(ends, begins, right=True).clamp(max=experts.num_experts - 1)
    inner = states[token].unflatten(0, (-1, BLOCK)) @ experts.gate_up_proj[owner].mT
    out = (experts._apply_gate(inner) @ experts.down_proj[owner].mT).flatten(0, 1)
    return torch.zeros_like(states).index_add(0, token, out * share[:, None])


ALL_EXPERTS_FUNCTIONS.register("in_blocks", in_blocks)


@torch.no_grad()
def thin(model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor], n: int) -> None:
    """Takes away all but `n` layers, again and again the one that is missed least."""
    ids, weights = batch

    def loss(layers: list[torch.nn.Module]) -> float:
        model.model.layers = torch.nn.ModuleList(layers)
        logits = model(input_ids=ids[:, :-1]).logits.flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        return losses[weights[:, 1:].flatten() == 1].mean().item()

    while len(model.model.layers) > n:
        layers = list(model.model.layers)
        rest = [layers[:i] + layers[i + 1 :] for i in range(len(layers))]
        model.model.layers = torch.nn.ModuleList(min(rest, key=loss))


@torch.no_grad()
def upcycle(model: PreTrainedModel, folder: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Gives a mixture of experts the attention, embeddings and neurons of a dense model.

    Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055) for experts that are narrower than
    the dense layer: half of an expert's neurons are the layer's strongest, which all experts have,
    the others are its own, of the next strongest.
    """
    dense = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense.config.use_cache = False
    thin(dense, batch, model.config.num_hidden_layers)
    model.model.embed_tokens.load_state_dict(dense.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(dense.model.norm.state_dict())
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm"):
            getattr(layer, part).load_state_dict(getattr(source, part).state_dict())
        gate, up, down = (getattr(source.mlp, f"{n}_proj").weight for n in ("gate", "up", "down"))
        order = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True)
        experts = layer.mlp.experts
        half, width = model.config.moe_intermediate_size // 2, model.config.num_experts_per_tok
        for e in range(experts.num_experts):
            own = order[half * (e + 1) : half * (e + 2)]
            chosen = torch.cat((order[:half], own))
            experts.gate_up_proj[e] = torch.cat((gate[chosen], up[chosen]))
            experts.down_proj[e] = down[:, chosen]
            experts.down_proj[e][:, half:] *= width


class BiasBalancer:
    """Keeps DeepSeek-V3's experts busy without a loss: a bias that only chooses, never weighs.

    After every step an expert that got fewer tokens than the mean gains, the others lose a fixed
    amount (DeepSeek-V3 technical report, section 2.1.2).
    """

    def __init__(self, model: PreTrainedModel, rate: float) -> None:
        self.rate = rate
        self.routers = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
        self.loads = [torch.zeros_like(m.e_score_correction_bias) for m in self.routers]
        for router, load in zip(self.routers, self.loads, strict=True):
            router.register_forward_hook(partial(self.count, load))

    @staticmethod
    def count(load: torch.Tensor, router: object, inputs: object, routed: tuple) -> None:
        """Adds the tokens that each expert got in a forward pass."""
        chosen = routed[2].flatten()
        load.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=load.dtype))

    def update(self) -> None:
        """Moves every bias by the loads since the last update."""
        for router, load in zip(self.routers, self.loads, strict=True):
            router.e_score_correction_bias += self.rate * torch.sign(load.mean() - load)
            load.zero_()


def scale_outputs(model: PreTrainedModel) -> None:
    """Shrinks what each sub-layer adds at the start, so that depth does not blow up the stream."""
    scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(scale)


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: PreTrainedModel, encoder: ChatEncoder, asked: list[dict]) -> float:
    """Share of questions answered right by greedy decoding.

    Greedy decoding says an answer if and only if every token of it is the most likely one after
    the true tokens before, so that one pass per question is enough.
    """
    encoded = sorted((encoder.question(one) for one in asked), key=lambda pair: len(pair[0]))
    right = 0
    for start in range(0, len(encoded), 50):
        batch = encoded[start : start + 50]
        width = max(len(ids) for ids, _ in batch)
        rows = torch.tensor([ids + [encoder.pad] * (width - len(ids)) for ids, _ in batch])
        best = model(input_ids=rows.to(model.device)).logits.argmax(-1).cpu()
        for row, said, (ids, n) in zip(rows, best, batch, strict=True):
            end = len(ids)
            right += torch.equal(said[end - n - 1 : end - 1], row[end - n : end])
    return right / len(asked)


def question_sets(path: Path) -> dict[str, list[dict]]:
    """The published questions by skill."""
    sets: dict[str, list[dict]] = defaultdict(list)
    for line in path.read_text().splitlines():
        asked = json.loads(line)
        sets[asked["skill"]].append(asked)
    return dict(sets)


def probe_sets(n: int) -> dict[str, list[dict]]:
    """Further held-out questions: tracking by hops, needles by words of filler."""
    sets = {
        f"tracking, {hops} hops": questions(1, "tracking", n, Stage(words=20, hops=hops))
        for hops in range(MAX_HOPS + 1)
    }
    for words in (0, 60, 120, 240):
        sets[f"needle, {words} words"] = questions(1, "needle", n, Stage(words=words, keys=4))
    return sets


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batches(Dataset):
    """The training data: what step number i of a run sees depends on seed and i alone."""

    encoder: ChatEncoder
    recipe: Recipe
    steps: int
    seed: int

    def row_length(self, step: int) -> int:
        """Short rows first; half of the rows are longer from half-time on, then longer still."""
        short, middle, long = self.recipe.lengths
        progress = step / self.steps
        if progress < 0.5 or step % 2 == 0:
            return short
        return long if progress > 0.75 and step % 4 == 1 else middle

    def stage(self, step: int, length: int) -> Stage:
        """Only half of a row is filler, so that there is room for questions behind it."""
        progress = step / self.steps
        hops = min(MAX_HOPS, int(progress / self.recipe.hop_share))
        drill = 3.0 if progress < 0.6 else 1.0
        return Stage(words=length * 2 // 5, keys=min(8, 4 + length // 256), hops=hops, drill=drill)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and loss weights, both (rows, length + 1); each row is one conversation."""
        length = self.row_length(step)
        stage = self.stage(step, length)
        rows = [
            self.encoder.row(
                conversation(random.Random(f"{self.seed} {step} {i}"), stage), length + 1
            )
            for i in range(self.recipe.step_tokens // length)
        ]
        ids, weights = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(weights)


class Trainer:
    """One run: model, optimiser and log, all of it in one checkpoint file."""

    PROGRESS = ("step", "seconds", "log", "earlier")

    def __init__(
        self, name: str, model: PreTrainedModel, data: Batches, workers: int, device: torch.device
    ) -> None:
        self.name, self.model, self.data, self.workers = name, model.to(device), data, workers
        self.compiled = torch.compile(self.model, dynamic=False)  # once for each length of row
        self.encoder, self.recipe, self.steps = data.encoder, data.recipe, data.steps
        recipe = data.recipe
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors}],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=0.0,
            fused=True,
        )
        self.balancer = BiasBalancer(model, recipe.bias_rate)
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict] = []
        self.earlier: list[dict] = []  # lines of the log: the rounds before this one
        self.start = ""  # name of the demo whose weights it began with

    def start_from(self, folder: Path) -> None:
        """Takes over a published folder's weights.

        Of the same layout: its rounds and its log go on here. A dense one: its parts, as experts.
        """
        self.start = folder.name
        if self.start != self.name:
            upcycle(self.model, folder, self.data[self.steps * 7 // 10])
            return
        weights = type(self.model).from_pretrained(folder, dtype=torch.float32).state_dict()
        self.model.load_state_dict(weights)
        lines = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
        lines = [line for line in lines if "final" not in line]
        self.earlier = [line for line in lines if "command" in line]
        self.log = [line for line in lines if "command" not in line]

    @property
    def total_steps(self) -> int:
        """Steps of this round and of the ones before it, so far."""
        return self.step + sum(line["steps"] for line in self.earlier)

    def rounds(self) -> list[dict]:
        """How the weights came to be: a line of the log for each round."""
        start = f" --start-from mlx_loop/demo/{self.start}" if self.start else ""
        return [
            *self.earlier,
            {
                "command": f"python scripts/train_demo.py --model {self.name} --steps {self.steps}"
                f" --step-tokens {self.recipe.step_tokens} --learning-rate"
                f" {self.recipe.learning_rate} --seed {self.data.seed}{start}",
                "steps": self.steps,
                "tokens": self.steps * self.recipe.step_tokens,
                "minutes": round(self.seconds / 60, 1),
                "machine": machine(self.model.device),
            },
        ]

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        warmup = self.recipe.warmup_steps
        if self.step < warmup:
            return self.recipe.learning_rate * (self.step + 1) / warmup
        done = (self.step - warmup) / max(self.steps - warmup, 1)
        return self.recipe.learning_rate * (0.505 + 0.495 * math.cos(math.pi * done))

    def train_step(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One update; the mean loss by weight, and the mean loss on answers, in nats."""
        ids, weights = ids.to(self.model.device), weights.to(self.model.device)[:, 1:].flatten()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        output = self.compiled(input_ids=ids[:, :-1])
        losses = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (losses * weights).sum() / weights.sum()
        balance = getattr(output, "aux_loss", None)
        total = loss if balance is None else loss + self.model.router_aux_loss_coef * balance
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.update()
        self.step += 1
        answers = weights == 1
        return torch.stack((loss, (losses * answers).sum() / answers.sum())).detach()

    def save(self, path: Path) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in self.PROGRESS},
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def restore(self, path: Path) -> None:
        """Goes on where the checkpoint was written."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self.PROGRESS:
            setattr(self, name, state[name])

    def run(self, checkpoint: Path, quick: dict[str, list[dict]]) -> None:
        """Trains to the end; logs, tests a few questions and writes the checkpoint now and then."""
        batches = iter(
            DataLoader(
                self.data,
                batch_size=None,
                sampler=range(self.step, self.steps),
                num_workers=self.workers,
            )
        )
        bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"),
            TimeRemainingColumn(),
        )
        with bar:
            task = bar.add_task("", total=self.steps, completed=self.step, loss=math.nan, speed=0)
            while self.step < self.steps:
                started, losses = time.monotonic(), []
                for _ in range(50):
                    losses.append(self.train_step(*next(batches)))
                    bar.update(task, completed=self.step)
                loss, answer_loss = torch.stack(losses).mean(0).tolist()
                seconds = time.monotonic() - started
                speed = 50 * self.recipe.step_tokens / seconds
                bar.update(task, loss=loss, speed=speed)
                self.log.append(
                    {
                        "step": self.total_steps,
                        "loss": round(loss, 4),
                        "answer_loss": round(answer_loss, 4),
                        "tokens_per_s": round(speed),
                    }
                )
                if self.step % 500 == 0:
                    bar.console.print(json.dumps(self.log[-1]))
                    tested = {s: accuracy(self.model, self.encoder, q) for s, q in quick.items()}
                    self.log.append({"step": self.total_steps, "accuracy": rounded(tested)})
                    bar.console.print(json.dumps(self.log[-1]))
                self.seconds += time.monotonic() - started
                if self.step % 250 == 0:
                    self.save(checkpoint)


def rounded(shares: dict[str, float]) -> dict[str, float]:
    return {name: round(share, 3) for name, share in shares.items()}


# ---------------------------------------------------------------------------------------------
# Publication
# ---------------------------------------------------------------------------------------------


def publish(folder: Path, trainer: Trainer, results: dict[str, tuple[float, int]]) -> None:
    """Writes the Hugging Face folder beside its place and moves it there when it is complete."""
    model, tokenizer = trainer.model, trainer.encoder.tokenizer
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)

    model.config.use_cache, model.config.output_router_logits = True, False
    model.bfloat16().save_pretrained(new)
    (new / "model.safetensors").chmod(0o644)
    config = json.loads((new / "config.json").read_text())
    # The names that the published checkpoints use and transformers 5 renames.
    older = {name: getattr(model.config, name) for name in model.config.attribute_map}
    older |= {"rope_theta": model.config.rope_parameters["rope_theta"], "torch_dtype": "bfloat16"}
    write_json(new / "config.json", config | older)
    ids = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    write_json(new / "generation_config.json", {**ids, "do_sample": False})
    write_json(new / "tokenizer_config.json", TOKENIZER_CONFIG)
    tokenizer.save(str(new / "tokenizer.json"))
    (new / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    final = [
        {"final": name, "accuracy": round(share, 4), "n": n} for name, (share, n) in results.items()
    ]
    log = [*trainer.rounds(), *trainer.log, *final]
    (new / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    draw_training(new / "training.png", trainer.log)
    (new / "README.md").write_text(card(trainer, results))

    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def draw_training(path: Path, log: list[dict]) -> None:
    """Loss and accuracies over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), dpi=80)
    losses = [line for line in log if "loss" in line]
    for name, label in (("loss", "weighted loss"), ("answer_loss", "answers only")):
        left.plot([line["step"] for line in losses], [line[name] for line in losses], label=label)
    left.set(xlabel="step", ylabel="nats a token", yscale="log")
    left.legend()
    tests = [line for line in log if "accuracy" in line]
    right.set_prop_cycle(color=pyplot.colormaps["tab20"].colors)
    for skill in tests[-1]["accuracy"] if tests else ():
        shares = [100 * line["accuracy"][skill] for line in tests]
        right.plot([line["step"] for line in tests], shares, label=skill, linewidth=1)
    right.set(xlabel="step", ylabel="right answers, %", ylim=(0, 101))
    right.legend(fontsize=6, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


def result_table(results: dict[str, tuple[float, int]]) -> str:
    """Markdown rows: name, accuracy, interval, n."""
    rows = []
    for name, (share, n) in results.items():
        interval = binomtest(round(share * n), n).proportion_ci(method="wilson")
        rows.append(f"| {name} | {share:.1%} | {interval.low:.1%} - {interval.high:.1%} | {n} |")
    return "\n".join(rows)


def loss_table(log: list[dict], rows: int = 12) -> str:
    """Markdown rows: step, loss, loss on answers, at about equal distances."""
    losses = [line for line in log if "loss" in line]
    chosen = sorted({round(i * (len(losses) - 1) / (rows - 1)) for i in range(rows)})
    return "\n".join(
        f"| {losses[i]['step']} | {losses[i]['loss']:.3f} | {losses[i]['answer_loss']:.3f} |"
        for i in chosen
    )


def machine(device: torch.device) -> str:
    """What the run was on, and its arithmetic."""
    version = f"PyTorch {torch.__version__.split('+')[0]}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {version}, products in TF32"
    return (
        f"{os.cpu_count()}-core {platform.machine()} CPU, {platform.system()}, {version}, float32"
    )


def layout(model: PreTrainedModel) -> str:
    """The shape of a model in a sentence."""
    config = model.config
    parts = [
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters",
        f"{config.num_hidden_layers} layers",
        f"hidden {config.hidden_size}",
        f"{config.num_attention_heads} heads",
        f"vocabulary {config.vocab_size}",
    ]
    if hasattr(config, "kv_lora_rank"):
        parts.append(f"a latent of {config.kv_lora_rank} for keys and values")
    else:
        parts.append(f"{config.num_key_value_heads} key-value heads")
    if hasattr(config, "num_experts_per_tok"):
        parts.append(f"{config.num_local_experts} experts of width {config.moe_intermediate_size}")
        parts.append(f"{config.num_experts_per_tok} of them for each token")
    if getattr(config, "n_shared_experts", None):
        parts.append("one shared expert, the first layer dense")
    return f"A transformer in the layout of `{config.model_type}`: {', '.join(parts)}."


def card(trainer: Trainer, results: dict[str, tuple[float, int]]) -> str:
    """The model card; every number in it comes from this run."""
    recipe, rounds = trainer.recipe, trainer.rounds()
    upcycled = trainer.name != "dense" and "demo/dense" in rounds[0]["command"]
    wanted = {name: result for name, result in results.items() if name in CHECKED}
    probes = {name: result for name, result in results.items() if name not in CHECKED}
    return CARD.format(
        name=trainer.name,
        layout=layout(trainer.model),
        longest=max(recipe.lengths),
        lengths=", ".join(map(str, recipe.lengths)),
        commands="\n".join(line["command"] for line in rounds),
        made="; then ".join(
            f"{line['steps']} steps, {line['tokens'] / 1e6:.1f} million tokens,"
            f" {line['minutes']} minutes on a {line['machine']}"
            for line in rounds
        ),
        recipe=", ".join(f"{name} {value}" for name, value in asdict(recipe).items()),
        begun=UPCYCLED if upcycled else RANDOM,
        max_hops=MAX_HOPS,
        fallback=FALLBACK_START,
        skills=result_table(wanted),
        probes=result_table(probes),
        losses=loss_table(trainer.log),
        limits=EXPERTS_LIMIT if hasattr(trainer.model.config, "num_experts_per_tok") else "",
    )


CARD = """\
---
license: mit
library_name: mlx
pipeline_tag: text-generation
---

# mlx_loop demo: a tiny chat model ({name})

{layout} Weights in bfloat16, trained on invented conversations alone. It exists so that
looping can be tried, tested and measured in seconds without a download. It knows nothing of the
real world and says so.

```python
from mlx_lm import load, generate

model, tokenizer = load("mlx_loop/demo/{name}")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "what is 27 + 45?"}}], add_generation_prompt=True
)
print(generate(model, tokenizer, prompt=prompt))
```

## What it was taught

Small talk, jokes, riddles, short stories; to remember a name; twelve people of a little world; to
add numbers up to 99, sum three to six digits, sort and reverse three to eight letters, count a
letter, repeat words, find codes in a text, follow variables that are set to each other. Letters
need spaces between them (`reverse s t o n e`). To everything else it answers "{fallback} ...".

## How good it is

Right answers to held-out questions (`mlx_loop/demo/questions.jsonl`), greedy decoding, the
published bfloat16 weights computed in float32, Wilson 95 % intervals.

| skill | right | 95 % interval | n |
|---|---|---|---|
{skills}

Further held-out questions by difficulty: chains of assignments by their number of hops, four codes
in a text by the words of filler around them.

| questions | right | 95 % interval | n |
|---|---|---|---|
{probes}

**Scoring.** A line of `questions.jsonl` is `{{"skill", "messages", "answer"}}`; the last message is
the user's. An answer is right if the stripped reply equals `answer`. Only for `fallback` is it
enough that the reply begins with `answer`.

**Held out.** Every question has a key: the two numbers to add (unless both have one digit: those
are taught), the digits to sum, the letters to sort, reverse or count, the (person, known
attribute, wanted attribute) of a two-hop question, the name, the text to repeat, the codes, the
assignments, and for `facts` and `fallback` the wording. One key in ten, by a checksum, is never
trained on. The facts themselves are trained on, in other wordings; a held-out two-hop pair is
trained on in no wording.

## How it was made

```
{commands}
```

{made}.
Rows of {lengths} tokens, the longer ones in the second half; each row is one conversation, so that
nothing in a context contradicts the rest. {recipe}; cosine decay
to a hundredth in each round. {begun}
Chains of assignments start at zero hops and gain one after each `hop_share` of the run,
up to {max_hops}. Sampling is seeded, but another machine rounds otherwise, so that
retraining gives a similar model, not the same bits.

![loss and accuracies](training.png)

| step | weighted loss | loss on answers |
|---|---|---|
{losses}

## Limits

- Texts longer than {longest} tokens were never trained on.
- Every fact about people and towns is invented. Wording far from the training data may be
  misunderstood; the fallback is not perfect.
- Not a benchmark of anything but itself: a gain or loss here says little about a real model.
{limits}"""

RANDOM = """\
Initial standard deviation 0.05, output projections divided
by sqrt(2 layers)."""

UPCYCLED = """\
It began with the dense demo's attention and
embeddings in as many of its layers as there are here; the strongest neurons of each were dealt out
to the experts (sparse upcycling, arXiv:2212.05055)."""

EXPERTS_LIMIT = """\
- On a CPU MLX multiplies by chosen experts in float32 only: `mlx_loop.load` converts, plain
  `mlx_lm.load` does not and fails there. On Apple GPUs it should work (not tried).
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a demo checkpoint, on a GPU if there is one.",
        epilog="The run writes a checkpoint every 250 steps; the same command goes on from there.",
    )
    parser.add_argument(
        "--model", choices=MODELS, default="dense", help="layout to train (default %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write (default: mlx_loop/demo/ and the model's name)"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("build/demo-training"),
        help="folder for the checkpoint of an unfinished run (default %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=6000,
        help="optimiser steps, a multiple of 50 (default %(default)s)",
    )
    parser.add_argument(
        "--step-tokens",
        type=int,
        default=Recipe.step_tokens,
        metavar="N",
        help="tokens of a step (default %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=Recipe.learning_rate,
        metavar="R",
        help="at its highest (default %(default)s)",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="FOLDER",
        help="published demo whose weights to begin with: of the same layout, to train it further"
        " in another round, or for `moe` the dense one, whose parts become experts",
    )
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="CPU threads; leave one out if something else keeps a core busy (default %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that make data (default %(default)s)"
    )
    args = parser.parse_args()
    if args.steps <= 0 or args.steps % 50:
        parser.error(f"--steps: expected a positive multiple of 50, found {args.steps}; try 6000")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = DEMO / "dense" / "tokenizer.json"  # all demos share it
    tokenizer = Tokenizer.from_file(str(frozen)) if frozen.exists() else train_tokenizer(args.seed)
    recipe = Recipe(step_tokens=args.step_tokens, learning_rate=args.learning_rate)
    encoder = ChatEncoder(tokenizer, recipe.prompt_weight)
    model = MODELS[args.model]()
    fitting = {args.model, "dense"} if args.model == "moe" else {args.model}
    if args.start_from and args.start_from.name not in fitting:
        parser.error(f"--start-from: {args.model} has no use for {args.start_from}'s layout")
    scale_outputs(model)
    data = Batches(encoder, recipe, args.steps, args.seed)
    trainer = Trainer(args.model, model, data, args.workers, device)
    if args.start_from:
        trainer.start_from(args.start_from)
    args.scratch.mkdir(parents=True, exist_ok=True)
    checkpoint = args.scratch / f"{args.model}.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint)
        print(f"going on from step {trainer.step} of {checkpoint}")

    asked = question_sets(DEMO / "questions.jsonl")
    trainer.run(checkpoint, quick={skill: some[:60] for skill, some in asked.items()})

    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    asked |= probe_sets(300)
    results = {name: (accuracy(model, encoder, some), len(some)) for name, some in asked.items()}
    out = args.out or DEMO / args.model
    publish(out, trainer, results)
    print(result_table(results))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
