"""RoPE settings of config.json, in the layout that a model type of mlx-lm reads.

transformers 5 writes them as one table, `rope_parameters`, for some types one per layer type;
older checkpoints name `rope_theta` and `rope_scaling` at the top. mlx-lm's arguments take the keys
they know and drop the rest, so a model in the other layout turns by another base without a word.
`unify` writes the settings where the type looks for them, and refuses those it has no place for.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any, NamedTuple, NoReturn

from ..errors import UserError

Settings = dict[str, Any]

# The names that config.json has for one setting; a type's arguments have at most one of a row.
THETA = ("rope_theta", "rotary_emb_base", "rope_embedding_base", "rope_freq_constant")
SLIDING_THETA = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
SHARE = ("partial_rotary_factor", "rotary_pct")
# A width says in numbers what a share says; a type that has one needs no place for the share.
WIDTH = ("rotary_dim", "qk_rope_head_dim")

FULL, SLIDING = "full_attention", "sliding_attention"
UNSCALED = ("default", "mrope")  # mrope differs where there are pictures.
ORIGINAL = "original_max_position_embeddings"


class Special(NamedTuple):
    """What the names of a type's arguments do not tell.

    Args:
        kinds: the kinds of scaling that it computes with; None: all that mlx-lm has.
        needs: settings that it fails without where nothing scales, at values that change nothing.
        theta: the base that it computes with, whatever its config says.
        share: the share of a head that it turns, whatever its config says.
        plain_sliding: its layers with a window do not scale.
        by_layer_type: it has one table per layer type.
        text: modules that may have its text model's arguments, the usual one first; None: its own.
    """

    kinds: str | None = None
    needs: Settings | None = None
    theta: float | None = None
    share: float | None = None
    plain_sliding: bool = False
    by_layer_type: bool = False
    text: str | None = None


def _each(names: str, special: Special) -> dict[str, Special]:
    return dict.fromkeys(names.split(), special)


SPECIAL = {
    # These take a scaling from the config, and then compute without it.
    **_each("gemma3n glm4_moe granitemoehybrid lfm2 lfm2_moe mixtral", Special(kinds="")),
    **_each("muse_glimmer muse_spark olmo_hybrid qwen2_moe qwen3_moe", Special(kinds="")),
    "solar_open": Special(kinds=""),
    # So do these, or they take any for the kind that they know.
    "deepseek": Special(kinds="linear"),
    "deepseek_v41": Special(kinds="yarn deepseek_yarn"),
    "hunyuan_v1_dense": Special(kinds="dynamic"),
    **_each("phi3 phimoe", Special(kinds="longrope su")),
    # These fail where nothing scales.
    "deepseek_v2": Special(kinds="yarn deepseek_yarn", needs={"factor": 1.0}),
    "hunyuan": Special(kinds="dynamic", needs={"factor": 1.0, "alpha": 1.0}),
    "minicpm3": Special(kinds="longrope su", needs={ORIGINAL: 1 << 30}),
    **_each("ministral3 mistral4", Special(needs={ORIGINAL: 1, "llama_4_scaling_beta": 0.0})),
    # The first two turn the whole head, whatever the tables say.
    "gemma4_text": Special(by_layer_type=True, share=1.0),
    "mellum": Special(by_layer_type=True, share=1.0, kinds="dynamic llama3 longrope yarn"),
    "laguna": Special(by_layer_type=True),
    "spark2_5": Special(by_layer_type=True, kinds=""),
    **_each("gear gemma3_text olmo3", Special(plain_sliding=True)),
    # The base is a number in mlx-lm's code.
    **_each("gptj phixtral plamo2 qwen", Special(theta=10_000.0)),
    "recurrent_gemma": Special(theta=10_000.0, share=0.5),
    # Text models with something around them.
    "gemma3": Special(text="gemma3_text"),
    "gemma4": Special(text="gemma4_text"),
    "lfm2-vl": Special(text="lfm2"),
    "mistral3": Special(text="llama ministral3 mistral4"),
    "pixtral": Special(text="llama"),
    **_each("prism_hadamard_qwen35 qwen3_5_moe", Special(text="qwen3_5")),
    "qwen2_vl": Special(text="qwen2"),
    "qwen3_vl": Special(text="qwen3"),
    "qwen3_vl_moe": Special(text="qwen3_moe"),
}


def reader(args_class: type) -> type:
    """`args_class` with a `from_dict` that takes the config through `unify` first."""

    def from_dict(cls: type, config: Settings) -> Any:
        return args_class.from_dict(unify(config, args_class))  # type: ignore[attr-defined]

    return type(args_class.__name__, (args_class,), {"from_dict": classmethod(from_dict)})


def unify(config: Settings, args_class: type) -> Settings:
    """A copy of `config` that has the RoPE settings where `args_class` reads them.

    Args:
        config: config.json, which stays as it is.
        args_class: mlx-lm's arguments of the model type.

    Raises:
        UserError: a RoPE setting that the type has no place for.
    """
    config = copy.deepcopy(dict(config))
    text = config.get("text_config")
    args_class = _text_args(args_class, text)
    if isinstance(text, dict):
        return {**config, "text_config": unify(text, args_class)}
    special, fields = _describe(args_class)
    if special.theta is None and not fields & {*THETA, "rope_parameters"}:
        return config  # It has no RoPE, or (dbrx) the settings in another section.
    layers = _read(config, fields)
    for settings in layers.values():
        _check(settings, args_class)
    if not special.by_layer_type:
        _check_same(layers, args_class)
    return {**config, **_write(layers, args_class)}


def _read(config: Settings, fields: set[str]) -> dict[str, Settings]:
    """The settings by layer type, or under "" for all layers, from either layout."""
    # Where a config has both, transformers takes `rope_scaling`.
    table = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(table, dict):
        raise UserError("rope_scaling and rope_parameters in config.json must be tables or null")
    top: Settings = {}
    for names in (THETA, SHARE):
        for name in sorted(names, key=fields.__contains__):  # The type's own name comes last.
            if config.get(name) is not None:
                top[names[0]] = config[name]
    if not any(isinstance(settings, dict) for settings in table.values()):
        table = {"": table}
    layers = {}
    for layer_type, settings in table.items():
        settings = {**top, **(settings or {})}
        kind = settings.get("rope_type") or settings.get("type") or "default"
        # Some types look under one of these two names only.
        layers[layer_type] = {**settings, "rope_type": kind, "type": kind}
    return layers


def _check(settings: Settings, args_class: type) -> None:
    """Refuse settings that the type would compute without."""
    special, fields = _describe(args_class)
    kind, theta = settings["rope_type"], settings.get("rope_theta")
    kinds = special.kinds if fields & {"rope_scaling", "rope_parameters"} else ""
    if kind not in UNSCALED and kinds is not None and kind not in kinds.split():
        _refuse(args_class, f"rope_type={kind!r}")
    if special.theta is not None and theta not in (None, special.theta):
        _refuse(args_class, f"rope_theta={theta}")
    has_place = special.by_layer_type or fields & {*SHARE, *WIDTH}
    turned = special.share or (None if has_place else 1.0)
    share = settings.get("partial_rotary_factor", turned)
    # The share of this kind is one of the frequencies, a part of the scaling.
    if kind != "proportional" and turned not in (None, share):
        _refuse(args_class, f"partial_rotary_factor={share}")


def _check_same(layers: dict[str, Settings], args_class: type) -> None:
    """Refuse layer types that differ where the type of model cannot tell them apart."""
    special, fields = _describe(args_class)
    first = _first(layers)
    for layer_type, settings in layers.items():
        computed = dict(first)
        if layer_type == SLIDING and special.plain_sliding:
            computed = {key: first[key] for key in (THETA[0], SHARE[0]) if key in first}
            computed |= {"rope_type": "default", "type": "default"}
        if layer_type == SLIDING and fields & {*SLIDING_THETA}:
            computed["rope_theta"] = settings.get("rope_theta")
        for key in {**computed, **settings}:
            if computed.get(key) != settings.get(key):
                _refuse(args_class, f"{key}={settings.get(key)!r} for layers of {layer_type}")


def _write(layers: dict[str, Settings], args_class: type) -> Settings:
    """The settings under the names that the type's arguments have."""
    special, fields = _describe(args_class)
    first = _first(layers)
    is_silent = first.keys() == {"rope_type", "type"}
    if special.by_layer_type:
        tables = {FULL: first, SLIDING: first} if "" in layers else layers
        return {} if is_silent else {"rope_parameters": tables}
    written: Settings = {}
    for names, value in (
        (THETA, first.get("rope_theta")),
        (SLIDING_THETA, layers.get(SLIDING, {}).get("rope_theta")),
        (SHARE, first.get(SHARE[0])),
    ):
        if value is not None:
            written |= {name: value for name in names if name in fields}
    scales = first["rope_type"] not in UNSCALED
    table = first if scales else {**(special.needs or {}), **first}
    if "rope_scaling" in fields:
        written["rope_scaling"] = table if scales or special.needs else None
    if "rope_parameters" in fields and not is_silent:
        written["rope_parameters"] = table
    return written


def _first(layers: dict[str, Settings]) -> Settings:
    """What a type without a table per layer type computes with."""
    return layers.get(FULL) or next(iter(layers.values()))


def _refuse(args_class: type, setting: str) -> NoReturn:
    raise UserError(
        f"config.json sets {setting}, which mlx-lm's {_module(args_class)} has no place for and "
        "would compute without; take it out of config.json if that is what you want"
    )


def _describe(args_class: type) -> tuple[Special, set[str]]:
    """What is special about a type, and the names of its arguments."""
    return SPECIAL.get(_module(args_class), Special()), {*inspect.signature(args_class).parameters}


def _text_args(args_class: type, text: Any) -> type:
    """The class of the arguments that the section `text_config` becomes, or the whole config."""
    special, fields = _describe(args_class)
    if "text_config" not in fields:
        return args_class
    names = (special.text or _module(args_class)).split()
    named = (text or {}).get("model_type")
    module = importlib.import_module(f"mlx_lm.models.{named if named in names else names[0]}")
    classes = ("TextArgs", "TextConfig", "TextModelArgs", "ModelArgs")
    return next(getattr(module, name) for name in classes if hasattr(module, name))


def _module(args_class: type) -> str:
    return args_class.__module__.rpartition(".")[2]
