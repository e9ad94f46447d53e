"""Judge of gaze traces: a `GazeTrace`, a `Detector` and a `Policy` make a `Report`.

Whole captions are judged by `Judge`, captions that are still being written by `PrefixJudge`. Everything here is numpy: traces
come from `gazeguard.tracing`, and the model's own answers of a self-verification come as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gazeguard import __version__
from gazeguard.claims.parse import Claim, Parser, Phrase, claims, may_end_thing
from gazeguard.claims.removal import without
from gazeguard.detection import features
from gazeguard.detection.calibration import logistic
from gazeguard.policy import Policy
from gazeguard.report import Finding, Report, Verdict, gaze_boxes
from gazeguard.trace import SEGMENTS, GazeTrace

if TYPE_CHECKING:  # at run time it would bring torch along
    from gazeguard.detection.detector import Detector

MIN_IMAGE_MASS = 0.01  # attention mass; gaze heads that never reach it wrote the caption without the image
_LAST_WORD = re.compile(r"[^\W_][\w'-]*$")
_NOT_ASKED = "location"  # the kind of claim: a yes/no question about an object says nothing about its location

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Judge:
    """What a detector and a policy make of gaze traces. Immutable and without state between calls.

    Calling it judges a whole caption: ``judge(trace)`` is the report.

    Attributes:
        detector: Gives each claim its risk; without one nothing is judged, and every verdict is *unchecked*.
        policy: Says from which risk a claim is flagged, and what becomes of flagged phrases.
        model: Fingerprint of the model whose traces are judged, for the reports.
        nlp: A spaCy pipeline that finds the phrases of a caption, in place of the rules for English.
    """

    detector: Detector | None
    policy: Policy
    model: str
    nlp: Parser | None = None

    def parse(self, text: str) -> Sequence[Claim]:
        """The claims of a caption; captions are parsed here and nowhere else."""
        return claims(text, self.nlp)

    # ----------------------------------------------------------------------------------------------- whole captions

    def __call__(self, trace: GazeTrace) -> Report:
        """Judge a whole caption.

        Args:
            trace: The caption's trace, live or replayed.

        Returns:
            Verdict, findings with risk, reasons and gazed box, and the filtered caption. A caption without usable evidence is
            *unchecked*, with the reason.
        """
        if len(trace) == 0:
            return self.unchecked(trace.text, "the caption is empty")
        parsed = () if (reason := self._blind(trace)) else self.parse(trace.text)
        if reason := reason or self._unjudgeable(parsed):
            return self.unchecked(trace.text, reason, trace)
        known = [claim for claim in parsed if claim.kind in self.detector.kinds]
        if reason := self._uncovered(trace, known):
            return self.unchecked(trace.text, reason, trace)
        values, kinds = features.features(trace, known), [claim.kind for claim in known]
        if reason := self._not_finite(trace, values, kinds):
            return self.unchecked(trace.text, reason, trace)
        return self._concluded(trace, known, values, self.detector.risk(values, kinds), np.full(len(known), np.nan))

    def questions(self, report: Report) -> tuple[Phrase, ...]:
        """The phrases of a caption that the model is to be asked about under a policy that verifies, each once."""
        asked = (f.claim.phrase for f in report.findings if self._counts_answers(f.claim.kind, f.risk))
        return tuple(dict.fromkeys(asked))

    def with_answers(self, report: Report, answers: Mapping[Phrase, float]) -> Report:
        """Judge a caption anew with what the model answered about some of its phrases.

        Args:
            report: What was found before.
            answers: For each phrase that the model was asked about, the log-odds of its yes against its no, nats.

        Returns:
            The report in which the risk of every claim that the answers count for is updated.
        """
        trace, judged = report.trace, [finding.claim for finding in report.findings]
        risks = np.array([finding.risk for finding in report.findings])
        log_odds = np.full(len(judged), np.nan)
        for i, (claim, risk) in enumerate(zip(judged, risks, strict=True)):
            if claim.phrase in answers and self._counts_answers(claim.kind, risk):
                log_odds[i] = answers[claim.phrase]
        risks = self.detector.update_with_answers(risks, log_odds, [claim.kind for claim in judged])
        return self._concluded(trace, judged, features.features(trace, judged), risks, log_odds)

    def unchecked(self, caption: str, reason: str, trace: GazeTrace | None = None) -> Report:
        """The report on a caption that could not be checked, with the reason; never a pass."""
        return self._report(caption, Verdict.UNCHECKED, reason, (), trace)

    # ----------------------------------------------------------------------------------------------------- prefixes

    def doubtful(self, trace: GazeTrace, parsed: Sequence[Claim], objects: Sequence[int]) -> Claim | None:
        """The first claim of a committed prefix whose risk is over the rewind threshold.

        Args:
            trace: Of the caption as far as it is written.
            parsed: All its claims.
            objects: Which of them are in question, by number, rising; all of kind object.

        Returns:
            The claim, or None if none is doubtful or the model's numbers are not finite.
        """
        kinds = [parsed[i].kind for i in objects]
        values = features.features(trace, parsed, objects)
        if self.detector.unknown(values, kinds):
            return None  # the whole caption will be unchecked
        over = self.detector.risk(values, kinds) >= self._threshold("object", self.policy.rewind.threshold)
        return parsed[objects[int(np.argmax(over))]] if over.any() else None

    # ------------------------------------------------------------------------------------------- reasons against it

    @staticmethod
    def _blind(trace: GazeTrace) -> str:
        """Why the trace is no evidence at all, or ""."""
        reached = trace.segment_mass[..., SEGMENTS.index("image")].max() < MIN_IMAGE_MASS  # False for NaN
        return "the gaze heads never attended to the image" if reached else ""

    def _unjudgeable(self, parsed: Sequence[Claim]) -> str:
        """Why no risk can be given to these claims, or ""."""
        if not parsed:
            return "the caption names nothing that could be checked"
        if self.detector is None:
            return "no detector is fitted for this model"
        if not any(claim.kind in self.detector.kinds for claim in parsed):
            return "the detector knows none of the kinds of claims in the caption"
        return ""

    @staticmethod
    def _uncovered(trace: GazeTrace, judged: Sequence[Claim]) -> str:
        """Which phrase has no token of its own, or ""."""
        for claim in judged:
            for span in (claim.span, claim.phrase.head, *claim.phrase.attributes, claim.related):
                if span is not None and not trace.tokens(span.start, span.end):
                    return f"no token covers {span.text!r}"
        return ""

    def _not_finite(self, trace: GazeTrace, values: F64, kinds: Sequence[str]) -> str:
        """Which of the model's numbers is not finite, or ""."""
        if unknown := self.detector.unknown(values, kinds):
            return f"the model gave no finite number for {unknown}"
        if not (np.isfinite(trace.logprobs).all() and np.isfinite(trace.segment_mass).all()):  # also what no feature reads
            return "the model gave no finite number for the caption's own tokens"
        return ""

    # ------------------------------------------------------------------------------------------------ from risks on

    def _threshold(self, kind: str, own: str | float | None = None) -> float:
        """The risk from which claims of a kind count as doubtful; by default the policy's own threshold."""
        return self.detector.threshold(kind, self.policy.threshold if own is None else own)

    def _counts_answers(self, kind: str, risk: float) -> bool:
        """Whether the model's answer counts for a claim of this kind and risk."""
        if self.detector.kinds[kind].answer is None or kind == _NOT_ASKED:
            return False
        return risk >= self._threshold(kind, self.policy.verify.threshold)

    def _flags(self, judged: Sequence[Claim], risks: F64) -> list[bool]:
        """Which claims are flagged. Of an absent object only the object is: nobody asks for its colour or location."""
        limits = {kind: self._threshold(kind) for kind in {claim.kind for claim in judged}}
        over = [bool(risk >= limits[claim.kind]) for claim, risk in zip(judged, risks, strict=True)]
        absent = {claim.phrase for claim, flag in zip(judged, over, strict=True) if flag and claim.kind == "object"}
        return [
            flag and (claim.kind == "object" or claim.phrase not in absent) for claim, flag in zip(judged, over, strict=True)
        ]

    def _concluded(self, trace: GazeTrace, judged: Sequence[Claim], values: F64, risks: F64, log_odds: F64) -> Report:
        """The report on claims with these features (claims, F), risks, and log-odds of yes, NaN where nothing was asked."""
        if not np.isfinite(risks).all():
            return self.unchecked(trace.text, "the detector gave no finite risk", trace)
        flags = self._flags(judged, risks)
        findings = self._findings(trace, judged, values, risks, flags, log_odds)
        doubtful = [str(claim) for claim, flag in zip(judged, flags, strict=True) if flag]
        verdict, reason = Verdict.PASS, ""
        if doubtful:
            verdict, reason = Verdict.FLAG, f"not supported by the image: {', '.join(doubtful)}"
        elif not trace.finished:
            verdict, reason = Verdict.UNCHECKED, "the caption was cut off by the length limit"
        return self._report(trace.text, verdict, reason, findings, trace)

    def _findings(
        self, trace: GazeTrace, judged: Sequence[Claim], values: F64, risks: F64, flags: Sequence[bool], log_odds: F64
    ) -> tuple[Finding, ...]:
        """One finding per claim; reasons are given for flagged claims and for answers that count."""
        kinds = [claim.kind for claim, flag in zip(judged, flags, strict=True) if flag]
        reasons = iter(self.detector.reasons(values[list(flags)], kinds))
        boxes = gaze_boxes(trace, [trace.tokens(claim.span.start, claim.span.end) for claim in judged])
        return tuple(
            Finding(
                claim=claim,
                risk=float(risk),
                flagged=flag,
                reasons=(next(reasons) if flag else ()) + _answer_reason(answer),
                box=box,
                answer=None if np.isnan(answer) else float(logistic(answer)),
            )
            for claim, risk, flag, box, answer in zip(judged, risks, flags, boxes, log_odds, strict=True)
        )

    def _report(
        self, caption: str, verdict: Verdict, reason: str, findings: tuple[Finding, ...], trace: GazeTrace | None
    ) -> Report:
        filtered = self._filtered(caption, verdict, (finding.claim for finding in findings if finding.flagged))
        return Report(caption, verdict, reason, findings, self.policy.name, self.model, __version__, trace, filtered)

    def _filtered(self, caption: str, verdict: Verdict, flagged: Iterable[Claim]) -> str:
        """What the policy lets through of a caption."""
        if self.policy.on_flag == "drop":
            return without(caption, [(claim.start, claim.end) for claim in flagged])
        if self.policy.on_flag == "abstain" and verdict != Verdict.PASS:
            return ""
        return caption


@dataclass(eq=False)
class PrefixJudge:
    """Judge of one caption while it is being written; a value with state, one per row of a batch.

    An object is judged once it is complete, that is once another word stands behind it, by the features that it has in the
    end: none of them reads what follows. Attributes and locations are not rolled back: another one would be a guess.

    Attributes:
        judge: What judges.
        committed: Number of leading tokens that hold only judged objects.
        length: Number of tokens when the caption was last extended.
    """

    judge: Judge
    committed: int = 0
    length: int = 0
    _text: str = ""
    _judged: set[tuple[int, int]] = field(default_factory=set)

    def roll_back(self, text: str, tokens: int) -> None:
        """Forget what lies behind the first ``tokens`` tokens, whose text is ``text``."""
        self._text = text
        self._judged = {(start, end) for start, end in self._judged if end <= len(text)}
        self.committed = min(self.committed, tokens)

    def extend(self, text: str, tokens: int, ended: bool) -> tuple[Sequence[Claim], list[int]]:
        """Take note of the next token.

        Args:
            text: The caption so far.
            tokens: Number of its tokens.
            ended: Whether it is complete.

        Returns:
            All claims of the text, and the numbers of those that are complete objects and not judged yet; none of either while
            no object can have become complete.
        """
        before, self._text, self.length = self._text, text, tokens
        if not (ended or self._may_complete_object(before, text)):
            return (), []
        parsed = self.judge.parse(text)
        return parsed, [
            i
            for i, claim in enumerate(parsed)
            if claim.kind == "object"
            and (ended or claim.end < len(text.rstrip()))
            and (claim.start, claim.end) not in self._judged
        ]

    def _may_complete_object(self, before: str, text: str) -> bool:
        """Whether a word ended here that can be the last one of an object; told without a parse, which costs more."""
        if text[len(before) : len(before) + 1].isalnum():
            return False  # it goes on with the last word
        last = _LAST_WORD.search(before)
        return self.judge.nlp is not None or (last is not None and may_end_thing(last[0]))

    def decide(self, trace: GazeTrace, parsed: Sequence[Claim], objects: Sequence[int]) -> Claim | None:
        """Judge the objects that `extend` returned: the first doubtful claim, or None.

        Args:
            trace: Of the caption so far.
            parsed: Its claims.
            objects: The numbers of those to judge.
        """
        claim = self.judge.doubtful(trace, parsed, objects)
        self._judged |= {(parsed[i].start, parsed[i].end) for i in objects}
        end = max(parsed[i].end for i in objects)
        self.committed = int(np.searchsorted(trace.offsets[:, 1], end, side="right"))
        return claim


def _answer_reason(log_odds: float) -> tuple[str, ...]:
    """In words: what the model answered when it was asked; nothing when it was not."""
    return () if np.isnan(log_odds) else (f"asked whether it is there, the model answers {'yes' if log_odds > 0 else 'no'}",)
