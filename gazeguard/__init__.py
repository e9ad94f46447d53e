"""GazeGuard watches where a vision-language model looks while it writes, and flags what the picture does not support."""

from importlib.metadata import version

__version__ = version("gazeguard")
