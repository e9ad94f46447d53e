"""What do we do about it? A policy is a small strict YAML file; the ones in ``policies/`` go by their names."""

from __future__ import annotations

import reprlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gazeguard.errors import PolicyError

MAX_FILE_BYTES = 64 * 1024


# Rules by which a detector sets its thresholds on validation data; `gazeguard.detector.thresholds` says what they mean.
Rule = Literal["f1", "precision_0.9", "bound_0.05", "bound_0.02"]


Threshold = Rule | Annotated[float, Field(ge=0, le=1)]
MOST_REWINDS = 1000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rerank(_Strict):
    """Move the scores of plausible words by what the gaze heads say for them.

    attribution:      how much a logit of attribution counts beside a logit of the model
    plausible:        only words with at least this share of the likeliest word's probability are moved
    attended_logprob: how much it counts, in logits per nat, whether a thing looks like what lies under the gaze
    end_bonus:        logits that a full stop gains where the gaze finds nothing that has not been named
    """

    attribution: float = Field(ge=0, le=10)
    plausible: float = Field(gt=0, le=1)
    attended_logprob: float = Field(default=0.0, ge=0, le=10)
    end_bonus: float = Field(default=0.0, ge=0, le=10)


class Rewind(_Strict):
    """Take a phrase that is over its risk limit back to where it began, bar that beginning there, and go on another way.

    budget:    how often per caption; 0 never
    threshold: from which risk; as the policy's own if it is left out
    """

    budget: int = Field(ge=0, le=MOST_REWINDS)
    threshold: Threshold | None = None


class Verify(_Strict):
    """Ask the model whether doubtful things are there, and let its answer count; see `gazeguard.ask`.

    threshold: from which risk a thing is asked about; as the policy's own if it is left out, so that what is flagged is
    """

    threshold: Threshold | None = None


class Policy(_Strict):
    """What is done while a caption is written (``rerank``, ``rewind``), once it is written (``verify``), and with phrases that
    are flagged in the end.

    threshold: the risk from which a claim is flagged
    left:      flagged phrases are only marked; or dropped from the caption; or there is no caption (abstain)
    """

    version: Literal[1]
    name: str = Field(min_length=1, max_length=64)
    threshold: Threshold = "f1"
    rerank: Rerank | None = None
    rewind: Rewind | None = None
    verify: Verify | None = None
    on_flag: Literal["keep", "drop", "abstain"] = "keep"

    @classmethod
    def load(cls, name: str | Path) -> Policy:
        """`load_policy`: a policy by its name, or from a YAML file."""
        return load_policy(name)


def policy_folder() -> Path:
    """Where the policies that come with GazeGuard are: in the package of a wheel, beside it in a checkout."""
    packed = Path(str(files("gazeguard"))) / "policies"
    return packed if packed.is_dir() else Path(__file__).resolve().parents[1] / "policies"


def policy_names() -> list[str]:
    """The names that `load_policy` knows."""
    return sorted(path.stem for path in policy_folder().glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML without aliases, by which a small file grows huge."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.get_event()
            raise yaml.YAMLError(f"it has an alias, *{alias.anchor}. Write the value out.")
        return super().compose_node(parent, index)


def load_policy(name: str | Path) -> Policy:
    """A policy by its name, or from a ``.yaml`` file. Raises `PolicyError` with the key, the value and what is allowed."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in policy_names():
            raise PolicyError(
                f"There is no policy {str(name)!r}. Known policies: {', '.join(policy_names())}; "
                "or give the path of a .yaml file."
            )
        path = policy_folder() / f"{name}.yaml"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PolicyError(f"{path} is larger than {MAX_FILE_BYTES} bytes; a policy has a handful of lines.")
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except PolicyError:
        raise
    except Exception as error:  # PyYAML's constructors let KeyError, AttributeError and others through
        raise PolicyError(f"{path} cannot be read as YAML: {error}") from error
    return parse_policy(data, str(path))


def parse_policy(data: Any, source: str = "the policy") -> Policy:
    """A policy from plain data. Raises `PolicyError`."""
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        raise PolicyError(f"{source}: {_explain(error, data)}") from error


def _shown(value: Any) -> str:
    """A short ``repr``: a value of the file may have thousands of digits or characters."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"of type {type(value).__name__}"


def _explain(error: ValidationError, data: Any) -> str:
    """The first thing that is wrong, with its key, its value and what is allowed."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if not isinstance(data, dict):
        return f"{_shown(data)} is given, but a policy is a mapping of keys to values. {_keys(Policy, '')}"
    # The path ends in the names of a union's members where the schema leaves a choice: those are no keys of the file.
    section = SECTIONS.get(first["loc"][0]) if len(first["loc"]) > 1 else None
    path = first["loc"][: 2 if section else 1]
    key, told = ".".join(str(part) for part in path), _keys(section or Policy, f"{path[0]}." if section else "")
    if first["type"] == "extra_forbidden":
        return f"key {key!r} (value {_shown(first['input'])}) is not known. {told}"
    if first["type"] == "missing":
        return f"key {key!r} is missing. {told}"
    if path[0] in SECTIONS and len(path) == 1:
        told = _keys(SECTIONS[key], f"{key}.")
        return f"key {key!r} has the value {_shown(first['input'])}, but it holds keys of its own. {told}"
    wanted = " or ".join(each["msg"] for each in errors if each["loc"][: len(path)] == path)
    return f"key {key!r} has the value {_shown(first['input'])}: {wanted}."


SECTIONS: dict[Any, type[BaseModel]] = {"rerank": Rerank, "rewind": Rewind, "verify": Verify}


def _keys(model: type[BaseModel], prefix: str) -> str:
    return f"Known keys: {', '.join(f'{prefix}{name}' for name in model.model_fields)}."
