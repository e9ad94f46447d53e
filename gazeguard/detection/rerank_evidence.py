"""Evidence that the rerank decoder may use for a model, and how strongly, measured when its detector is fitted."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from gazeguard.errors import PolicyError
from gazeguard.policy import STRENGTHS, Policy


class RerankEvidence(BaseModel):
    """The strengths of the terms of rerank that were chosen for one model. Immutable.

    Attributes:
        attribution: Strength of the direct logit attribution of the gaze heads.
        attended_logprob: Strength of the logit lens on the attended image tokens.
        end_bonus: What is added to the logit of a full stop where the heads attend to nothing new.
        layer: The decoder layer before which the image tokens are read; None for behind the last one.
        usable: Whether any of it helps; otherwise rerank is refused for the model, with the reason and the figures.
        reason: Why not; "" when usable.
        figures: What decided it, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attribution: FiniteFloat = Field(ge=0, le=10)
    attended_logprob: FiniteFloat = Field(ge=0, le=10)
    end_bonus: FiniteFloat = Field(ge=0, le=10)
    layer: int | None = Field(None, ge=1)
    usable: bool
    reason: str = Field("", max_length=1000)
    figures: dict[str, FiniteFloat] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> RerankEvidence:
        if self.usable == bool(self.reason.strip()):
            raise ValueError("rerank evidence has a reason exactly when it is not usable")
        return self


def with_measured_strengths(policy: Policy, evidence: RerankEvidence | None) -> Policy:
    """The policy with the strengths of rerank that were measured for a model, if it sets none itself.

    Args:
        policy: Any policy; one without rerank, or with a strength of its own, stays as it is.
        evidence: Of the model's detector.

    Raises:
        PolicyError: Nothing was measured for the model, or nothing that was measured helps it.
    """
    if policy.rerank is None or policy.rerank.strengths:
        return policy
    instead = f"Choose a policy without rerank, or set one of {', '.join(f'rerank.{name}' for name in STRENGTHS)} yourself."
    if evidence is None:
        raise PolicyError(
            f"Policy {policy.name!r} reranks with the strengths that were measured for the model, and this guard has none: "
            f"its detector was fitted without them, or there is no detector. Run gazeguard fit. {instead}"
        )
    if not evidence.usable:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in evidence.figures.items())
        raise PolicyError(
            f"Policy {policy.name!r} reranks by evidence that does not help this model: {evidence.reason} ({figures}). "
            f"{instead}"
        )
    measured = {name: getattr(evidence, name) for name in (*STRENGTHS, "layer")}
    return policy.model_copy(update={"rerank": policy.rerank.model_copy(update=measured)})
