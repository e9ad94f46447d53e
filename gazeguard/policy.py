"""What do we do about it? A policy is a small strict YAML file; the ones in ``policies/`` go by their names."""

from __future__ import annotations

import reprlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gazeguard.errors import PolicyError

MAX_FILE_BYTES = 64 * 1024


# Rules by which a detector sets its thresholds on validation data; `gazeguard.detector.thresholds` says what they mean.
Rule = Literal["f1", "precision_0.9", "bound_0.05", "bound_0.02"]


class _Policy(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    name: str = Field(min_length=1, max_length=64)
    threshold: Rule | Annotated[float, Field(ge=0, le=1)] = "f1"


class Mark(_Policy):
    """Write what the model writes; say which phrases are doubtful."""

    action: Literal["mark"]


class Rerank(_Policy):
    """Move the scores of plausible words by what the gaze heads say for them; mark what is still doubtful."""

    action: Literal["rerank"]
    strength: float = Field(ge=0, le=10)
    plausible: float = Field(gt=0, le=1)


Policy = Mark | Rerank
_PARSER: TypeAdapter[Policy] = TypeAdapter(Annotated[Policy, Field(discriminator="action")])


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
        return _PARSER.validate_python(data)
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
    if first["type"] in ("union_tag_not_found", "union_tag_invalid", "model_attributes_type", "dict_type"):
        actions = ", ".join(kind.model_fields["action"].annotation.__args__[0] for kind in Policy.__args__)
        if not isinstance(data, dict):
            return f"{_shown(data)} is given, but a policy is a mapping of keys to values. Allowed actions: {actions}."
        given = f"action {_shown(data['action'])}" if "action" in data else "no action"
        return f"{given} is given. Allowed actions: {actions}."
    tag, key = str(first["loc"][0]), ".".join(str(part) for part in first["loc"][1:2])
    allowed = next(kind for kind in Policy.__args__ if kind.model_fields["action"].annotation.__args__[0] == tag).model_fields
    if first["type"] == "extra_forbidden":
        value = _shown(first["input"])
        return f"key {key!r} (value {value}) is not known. Keys of a {tag} policy: {', '.join(allowed)}."
    if first["type"] == "missing":
        return f"key {key!r} is missing. Keys of a {tag} policy: {', '.join(allowed)}."
    wanted = " or ".join(each["msg"] for each in errors if each["loc"][:2] == first["loc"][:2])
    return f"key {key!r} has the value {_shown(first['input'])}: {wanted}."
