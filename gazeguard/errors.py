"""What can go wrong? One tree; every message says what is wrong, why, and what to do.

GazeGuardError
├── InputError            the picture, the caption or the call cannot be used
├── OutputError           what was found out cannot be written
├── UnsupportedError      this model, or this way of generating, cannot be watched (the message names the way out)
├── NoAttentionError      the hook ran but saw no attention: never read as "no drift"
├── ArtifactError         a heads, detector, trace or policy file cannot be read
│   └── MismatchError     the file was made for another model or for other heads
└── PolicyError           a policy does not say what it must, or says what nobody understands
"""


class GazeGuardError(Exception):
    """Root of everything that GazeGuard raises on purpose."""


class InputError(GazeGuardError, ValueError):
    """The picture, the caption or the call cannot be used."""


class OutputError(GazeGuardError, OSError):
    """What was found out cannot be written."""


class UnsupportedError(GazeGuardError, NotImplementedError):
    """This model, or this way of generating, cannot be watched."""


class NoAttentionError(GazeGuardError, RuntimeError):
    """The hook ran but saw no attention."""


class ArtifactError(GazeGuardError, ValueError):
    """A file cannot be read as what it should be."""


class MismatchError(ArtifactError):
    """The file was made for another model or for other heads."""


class PolicyError(GazeGuardError, ValueError):
    """A policy does not say what it must, or says what nobody understands."""
