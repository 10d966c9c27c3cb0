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

FILE = "README.md"


def write_card(folder: Path, model: Looped, name: str, recipe: str = "") -> None:
    """Write what the model in `folder` is, how it was made and how it is run.

    Args:
        model: as it is saved; nothing is evaluated.
        name: of the folder, or the repository.
        recipe: how it was quantised, in words; empty: as its weights were.
    """
    origin = base_model(model)
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "looped-transformer"],
        base_model=origin,
        license=_license(model),
    )
    what = f"A {model.model_type} model"
    if origin:
        what = f"[{origin}](https://huggingface.co/{origin})"
    loop = "off" if model.loop is None else str(model.loop)
    horizon = " --horizon 1" if model.loop is not None and model.loop.horizon != 1 else ""
    settings = "null" if model.loop is None else model.loop.to_json()
    text = f"""\
        # {name}

        {what} in MLX format, with loop settings for
        [mlx_loop](https://pypi.org/project/mlx-loop/): its middle layers are applied several times
        at inference, as damped sub-steps of the one step that they were trained to be. The weights
        are those of the plain model; hosts that do not know loops run it as that. Whether looping
        helps depends on the model and the task: measure it.

        | | |
        |---|---|
        | quantisation | {recipe or "as the checkpoint it was made from"} |
        | bits per weight | {compute_bits_per_weight(model):.3f}, scales included |
        | loop | {loop} |
        | made with | mlx_loop {__version__}, mlx-lm {version("mlx-lm")}, mlx {version("mlx")} |

        Looped, with the settings in config.json (`{settings}`):

        ```bash
        pip install mlx-loop
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


def _license(model: Looped) -> str | None:
    card = model.checkpoint.path / FILE if model.checkpoint else None
    if card is None or not card.exists():
        return None
    try:
        return ModelCard.load(card).data.license
    except Exception:  # A card without a header, or whatever else a README may be.
        return None
