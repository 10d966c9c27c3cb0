"""A checkpoint on the Hugging Face hub without its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError

from ..errors import UserError


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
        try:
            shutil.copy(hf_hub_download(repo, "config.json"), folder)
            metadata = HfApi().get_safetensors_metadata(repo)
        except NotASafetensorsRepoError as error:
            raise UserError(f"{repo} has no safetensors weights: choose another one") from error
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise UserError(
                f"no folder {repo} here, and it cannot be had from the Hugging Face hub; check the "
                "name and the network, and for a gated model run `hf auth login`"
            ) from error
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


def _write_hollow(file: Path, tensors: dict[str, dict]) -> None:
    """A safetensors file: the header's length in 8 bytes, the header, and a hole for the data."""
    header = json.dumps(tensors).encode()
    end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + end)
