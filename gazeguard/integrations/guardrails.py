"""guardrails-ai validator: captions that their image has to support.

from guardrails import Guard
from gazeguard.integrations.guardrails import SupportedByImage

checked = Guard().use(SupportedByImage(pretrained="MODEL", artifacts="DIR", on_fail="fix"))
checked.validate("A dog on a skateboard.", metadata={"image": "photo.jpg"}).validated_output
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardrails.classes.validation.validation_result import ErrorSpan, FailResult, PassResult, ValidationResult
from guardrails.validator_base import Validator, register_validator

from gazeguard.errors import InputError
from gazeguard.guard import GazeGuard
from gazeguard.prompts import DEFAULT_PROMPT
from gazeguard.report import Report, Verdict


@register_validator(name="gazeguard/supported_by_image", data_type="string")
class SupportedByImage(Validator):  # type: ignore[misc]  # its base is Any where guardrails-ai is not installed
    """Passes a caption whose verdict is *pass*; fails *flag* and *unchecked*, with the filtered caption as the fix.

    What the fix is, the guard's policy decides: under "drop" the caption without its flagged phrases (an *unchecked* caption
    stays whole, since nothing is flagged), under "abstain" "", under "mark" the caption as it is.

    The metadata of a validation hold the ``image`` (a path, bytes or a PIL image) and, if it is not the default one, the
    ``prompt`` that the caption answers.

    Args:
        guard: A guard; it serves one thread at a time.
        pretrained: In place of a guard, the folder or hub id of a model, or "lab".
        artifacts: Folder or hub id of its gaze heads and detector; by default the model's own folder.
        policy: Name of a policy, or the path of one.
        on_fail: What guardrails does about a failure: "fix", "exception", "noop", ...

    Raises:
        InputError: There is neither a guard nor a model, or both.
    """

    required_metadata_keys = ("image",)

    def __init__(
        self,
        guard: GazeGuard | None = None,
        pretrained: str | Path | None = None,
        artifacts: str | Path | None = None,
        policy: str | Path = "drop",
        on_fail: Any = None,
        **options: Any,
    ) -> None:
        named = {"pretrained": pretrained, "artifacts": artifacts, "policy": policy}
        super().__init__(on_fail=on_fail, **{name: str(value) for name, value in named.items() if value is not None}, **options)
        if (guard is None) == (pretrained is None):
            raise InputError("Expected either a guard or the name of a model. Pass guard=... or pretrained=...")
        self.guard = guard or GazeGuard.from_pretrained(str(pretrained), artifacts=artifacts, policy=policy)

    def _validate(self, value: Any, metadata: dict[str, Any]) -> ValidationResult:
        """The result for a caption; raises `InputError` for metadata without an image."""
        if metadata.get("image") is None:
            raise InputError("The metadata have no image. Pass metadata={'image': ...}: a path, bytes or a PIL image.")
        return result_of(self.guard.check(metadata["image"], value, metadata.get("prompt", DEFAULT_PROMPT)))


def result_of(report: Report) -> ValidationResult:
    """A report as guardrails has it; the report itself is in the metadata."""
    metadata = {"gazeguard": report.to_dict()}
    if report.verdict == Verdict.PASS:
        return PassResult(metadata=metadata)
    return FailResult(
        error_message=report.reason if report.verdict == Verdict.FLAG else f"unchecked: {report.reason}",
        fix_value=report.filtered_caption,
        error_spans=[
            ErrorSpan(start=finding.claim.start, end=finding.claim.end, reason="; ".join(finding.reasons) or "high risk")
            for finding in report.flagged
        ],
        metadata=metadata,
    )
