"""Files of heads and detectors: read with a bounded size, found in a folder or on the hub, and pushed there."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from gazeguard.errors import ArtifactError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HEADS_FILE = "heads.json"
DETECTOR_FILE = "detector.json"
MAX_FILE_BYTES = 16 * 2**20

Model = TypeVar("Model", bound=BaseModel)


def read_json(kind: type[Model], path: str | Path, what: str, maker: str) -> Model:
    """Read a pydantic model from a JSON file of bounded size.

    Args:
        kind: The pydantic model.
        path: The file.
        what: What the file holds, for the message ("gaze heads").
        maker: The command or function that writes such a file, for the message.

    Returns:
        The validated model.

    Raises:
        ArtifactError: The file cannot be read, or it is not what it should be.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_FILE_BYTES} bytes, more than any file of {what}.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, numbers without end
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} cannot be read as a file of {what} ({error}). {maker} writes one.") from error
    try:
        return kind.model_validate(data, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise ArtifactError(f"{path} is not a file of {what}: {where}: {first['msg']}. {maker} writes one.") from error


def find_file(source: str | Path, name: str, **download: Any) -> Path:
    """Find a file of an artifact in a folder or in a repository of the hub.

    Args:
        source: A folder, the file itself, or a hub id (``owner/name``); what exists on disk goes first.
        name: The file's name in the folder or repository.
        **download: For a repository, options of `huggingface_hub.hf_hub_download` (``revision``, ``token``, ...).

    Returns:
        The path of the file, which need not exist when `source` is neither a folder nor a hub id.

    Raises:
        ArtifactError: The folder or the repository has no such file.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / name).is_file():
            raise ArtifactError(f"There is no {name} in the folder {path}.")
        return path / name
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    from huggingface_hub import hf_hub_download

    if not download:  # with options of its own the repository may be one that is asked for in another way
        check_repository(str(source), name)
    try:
        return Path(hf_hub_download(str(source), name, **download))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(
            f"There is no folder {str(source)!r}, and no {name} from the hub's repository ({reason})."
        ) from error


def check_repository(repository: str, name: str) -> None:
    """Ask the hub once whether there is a repository: the loaders of libraries would ask again and again, for half a minute.

    Args:
        repository: A hub id; it is not asked for where `name` is in the hub's cache.
        name: A file that the repository has to have.

    Raises:
        ArtifactError: There is none, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        if not isinstance(try_to_load_from_cache(repository, name), str):
            HfApi().model_info(repository, timeout=10)
    except HFValidationError as error:
        raise ArtifactError(f"There is no folder {repository!r}, and it is no id of the hub.") from error
    except Exception as error:  # what the client raises differs between its releases, and between its HTTP libraries
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(
            f"There is no folder {repository!r}, and the hub has no such repository or cannot be reached ({reason})."
        ) from error


def push_folder(write: Callable[[Path], None], repo_id: str, api: HfApi | None = None, **upload: Any) -> str:
    """Upload what a function writes into a repository of the hub, which is created if need be.

    Args:
        write: Writes the files into the folder that it is given.
        repo_id: The repository (``owner/name``).
        api: With a token or an endpoint of one's own.
        **upload: Options of `HfApi.upload_folder` (``commit_message``, ``create_pr``, ...).

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **upload))
