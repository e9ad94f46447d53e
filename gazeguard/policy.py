"""Policies: what is done about likely hallucinations, as small strict YAML files. Those in ``policies/`` go by their names."""

from __future__ import annotations

import reprlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gazeguard.claims.parse import ClaimedKind
from gazeguard.errors import PolicyError

MAX_FILE_BYTES = 64 * 1024


# Rules by which a detector sets its thresholds on validation data; `gazeguard.detection.calibration.thresholds` has them.
Rule = Literal["f1", "precision_0.9", "bound_0.05", "bound_0.02"]
Threshold = Rule | Annotated[float, Field(ge=0, le=1)]
MOST_REWINDS = 1000
STRENGTHS = ("attribution", "attended_logprob", "end_bonus")  # of `Rerank`


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rerank(_Strict):
    """Move the logits of plausible next tokens by the evidence of the gaze heads.

    Without any strength (``rerank: {}``) those are taken that were measured for the model, see
    `gazeguard.detection.rerank_evidence`; with one, the others are 0.

    Attributes:
        attribution: Weight of the gaze heads' direct logit attribution, in logits per logit of the model.
        plausible: Only tokens with at least this share of the top token's probability are moved.
        attended_logprob: Weight of a token's log-probability in the logit lens on the attended image tokens, in logits per
            nat.
        end_bonus: Logits that a full stop gains where no attended image token shows an object that is not named yet.
        layer: The layer of the decoder before which the logit lens reads the image tokens, counted from 0; by default they are
            read behind the last one.
    """

    attribution: float | None = Field(default=None, ge=0, le=10)
    plausible: float = Field(default=0.003, gt=0, le=1)
    attended_logprob: float | None = Field(default=None, ge=0, le=10)
    end_bonus: float | None = Field(default=None, ge=0, le=10)
    layer: int | None = Field(default=None, ge=1)

    @property
    def strengths(self) -> dict[str, float]:
        """The strengths that are set."""
        values = {name: getattr(self, name) for name in STRENGTHS}
        return {name: value for name, value in values.items() if value is not None}


class Rewind(_Strict):
    """Roll an object over its risk limit back to where it began, ban that beginning there, and try an alternative.

    Attributes:
        budget: Rollbacks per caption at most; 0 for none.
        threshold: The risk that leads to a rollback; by default the policy's own threshold.
    """

    budget: int = Field(ge=0, le=MOST_REWINDS)
    threshold: Threshold | None = None


class Verify(_Strict):
    """Self-verification: ask the model whether doubtful objects are there, and let its answer count as evidence.

    Attributes:
        threshold: The risk from which an object is asked about; by default the policy's own, so that whatever would be
            flagged is asked about.
    """

    threshold: Threshold | None = None


class Policy(_Strict):
    """What is done while a caption is generated, once it is complete, and about phrases that are flagged in the end.

    Attributes:
        version: Version of the format.
        name: Name of the policy, which every report shows.
        threshold: The risk from which a claim is flagged: a number, or a rule of the detector.
        rerank: While a caption is generated: how the next token is chosen.
        rewind: While a caption is generated: rollback of likely hallucinations.
        verify: Once it is complete: self-verification.
        on_flag: Flagged phrases are only marked ("keep"), removed from the caption ("drop"), or the caption is withheld
            ("abstain").
        require: Kinds of claims that have to be judged: a caption passes only if every claim of these kinds was. By default
            those that detectors can be fitted on, so that a pass says something about all of them.
    """

    version: Literal[1]
    name: str = Field(min_length=1, max_length=64)
    threshold: Threshold = "f1"
    rerank: Rerank | None = None
    rewind: Rewind | None = None
    verify: Verify | None = None
    on_flag: Literal["keep", "drop", "abstain"] = "keep"
    require: tuple[ClaimedKind, ...] = Field(default=("object", "attribute", "location"), strict=False)

    @classmethod
    def load(cls, name: str | Path) -> Policy:
        """`load_policy`: a policy by its name, or from a YAML file."""
        return load_policy(name)


def policy_folder() -> Path:
    """The folder of the policies that ship with GazeGuard: in the package of a wheel, beside it in a checkout."""
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
    """Load a policy.

    Args:
        name: The name of a policy that ships with GazeGuard, or the path of a ``.yaml`` file.

    Returns:
        The policy.

    Raises:
        PolicyError: There is no such policy, or the file is none; the message has the key, the value and what is allowed.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in policy_names():
            raise PolicyError(
                f"Unknown policy {str(name)!r}; expected one of: {', '.join(policy_names())}; or the path of a .yaml file."
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
    """Validate plain data as a policy.

    Args:
        data: What a YAML file holds.
        source: Its name, for the message.

    Returns:
        The policy.

    Raises:
        PolicyError: With the key, the value and what is allowed.
    """
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
    """The first error, with its key, its value and what is allowed."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if not isinstance(data, dict):
        return f"{_shown(data)} is given, but a policy is a mapping of keys to values. {_keys(Policy, '')}"
    # The path ends in the names of a union's members where the schema leaves a choice: those are no keys of the file.
    section = SECTIONS.get(first["loc"][0]) if len(first["loc"]) > 1 else None
    path = first["loc"][: 2 if section else 1]
    key, known = ".".join(str(part) for part in path), _keys(section or Policy, f"{path[0]}." if section else "")
    if first["type"] == "extra_forbidden":
        return f"key {key!r} (value {_shown(first['input'])}) is not known. {known}"
    if first["type"] == "missing":
        return f"key {key!r} is missing. {known}"
    if path[0] in SECTIONS and len(path) == 1:
        known = _keys(SECTIONS[key], f"{key}.")
        return f"key {key!r} has the value {_shown(first['input'])}, but it holds keys of its own. {known}"
    messages = [each["msg"] for each in errors if each["loc"][: len(path)] == path]
    wanted = " or ".join(messages).replace("valid tuple", "list")  # YAML has no tuples
    return f"key {key!r} has the value {_shown(first['input'])}: {wanted}."


SECTIONS: dict[Any, type[BaseModel]] = {"rerank": Rerank, "rewind": Rewind, "verify": Verify}


def _keys(model: type[BaseModel], prefix: str) -> str:
    return f"Known keys: {', '.join(f'{prefix}{name}' for name in model.model_fields)}."
