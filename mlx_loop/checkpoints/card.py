"""The model card, README.md, of a saved folder, and its way to the Hugging Face hub."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent

from huggingface_hub import HfApi, ModelCard, ModelCardData
from mlx_lm.utils import compute_bits_per_weight

from .. import __version__
from ..errors import UserError
from ..foreign import read_text
from ..models.looped import Looped
from .hub import TIMEOUT

FILE = "README.md"


def write_card(folder: Path, model: Looped, name: str, recipe: str = "") -> None:
    """Write what the model in `folder` is, how it was made and how it is run.

    Args:
        model: as it is saved; nothing is evaluated.
        name: of the folder, or the repository.
        recipe: how it was quantised, in words; empty: as its weights were.
    """
    published = _published(model)
    origin = base_model(model) or _first(published.base_model)
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "looped-transformer"],
        base_model=origin,
        license=published.license,
        license_name=published.license_name,
        license_link=published.license_link,
    )
    page = f"[{origin}](https://huggingface.co/{origin})"
    licence = published.license_name or published.license
    if published.license_link:
        licence = f"[{licence}]({published.license_link})"
    loop = "off" if model.loop is None else str(model.loop)
    horizon = " --horizon 1" if model.loop is not None and model.loop.horizon != 1 else ""
    settings = "null" if model.loop is None else model.loop.to_json()
    text = f"""\
        # {name}

        {page if origin else f"A {model.model_type} model"} in MLX format, with loop settings for
        mlx_loop: its middle layers are applied several times at inference, as damped sub-steps of
        the one step that they were trained to be. The weights are those of the plain model; hosts
        that do not know loops run it as that. Whether looping helps depends on the model and the
        task: measure it.

        | | |
        |---|---|
        | base model | {page if origin else "not named by the folder it was made from"} |
        | licence | {licence or "not known here: that of the base model"} |
        | quantisation | {recipe or "as the checkpoint it was made from"} |
        | bits per weight | {compute_bits_per_weight(model):.3f}, scales included |
        | loop | {loop} |
        | made with | mlx_loop {__version__}, mlx-lm {version("mlx-lm")}, mlx {version("mlx")} |

        Looped, with the settings in config.json (`{settings}`), where mlx_loop is installed:

        ```bash
        mlx_loop chat --model {name}
        ```

        Un-looped, as any other MLX model:

        ```bash
        mlx_loop chat --model {name} --loops 1{horizon}
        mlx_lm.chat --model {name}
        ```
        """
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{dedent(text)}").save(folder / FILE)


def upload(folder: Path, repo: str) -> str:
    """Put a saved folder on the Hugging Face hub, its card with the repository's name.

    Returns:
        The address of the model's page.

    Raises:
        UserError: the folder has no card of ours.
    """
    card, name = folder / FILE, re.escape(folder.resolve().name)
    text = read_text(card) if card.exists() else ""
    text, count = re.subn(rf"(?m)^(# |.* --model ){name}(?=\s)", rf"\g<1>{repo}", text)
    if not count:
        raise UserError(f"{folder} has no card of mlx_loop: save or quantise the model first")
    api = HfApi()
    api.create_repo(repo_id=repo, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repo, ignore_patterns=[FILE])
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo=FILE, repo_id=repo)
    return f"https://huggingface.co/{repo}"


def base_model(model: Looped) -> str | None:
    """The repository that a model came from, where its folder is one of the hub's cache."""
    for part in model.checkpoint.path.parts if model.checkpoint else ():
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None


def _published(model: Looped) -> ModelCardData:
    """What the card of the model's folder says, else the page of the repository it came from."""
    card, origin = model.checkpoint and model.checkpoint.path / FILE, base_model(model)
    try:
        if card and card.exists():
            return ModelCard.load(card).data
        if origin:
            return HfApi().model_info(origin, timeout=TIMEOUT).card_data or ModelCardData()
    except Exception:  # Whatever a README may be; or no network, which raises many kinds.
        pass
    return ModelCardData()


def _first(names: str | list[str] | None) -> str | None:
    return names[0] if isinstance(names, list) else names
