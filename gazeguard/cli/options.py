"""Options that commands share: how the model is loaded, which artifacts and which policy a guard has."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gazeguard.cli.console import note
from gazeguard.errors import InputError
from gazeguard.policy import load_policy, policy_names
from gazeguard.progress import status

if TYPE_CHECKING:
    from gazeguard.guard import GazeGuard

LAB_NOTE = "no --model is given, so the lab's toy model answers, which knows only drawn pictographs."
MODEL_PANEL = "Model"

PromptOption = Annotated[
    str, typer.Option("--prompt", help="The question that the model is asked, or that the caption answers.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per image and line, nothing else.")]
PageOption = Annotated[Path | None, typer.Option("--html", help="Also write a replay page to this file.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images that the model processes at once.")]
ImageColumn = Annotated[str, typer.Option(help="Name of the image column in JSONL and parquet.")]
CaptionColumn = Annotated[str, typer.Option(help="Name of the caption column in JSONL and parquet.")]
CaptionSuffix = Annotated[str, typer.Option("--caption-ext", help="Suffix of caption files in folders and shards.")]
EncodingOption = Annotated[
    str | None,
    typer.Option("--encoding", help="Encoding of text without a byte order mark: cp1252, utf-16-le, ...", show_default="utf-8"),
]
WriteOption = Annotated[
    bool,
    typer.Option("--write-captions", help="Write a caption for each row without one; existing captions are never replaced."),
]
ArtifactsOption = Annotated[
    str | None,
    typer.Option(
        "--artifacts",
        metavar="DIR",
        help="Folder or hub id with the model's gaze heads and detector.",
        show_default="the model's own folder",
        rich_help_panel=MODEL_PANEL,
    ),
]
HeadsOption = Annotated[
    Path | None,
    typer.Option(
        "--heads", help="File with the gaze heads.", show_default="heads.json of the artifacts", rich_help_panel=MODEL_PANEL
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help='Folder or hub id of a vision-language model, or "lab".',
            show_default="the lab's toy model",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            "--device", help="cpu, cuda, cuda:1, ...; auto takes the GPU if there is one.", rich_help_panel=MODEL_PANEL
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="bfloat16, float16, float32; auto takes the checkpoint's dtype.", rich_help_panel=MODEL_PANEL
        ),
    ] = "auto"
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map",
            help="Spread the model over several devices, as transformers' device_map does (auto, ...).",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    processor: Annotated[
        str | None,
        typer.Option(
            "--processor",
            metavar="MODULE:ATTRIBUTE",
            help="Your own processor, or a function that takes the model and returns one. MODULE is imported: its code runs.",
            show_default="the checkpoint's",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None

    @property
    def source(self) -> str:
        """The folder or hub id, with a note when none was given."""
        if self.model is None:
            note(LAB_NOTE)
        return self.model or "lab"

    def load(self) -> tuple[Any, Any]:
        """Load the model and its processor."""
        source = self.source
        with status("loading the model"):
            from transformers.utils.logging import disable_progress_bar

            from gazeguard.loading import load

            disable_progress_bar()
            how = {"device_map": self.device_map, "processor": self.processor}
            return load(source, device=self.device, dtype=self.dtype, **how)

    def arguments(self, **more: Any) -> str:
        """The options that another command needs for the same model, as typed: " --model X --artifacts Y"."""
        given = {"model": self.model, "processor": self.processor, **more}
        return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)


@dataclass(frozen=True)
class GuardOptions(ModelOptions):
    """How a model is loaded and watched."""

    artifacts: ArtifactsOption = None
    heads: HeadsOption = None
    detector: Annotated[
        Path | None,
        typer.Option(
            "--detector",
            help="File or folder with the detector.",
            show_default="detector.json of the artifacts",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    policy: Annotated[
        str,
        typer.Option(
            "--policy", help="Name of a policy (gazeguard policy list), or a .yaml file.", autocompletion=policy_names
        ),
    ] = "mark"
    nouns: Annotated[
        Path | None,
        typer.Option(
            "--nouns", metavar="FILE", help="File with one noun per line: count these as objects, although they seem abstract."
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """The options that were given, for a loader in another process."""
        names = ("artifacts", "heads", "detector", "device", "dtype", "device_map", "processor")
        options = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, "auto")}
        return options | ({"nouns": read_nouns(self.nouns)} if self.nouns is not None else {})

    def guard(self) -> GazeGuard:
        """Load the model and its guard."""
        load_policy(self.policy)  # before the model, which takes its time
        return self.watch(*self.load())

    def watch(self, model: Any, processor: Any) -> GazeGuard:
        """The guard of a model that is loaded."""
        from gazeguard.guard import GazeGuard

        policy = load_policy(self.policy)
        given: dict[str, Any] = {"artifacts": self.artifacts, "heads": self.heads, "detector": self.detector}
        nouns = () if self.nouns is None else read_nouns(self.nouns)
        return GazeGuard(model, processor, policy=policy, nouns=nouns, **given)

    def arguments(self, **more: Any) -> str:
        """The options that another command needs for the same guard, as typed."""
        own = {"artifacts": self.artifacts, "heads": self.heads, "detector": self.detector, "nouns": self.nouns}
        return super().arguments(**own, **more)


def read_nouns(path: Path) -> tuple[str, ...]:
    """The nouns of a file, one per line, blank lines left out.

    Raises:
        InputError: The file cannot be read, or a line has more than one word.
    """
    try:
        nouns = tuple(line.strip().lower() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a list of nouns: {error}. It is plain text with one noun per line."
        ) from error
    if several := [noun for noun in nouns if " " in noun]:
        raise InputError(f"{path}: {several[0]!r} is more than one word; a list of nouns has one per line.")
    return nouns
