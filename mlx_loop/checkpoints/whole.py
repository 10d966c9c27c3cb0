"""What a checkpoint's folder must be before anything is made of it: whole, and in no contradiction.

Only headers are read: `mx.load` is lazy, and knows a file that ends too early.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import mlx.core as mx
from safetensors import safe_open

from ..errors import UserError
from ..foreign import foreseen, read_json
from .quantise import MODES, Params


def check_whole(path: Path, config: Mapping[str, Any]) -> list[Path]:
    """Refuse a damaged checkpoint with a line that says which file or tensor is wrong.

    Returns:
        Files of weights that the index does not name, which are of another model.

    Raises:
        UserError: no weights, a shard that is missing or cut short, an index that names files
            outside the folder or tensors that are not there, more layers than the weights can be
            of, or a `quantization` section that contradicts itself or the weights.
    """
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path} has no model*.safetensors: the weights are missing")
    places = _read_index(path / "model.safetensors.index.json")
    shards = [file for file in files if not places or file.name in places.values()]
    missing = sorted({name for name in places.values() if not (path / name).exists()})
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: download or copy it again")
    tensors: dict[str, mx.array] = {}
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard} is not a file: download or copy it again")
        with foreseen(f"{shard} is incomplete or damaged: download or copy it again"):
            # It knows, as MLX does not, whether the header and the file are of one length.
            with safe_open(shard, "numpy"):
                pass
            found = mx.load(str(shard))
        for name, place in places.items():
            if place == shard.name and name not in found:
                raise UserError(f"{shard} lacks {name}, which the index says is there")
        tensors |= cast(dict[str, mx.array], found)
    _check_counts(path / "config.json", config, tensors)
    _check_quantization(path, config, tensors)
    return [file for file in files if file not in shards]


def _check_counts(file: Path, config: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> None:
    """Refuse more layers than tensors, and more heads or experts than anything has rows."""
    widest = max((max(array.shape, default=0) for array in tensors.values()), default=0)
    most = {"layer": len(tensors), "expert": max(widest, len(tensors)), "head": widest}
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(file, value, tensors)
        for word, limit in most.items():
            if word in name and type(value) is int and value > limit:
                raise UserError(f"{file}: {name} is {value}, which the weights cannot be of")


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name in the same folder; empty where there is no index."""
    if not file.exists():
        return {}
    with foreseen(f"{file} is not a valid index of weights, download it again"):
        places = read_json(file)["weight_map"]
        names = set(places.values())
    for name in names:
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise UserError(f"{file} names {name!r}, which is not a file of the folder: refused")
    return places


def _check_quantization(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, mx.array]
) -> None:
    file = path / "config.json"
    section = config.get("quantization")
    quantised = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if section is None:
        if quantised and not config.get("quantization_config"):
            raise UserError(
                f"{file} has no quantization section, but {quantised[0]} is quantised: "
                "restore the config.json that belongs to these weights"
            )
        return
    whole = _params(file, "quantization", section, needed=("bits", "group_size"))
    own = {
        name: _params(file, name, params)
        for name, params in section.items()
        if isinstance(params, Mapping)
    }
    other = config.get("quantization_config")
    if isinstance(other, Mapping) and "quant_method" not in other and other != section:
        raise UserError(f"{file}: quantization and quantization_config differ: remove one of them")
    if not quantised:
        raise UserError(f"{file} says that the weights are quantised, but none of them are")
    # Where config.json names no matrix of its own, mlx-lm infers its widths from the shapes, so
    # the section's own numbers are wrong only if nothing at all was made with them.
    rest = [name for name in quantised if name not in own]
    if rest and not any(_fits(tensors, name, whole) for name in rest):
        _contradicts(file, rest[0], whole)
    for name in quantised:
        if name in own and not _fits(tensors, name, own[name]):
            _contradicts(file, name, own[name])


def _params(file: Path, name: str, said: Any, needed: Collection[str] = ()) -> Params:
    """`said`, with the mode's own width and group size where it has none, as MLX takes them."""
    mode = said.get("mode", "affine") if isinstance(said, Mapping) else None
    if not isinstance(mode, str) or mode not in MODES or not all(key in said for key in needed):
        _says_too_little(file, name)
    own = zip(("bits", "group_size"), MODES[mode], strict=True)
    params = {key: value if said.get(key) is None else said[key] for key, value in own}
    if not all(isinstance(number, int) for number in params.values()):
        _says_too_little(file, name)
    return params


def _says_too_little(file: Path, name: str) -> NoReturn:
    raise UserError(
        f"{file}: the quantization of {name} must have bits, group_size and, if it is not "
        f"affine, one of the modes {', '.join(MODES)}"
    )


def _fits(tensors: Mapping[str, mx.array], name: str, params: Params) -> bool:
    """Whether weights (rows, columns * bits / 32) and scales (rows, columns / group) agree."""
    weight = tensors.get(f"{name}.weight")
    if weight is None or weight.dtype != mx.uint32:
        return True
    columns = tensors[f"{name}.scales"].shape[-1] * params["group_size"]
    return weight.shape[-1] * 32 == columns * params["bits"]


def _contradicts(file: Path, name: str, params: Params) -> NoReturn:
    raise UserError(
        f"{file} says {params['bits']} bits in groups of {params['group_size']} for {name}, and "
        "the shapes of its weights say otherwise: restore the config.json that belongs to them"
    )
