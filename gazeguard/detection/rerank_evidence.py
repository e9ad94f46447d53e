"""Evidence that the rerank decoder may use for a model, and how strongly, measured when its detector is fitted."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator


class RerankEvidence(BaseModel):
    """The strengths of the terms of rerank that were chosen for one model. Immutable.

    Attributes:
        attribution: Strength of the direct logit attribution of the gaze heads.
        attended_logprob: Strength of the logit lens on the attended image tokens.
        end_bonus: What is added to the logit of a token that ends the caption.
        usable: Whether any of it helps; otherwise rerank is refused for the model, with the reason and the figures.
        reason: Why not; "" when usable.
        figures: What decided it, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attribution: FiniteFloat
    attended_logprob: FiniteFloat
    end_bonus: FiniteFloat
    usable: bool
    reason: str = Field("", max_length=1000)
    figures: dict[str, FiniteFloat] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> RerankEvidence:
        if self.usable == bool(self.reason.strip()):
            raise ValueError("rerank evidence has a reason exactly when it is not usable")
        return self
