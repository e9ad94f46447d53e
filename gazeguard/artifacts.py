"""TODO artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gazeguard.errors import ArtifactError

MAX_FILE_BYTES = 16 * 2**20


def read_json(kind: type[Any], path: str | Path, what: str, maker: str) -> Any:
    """A pydantic model from a JSON file of bounded size. Raises `ArtifactError` with what is wrong and what writes one."""
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
