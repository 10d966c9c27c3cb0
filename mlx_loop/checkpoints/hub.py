"""A checkpoint on the Hugging Face hub without its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
)
from mlx_lm.utils import hf_repo_to_path

from ..errors import UserError

# What the hub's client raises, and the package beneath it that talks to the network.
HubError: type[Exception] = HfHubHTTPError.__bases__[0]
# Seconds for the hub's first answer.
TIMEOUT = 10


@contextmanager
def hollow(repo: str) -> Iterator[Path]:
    """A folder like the repository's, but its weights are holes of the right sizes.

    config.json and the headers of the safetensors files are all that is downloaded. The files are
    sparse, so they take no space; mlx-lm's own loader finds in them every name, shape and type.

    Raises:
        UserError: no such repository, no network, or no safetensors files in it.
    """
    with TemporaryDirectory(prefix="mlx_loop.") as name:
        folder = Path(name)
        api = HfApi()
        try:
            # Asked once. A download would try again for half a minute where there is no network.
            api.model_info(repo, timeout=TIMEOUT)
            shutil.copy(hf_hub_download(repo, "config.json"), folder)
            metadata = api.get_safetensors_metadata(repo)
        except NotASafetensorsRepoError as error:
            raise UserError(f"{repo} has no safetensors weights: choose another one") from error
        except (HubError, HFValidationError, OSError) as error:
            raise cannot_have(repo, error) from error
        for file, content in metadata.files_metadata.items():
            _write_hollow(
                folder / Path(file).name,
                {
                    tensor: {
                        "dtype": info.dtype,
                        "shape": list(info.shape),
                        "data_offsets": list(info.data_offsets),
                    }
                    for tensor, info in content.tensors.items()
                },
            )
        yield folder


def cached(repo: str) -> Path | None:
    """The folder of a repository that is on this computer as a whole; None: it is not."""
    try:
        return hf_repo_to_path(repo)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def cannot_have(repo: str, error: Exception) -> UserError:
    """What to say where a repository cannot be had from the hub."""
    missing = f"there is no folder {repo} here, and it is not in the Hugging Face cache"
    if is_offline_mode():
        return UserError(f"{missing}: unset HF_HUB_OFFLINE to ask the Hugging Face hub for it")
    if isinstance(error, HfHubHTTPError | HFValidationError):
        reason = str(error).partition("\n")[0]
        return UserError(
            f"{missing}; the Hugging Face hub does not give it ({reason}): check the name, and for "
            "a gated model run `hf auth login`"
        )
    return UserError(f"{missing}; the Hugging Face hub cannot be reached: check the network")


def _write_hollow(file: Path, tensors: dict[str, dict]) -> None:
    """A safetensors file: the header's length in 8 bytes, the header, and a hole for the data."""
    header = json.dumps(tensors).encode()
    end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + end)
