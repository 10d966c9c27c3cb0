"""RoPE settings in both layouts of config.json, for every model type of mlx-lm."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import zoo
from conftest import tokens
from mlx.utils import tree_flatten
from transformers import CONFIG_MAPPING

import mlx_loop
from mlx_loop import UserError
from mlx_loop.models import rope

pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
TOKENS = tokens(1, 12)
NOISE = 0.1 * mx.random.normal((2_000_000,), key=mx.random.key(0))
REFUSED = (ValueError, KeyError)  # A UserError, or what mlx-lm raises by itself.
Config = dict[str, Any]

# The names that mlx-lm's types have for the base, for that of some layers, and for the share.
THETA = {"rope_theta", "rotary_emb_base", "rope_embedding_base", "rope_freq_constant"}
LOCAL = {"rope_local_base_freq", "rope_local_theta", "swa_rope_theta", "compress_rope_theta"}
SHARE = {"partial_rotary_factor", "rotary_pct"}
SAID = {*THETA, *LOCAL, *SHARE, "rope_scaling", "rope_parameters", "partial_rotary_factors"}

# Types with a number in the code for the base; types without RoPE, or (dbrx) with a section for it.
FIXED = "gptj phixtral plamo2 qwen recurrent_gemma".split()
IDLE = "dbrx gpt2 gpt_bigcode jamba kimi_k3 kimi_linear mamba mamba2 nemotron_h rwkv7".split()
# Types with one table per layer type, which transformers does not make of the other layout, and
# types that transformers gives a scaling of its own where a config has none.
NESTED = "gear gemma4 gemma4_text laguna mellum mimo_v2_flash olmo3 spark2_5 step3p5".split()
SCALED = "apertus gpt_oss ministral3 mistral3 mistral4".split()
# The share to tell these types; the rest is told a half, or nothing where there is no place.
TOLD = {"glm": 1.0, "gemma4": None, "gemma4_text": None}
MISREAD = ["deepseek_v2", "deepseek_v41", "minicpm3"]  # They take any scaling for theirs.

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ALPHA = {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
# The scaling to tell these types; the rest is told yarn.
SCALING: dict[str, Config] = {
    **dict.fromkeys("deepseek internlm2 internlm3 nemotron olmo2".split(), LINEAR),
    **dict.fromkeys("exaone4 llama qwen3_5".split(), LLAMA3),
    **dict.fromkeys(["hunyuan", "hunyuan_v1_dense"], ALPHA),
    **dict.fromkeys(["minicpm3", "phi3"], LONGROPE),
    "phimoe": {**LONGROPE, "long_factor": [2.0] * 16, "short_mscale": 1.0, "long_mscale": 1.5},
}


def args_class(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name}").ModelArgs


def section(config: Config) -> Config:
    """The part of a config that is about the text model."""
    return config.get("text_config", config)


@cache
def fields(name: str) -> set[str]:
    """What a type's arguments have, with those of its text model."""
    text = rope._text_args(args_class(name), section(zoo.config(name)))
    return {*inspect.signature(args_class(name)).parameters, *inspect.signature(text).parameters}


def known(name: str, config: Config) -> Config:
    """What a type's arguments have a place for."""
    found = {key: config[key] for key in sorted(fields(name) & config.keys())}
    if "text_config" in config:
        found["text_config"] = known(name, config["text_config"])
    return found


def old(name: str, theta: float, share: float | None = None, **scaling: Any) -> Config:
    """A tiny config with `rope_theta` and `rope_scaling`, under the type's own names."""
    has_share = bool(fields(name) & SHARE)
    config = known(name, zoo.config(name))
    for key in SAID | ({"rotary_dim"} if has_share else set()):
        section(config).pop(key, None)
    said = dict.fromkeys(fields(name) & THETA or {"rope_theta"}, theta)
    said |= dict.fromkeys(fields(name) & LOCAL, theta / 2)
    share = TOLD.get(name, 0.5 if has_share else None) if share is None else share
    if share is not None:
        said |= dict.fromkeys(fields(name) & SHARE or {"partial_rotary_factor"}, share)
    section(config).update(said | {"rope_scaling": copy.deepcopy(scaling) or None})
    if name == "dbrx":
        config["attn_config"]["rope_theta"] = theta
    return config


def new(name: str, theta: float, share: float | None = None, **scaling: Any) -> Config:
    """The same with `rope_parameters`, as transformers writes it where it knows the type."""
    config = old(name, theta, share, **scaling)
    text = section(config)
    said = {key: text.pop(key) for key in SAID & text.keys()}
    local = {key: said[key] for key in LOCAL & said.keys()}
    model = zoo.TEXT.get(name, name)
    classes = [CONFIG_MAPPING[m] for m in (f"{model}_text", model) if m in CONFIG_MAPPING]
    if scaling and name in ("phi3", "phimoe"):
        classes = []  # transformers checks a longrope against the sizes of the real model.
    if name in (*NESTED, *SCALED) or not classes:
        plain: Config = {"rope_theta": theta}
        for key in SHARE & said.keys():
            plain["partial_rotary_factor"] = said[key]
        table = {**plain, **(scaling or {"rope_type": "default"})}
        if name in NESTED:
            sliding = plain if name in ("gear", "olmo3") else table
            sliding = {**sliding, "rope_theta": next(iter(local.values()), theta)}
            table, local = {"full_attention": table, "sliding_attention": sliding}, {}
        said = {**local, "rope_parameters": table}
    if classes:
        if name in NESTED:
            said |= {key: text[key] for key in ("layer_types", "num_hidden_layers") if key in text}
        written = classes[0](**copy.deepcopy(said)).to_dict()
        said = {key: written[key] for key in SAID & written.keys()}
    text.update(said)
    return config


@cache
def compute(name: str, config: str) -> mx.array:
    """The logits of mlx-lm's model, with the same weights every time."""
    # `from_dict` looks up the signature for each key, which takes longer than the model.
    said = json.loads(config)
    names = inspect.signature(args_class(name)).parameters
    args = args_class(name)(**{key: said[key] for key in names if key in said})
    mx.random.seed(0)  # For the biases.
    model = importlib.import_module(f"mlx_lm.models.{name}").Model(args)
    if name == "phi3small":  # It sets logits beyond the end of a small vocabulary.
        model._dummy_tokenizer_ids = model._dummy_tokenizer_ids[:0]
    matrices = [
        (path, NOISE[1009 * place :][: p.size].reshape(p.shape).astype(p.dtype))
        for place, (path, p) in enumerate(tree_flatten(model.parameters()))
        if p.ndim > 1 and p.dtype != mx.uint32
    ]
    return model.load_weights(matrices, strict=False).eval()(TOKENS)


def alone(name: str, config: Config) -> mx.array | None:
    """The logits of mlx-lm by itself; None: it fails."""
    try:
        return compute(name, json.dumps(known(name, config)))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def logits(name: str, config: Config) -> mx.array:
    """The same for a config in either layout."""
    return compute(name, json.dumps(known(name, rope.unify(config, args_class(name)))))


def same(one: mx.array | None, two: mx.array) -> bool:
    return one is not None and bool(mx.array_equal(one, two))


@pytest.mark.parametrize("name", zoo.TYPES, scope="module")
def test_both_layouts_give_the_same_logits(name):
    usual, by_itself = logits(name, old(name, 10_000.0)), alone(name, old(name, 500.0))
    if name in FIXED:
        assert same(by_itself, usual)
        assert same(logits(name, new(name, 10_000.0)), usual)
        for config in (old(name, 500.0), new(name, 500.0)):
            with pytest.raises(UserError, match=r"rope_theta=500\.0"):
                rope.unify(config, args_class(name))
        return
    plain = logits(name, old(name, 500.0))
    assert same(logits(name, new(name, 500.0)), plain)
    assert same(usual, plain) == (name in IDLE and name != "dbrx")
    assert by_itself is None or same(by_itself, plain) or "rope_parameters" in fields(name)


@pytest.mark.parametrize("name", zoo.TYPES, scope="module")
@pytest.mark.parametrize("told", ["scaling", "share"])
def test_what_is_told_acts_in_both_layouts_or_is_refused(name, told):
    if name in (*FIXED, *IDLE):
        return
    scaling = SCALING.get(name, {**YARN, "llama_4_scaling_beta": 0.1})
    said = scaling if told == "scaling" else {"share": 0.75}
    config, plain = old(name, 500.0, **said), old(name, 500.0)
    try:
        found = logits(name, config)
    except REFUSED:
        with pytest.raises(REFUSED):
            logits(name, new(name, 500.0, **said))
        by_itself = alone(name, config)
        assert by_itself is None or same(alone(name, plain), by_itself) or name in MISREAD
    else:
        assert same(logits(name, new(name, 500.0, **said)), found)
        has_width = fields(name) & {"rotary_dim", "qk_rope_head_dim"}
        assert not same(found, logits(name, plain)) or (has_width and told == "share")


FULL = {**LINEAR, "rope_theta": 500.0}
ONE = {"rope_parameters": {"full_attention": FULL, "sliding_attention": {"rope_theta": 500.0}}}
TWO = {"rope_parameters": {"full_attention": FULL, "sliding_attention": {"rope_theta": 50.0}}}
NEW = {"rope_parameters": {"rope_theta": 7.0}}


@pytest.mark.parametrize(
    ("name", "said", "found"),
    [
        # transformers too believes `rope_scaling` first, and the top last.
        ("llama", {"rope_theta": 500.0, **NEW}, {"rope_theta": 7.0}),
        ("llama", {"rope_theta": 500.0, **NEW, "rope_scaling": LINEAR}, {"rope_theta": 500.0}),
        ("llama", {**NEW, "rope_scaling": {**LINEAR, "rope_theta": 9.0}}, {"rope_theta": 9.0}),
        ("gemma3_text", TWO, {"rope_local_base_freq": 50.0}),
        ("olmo3", ONE, {"rope_theta": 500.0}),
        ("bitnet", NEW, {"rope_theta": 7.0}),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, {"rope_scaling": None}),
        ("step3p5", {"rope_theta": [5e6, 1e4], "partial_rotary_factors": [0.5, 1.0]}, None),
        ("nemotron_h", {"rope_theta": 10_000, "partial_rotary_factor": 0.5}, None),
    ],
)
def test_a_setting_is_where_the_type_has_a_place_for_it(name, said, found):
    before = copy.deepcopy(said)
    assert rope.unify(said, args_class(name)).items() >= (found or said).items()
    assert said == before


@pytest.mark.parametrize(
    ("name", "said", "setting"),
    [
        ("qwen3_moe", {"rope_scaling": YARN}, "rope_type='yarn'"),
        ("qwen2_moe", {"rope_scaling": LINEAR}, "rope_type='linear'"),
        ("mellum", ONE, "rope_type='linear'"),
        ("glm", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("gpt_oss", ONE, "rope_type='default' for layers of sliding_attention"),
        ("olmo3", TWO, "rope_theta=50.0 for layers of sliding_attention"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_and_where(name, said, setting):
    with pytest.raises(UserError) as refused:
        rope.unify(said, args_class(name))
    assert str(refused.value) == (
        f"config.json sets {setting}, which mlx-lm's {name} has no place for and would compute "
        "without; take it out of config.json if that is what you want"
    )


def test_a_checkpoint_that_transformers_5_wrote_loads_as_the_one_before(tmp_path):
    folder = shutil.copytree(Path(__file__).parent / "data/golden/models/llama", tmp_path / "llama")
    before = mlx_loop.load_model(folder, loop=None)(TOKENS)
    config = json.loads((folder / "config.json").read_text())
    table = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": table}))
    model = mlx_loop.load_model(folder, loop=None)
    assert mx.array_equal(model(TOKENS), before)
    assert (
        model.checkpoint.config["rope_parameters"] == table
    )  # What is saved again is what was read.
