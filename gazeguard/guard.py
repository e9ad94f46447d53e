"""GazeGuard: the public face. It joins the tracer, which records a model's gaze heads, and the judge of the traces.

guard = GazeGuard.from_pretrained("path or hub id", artifacts="folder or hub id", policy="mark")
ids = guard.generate(**inputs, max_new_tokens=100)      # as model.generate; then guard.reports
with guard.watch():
    ids = model.generate(**inputs, max_new_tokens=100)  # the same
report = guard.check(image, "In panel one there is a red star.")
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from gazeguard import _compat
from gazeguard.artifacts import DETECTOR_FILE, HEADS_FILE, find_file, push_folder
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.self_test import Check, run_self_test
from gazeguard.attention.steering import STRENGTH, Mode, SteeringTarget, Target, undescribed_regions
from gazeguard.attention.trace_batch import TraceBatch
from gazeguard.claims.parse import Parser
from gazeguard.claims.phrases import Phrase
from gazeguard.decoding.call import (
    GenerateCall,
    GeneratedIds,
    ImageSizes,
    cache_of,
    check_loop_supported,
    check_streamable,
    check_supported,
    end_tokens,
)
from gazeguard.decoding.let_through import LetThrough, let_through
from gazeguard.decoding.rerank import RerankProcessor
from gazeguard.decoding.rewind import CommittedPrefix, Draft, RewindLoop, list_delimiters, list_ends, rollback_span
from gazeguard.decoding.verification import SelfVerification
from gazeguard.detection.detector import Detector
from gazeguard.detection.rerank_evidence import with_measured_strengths
from gazeguard.errors import ArtifactError, InputError, MismatchError, PolicyError, UnsupportedError, given
from gazeguard.heads.artifact import GazeHeads
from gazeguard.judge import Assessment, Judge, PrefixJudge
from gazeguard.loading import load
from gazeguard.policy import Policy, policy_names
from gazeguard.prompts import DEFAULT_PROMPT
from gazeguard.replay.comparison import Comparison
from gazeguard.report import Report, Verdict
from gazeguard.trace import GazeTrace
from gazeguard.tracing import DraftTraces, Prepared, Prompts, Tracer
from gazeguard.vision.encoding import check_processor, encode
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.image_tokens import image_token_id
from gazeguard.vision.images import BACKGROUND, load_image

LOGGER = logging.getLogger("gazeguard")


class Fittable:
    """A guard's method that fits its own detector."""

    model: PreTrainedModel
    processor: Any
    tracer: Tracer
    judge: Judge

    def fit(self, folder: str | Path, **options: Any) -> Any:
        """Fit a detector to this model without labels, and use it from now on.

        Args:
            folder: Where the gaze heads, the detector and their card go.
            **options: Arguments of `gazeguard.fit` (``images``, ``captions``, ``budget``, ``prompt``, ...).

        Returns:
            The gaze heads, the detector and figures: `gazeguard.fitting.run.Fitted`.
        """
        run = import_module("gazeguard.fitting.run")  # it uses the guard, so that it is only imported when it is called
        fitted = run.fit(self.model, self.processor, folder, **{"heads": self.tracer.heads, **options})
        self.judge = replace(self.judge, detector=fitted.detector)
        return fitted


class GazeGuard(Fittable):
    """Watches a model's gaze heads while it writes, and says which phrases the image does not support.

    The ids that ``generate`` returns decode to ``report.filtered_caption``, which is what the policy lets through. Under
    ``on_flag: keep`` it is the caption itself; under ``drop``, without flagged phrases (an *unchecked* caption stays
    whole, since nothing is flagged); under ``abstain``, the caption if its verdict is *pass*, else "".

    One guard serves one thread at a time. If two guards use one model at the same moment, the second one is refused.

    Attributes:
        model: The model.
        processor: Its processor.
        tracer: Records its gaze heads.
        judge: Judges the traces; ``guard.judge(trace)`` returns the report on a trace.
        verification: Asks the model about doubtful phrases; None under a policy that does not verify.
        reports: One per caption of the last ``generate``, watched ``model.generate`` or ``caption``; others return theirs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin | None = None,
        policy: str | Path | Policy = "mark",
        heads: GazeHeads | str | Path | None = None,
        detector: Detector | str | Path | None = None,
        grid: ImageGrid | None = None,
        nlp: Parser | None = None,
        artifacts: str | Path | None = None,
        nouns: Iterable[str] = (),
        background: str = BACKGROUND,
    ) -> None:
        """Join a loaded model with its artifacts.

        Args:
            model, processor: A vision-language model of transformers and its processor.
            policy: The name or path of a policy, or a `Policy`.
            heads: `GazeHeads`, or their file, folder or hub id; by default those of the artifacts.
            detector: The same for a `Detector`, by default from where the heads are; without one all captions are *unchecked*.
            grid: The positions of the image tokens, for a model whose layout no rule of `gazeguard.vision` knows.
            nlp: A spaCy pipeline that tags the caption's words instead of the package's own tagger.
            artifacts: Folder or hub id with ``heads.json`` and ``detector.json``; by default the model's own folder.
            nouns: Nouns that count as objects although the parser takes them for abstract ones ("radiation").
            background: The colour behind transparent images.

        Raises:
            InputError: An argument has the wrong type, or there are no gaze heads.
            UnsupportedError: The model's attention cannot be recorded.
            MismatchError: Heads or detector belong to another model, or the detector lacks what the policy needs.
            PolicyError: The policy is invalid, or reranks by evidence that was not measured for the model or does not help it.
        """
        _check_kinds(model, processor)
        self.model, self.processor = model, cast(Any, processor)
        gaze_heads, judging = _find_artifacts(model, heads, detector, artifacts)
        rules = _check_fit(model, gaze_heads, judging, _as_policy(policy))
        self.verification = SelfVerification.for_model(model, processor) if rules.verify is not None else None
        lens = judging is None or judging.uses_lens
        self.tracer = Tracer(model, processor, gaze_heads, grid, lens, background=background)
        self.tracer.recorder.read_layer(rules.rerank.layer if rules.rerank is not None else None)
        self.judge = Judge(judging, rules, gaze_heads.model, nlp, frozenset(nouns), _model_name(model), gaze_heads.unusable)
        self.reports: list[Report] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        artifacts: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        processor: str | None = None,
        **options: Any,
    ) -> GazeGuard:
        """Load a model, its processor and its artifacts.

        Args:
            model: Folder or hub id of a vision-language model, or "lab".
            artifacts: Folder or hub id of its gaze heads and detector; by default the model's own folder.
            device: Where the model goes; "auto" takes the GPU if there is one.
            dtype: Data type of the weights; "auto" takes the checkpoint's.
            device_map: transformers' distribution over several devices, instead of `device`.
            processor: "module:attribute" of your own processor, whose code runs; by default the checkpoint's.
            **options: Of the constructor: ``policy``, ``heads``, ``detector``, ``grid``, ``nlp``, ``background``, ``nouns``.
        """
        loaded = load(model, device=device, dtype=dtype, device_map=device_map, processor=processor)
        return cls(*loaded, artifacts=artifacts, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``heads.json``, ``detector.json`` if there is a detector, and its card into a folder."""
        self.heads.save_pretrained(folder)
        if self.detector is not None:
            self.detector.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **upload: Any) -> str:
        """Upload what `save_pretrained` writes to the hub; ``upload`` as for `Detector.push_to_hub`."""
        return push_folder(self.save_pretrained, repo_id, **upload)

    def __repr__(self) -> str:
        """One line: model, policy, number of heads, detector."""
        kinds = "no detector" if self.detector is None else f"detector of {', '.join(self.detector.kinds)}"
        parts = (type(self.model).__name__, f"policy {self.policy.name!r}", f"{len(self.heads.heads)} gaze heads", kinds)
        return f"GazeGuard({', '.join(parts)})"

    @property
    def heads(self) -> GazeHeads:
        """The gaze heads."""
        return self.tracer.heads

    @property
    def detector(self) -> Detector | None:
        """The detector, if there is one."""
        return self.judge.detector

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self.judge.policy

    # ----------------------------------------------------------------------------------------------------- generate

    def generate(self, inputs: Tensor | None = None, **arguments: Any) -> Any:
        """Run `model.generate` with the same arguments and the same result, and put the reports into ``reports``.

        A caption that the policy changes is encoded again.

        Args:
            inputs: The prompts' ids, if not given as ``input_ids``.
            **arguments: Those of ``model.generate``; and ``picture_sizes``, for each prompt the (width, height) of its images,
                which gives attended boxes in their pixels. By default boxes are in pixels of the processed images.
        """
        output, self.reports = self.generate_with_reports(inputs, **arguments)
        return output

    def generate_with_reports(self, inputs: Tensor | None = None, **arguments: Any) -> tuple[Any, list[Report]]:
        """Run `generate`, and return its result together with one report per caption."""
        watched = _watched(self, GenerateCall.from_generate(self.model, inputs, arguments))
        return watched.result(self), watched.reports

    @contextmanager
    def watch(self) -> Iterator[GazeGuard]:
        """Inside, ``model.generate`` is `generate`; outside, the model is what it was. Earlier reports go."""
        if "generate" in self.model.__dict__:
            raise UnsupportedError("This model's generate is already wrapped. Leave the other watch first.")
        self.reports, self.model.generate, self.model.generate_batch = [], self.generate, _no_continuous_batching
        try:
            yield self
        finally:
            del self.model.generate, self.model.generate_batch

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        picture_sizes: ImageSizes | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decode loop that ``generate(custom_generate=guard)`` runs: transformers' own, watched. Streamers are served."""
        arguments = _compat.arguments_of_generate(self)
        check_loop_supported(generation_config, model.config.is_encoder_decoder, arguments)
        loop = (input_ids, logits_processor, stopping_criteria, generation_config, picture_sizes, model_kwargs, arguments)
        watched = _watched(self, GenerateCall.from_loop(model, *loop))
        self.reports = watched.reports
        return watched.result(self)

    def caption(self, image: Any, prompt: str = DEFAULT_PROMPT, **arguments: Any) -> Report:
        """Generate and watch one caption of an image (a path or a PIL image); ``arguments`` go to `generate`."""
        loaded = load_image(image, self.tracer.background)
        inputs = encode(self.model, self.processor, [loaded], [prompt]).inputs
        self.generate(**inputs, **{"max_new_tokens": 256, "picture_sizes": [[loaded.size]], **arguments})
        return self.reports[0]

    def compare(self, policies: Iterable[Any], image: Any, prompt: str = DEFAULT_PROMPT, **arguments: Any) -> Comparison:
        """Run `caption` on one image under each of several policies, with the same heads and detector."""
        return _compare(self, policies, load_image(image, self.tracer.background), prompt, arguments)

    # ----------------------------------------------------------------------------------------------------- steering

    @contextmanager
    def steer(
        self,
        targets: Target | Sequence[Target],
        strength: float = STRENGTH,
        mode: Mode = "both",
        prompt: bool = True,
        image: int = 0,
    ) -> Iterator[GazeGuard]:
        """Steer the attention of usable gaze heads while this guard works in the block; arguments of `SteeringTarget`.

        with guard.steer({0: left, 20: right}):  # two boxes, the other one from the 20th new token on
            guard.caption(image, "Describe a panel.")
        """
        self.heads.check_usable()
        with self.tracer.steer(SteeringTarget(targets, strength, mode, prompt, image)):
            yield self

    def find_missed_objects(
        self, image: Any, report: Report, regions: int = 2, prompt: str = "Name one object."
    ) -> list[Report]:
        """Find objects that a caption leaves out, by a short generation.

        It steers the gaze heads to the regions of the image that they attended to least while the caption named objects, and
        lets the model answer `prompt` once for each region, in one batch.

        Returns:
            Reports on the answers that pass and name a new object. `report`, the report on the image's caption, is not changed.

        Raises:
            InputError: The report has no trace of a caption that names objects.
        """
        return _missed_objects(self, load_image(image, self.tracer.background), report, regions, prompt)

    # -------------------------------------------------------------------------------------------------------- check

    def check(self, image: Any, caption: str, prompt: str = DEFAULT_PROMPT) -> Report:
        """Judge a caption by any author with one teacher-forced pass. ``prompt`` is the question that it answers.

        Empty captions, captions beyond the model's context, bad images and prompts with special tokens are *unchecked*.
        """
        return self.check_all([image], [caption], prompt)[0]

    def check_all(
        self, images: Sequence[Any], captions: Sequence[str], prompt: str | Sequence[str] = DEFAULT_PROMPT
    ) -> list[Report]:
        """Run `check` on a batch, in one pass; ``prompt`` is one for all, or one per caption. Captions may share an image."""
        prompts = [prompt] * len(captions) if isinstance(prompt, str) else prompt
        return self.check_prepared(self.tracer.prepare(images, captions, prompts, packed=True))

    def prepare(self, images: Sequence[Any], captions: Sequence[str], prompt: str | Sequence[str] = DEFAULT_PROMPT) -> Prepared:
        """Captions in rows of their own for `check_prepared`; see `Tracer.prepare`."""
        return self.tracer.prepare(images, captions, [prompt] * len(captions) if isinstance(prompt, str) else prompt)

    def check_prepared(self, prepared: Prepared) -> list[Report]:
        """The reports of `check_all`, in the order of the captions; another thread can prepare them."""
        reports = {i: self.unchecked(*row) for i, row in prepared.unchecked.items()}
        for part in prepared.parts:
            traces, cache = self.tracer.replay(part, use_cache=self.verification is not None)
            judged = list(map(self.judge.assess, traces))
            reports |= zip(part.rows, _reports(self, judged, part.batch.prompt, part.batch.rows, cache), strict=True)
        return [reports[i] for i in sorted(reports)]

    def unchecked(self, caption: str, reason: str, trace: GazeTrace | None = None) -> Report:
        """The report on a caption that could not be checked, with the reason; never a pass."""
        return self.judge.unchecked(caption, reason, trace)

    def self_test(self, inputs: Mapping[str, Any]) -> list[Check]:
        """Test on a batch, as the processor makes it, whether watching works for this model: see `run_self_test`."""
        return run_self_test(self.model, self.processor, inputs, heads=self.tracer.recorder.heads, known=self.tracer.grid)


# ---------------------------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def _watched(guard: GazeGuard, call: GenerateCall) -> _Watched:
    """Run a call of generate, and judge its captions."""
    tracer = guard.tracer
    check_streamable(guard.policy, call.streams)
    check_supported(call.config, guard.policy, guard.model.config.is_encoder_decoder)
    if not end_tokens(call.config):
        LOGGER.warning(
            "The generation config of %s has no eos_token_id: every caption runs to the length limit, and what is written "
            "behind its end is judged, too. Set model.generation_config.eos_token_id, or pass eos_token_id=...",
            type(guard.model).__name__,
        )
    prompts = tracer.prompts(call.inputs, call.ids, call.mask, call.image_sizes)
    decoded = _decode(guard, call, prompts) if guard.policy.rewind is None else _decode_with_rewind(guard, call, prompts)
    traces = tracer.traces(decoded.batch, decoded.captions, prompts, decoded.passes)
    assessments, rows = [], [number * len(prompts.lengths) // len(traces) for number in range(len(traces))]
    for row, trace in zip(rows, traces, strict=True):
        reason = tracer.unreadable(prompts, row, trace.token_ids)
        assessments.append(Assessment(trace, reason) if reason else guard.judge.assess(trace))
    reports = _reports(guard, assessments, call.prompts(), rows, decoded.cache)
    return _Watched(call, decoded.output, prompts.start, decoded.captions, reports)


class _Watched(NamedTuple):
    """A watched call of generate: what it gave, where the captions begin in it, the captions, and the reports on them."""

    call: GenerateCall
    output: Any
    start: int
    captions: Sequence[GeneratedIds]
    reports: list[Report]

    def result(self, guard: GazeGuard) -> Any:
        """What the caller gets: the output, as far as the policy lets it through."""
        pairs = zip(self.reports, self.captions, strict=True)
        passed = [LetThrough(report.caption, report.filtered_caption, caption.finished) for report, caption in pairs]
        output = let_through(self.output, self.start, passed, self.call.config, guard.processor.tokenizer)
        return self.call.result(output)


def _reports(
    guard: GazeGuard,
    assessments: Sequence[Assessment],
    inputs: Mapping[str, Any],
    rows: Sequence[int],
    cache: Cache | None,
) -> list[Report]:
    """The reports on captions; where the policy verifies, with the model's answers about what is doubtful.

    Args:
        guard: Whose policy it is.
        assessments: Of the captions.
        inputs: Their prompts.
        rows: For each caption its prompt.
        cache: Of the pass that generated or replayed the captions.
    """
    answers: dict[int, dict[Phrase, float]] = {}
    if guard.verification is not None:
        asked = [(number, phrase) for number, each in enumerate(assessments) for phrase in guard.judge.questions(each)]
        about, phrases = [rows[number] for number, _ in asked], [phrase for _, phrase in asked]
        log_odds = guard.verification.log_odds(inputs, about, phrases, cache) if asked else []
        for (number, phrase), answer in zip(asked, log_odds, strict=True):
            answers.setdefault(number, {})[phrase] = answer
    return [guard.judge.report(each, answers.get(number)) for number, each in enumerate(assessments)]


class _Decoded(NamedTuple):
    """What a call of generate gave: its output, the captions, their numbers, the pass of each token, and the cache."""

    output: Any
    captions: Sequence[GeneratedIds]
    batch: TraceBatch
    passes: Sequence[Sequence[int]] | None
    cache: Cache | None


class _Reviewer:
    """The reviewer of a `RewindLoop`: traces of the drafts, judged."""

    def __init__(self, judge: Judge, drafts: DraftTraces, ends: set[int]) -> None:
        self.judge, self.drafts, self.ends = judge, drafts, ends
        self.prefixes: list[PrefixJudge] = []

    def __call__(self, drafts: Sequence[Draft | None]) -> list[CommittedPrefix]:
        self.prefixes = self.prefixes or [PrefixJudge(self.judge) for _ in drafts]
        self.drafts.update(drafts)
        return [CommittedPrefix(0) if draft is None else self._reviewed(row, draft) for row, draft in enumerate(drafts)]

    def _reviewed(self, row: int, draft: Draft) -> CommittedPrefix:
        prefix, tokens = self.prefixes[row], draft.tokens
        ids = np.array(tokens[:-1] if tokens[-1] in self.ends else tokens, np.int64)
        if len(tokens) <= prefix.length:  # it was rolled back
            prefix.roll_back(self._text(tokens[:-1]), len(tokens) - 1)
        committed = prefix.committed
        claims, objects = prefix.extend(self._text(ids.tolist()), len(tokens), draft.ended)
        if not objects:
            return CommittedPrefix(committed)
        trace = self.drafts.trace(row, draft, ids)
        if (doubtful := prefix.decide(trace, claims, objects)) is None:
            return CommittedPrefix(prefix.committed)
        points = trace.tokens(*rollback_span(doubtful, trace.text))
        return CommittedPrefix(committed, range(max(committed, points.start), points.stop))

    def _text(self, ids: Sequence[int]) -> str:
        tokenizer = self.drafts.tracer.processor.tokenizer
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _reranker(guard: GazeGuard, recorder: AttentionRecorder) -> RerankProcessor | None:
    rules = guard.policy.rerank
    return None if rules is None else RerankProcessor(recorder, rules, guard.processor.tokenizer)


def _decode(guard: GazeGuard, call: GenerateCall, prompts: Prompts) -> _Decoded:
    """Generate in transformers' own loop."""
    with guard.tracer.record(prompts, reordered=call.beams > 1) as recorder:
        rerank = _reranker(guard, recorder)
        output = call.run([] if rerank is None else [rerank], None)
        captured = guard.tracer.capture(getattr(output, "beam_indices", None))
    captions = call.captions(output, prompts.start)
    batch = guard.tracer.trace_batch(captured, [caption.ids for caption in captions])
    return _Decoded(output, captions, batch, None, cache_of(output))


def _decode_with_rewind(guard: GazeGuard, call: GenerateCall, prompts: Prompts) -> _Decoded:
    """Generate in a loop that rolls doubtful phrases back."""
    with guard.tracer.record(prompts) as recorder:
        drafts = DraftTraces(guard.tracer, prompts)
        tokenizer, ends = guard.processor.tokenizer, end_tokens(call.config)
        reviewer, budget = _Reviewer(guard.judge, drafts, ends), given(guard.policy.rewind).budget
        loop = RewindLoop(reviewer, budget, list_delimiters(tokenizer), _reranker(guard, recorder))
        loop.list_ends = [*list_ends(tokenizer), *ends]
        output = call.run([], loop)
        batch = drafts.trace_batch()
    captions = call.captions(output, prompts.start)
    passes = [row[: len(caption.ids)] for row, caption in zip(given(loop.passes).tolist(), captions, strict=True)]
    return _Decoded(output, captions, batch, passes, loop.cache)


def _compare(
    guard: GazeGuard, policies: Iterable[Any], image: Image.Image, prompt: str, arguments: Mapping[str, Any]
) -> Comparison:
    """`GazeGuard.compare`."""
    judge, tracer = guard.judge, guard.tracer
    shared: dict[str, Any] = {"heads": guard.heads, "detector": guard.detector, "grid": tracer.grid, "nlp": judge.nlp}
    shared |= {"nouns": judge.nouns, "background": tracer.background}
    guards = [GazeGuard(guard.model, guard.processor, policy, **shared) for policy in policies]
    return Comparison(image, tuple(each.caption(image, prompt, **arguments) for each in guards))


def _missed_objects(guard: GazeGuard, image: Image.Image, report: Report, regions: int, prompt: str) -> list[Report]:
    """`GazeGuard.find_missed_objects`."""
    if report.trace is None or not report.findings:
        raise InputError("The report has no trace of a caption that names objects, so nothing says where it has not been.")
    trace, named = report.trace, [f.claim.phrase.head for f in report.findings if f.claim.kind == "object"]
    gaze = np.array([trace.gaze[trace.tokens(head.start, head.end).start].mean(0) for head in named])
    inputs = encode(guard.model, guard.processor, [image] * regions, [prompt] * regions).inputs
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "picture_sizes": [[image.size]] * regions}
    with guard.steer(undescribed_regions(trace.grid, gaze, regions)):
        _, answers = guard.generate_with_reports(**inputs, **options)
    known, new = {head.text.lower() for head in named}, []
    for answer in answers:
        objects = {finding.claim.phrase.head.text.lower() for finding in answer.findings}
        if answer.verdict == Verdict.PASS and not objects & known:
            new.append(answer)
            known |= objects
    return new


def _no_continuous_batching(*_: Any, **__: Any) -> None:
    raise UnsupportedError(
        "GazeGuard cannot watch generate_batch: continuous batching takes no images. Use generate, and check_all() for many "
        "captions at once."
    )


# ----------------------------------------------------------------------------------------------------------- opening


def _check_kinds(model: Any, processor: Any) -> None:
    """Raise `InputError` where something else stands in the place of a model or its processor."""
    if isinstance(model, str | Path):
        raise InputError(
            f"GazeGuard got {str(model)!r} in place of a model. Use GazeGuard.from_pretrained({str(model)!r}), which loads it."
        )
    if not (isinstance(getattr(model, "config", None), PretrainedConfig) and hasattr(model, "generate")):
        raise InputError(
            f"GazeGuard got a {type(model).__name__} in place of a model; expected a vision-language model of transformers. "
            "Load one with GazeGuard.from_pretrained(...) or AutoModelForImageTextToText."
        )
    image_token_id(model)
    check_processor(processor)


def _model_name(model: PreTrainedModel) -> str:
    """The hub id of a model; for a model from a folder, its class and the folder's name without the path."""
    name, kind = str(model.name_or_path or ""), type(model).__name__
    return f"{kind} from {Path(name).resolve().name}" if name and Path(name).exists() else name or kind


def _as_policy(policy: Any) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str | Path):
        return Policy.load(policy)
    raise PolicyError(
        f"policy is {policy!r:.80}; expected the name of a policy ({', '.join(policy_names())}), the path of a .yaml file, or "
        "a Policy."
    )


def _find_artifacts(model: PreTrainedModel, heads: Any, detector: Any, artifacts: Any) -> tuple[GazeHeads, Detector | None]:
    """The gaze heads and the detector, given or beside one another; no detector where the heads are unusable."""
    for name, value, kind in (("heads", heads, GazeHeads), ("detector", detector, Detector)):
        if not isinstance(value, kind | str | Path | None):
            raise InputError(f"{name} is {value!r:.80}; expected {kind.__name__}, or the path or hub id of such a file.")
    source = model.name_or_path if artifacts is None else artifacts
    if detector is None and (heads is None or artifacts is not None):
        detector = _optional(source, DETECTOR_FILE, remote=artifacts is not None)
    if heads is None and (heads := _optional(source, HEADS_FILE, remote=artifacts is not None)) is None:
        name = model.name_or_path or f"this {type(model).__name__}"
        where = "" if artifacts is None else f" in {artifacts}"
        raise InputError(
            f"No gaze heads for {name}{where}. Run `gazeguard fit {model.name_or_path or 'MODEL'} --out DIR`, then pass "
            "`--artifacts DIR`; in Python gazeguard.fit(model, processor, DIR) finds them, then pass artifacts=DIR."
        )
    heads = heads if isinstance(heads, GazeHeads) else GazeHeads.from_pretrained(heads)
    detector = Detector.from_pretrained(detector) if isinstance(detector, str | Path) else detector
    return heads, None if heads.unusable else detector


def _optional(source: str | Path, name: str, remote: bool) -> Path | None:
    """A file of a folder, or of a hub repository where that may be asked; None where there is none."""
    if Path(source).is_dir() or not remote:
        return path if (path := Path(source) / name).is_file() else None
    try:
        return path if (path := find_file(source, name)).is_file() else None
    except ArtifactError as error:
        if type(error.__cause__).__name__ == "EntryNotFoundError":  # the repository is there, the file is not
            return None
        raise


def _check_fit(model: PreTrainedModel, heads: GazeHeads, detector: Detector | None, policy: Policy) -> Policy:
    """Raise unless model, heads, detector and policy belong together; the policy with the strengths measured for rerank."""
    heads.check_model(model)
    if detector is not None:
        detector.check_heads(heads)
    elif policy.rewind is not None:
        advice = heads.unusable or "Fit one with gazeguard fit."
        raise InputError(
            f"Policy {policy.name!r} rolls back what a detector doubts, and there is none for this model. {advice} Or choose a "
            "policy without rewind."
        )
    if policy.verify is not None and (detector is None or not detector.uses_answers):
        raise MismatchError(
            f"Policy {policy.name!r} asks the model about what a detector doubts, and this guard has no detector that has "
            "learnt what the answers are worth (answer, in detector.json). Fit one with gazeguard fit (or train --verify), or "
            "choose a policy without verify."
        )
    return with_measured_strengths(policy, None if detector is None else detector.rerank)
