"""Gate of a detector: whether its verdicts may be given at all, with the figures that decided it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator


class Gate(BaseModel):
    """Whether a detector is worth its verdicts. Immutable.

    Attributes:
        usable: Whether captions are judged; otherwise every verdict is *unchecked*, with the reason.
        reason: Why not, in words that a report can repeat; "" when usable.
        figures: What decided it, by name ("lift_low": the lower end of the interval of the lift over text alone).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    usable: bool
    reason: str = Field("", max_length=1000)
    figures: dict[str, FiniteFloat] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Gate:
        if self.usable == bool(self.reason.strip()):
            raise ValueError("a gate has a reason exactly when it is not usable")
        return self
