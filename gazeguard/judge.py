"""Judge of gaze traces: a `GazeTrace`, a `Detector` and a `Policy` make a `Report`.

Whole captions are judged by `Judge`, captions that are still being written by `PrefixJudge`. Everything here is numpy: traces
come from `gazeguard.tracing`, and the model's own answers of a self-verification come as numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from gazeguard import __version__
from gazeguard.claims.ending import open_ending
from gazeguard.claims.parse import JUDGED, Caption, Claim, ClaimKind, Kind, Parser, may_end_thing, parse
from gazeguard.claims.phrases import Phrase
from gazeguard.claims.removal import without
from gazeguard.claims.repetition import find_repetition, shortened
from gazeguard.detection import features
from gazeguard.detection.calibration import logistic
from gazeguard.errors import given
from gazeguard.policy import Policy
from gazeguard.report import CUT_OFF, ENDS_OPEN, UNSUPPORTED, Finding, Report, Verdict, gaze_boxes
from gazeguard.trace import SEGMENTS, GazeTrace

if TYPE_CHECKING:  # at run time it would bring torch along
    from gazeguard.detection.detector import Detector

MAX_NAMED = 10  # doubtful claims in a reason
MIN_ANSWER_EFFECT = 0.1  # nats of the risk's log-odds; an answer that moves it less is no reason
MIN_IMAGE_MASS = 0.01  # attention mass; gaze heads that never reach it wrote the caption without the image
_LAST_WORD = re.compile(r"[^\W_][\w'-]*$")
ABSENT = ("its object is flagged",)  # why a claim over its threshold is not flagged itself
_NOT_ASKED = "location"  # the kind of claim: a yes/no question about an object says nothing about its location

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Assessment:
    """What a detector finds out about a caption, before any verdict.

    Attributes:
        trace: The caption's trace.
        reason: Why it could not be assessed; "" if it could, and only then there are claims.
        caption: The parsed caption.
        not_judged: Kinds of claims that the caption makes and the detector does not know.
        degenerate: What the caption repeats in a loop, in words; "" if nothing. Then each distinct claim is judged once, where
            it stands first.
        claims: The claims that the detector judges.
        values: (claims, F) their features.
        risks: (claims,) the probability that each is false.
    """

    trace: GazeTrace
    reason: str = ""
    caption: Caption | None = None
    not_judged: tuple[str, ...] = ()
    degenerate: str = ""
    claims: Sequence[Claim] = ()
    values: F64 = field(default_factory=lambda: np.zeros((0, 0)))
    risks: F64 = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, eq=False)
class Judge:
    """What a detector and a policy make of gaze traces. Immutable and without state between calls.

    Calling it judges a whole caption: ``judge(trace)`` is the report.

    Attributes:
        detector: Gives each claim its risk; without one nothing is judged, and every verdict is *unchecked*.
        policy: Says from which risk a claim is flagged, and what becomes of flagged phrases.
        model: Fingerprint of the model whose traces are judged, for the reports.
        nlp: A spaCy pipeline for the parser of captions; by default the package's own tagger.
        nouns: Nouns that are objects although the parser takes them for abstract ("radiation").
        model_name: What the model is called, for the reports.
        unusable: Why the gaze heads are unusable; then there is no detector, and this is the reason of every verdict.
    """

    detector: Detector | None
    policy: Policy
    model: str
    nlp: Parser | None = None
    nouns: frozenset[str] = frozenset()
    model_name: str = ""
    unusable: str = ""

    @property
    def fitted(self) -> Detector:
        """The detector, for what is reached only with one."""
        return given(self.detector)

    def parse(self, text: str) -> Caption:
        """Parse a caption: here and nowhere else between its trace and its report."""
        return parse(text, self.nlp, nouns=self.nouns)

    # ----------------------------------------------------------------------------------------------- whole captions

    def __call__(self, trace: GazeTrace) -> Report:
        """Judge a whole caption.

        Args:
            trace: The caption's trace, live or replayed.

        Returns:
            Verdict, findings with risk, reasons and gazed box, and the filtered caption. A caption without usable evidence is
            *unchecked*, with the reason.
        """
        return self.report(self.assess(trace))

    def assess(self, trace: GazeTrace) -> Assessment:
        """Parse a caption and give each of its claims a risk, or the reason why that is impossible."""
        caption = self.parse(trace.text)
        if caption.response is not None:  # before the evidence: whoever writes a refusal need not attend to the image
            return Assessment(trace, f"{caption.response}: the text is no caption", caption)
        if reason := _no_evidence(trace):
            return Assessment(trace, reason, caption)
        claims = _judged_claims(caption)
        if not claims:
            return Assessment(trace, _nothing_claimed(caption), caption)
        if reason := self._refused():
            return Assessment(trace, reason, caption)
        not_judged = tuple(kind for kind in caption.kinds if kind not in self.fitted.kinds)
        if not (claims := [claim for claim in claims if claim.kind in self.fitted.kinds]):
            return Assessment(trace, "the detector knows none of the kinds of claims in the caption", caption, not_judged)
        if reason := _uncovered(trace, claims):
            return Assessment(trace, reason, caption, not_judged)
        degenerate = ""
        if loop := find_repetition(trace.text):
            claims, degenerate = _distinct(claims), f"degenerate text: {loop}"
        values, kinds = features.features(trace, claims), [claim.kind for claim in claims]
        if reason := self._not_finite(trace, values, kinds):
            return Assessment(trace, reason, caption, not_judged)
        if reason := _outside(self.fitted, trace, values, caption.phrases):
            return Assessment(trace, reason, caption, not_judged)
        return Assessment(trace, "", caption, not_judged, degenerate, claims, values, self.fitted.risk(values, kinds))

    def questions(self, assessment: Assessment) -> tuple[Phrase, ...]:
        """The phrases of doubtful claims, each once, that the model is asked about under a policy that verifies."""
        if assessment.reason:
            return ()
        pairs = zip(assessment.claims, assessment.risks, strict=True)
        return tuple(dict.fromkeys(claim.phrase for claim, risk in pairs if self._counts_answers(claim.kind, risk)))

    def report(self, assessment: Assessment, answers: Mapping[Phrase, float] | None = None) -> Report:
        """Conclude from the risks of a caption's claims.

        Args:
            assessment: Of the caption.
            answers: For each phrase that the model was asked about, the log-odds of its yes against its no, nats; they update
                the risk of the doubtful claims about it.
        """
        if assessment.reason:
            report = self.unchecked(assessment.trace.text, assessment.reason, assessment.trace)
            return replace(report, not_judged=assessment.not_judged)
        claims, risks = assessment.claims, assessment.risks
        log_odds = np.full(len(claims), np.nan)
        if answers:
            for i, (claim, risk) in enumerate(zip(claims, risks, strict=True)):
                if claim.phrase in answers and self._counts_answers(claim.kind, risk):
                    log_odds[i] = answers[claim.phrase]
            risks = self.fitted.update_with_answers(risks, log_odds, [claim.kind for claim in claims])
        trace = assessment.trace
        if not np.isfinite(risks).all():
            return self.unchecked(trace.text, "the detector gave no finite risk", trace)
        flags = self._flags(claims, risks)
        findings = self._findings(assessment, risks, flags, log_odds)
        doubtful = [claim for claim, flag in zip(claims, flags, strict=True) if flag]
        verdict, reason = self._verdict(assessment, doubtful)
        filtered = self._filtered(trace.text, verdict)
        if doubtful and self.policy.on_flag == "drop":
            filtered = without(given(assessment.caption), _cut_spans(assessment, doubtful))
        report = self._report(trace.text, verdict, reason, findings, trace, filtered)
        return replace(report, not_judged=assessment.not_judged)

    def unchecked(self, caption: str, reason: str, trace: GazeTrace | None = None) -> Report:
        """The report on a caption that could not be checked, with the reason; never a pass."""
        filtered = self._filtered(caption, Verdict.UNCHECKED)
        return self._report(caption, Verdict.UNCHECKED, reason, (), trace, filtered)

    # ----------------------------------------------------------------------------------------------------- prefixes

    def doubtful(self, trace: GazeTrace, claims: Sequence[Claim], objects: Sequence[int]) -> Claim | None:
        """The first claim of a committed prefix whose risk is over the rewind threshold.

        Args:
            trace: Of the caption as far as it is written.
            claims: All its claims.
            objects: Which of them are in question, by number, rising; all of kind object.

        Returns:
            The claim, or None if none is doubtful or the model's numbers are not finite.
        """
        kinds = [claims[i].kind for i in objects]
        values = features.features(trace, claims, objects)
        if self._refused() or self.fitted.unknown(values, kinds) or _outside(self.fitted, trace):
            return None  # the whole caption will be unchecked
        over = self.fitted.risk(values, kinds) >= self._threshold("object", given(self.policy.rewind).threshold)
        return claims[objects[int(np.argmax(over))]] if over.any() else None

    # ------------------------------------------------------------------------------------------------------- helpers

    def _verdict(self, assessment: Assessment, doubtful: Sequence[Claim]) -> tuple[Verdict, str]:
        """The verdict on a caption with these flagged claims, and why."""
        why = [assessment.degenerate] * bool(assessment.degenerate)
        if doubtful:
            why.append(f"{UNSUPPORTED}{_enumerated(doubtful)}")
        if not assessment.trace.finished:
            why.append(CUT_OFF)
        elif ending := open_ending(given(assessment.caption).reading):
            why.append(f"{ENDS_OPEN}: {shortened(ending)!r}")
        if not why and (refused := given(assessment.caption).reading.refused):
            why.append(f"a sentence cannot be read: {refused[0][2]}")
        if not why and (missing := [kind for kind in assessment.not_judged if kind in self.policy.require]):
            known = ", ".join(f"{kind}s" for kind in self.fitted.kinds)
            reasons = [
                f" ({reason.rstrip('.')})" for kind in missing if (reason := self.fitted.left_out.get(cast(ClaimKind, kind)))
            ]
            names = " and ".join(f"{kind}s" for kind in missing)
            why.append(f"{names} not judged: the detector knows only {known}{''.join(reasons)}")
        return Verdict.FLAG if doubtful else Verdict.UNCHECKED if why else Verdict.PASS, "; ".join(why)

    def _refused(self) -> str:
        """Why nothing at all may be judged, or ""."""
        if self.detector is None:
            return self.unusable.partition(". ")[0] or "no detector is fitted for this model"
        gate = self.detector.gate
        return "" if gate is None or gate.usable else f"the detector is not usable for this model: {gate.reason}"

    def _not_finite(self, trace: GazeTrace, values: F64, kinds: Sequence[str]) -> str:
        """Which of the model's numbers is not finite, or ""."""
        if unknown := self.fitted.unknown(values, kinds):
            return f"the model gave no finite number for {unknown}"
        if not (np.isfinite(trace.logprobs).all() and np.isfinite(trace.segment_mass).all()):  # also what no feature reads
            return "the model gave no finite number for the caption's own tokens"
        return ""

    def _threshold(self, kind: str, rule: str | float | None) -> float:
        """The risk, before any answer, from which claims of a kind count as doubtful; by default the policy's own threshold."""
        return self.fitted.threshold(kind, self.policy.threshold if rule is None else rule)

    def _flag_threshold(self, kind: str) -> float:
        """The final risk from which claims of a kind are flagged: after the model's answers where the policy verifies."""
        return self.fitted.threshold(kind, self.policy.threshold, verified=self.policy.verify is not None)

    def _limits(self, claims: Sequence[Claim]) -> dict[str, float]:
        """`_flag_threshold` of each kind of these claims."""
        return {kind: self._flag_threshold(kind) for kind in {claim.kind for claim in claims}}

    def _counts_answers(self, kind: str, risk: float) -> bool:
        """Whether the model's answer counts for a claim of this kind and risk."""
        if self.fitted.kinds[cast(Kind, kind)].answer is None or kind == _NOT_ASKED:
            return False
        asking = given(self.policy.verify).threshold
        return risk >= (self._flag_threshold(kind) if asking is None else self._threshold(kind, asking))

    def _flags(self, claims: Sequence[Claim], risks: F64) -> list[bool]:
        """Which claims are flagged. If an object is flagged, its attributes and locations are not."""
        limits = self._limits(claims)
        over = [bool(risk >= limits[claim.kind]) for claim, risk in zip(claims, risks, strict=True)]
        absent = {claim.phrase for claim, flag in zip(claims, over, strict=True) if flag and claim.kind == "object"}
        return [
            flag and (claim.kind == "object" or claim.phrase not in absent) for claim, flag in zip(claims, over, strict=True)
        ]

    def _findings(self, assessment: Assessment, risks: F64, flags: Sequence[bool], log_odds: F64) -> tuple[Finding, ...]:
        """One finding per claim; reasons are given for claims over the threshold and for answers that count."""
        trace, claims = assessment.trace, assessment.claims
        limits = self._limits(claims)
        kinds = [claim.kind for claim, flag in zip(claims, flags, strict=True) if flag]
        reasons = iter(self.fitted.reasons(assessment.values[list(flags)], kinds))
        boxes = gaze_boxes(trace, [trace.tokens(claim.span.start, claim.span.end) for claim in claims])
        return tuple(
            Finding(
                claim=claim,
                risk=float(risk),
                flagged=flag,
                reasons=(next(reasons) if flag else ABSENT * bool(risk >= limits[claim.kind]))
                + self._answer_reason(claim.kind, answer),
                box=box,
                answer=None if np.isnan(answer) else float(logistic(answer)),
                threshold=float(limits[claim.kind]),
            )
            for claim, risk, flag, box, answer in zip(claims, risks, flags, boxes, log_odds, strict=True)
        )

    def _answer_reason(self, kind: str, log_odds: float) -> tuple[str, ...]:
        """In words: what the model answered; nothing when it was not asked, or where its answer hardly moves the risk."""
        if np.isnan(log_odds) or abs(given(self.fitted.kinds[cast(Kind, kind)].answer)[1] * log_odds) < MIN_ANSWER_EFFECT:
            return ()
        return (f"asked whether it is there, the model answers {'yes' if log_odds > 0 else 'no'}",)

    def _filtered(self, caption: str, verdict: Verdict) -> str:
        """The text that the policy lets through of a caption without flagged phrases to cut."""
        return "" if self.policy.on_flag == "abstain" and verdict != Verdict.PASS else caption

    def _report(
        self,
        caption: str,
        verdict: Verdict,
        reason: str,
        findings: tuple[Finding, ...],
        trace: GazeTrace | None,
        filtered: str,
    ) -> Report:
        report = Report(caption, verdict, reason, findings, self.policy.name, self.model, __version__, trace, filtered)
        return replace(report, model_name=self.model_name)


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
        claims = _judged_claims(self.judge.parse(text))
        return claims, [
            i
            for i, claim in enumerate(claims)
            if claim.kind == "object"
            and (ended or claim.end < len(text.rstrip()))
            and (claim.start, claim.end) not in self._judged
        ]

    def _may_complete_object(self, before: str, text: str) -> bool:
        """Whether a word ended here that can be the last one of an object: a quick test, where a parse costs more."""
        if text[len(before) : len(before) + 1].isalnum():
            return False  # it goes on with the last word
        last = _LAST_WORD.search(before)
        return self.judge.nlp is not None or (last is not None and may_end_thing(last[0]))

    def decide(self, trace: GazeTrace, claims: Sequence[Claim], objects: Sequence[int]) -> Claim | None:
        """Judge the objects that `extend` returned: the first doubtful claim, or None.

        Args:
            trace: Of the caption so far.
            claims: Its claims.
            objects: The numbers of those to judge.
        """
        doubtful = self.judge.doubtful(trace, claims, objects)
        self._judged |= {(claims[i].start, claims[i].end) for i in objects}
        end = max(claims[i].end for i in objects)
        self.committed = int(np.searchsorted(trace.offsets[:, 1], end, side="right"))
        return doubtful


def _judged_claims(caption: Caption) -> list[Claim]:
    """The claims of the kinds that detectors are fitted on."""
    return [claim for claim in caption.claims if claim.kind in JUDGED]


def _key(claim: Claim) -> tuple[str, str]:
    """What a claim says, wherever it stands."""
    return claim.kind, str(claim).lower()


def _distinct(claims: Sequence[Claim]) -> list[Claim]:
    """Each distinct claim where it stands first."""
    return list({_key(claim): claim for claim in reversed(claims)}.values())[::-1]


def _enumerated(claims: Sequence[Claim]) -> str:
    """Distinct claims in words, at most `MAX_NAMED` of them."""
    names = list(dict.fromkeys(shortened(str(claim)) for claim in claims))
    more = [f"{len(names) - MAX_NAMED} more"] * (len(names) > MAX_NAMED)
    return ", ".join(names[:MAX_NAMED] + more)


def _cut_spans(assessment: Assessment, doubtful: Sequence[Claim]) -> list[tuple[int, int]]:
    """The characters to cut: flagged claims, and objects of which nothing but the name would be left.

    The object was judged as part of its phrase. Where two or more of its attributes and locations are flagged, "a yellow star
    at the top" is no star that the image shows: cut down to "a star" it would sound true, so it goes whole. In a
    repetition loop every repeat of a flagged claim goes.
    """
    if assessment.degenerate:
        keys = {_key(claim) for claim in doubtful}
        doubtful = [claim for claim in given(assessment.caption).claims if _key(claim) in keys]
    said = Counter(claim.phrase for claim in dict.fromkeys(doubtful) if claim.kind != "object")
    spans = [(claim.start, claim.end) for claim in doubtful]
    return spans + [(phrase.start, phrase.end) for phrase, false in said.items() if false > 1]


def _outside(detector: Detector, trace: GazeTrace, values: F64 | None = None, phrases: Sequence[Phrase] = ()) -> str:
    """What of a caption lies outside of a detector's domain, with the figure; or "".

    Args:
        detector: The detector.
        trace: The caption's trace.
        values: (claims, F) features of its claims; without them only the image is compared.
        phrases: All its phrases.
    """
    if (domain := detector.domain) is None:
        return ""
    if values is None:
        return domain.outside(np.zeros((0, 0)), detector.heads, trace.image_state)
    return domain.outside(values, detector.heads, trace.image_state, features.wording_nll(trace, phrases))


def _no_evidence(trace: GazeTrace) -> str:
    """Why a trace is no evidence at all, or ""."""
    if len(trace) == 0:
        return "the caption is empty"
    if trace.segment_mass[..., SEGMENTS.index("image")].max() < MIN_IMAGE_MASS:  # False for NaN
        return "the gaze heads never attended to the image"
    return trace.grid.illegible()


def _nothing_claimed(caption: Caption) -> str:
    """Why a caption without claims is not judged."""
    if caption.reason is not None:
        return f"nothing of the caption is judged: {caption.reason}"
    return "the caption names nothing that could be checked"


def _uncovered(trace: GazeTrace, claims: Sequence[Claim]) -> str:
    """Which phrase of a claim has no token, or ""."""
    for claim in claims:
        for span in (claim.span, claim.phrase.head, *claim.phrase.attributes, claim.related):
            if span is not None and not trace.tokens(span.start, span.end):
                return f"no token covers {span.text!r}"
    return ""
