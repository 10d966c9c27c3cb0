"""RoPE settings of config.json, in the layout that a model type of mlx-lm reads.

transformers 5 writes them as one table, `rope_parameters`, for some types one per layer type;
older checkpoints name `rope_theta` and `rope_scaling` at the top. mlx-lm's arguments take the keys
they know and drop the rest, so a model in the other layout turns by another base without a word.
`unify` writes the settings where the type looks for them, and refuses those it has no place for.
Where settings are missing or disagree, it decides as transformers does.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any, NoReturn

from mlx_lm.models.base import BaseModelArgs

from .errors import UserError

Settings = dict[str, Any]
REQUIRED = inspect.Parameter.empty

# The names that config.json has for one setting. A type's arguments have at most one of a row.
THETA = ("rope_theta", "rotary_emb_base", "rope_embedding_base", "rope_freq_constant")
SECOND_THETA = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta", "compress_rope_theta")
PARTIAL = ("rotary_dim", "rotary_pct", "partial_rotary_factor")

# The tables below say, by the name of its module, what a type's signature in mlx-lm does not.

# Where a type that wraps a text model has the arguments of its `text_config`.
TEXT_ARGS = {
    "gemma3": "gemma3_text.ModelArgs",
    "gemma3n": "gemma3n.TextConfig",
    "gemma4": "gemma4_text.ModelArgs",
    "kimi_k25": "deepseek_v3.ModelArgs",
    "kimi_k3": "kimi_k3.TextArgs",
    "kimi_vl": "kimi_vl.TextArgs",
    "lfm2-vl": "lfm2.ModelArgs",
    "llama4": "llama4.TextArgs",
    "minimax_m3_vl": "minimax_m3_vl.TextArgs",
    "mistral3": "llama.ModelArgs",  # or what the section names
    "muse_spark": "muse_spark.TextArgs",
    "pixtral": "llama.ModelArgs",
    "prism_hadamard_qwen35": "qwen3_5.TextModelArgs",
    "qwen2_vl": "qwen2.ModelArgs",
    "qwen3_5": "qwen3_5.TextModelArgs",
    "qwen3_5_moe": "qwen3_5.TextModelArgs",
    "qwen3_vl": "qwen3.ModelArgs",
    "qwen3_vl_moe": "qwen3_moe.ModelArgs",
}

# Types without rotary embeddings: what a config says of them is idle, in transformers too.
NO_ROPE = "gpt2 gpt_bigcode jamba kimi_k3 kimi_linear mamba mamba2 nemotron_h rwkv7".split()


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Values that a type computes with, whatever its config says.
FIXED_THETA = _each("gptj phixtral plamo2 qwen recurrent_gemma", 10_000.0)
FIXED_PARTIAL = {"recurrent_gemma": 0.5}

# The scalings that a type serves: all of mlx-lm's `initialize_rope` if it has a place for them, but
# for these types less. mlx-lm takes the rest from a config too, and then ignores it or fails.
ALL = "linear dynamic llama3 yarn deepseek_yarn telechat3-yarn longrope proportional".split()
SCALINGS = {
    **_each("gemma3n glm4_moe mixtral qwen2_moe qwen3_moe solar_open spark2_5", []),
    **_each("granitemoehybrid lfm2 lfm2_moe muse_glimmer muse_spark olmo_hybrid", []),
    **_each("deepseek nemotron", ["linear"]),
    **_each("deepseek_v2 deepseek_v41", ["yarn", "deepseek_yarn"]),
    **_each("hunyuan hunyuan_v1_dense", ["dynamic"]),
    **_each("internlm2 internlm3", ["linear", "dynamic"]),
    **_each("mellum", [kind for kind in ALL if kind != "linear"]),
    **_each("minicpm3 phi3 phimoe", ["longrope"]),
}
SAME_KIND = {"su": "longrope", "mrope": "default"}  # `mrope` differs where there are pictures.

# Types that look for the kind of scaling under one of its two names only.
KIND_KEY = {
    **_each("deepseek hunyuan hunyuan_v1_dense internlm2 nemotron phi3", "type"),
    **_each("internlm3 mellum nemotron-nas", "rope_type"),
}

# Scalings that change nothing, for types that cannot be without one.
NEUTRAL: dict[str, Settings] = {
    "deepseek_v2": {"type": "yarn", "factor": 1.0},
    "hunyuan": {"type": "dynamic", "factor": 1.0, "alpha": 1.0},
    "minicpm3": {"type": "longrope", "short_factor": 1.0, "long_factor": 1.0},
}

# Types that read `rope_parameters` only, though they have the old names too, and need these keys.
NEW_LAYOUT = _each("ministral3 mistral4", {"llama_4_scaling_beta": 0.0})

# Types whose `rope_parameters` has one table per layer type.
PER_LAYER_TYPE = "gemma4_text laguna mellum spark2_5".split()
PARTIAL_PER_LAYER_TYPE = "laguna spark2_5".split()

# The layer types of a type with two thetas, and which of them scales.
LAYER_TYPES = ("full_attention", "sliding_attention")
OTHER_LAYER_TYPES = {"deepseek_v41": ("main", "compress")}
SCALED = {**_each("gear gemma3_text olmo3", "full_attention"), "deepseek_v41": "compress"}

# Types without RoPE in the layers of full attention.
FULL_WITHOUT_ROPE = "afmoe cohere2 exaone4 exaone_moe".split()

ORIGINAL = "original_max_position_embeddings"


def reader(args_class: type) -> type:
    """`args_class`, with a `from_dict` that reads a config in either layout.

    `from_dict` raises a UserError for a RoPE setting that the type has no place for.
    """

    def from_dict(cls: type, config: Settings) -> Any:
        return args_class.from_dict(unify(config, args_class))  # type: ignore[attr-defined]

    return type(args_class.__name__, (args_class,), {"from_dict": classmethod(from_dict)})


def unify(config: Settings, args_class: type) -> Settings:
    """A copy of `config` that has the RoPE settings where `args_class` reads them.

    Args:
        config: config.json; one that has them there already comes back equal.
        args_class: mlx-lm's arguments of the model type.

    Raises:
        UserError: a RoPE setting that the type has no place for.
    """
    config = copy.deepcopy(dict(config))
    text = config.get("text_config")
    text_args = _text_args(args_class, text)
    if text_args is not None:
        if isinstance(text, dict):
            return {**config, "text_config": unify(text, text_args)}
        # Some wrappers take a config without this section as the text model's own.
        return unify(config, text_args) if _has_own_from_dict(args_class) else config
    name, fields = _module(args_class), _fields(args_class)
    if name in NO_ROPE:  # kimi_linear asks for a theta all the same.
        return {"rope_theta": 10_000.0, **config} if "rope_theta" in fields else config
    if "attn_config" in fields:  # dbrx has its theta in there.
        attention = config.get("attn_config") or {}
        inner = _Type(name, {"rope_theta": REQUIRED}, {**attention, **config})
        return {**config, "attn_config": {**attention, **inner.changes()}}
    return {**config, **_Type(name, fields, config).changes()}


class _Type:
    """A model type of mlx-lm with a config for it."""

    def __init__(self, name: str, fields: Settings, config: Settings) -> None:
        self.name, self.fields, self.config = name, fields, config
        self.seen = {**fields, **config}
        self.defaults = _transformers_defaults(config.get("model_type", ""))
        self.theta = self.first_of(THETA, fields)
        self.second_theta = self.first_of(SECOND_THETA, fields)
        self.first, self.second = OTHER_LAYER_TYPES.get(name, LAYER_TYPES)

    @staticmethod
    def first_of(names: Iterable[str], there: Iterable[str]) -> str | None:
        return next((name for name in names if name in there), None)

    def refuse(self, setting: str) -> NoReturn:
        raise UserError(
            f"config.json sets {setting}, which mlx-lm's {self.name} has no place for and would "
            "compute without; take it out of config.json if that is what you want"
        )

    def changes(self) -> Settings:
        """What to set in the config: the keys that the arguments would see otherwise."""
        layers = self.read()
        if self.name in PER_LAYER_TYPE:
            written = self.write_per_layer_type(layers)
        elif "partial_rotary_factors" in self.fields:
            written = self.write_per_layer(layers)
        else:
            written = self.write(layers)
        return {key: value for key, value in written.items() if self.seen.get(key) != value}

    # Reading: from any layout to one table per layer type, or one under "" for all layers.

    def read(self) -> dict[str, Settings]:
        given, top = self.table(), self.top()
        if not given and not top:
            given = copy.deepcopy(self.defaults)
        if not _is_nested(given):
            return self.spread(self.complete({**top, **given}, self.first)) if given or top else {}
        # transformers has defaults for a layer type of these types that is not there, or null.
        fills = self.second_theta is not None or self.name in SCALED
        if fills:
            given = {self.first: None, self.second: None, **given}
        layers = {}
        for layer_type, settings in given.items():
            if isinstance(settings, dict) or (settings is None and fills):
                named = {**self.top(layer_type), **(settings or {})}
                layers[layer_type] = self.complete(named, layer_type)
        if self.name in FULL_WITHOUT_ROPE and len(layers) > 1:
            layers.pop(self.first, None)
        for layer_type in self.layer_types():
            idle = self.name in FULL_WITHOUT_ROPE and layer_type == self.first
            if layer_type in {*given, self.first, self.second} - {*layers} and not idle:
                self.refuse(f"no RoPE for layers of {layer_type}")
        return layers

    def table(self) -> Settings:
        """The table of settings: `rope_scaling` before `rope_parameters`, as in transformers."""
        old, new = (self.config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
        if not isinstance(old, dict) or not isinstance(new, dict):
            raise UserError(
                "rope_scaling and rope_parameters in config.json must be tables or null"
            )
        table = dict(old or new)
        if old and _is_nested(new) and not _is_nested(old):
            table = {**new, self.first: {**(new.get(self.first) or {}), **old}}
        if "layer_rope_theta" in self.fields:
            thetas = {theta for theta in self.config.get("layer_rope_theta") or () if theta}
            if len(thetas) > 1:
                self.refuse(f"layer_rope_theta to several values ({sorted(thetas)})")
            if thetas:
                table["rope_theta"] = thetas.pop()  # It comes before the one for all layers.
        return table

    def top(self, layer_type: str = "") -> Settings:
        """The settings at the top of config.json, under the type's own names or the common ones."""
        settings = {}
        own = THETA if self.name in FIXED_THETA else [self.theta] if self.theta else []
        theta = self.first_of([*own, "rope_theta"], self.config)
        if self.second_theta and layer_type == self.second:
            theta = self.first_of([self.second_theta], self.config)
        if theta is not None:
            settings["rope_theta"] = self.config[theta]
        known = {*self.fields, "partial_rotary_factor"}
        known |= {"rotary_pct"} if self.name in FIXED_THETA else set()
        for name in (name for name in PARTIAL if name in known):
            if self.config.get(name) is not None:
                width = self.head_dim() if name == "rotary_dim" else 1
                settings["partial_rotary_factor"] = self.config[name] / width
                break
        return settings

    def complete(self, settings: Settings, layer_type: str) -> Settings:
        """`settings` with what transformers fills in where config.json is silent."""
        names = [key for key in ("rope_type", "type") if key in settings] or ["rope_type"]
        kind = SAME_KIND.get(_kind(settings), _kind(settings))
        settings = {**settings, **dict.fromkeys(names, kind)}
        theta = (self.defaults.get(layer_type) or self.defaults).get("rope_theta")
        if theta is not None:
            settings.setdefault("rope_theta", theta)
        partial = self.defaults.get("partial_rotary_factor")
        if partial is not None and "qk_rope_head_dim" not in self.fields:
            settings.setdefault("partial_rotary_factor", partial)
        longest = self.config.get("max_position_embeddings")
        inside = ORIGINAL not in self.fields and longest is not None
        if inside and kind in ("llama3", "yarn", "longrope"):
            settings.setdefault(ORIGINAL, longest)
        return settings

    def spread(self, settings: Settings) -> dict[str, Settings]:
        """One table for all layers, by layer type where the type of model tells them apart."""
        if self.second_theta is None and self.name not in PER_LAYER_TYPE:
            return {"": settings}
        place = self.second_theta or self.first_of(SECOND_THETA, self.config)
        if place is None:
            return {key: dict(settings) for key in self.layer_types() or LAYER_TYPES}
        default = (self.defaults.get(self.second) or {}).get("rope_theta", self.fields.get(place))
        theta = self.config.get(place, default)
        layers = {self.first: settings, self.second: {**settings, "rope_theta": theta}}
        if theta is REQUIRED:
            del layers[self.second]["rope_theta"]
        plain = {self.first, self.second} - {SCALED.get(self.name, self.first)}
        return {key: _plain(layers[key]) if key in plain else layers[key] for key in layers}

    # Writing: the tables to where the type reads them.

    def write(self, layers: dict[str, Settings]) -> Settings:
        """One table, or two that differ where the type has two places."""
        if not layers:
            return {}
        first = layers.get(self.first) or next(iter(layers.values()))
        scaled = layers.get(SCALED.get(self.name, ""), first)
        for layer_type, settings in layers.items():
            theta, partial = settings.get("rope_theta"), settings.get("partial_rotary_factor", 1)
            has_theta = self.second_theta is not None and layer_type == self.second
            if theta != first.get("rope_theta") and not has_theta:
                self.refuse(f"rope_theta={theta} for {layer_type}")
            if partial != first.get("partial_rotary_factor", 1):
                self.refuse(f"partial_rotary_factor={partial} for {layer_type}")
            scales = self.name not in SCALED or layer_type in (SCALED[self.name], "")
            if _scaling(settings) != (_scaling(scaled) if scales else None):
                self.refuse(f"rope_type={_kind(settings)!r} for {layer_type}")
        written = self.write_theta(first)
        if self.second_theta and "rope_theta" in layers.get(self.second, {}):
            written[self.second_theta] = layers[self.second]["rope_theta"]
        return {**written, **self.write_scaling(scaled), **self.write_partial(first)}

    def write_theta(self, settings: Settings) -> Settings:
        if "rope_theta" not in settings:
            return {}
        theta = settings["rope_theta"]
        if theta is None and self.name != "olmo_hybrid":  # Where it stands for no RoPE.
            self.refuse("rope_theta=null")
        has_place = self.theta is not None or "rope_parameters" in self.fields
        if theta != FIXED_THETA.get(self.name, theta if has_place else None):
            self.refuse(f"rope_theta={theta}")
        # Types with both places take it from the table, or as the table says it.
        in_table = "rope_parameters" in self.fields and self.config.get("rope_parameters")
        if self.theta is None or (in_table and self.theta not in self.config):
            return {}
        return {self.theta: theta}

    def write_scaling(self, settings: Settings) -> Settings:
        """`rope_scaling`, `rope_parameters`, or both, and the field that some types have beside."""
        scaling = self.scaling(settings)
        written: Settings = {}
        if scaling is not None and ORIGINAL in self.fields:
            original = settings.get(ORIGINAL, self.seen.get("max_position_embeddings"))
            written[ORIGINAL] = self.config.get(ORIGINAL, original)
        if "rope_parameters" in self.fields and (
            self.theta is None
            or self.name in NEW_LAYOUT
            or self.fields["rope_parameters"] is not None
        ):
            longest = {ORIGINAL: self.seen.get("max_position_embeddings")}
            more = {**longest, **NEW_LAYOUT[self.name]} if self.name in NEW_LAYOUT else {}
            return {**written, "rope_parameters": {**more, **settings}}
        if "rope_scaling" in self.fields:
            written["rope_scaling"] = scaling
        needed = self.config.get("rope_parameters") or (scaling and not written)
        if "rope_parameters" in self.fields and needed:
            written["rope_parameters"] = settings
        return written

    def scaling(self, settings: Settings) -> Settings | None:
        """What the type takes as `rope_scaling`."""
        scaling = _scaling(settings)
        if scaling is None:
            if self.name not in NEUTRAL:
                return None
            longest = self.seen.get("max_position_embeddings")
            return {**NEUTRAL[self.name], ORIGINAL: longest}
        has_place = "rope_scaling" in self.fields or "rope_parameters" in self.fields
        kind = _kind(settings)
        if kind not in SCALINGS.get(self.name, ALL if has_place else []):
            self.refuse(f"rope_type={kind!r}")
        if self.name in KIND_KEY:
            scaling.setdefault(KIND_KEY[self.name], kind)
        if kind == "linear" and "factor" in scaling:
            scaling["factor"] = float(scaling["factor"])  # Some types insist.
        return scaling

    def write_partial(self, settings: Settings) -> Settings:
        partial = settings.get("partial_rotary_factor")
        if partial is None:
            return {}
        places = [name for name in PARTIAL if name in self.fields]
        if "qk_rope_head_dim" in self.fields and self.name != "bailing_hybrid":
            # The part that turns has a width of its own; transformers may give it as a share.
            if partial != 1 and not self.is_rope_head(partial):
                self.refuse(f"partial_rotary_factor={partial}")
            return {}
        fixed = 1 if _kind(settings) != "proportional" else partial
        if not places and partial != FIXED_PARTIAL.get(self.name, fixed):
            self.refuse(f"partial_rotary_factor={partial}")
        if len(places) > 1 and self.config.get("rotary_dim") is None:
            places.remove("rotary_dim")
        return {
            name: round(partial * self.head_dim()) if name == "rotary_dim" else partial
            for name in places
        }

    def write_per_layer_type(self, layers: dict[str, Settings]) -> Settings:
        for layer_type, settings in layers.items():
            self.scaling(settings)
            if self.name in KIND_KEY:
                settings.setdefault(KIND_KEY[self.name], _kind(settings))
            partial = settings.get("partial_rotary_factor", 1)
            has_place = self.name in PARTIAL_PER_LAYER_TYPE or _kind(settings) == "proportional"
            if partial != 1 and not has_place:
                self.refuse(f"partial_rotary_factor={partial} for {layer_type}")
        return {"rope_parameters": layers} if layers else {}

    def write_per_layer(self, layers: dict[str, Settings]) -> Settings:
        """Lists with an entry per layer (step3p5)."""
        if "" in layers or not self.layer_types():
            partial = next(iter(layers.values()), {}).pop("partial_rotary_factor", None)
            partials = [partial] * self.config.get("num_hidden_layers", 0)
            lists = {} if partial is None else {"partial_rotary_factors": partials}
            return {**self.write(layers), **lists}
        scalings = {key: self.scaling(layers[key]) for key in layers}
        scaled = [key for key in layers if scalings[key] is not None]
        if any(scalings[key] != scalings[scaled[0]] for key in scaled):
            self.refuse("several ways of scaling RoPE")
        order = [layers[layer_type] for layer_type in self.config["layer_types"]]
        return {
            "rope_theta": [settings["rope_theta"] for settings in order],
            "partial_rotary_factors": [s.get("partial_rotary_factor", 1.0) for s in order],
            "rope_scaling": scalings[scaled[0]] if scaled else None,
            "yarn_only_types": scaled,
        }

    # What else the config says.

    def layer_types(self) -> list[str]:
        return list(dict.fromkeys(self.config.get("layer_types") or ()))

    def head_dim(self) -> int:
        config = self.config
        heads = self.first_of(("num_attention_heads", "n_head", "num_heads"), config)
        width = self.first_of(("hidden_size", "n_embd", "model_dim"), config)
        if config.get("head_dim"):
            return config["head_dim"]
        return config[width] // config[heads] if heads and width else 1

    def is_rope_head(self, partial: float) -> bool:
        rope = self.seen["qk_rope_head_dim"]
        heads = (
            self.config.get("head_dim"),
            (self.seen.get("qk_nope_head_dim") or 0) + (rope or 0),
        )
        return any(round(partial * head) == rope for head in heads if head)


def _kind(settings: Settings) -> str:
    return str(settings.get("rope_type") or settings.get("type") or "default")


def _is_nested(table: Settings) -> bool:
    """Whether it has a table per layer type."""
    return any(isinstance(value, dict) or key in LAYER_TYPES for key, value in table.items())


def _plain(settings: Settings) -> Settings:
    keys = ("rope_theta", "partial_rotary_factor")
    return {"rope_type": "default", **{key: settings[key] for key in keys if key in settings}}


def _scaling(settings: Settings) -> Settings | None:
    """The part that says how positions are scaled; None where they are not."""
    kind = _kind(settings)
    if kind == "default":
        return None
    drop = {"rope_theta"} if kind == "proportional" else {"rope_theta", "partial_rotary_factor"}
    return {key: value for key, value in settings.items() if key not in drop}


@cache
def _transformers_defaults(model_type: str) -> Settings:
    """`rope_parameters` of transformers' model type where a config says nothing."""
    from transformers import CONFIG_MAPPING, logging

    if model_type not in CONFIG_MAPPING:
        return {}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # Some default configs are not to transformers' own liking.
    config = CONFIG_MAPPING[model_type]().get_text_config()
    logging.set_verbosity(verbosity)
    return getattr(config, "rope_parameters", None) or {}


def _text_args(args_class: type, text: Any) -> type | None:
    """The class of the arguments that the section `text_config` becomes; None: there is none."""
    if "text_config" not in _fields(args_class):
        # Some types read the section themselves, into the same arguments.
        return args_class if isinstance(text, dict) and _has_own_from_dict(args_class) else None
    name = _module(args_class)
    if name not in TEXT_ARGS:
        return None
    module, _, attribute = TEXT_ARGS[name].partition(".")
    if name == "mistral3" and isinstance(text, dict):
        inner = text.get("model_type")
        module = inner if inner in ("ministral3", "mistral4") else module
    return getattr(importlib.import_module(f"mlx_lm.models.{module}"), attribute)


def _has_own_from_dict(args_class: type) -> bool:
    own = getattr(args_class, "from_dict", None)
    return getattr(own, "__func__", None) is not BaseModelArgs.from_dict.__func__  # type: ignore[attr-defined]


def _fields(args_class: type) -> Settings:
    """The arguments by name, with their defaults."""
    parameters = inspect.signature(args_class).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _module(args_class: type) -> str:
    """The name of mlx-lm's module for it."""
    names = [cls.__module__ for cls in args_class.__mro__]
    mlx_lm = [name for name in names if name.startswith("mlx_lm.models.")]
    return (mlx_lm or names)[0].rpartition(".")[2]
