"""State of an interrupted head discovery: one safetensors file, which says of what model and strips it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gazeguard.errors import ArtifactError, MismatchError
from gazeguard.heads.artifact import Probe
from gazeguard.heads.strips import Strip


@dataclass(frozen=True)
class SearchState:
    """The matrices of all strips that were shown so far, in a file.

    Attributes:
        path: The file.
        source: What they belong to: the model and the strips.
    """

    path: Path
    source: str

    def save(self, matrices: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace the file; a process that is killed meanwhile leaves the old one."""
        new = self.path.with_name(self.path.name + ".new")
        # safetensors writes the memory of an array as it lies, whatever its strides say.
        save_file(
            {probe: np.ascontiguousarray(each) for probe, each in matrices.items()}, new, metadata={"source": self.source}
        )
        new.replace(self.path)

    def load(self, probes: set[Probe], shape: tuple[int, int, int]) -> dict[str, NDArray[np.float32]]:
        """The matrices of these probes, (strips, *shape) each; nothing when there is no file.

        Raises:
            ArtifactError: The file is none of an interrupted search.
            MismatchError: It belongs to another model or other strips.
        """
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, "np") as file:
                source = (file.metadata() or {}).get("source")
                matrices = {probe: file.get_tensor(probe) for probe in sorted(file.keys())}
        except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:  # types that numpy lacks
            raise ArtifactError(f"{self.path} is no interrupted search for heads ({error}). Delete it.") from error
        if source != self.source:
            raise MismatchError(
                f"{self.path} holds a search with another model or other strips. Delete it, or give another file."
            )
        shapes = {each.shape for each in matrices.values()}
        if set(matrices) != probes or len(shapes) != 1 or shapes.pop()[1:] != shape:
            raise ArtifactError(f"{self.path} does not hold the matrices of an interrupted search. Delete it.")
        return matrices


def digest_of(strips: Sequence[Strip]) -> str:
    """Sixteen hex digits that tell sets of strips apart."""
    digest = hashlib.sha256()
    for strip in strips:
        digest.update(repr((strip.panels, strip.narration, strip.questions)).encode() + strip.image.tobytes())
    return digest.hexdigest()[:16]
