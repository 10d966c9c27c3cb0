"""RoPE settings in both layouts of config.json, for every model type of mlx-lm."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import zoo
from conftest import tokens
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import deepseek_v2, gemma3, gemma3_text, llama, olmo3, phi3, qwen3, step3p5
from transformers import CONFIG_MAPPING

import mlx_loop
from mlx_loop import UserError, rope

GOLDEN = Path(__file__).parent / "data" / "golden" / "models"
TOKENS = tokens(1, 12)

# What checkpoints call `rope_theta`, and the theta of the layers with a window.
THETA = {
    "gpt_neox": "rotary_emb_base",
    "openelm": "rope_freq_constant",
    "phi3small": "rope_embedding_base",
}
SECOND_THETA = {
    **dict.fromkeys("gear gemma3 gemma3_text gemma3n".split(), "rope_local_base_freq"),
    "deepseek_v41": "compress_rope_theta",
    "mimo_v2_flash": "swa_rope_theta",
    "plamo3": "rope_local_theta",
}
# Types whose `rope_parameters` transformers writes by layer type, with one theta for all.
BY_LAYER_TYPE = "gemma4 gemma4_text laguna mellum olmo3 spark2_5 step3p5".split()
# Types of which transformers reads `rope_parameters` only, or fills in a scaling where it is null.
BY_TABLE = "apertus gpt_oss mimo_v2_flash minimax ministral3 mistral3 mistral4".split()
# The share of a head that turns: what a type must be told, and what it does whatever it is told.
PARTIAL = {
    **dict.fromkeys("glm4 glm4_moe qwen3_next solar_open stablelm gpt_neox".split(), 0.5),
    **dict.fromkeys("mimo_v2_flash minimax phi recurrent_gemma".split(), 0.5),
    "glm": 1.0,
}
FIXED = "gptj phixtral plamo2 qwen recurrent_gemma".split()
TYPES = [name for name in zoo.TYPES if name not in (*FIXED, *rope.NO_ROPE)]

# Types that take any scaling for the one that they know.
MISREAD = "deepseek_v2 deepseek_v41 minicpm3".split()

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def args_class(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name}").ModelArgs


def section(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that is about the text model."""
    return config.get("text_config", config)


@cache
def stripped(name: str) -> dict[str, Any]:
    config = zoo.config(name)
    wrapper = rope._fields(args_class(name))
    text = rope._fields(rope._text_args(args_class(name), section(config)) or args_class(name))
    names = {*rope.THETA, *rope.SECOND_THETA, *rope.PARTIAL, "layer_rope_theta"}
    names |= {"rope_scaling", "rope_parameters", "partial_rotary_factors"}
    sizes = {"model_type", "max_position_embeddings", "head_dim", "layer_types"}
    keep = ({*wrapper, *text} | sizes | {"num_hidden_layers"}) - names
    for part in (config, section(config)):
        for key in part.keys() - keep - {"text_config"}:
            del part[key]
    config.get("attn_config", {}).pop("rope_theta", None)
    return config


def without_rope(name: str) -> dict[str, Any]:
    """A tiny config that says nothing of RoPE, nor of what the type has no place for."""
    return copy.deepcopy(stripped(name))


def old(name: str, theta: float, partial: float | None = None, **scaling: Any) -> dict[str, Any]:
    """The layout with `rope_theta` and `rope_scaling`, under the type's own names."""
    config = without_rope(name)
    place = config["attn_config"] if name == "dbrx" else section(config)
    place[THETA.get(name, "rope_theta")] = theta
    if name in SECOND_THETA:
        place[SECOND_THETA[name]] = theta / 2
    partial = PARTIAL.get(name) if partial is None else partial
    if name == "minimax":
        place["rotary_dim"] = round(partial * zoo.HEAD)
    elif partial is not None:
        key = "rotary_pct" if name == "gpt_neox" else "partial_rotary_factor"
        section(config)[key] = partial
    if scaling:
        section(config)["rope_scaling"] = scaling
    return config


def new(name: str, theta: float, partial: float | None = None, **scaling: Any) -> dict[str, Any]:
    """The layout with `rope_parameters`, as transformers writes it where it knows the type."""
    config = without_rope(name)
    table: dict[str, Any] = {"rope_theta": theta}
    if "type" not in scaling:
        table["rope_type"] = "default"
    partial = PARTIAL.get(name) if partial is None else partial
    if partial is not None:
        table["partial_rotary_factor"] = partial
    if name == "deepseek_v41":
        table = {"main": table, "compress": {**table, **scaling, "rope_theta": theta / 2}}
    elif name in SECOND_THETA or name == "olmo3":
        second = theta / 2 if name in SECOND_THETA else theta
        plain = {**table, "rope_theta": second}
        table = {"full_attention": {**table, **scaling}, "sliding_attention": plain}
    else:
        table |= scaling
        if name in BY_LAYER_TYPE:
            table = {kind: dict(table) for kind in ("full_attention", "sliding_attention")}
    text = zoo.TEXT.get(name, name)
    for model_type in (f"{text}_text", text):
        # transformers wants longrope with numbers that fit the sizes from these two.
        if model_type in CONFIG_MAPPING and not (scaling and name in ("phi3", "phimoe")):
            given: dict[str, Any] = {"rope_parameters": table}
            if name in BY_LAYER_TYPE:
                sizes = ("num_hidden_layers", "layer_types")
                given |= {key: copy.copy(section(config)[key]) for key in sizes}
            elif name not in BY_TABLE and (partial is None or name not in SECOND_THETA):
                given = section(old(name, theta, partial, **scaling))
                names = {*THETA.values(), *SECOND_THETA.values(), "rope_theta", "rope_scaling"}
                names |= {"partial_rotary_factor", "rotary_pct"}
                given = {key: given[key] for key in names & given.keys()}
                if name == "dbrx":
                    given["rope_theta"] = theta
            table = CONFIG_MAPPING[model_type](**given).to_dict()["rope_parameters"]
            break
    section(config)["rope_parameters"] = table
    return config


NOISE = 0.1 * mx.random.normal((2_000_000,), key=mx.random.key(0))


@cache
def weights(name: str) -> Any:
    """Matrices cut from the same noise, each at another place; drawing them all takes too long."""
    parameters = make(name, args_class(name).from_dict(zoo.config(name))).parameters()
    matrices = {
        path: NOISE[1009 * place :][: p.size].reshape(p.shape).astype(p.dtype)
        for place, (path, p) in enumerate(tree_flatten(parameters))
        if p.ndim > 1 and p.dtype != mx.uint32
    }
    return tree_unflatten([(path, matrices.get(path, p)) for path, p in tree_flatten(parameters)])


def make(name: str, args: Any) -> Any:
    model = importlib.import_module(f"mlx_lm.models.{name}").Model(args)
    if name == "phi3small":  # it sets logits beyond the end of a small vocabulary
        model._dummy_tokenizer_ids = model._dummy_tokenizer_ids[:0]
    return model.eval()


def run(name: str, args: Any) -> mx.array:
    """The logits of mlx-lm's model with these arguments, and the same weights every time."""
    model = make(name, args)
    model.update(weights(name))
    return model(TOKENS)


def arguments(name: str, config: dict[str, Any]) -> Any:
    return rope.reader(args_class(name)).from_dict(config)


def logits(name: str, config: dict[str, Any]) -> mx.array:
    return run(name, arguments(name, config))


def same(name: str, config: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configs make the same model; equal arguments do, and are quick to compare."""
    one, two = arguments(name, config), arguments(name, other)
    return one == two or mx.array_equal(run(name, one), run(name, two))


@pytest.fixture(scope="module", params=TYPES)
def name(request: Any) -> str:
    """Each model type with RoPE of a free base in turn."""
    return request.param


@pytest.fixture(scope="module")
def plain(name: str) -> mx.array:
    """The logits with a base far from every default, in the old layout."""
    return logits(name, old(name, 500.0))


def test_both_layouts_give_the_same_logits(name, plain):
    assert mx.array_equal(logits(name, new(name, 500.0)), plain)
    assert not mx.array_equal(logits(name, new(name, 10_000.0)), plain)


@pytest.mark.parametrize("scaling", [LINEAR, YARN], ids=["linear", "yarn"])
def test_a_scaling_acts_in_both_layouts_or_is_refused(name, plain, scaling):
    config = old(name, 500.0, **scaling)
    try:
        found = logits(name, config)
    except UserError:
        with pytest.raises(UserError, match="rope_type"):
            rope.unify(new(name, 500.0, **scaling), args_class(name))
        assert name in MISREAD or ignores(name, config, plain)
    else:
        assert same(name, config, new(name, 500.0, **scaling))
        assert not mx.array_equal(found, plain)


def ignores(name: str, config: dict[str, Any], plain: mx.array) -> bool:
    """Whether mlx-lm by itself fails on the config or computes as if it said nothing."""
    try:
        return mx.array_equal(run(name, args_class(name).from_dict(config)), plain)
    except (TypeError, ValueError, KeyError):
        return True


def test_a_share_of_the_head_acts_in_both_layouts_or_is_refused(name, plain):
    config = old(name, 500.0, 0.75)
    try:
        found = logits(name, config)
    except UserError:
        with pytest.raises(UserError, match="partial_rotary_factor"):
            rope.unify(new(name, 500.0, 0.75), args_class(name))
    else:
        assert same(name, config, new(name, 500.0, 0.75))
        assert not mx.array_equal(found, plain)


def test_a_config_in_the_right_layout_comes_back_equal(name):
    right = rope.unify(old(name, 500.0), args_class(name))
    assert rope.unify(right, args_class(name)) == right


LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * (zoo.HEAD // 2),
    "long_factor": [2.0] * (zoo.HEAD // 2),
    "original_max_position_embeddings": 64,
}
MSCALES = {"short_mscale": 1.0, "long_mscale": 1.5}
HALF = {key: [value[0]] * (zoo.HEAD // 4) for key, value in LONGROPE.items() if "factor" in key}
ALPHA = {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("phi3", LONGROPE),
        ("phimoe", {**LONGROPE, **MSCALES}),
        ("minicpm", LONGROPE),
        ("minicpm3", {**LONGROPE, **HALF}),
        ("hunyuan", ALPHA),
        ("hunyuan_v1_dense", ALPHA),
        ("llama", LLAMA3),
        ("telechat3", {**YARN, "rope_type": "telechat3-yarn"}),
    ],
)
def test_a_scaling_of_its_own_acts_in_both_layouts(name, scaling):
    found = logits(name, old(name, 500.0, **scaling))
    assert mx.array_equal(logits(name, new(name, 500.0, **scaling)), found)
    assert not mx.array_equal(found, logits(name, old(name, 500.0)))


# What a config may say, in one layout, in both, or hardly; transformers tells what is meant.
ON_LLAMA: list[dict[str, Any]] = [
    {},
    {"rope_theta": 500.0},
    {"rope_theta": 500.0, "rope_scaling": None},
    {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 500.0, "rope_scaling": {"type": "dynamic", **LINEAR}},
    {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
    {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 500.0, "rope_parameters": {**LINEAR, "rope_theta": 7.0}},
    {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 7.0}, "rope_scaling": LINEAR},
    {"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {**YARN, "rope_theta": 9.0}},
    {"rope_parameters": {**LINEAR, "rope_theta": 7.0}, "rope_scaling": None},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 7.0}},
    {"rope_parameters": {}, "rope_theta": 500.0},
    {"rope_parameters": None, "rope_theta": 500.0},
]


@pytest.mark.parametrize("model_type", ["llama", "olmoe", "qwen2", "qwen3", "seed_oss", "smollm3"])
@pytest.mark.parametrize("said", ON_LLAMA, ids=str)
def test_what_a_config_means_is_what_transformers_takes_it_for(model_type, said):
    config = {**without_rope(model_type), **said}
    longest = {"max_position_embeddings": config["max_position_embeddings"]}
    meant = CONFIG_MAPPING[model_type](**longest, **copy.deepcopy(said)).rope_parameters
    args = rope.reader(args_class(model_type)).from_dict(config)
    assert args.rope_theta == meant["rope_theta"]
    kind = dict.fromkeys(("rope_type", "type"), meant["rope_type"])
    scaling = args.rope_scaling or {"rope_type": "default"}
    named = {key: value for key, value in scaling.items() if key != "rope_theta"}
    assert {**kind, **named, "rope_theta": args.rope_theta} == {**meant, **kind}


CONFIGS = {
    "llama": {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
    "qwen3": {"rope_theta": 1e6, "rope_scaling": None},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
    "gpt_oss": {"rope_theta": 150_000, "rope_scaling": {**YARN, "truncate": False}},
    "deepseek_v3": {"rope_theta": 10_000.0, "rope_scaling": {"type": "yarn", **YARN}},
    "minimax": {"rope_theta": 5e6, "rotary_dim": 64, "head_dim": 128, "partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_emb_base": 10_000, "rotary_pct": 0.25},
    "step3p5": {"rope_theta": [5e6, 1e4], "partial_rotary_factors": [0.5, 1.0]},
    "exaone_moe": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "laguna": {"rope_parameters": {"full_attention": {**YARN, "rope_theta": 5e5}}},
    "muse_glimmer": {"rope_theta": 5e5, "layer_rope_theta": [5e5, 0]},
    "lfm2": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    "olmo_hybrid": {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
    "nemotron_h": {"rope_theta": 10_000, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_released_config_is_right_already(name):
    config = {"model_type": name, "max_position_embeddings": 4096, **CONFIGS[name]}
    assert rope.unify(config, args_class(name)) == config


def test_the_users_config_stays_as_it_is():
    config = new("qwen3_5", 500.0)  # mlx-lm's arguments rename a key in its table
    before = copy.deepcopy(config)
    rope.reader(args_class("qwen3_5")).from_dict(config)
    assert config == before


BY_TYPE = {
    "full_attention": {**LINEAR, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}


@pytest.mark.parametrize("name", ["gemma3_text", "gear"])
def test_each_kind_of_layer_has_its_own_base_where_the_type_has_two(name):
    found = rope.unify({"model_type": name, "rope_parameters": BY_TYPE}, args_class(name))
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (500.0, 50.0)
    assert found["rope_scaling"] == LINEAR


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "olmo3", "qwen3"])
def test_kinds_of_layers_that_differ_are_refused_where_the_type_has_one_base(name):
    with pytest.raises(UserError, match=r"rope_theta=50\.0 for sliding_attention"):
        rope.unify({"model_type": name, "rope_parameters": BY_TYPE}, args_class(name))


def test_layers_of_full_attention_alone_may_scale():
    same = {**BY_TYPE, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
    config = {"model_type": "olmo3", "rope_parameters": same}
    found = rope.unify(config, olmo3.ModelArgs)
    assert (found["rope_theta"], found["rope_scaling"]) == (500.0, LINEAR)
    with pytest.raises(UserError, match="rope_type='default' for sliding_attention"):
        rope.unify({**config, "model_type": "llama"}, llama.ModelArgs)


def test_layers_in_a_list_have_their_settings_in_lists():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    table = copy.deepcopy(BY_TYPE)
    table["full_attention"]["partial_rotary_factor"] = 0.5
    config = {"model_type": "step3p5", "layer_types": kinds, "rope_parameters": table}
    found = rope.unify(config, step3p5.ModelArgs)
    assert found["rope_theta"] == [500.0, 50.0, 500.0]
    assert found["partial_rotary_factors"] == [0.5, 1.0, 0.5]
    assert (found["rope_scaling"], found["yarn_only_types"]) == (LINEAR, ["full_attention"])


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"rope_theta": 500.0, "rope_scaling": LINEAR},
        {"rope_theta": 500.0, "rope_local_base_freq": 50.0, "rope_scaling": None},
        {"rope_parameters": BY_TYPE, "rope_theta": 7.0, "rope_local_base_freq": 7.0},
        {"rope_parameters": BY_TYPE, "rope_scaling": {**LINEAR, "factor": 8.0}},
        {"rope_parameters": {"full_attention": {"rope_theta": 500.0}}},
        {"rope_parameters": {**BY_TYPE, "sliding_attention": None}, "rope_local_base_freq": 50.0},
    ],
    ids=str,
)
def test_two_bases_are_what_transformers_takes_them_for(said):
    meant = CONFIG_MAPPING["gemma3_text"](**copy.deepcopy(said)).rope_parameters
    config = {**without_rope("gemma3_text"), **said}
    args = rope.reader(gemma3_text.ModelArgs).from_dict(config)
    assert args.rope_theta == meant["full_attention"]["rope_theta"]
    assert args.rope_local_base_freq == meant["sliding_attention"]["rope_theta"]
    scaling = {**(args.rope_scaling or {"rope_type": "default"}), "rope_theta": args.rope_theta}
    assert scaling == meant["full_attention"]


def test_a_null_for_a_kind_of_layer_is_what_the_type_makes_of_it():
    table = {**BY_TYPE, "sliding_attention": None}
    config = {"rope_parameters": table, "layer_types": ["sliding_attention"]}
    found = rope.unify({"model_type": "gemma3_text", **config}, gemma3_text.ModelArgs)
    assert found.get("rope_local_base_freq", 10_000.0) == 10_000.0
    with pytest.raises(UserError, match="no RoPE for layers of sliding_attention"):
        rope.unify({"model_type": "llama", **config}, llama.ModelArgs)
    unused = {**config, "layer_types": ["full_attention"]}
    assert rope.unify({"model_type": "llama", **unused}, llama.ModelArgs)["rope_theta"] == 500.0


def test_a_type_whose_layers_of_full_attention_have_no_rope_ignores_what_is_said_of_them():
    table = {"full_attention": None, "sliding_attention": {"rope_theta": 50.0}}
    layers = {"layer_types": ["full_attention", "sliding_attention"], "rope_parameters": table}
    found = rope.unify({"model_type": "afmoe", **layers}, args_class("afmoe"))
    assert found["rope_theta"] == 50.0


def test_null_is_no_scaling_even_for_a_type_that_cannot_be_without():
    config = zoo.config("deepseek_v2") | {"rope_theta": 500.0, "rope_scaling": None}
    assert mx.array_equal(
        logits("deepseek_v2", {**config, "partial_rotary_factor": None}),
        logits("deepseek_v2", new("deepseek_v2", 500.0)),
    )
    with pytest.raises(AttributeError):  # by itself mlx-lm fails
        deepseek_v2.Model(deepseek_v2.ModelArgs.from_dict(config))


def test_two_names_for_a_kind_of_scaling_are_one():
    su = {**LONGROPE, "type": "su"}
    config = {"model_type": "phi3", "partial_rotary_factor": 1.0, "rope_theta": 1e4}
    assert rope.unify(config | {"rope_scaling": su}, phi3.ModelArgs)["rope_scaling"] == LONGROPE
    pictures = {"type": "mrope", "mrope_section": [2, 3, 3]}
    found = rope.unify({"model_type": "qwen3", "rope_theta": 5.0, "rope_scaling": pictures}, QWEN3)
    assert found["rope_scaling"] is None


QWEN3 = qwen3.ModelArgs


@pytest.mark.parametrize("name", FIXED)
def test_a_base_that_the_type_cannot_change_must_be_the_one_it_has(name):
    plain = run(name, args_class(name).from_dict(zoo.config(name)))
    share = {"partial_rotary_factor": 0.5} if name == "recurrent_gemma" else {"rotary_dim": 16}
    for layout in ("rope_theta", "rope_parameters"):
        config = {**without_rope(name), **share}
        for theta in (10_000.0, 500.0):
            config[layout] = theta if layout == "rope_theta" else {"rope_theta": theta}
            if theta == 10_000.0:
                assert mx.array_equal(logits(name, config), plain)
            else:
                with pytest.raises(UserError, match=rf"rope_theta={theta}, which mlx-lm's {name}"):
                    rope.unify(config, args_class(name))


@pytest.mark.parametrize("name", rope.NO_ROPE)
def test_a_type_without_rope_does_not_mind_what_is_said_of_it(name):
    plain = args_class(name).from_dict(zoo.config(name))
    config = {**zoo.config(name), "rope_parameters": {**YARN, "rope_theta": 500.0}}
    del config["rope_theta"], config["rope_scaling"]
    assert mx.array_equal(logits(name, config), run(name, plain))


@pytest.mark.parametrize("name", ["bitnet", "muse_spark"])
def test_types_without_a_fallback_for_their_metal_kernels_have_the_base_in_their_arguments(name):
    fields = rope._fields(args_class(name))
    if name == "muse_spark":
        fields = {"text_config": {}}
    for said in ({"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0}}):
        config = {"text_config": said} if "text_config" in fields else said
        found = rope.unify({"model_type": name, **config}, args_class(name))
        text = found.get("text_config", found)
        place = text["rope_parameters"] if name == "muse_spark" else text
        assert place["rope_theta"] == 500.0


@pytest.mark.parametrize(
    "name", [name for name in zoo.TYPES if "text_config" in rope._fields(args_class(name))]
)
def test_it_is_known_where_a_wrapper_has_its_text_models_arguments(name):
    assert name in rope.TEXT_ARGS


def test_a_wrapper_without_a_section_for_text_is_left_alone():
    config = {"model_type": "gemma3", "rope_theta": 500.0}
    assert rope.unify(config, gemma3.ModelArgs) == config


def test_a_refusal_is_one_line_that_says_what_and_where():
    config = {"model_type": "qwen3_moe", "rope_theta": 1e6, "rope_scaling": YARN}
    with pytest.raises(UserError) as refused:
        rope.unify(config, args_class("qwen3_moe"))
    assert str(refused.value) == (
        "config.json sets rope_type='yarn', which mlx-lm's qwen3_moe has no place for and would "
        "compute without; take it out of config.json if that is what you want"
    )


def test_a_checkpoint_that_transformers_5_wrote_loads_as_the_one_before(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))
    before = mlx_loop.load_model(folder, loop=None)(TOKENS)
    config = json.loads((folder / "config.json").read_text())
    table = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    config["rope_parameters"] = table
    (folder / "config.json").write_text(json.dumps(config))
    model = mlx_loop.load_model(folder, loop=None)
    assert mx.array_equal(model(TOKENS), before)
    assert model.config["rope_parameters"] == table  # what is saved again is what was read
