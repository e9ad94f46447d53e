"""Who watches? `GazeGuard`: around ``model.generate``, or over a caption that anything wrote.

guard = GazeGuard(model, processor, policy="mark")
ids = guard.generate(**inputs, max_new_tokens=100)      # as model.generate; guard.reports says what was seen
with guard.watch():
    ids = model.generate(**inputs, max_new_tokens=100)  # the same
report = guard.check(image, "In panel one there is a red star.")
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from gazeguard import __version__
from gazeguard.artifacts import DETECTOR_FILE
from gazeguard.attention.buffers import CapturedActivations, KeyLayout
from gazeguard.attention.logit_lens import LogitLens
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.self_test import Check, run_self_test
from gazeguard.attention.steering import STRENGTH, Mode, SteeringTarget, Target, undescribed_regions
from gazeguard.attention.trace_batch import TraceBatch, trace_batch
from gazeguard.attention.visual_keys import VisualKeys, visual_keys
from gazeguard.claims.parse import Claim, Parser, Phrase, claims, may_end_thing
from gazeguard.claims.removal import without
from gazeguard.decoding.rerank import RerankProcessor
from gazeguard.decoding.rewind import CommittedPrefix, RewindLoop, list_delimiters, rollback_points
from gazeguard.decoding.verification import AnswerTokens, answers, question, tails
from gazeguard.detection import features
from gazeguard.detection.calibration import logistic
from gazeguard.detection.detector import Detector
from gazeguard.errors import GazeGuardError, InputError, MismatchError, UnsupportedError
from gazeguard.heads.artifact import GazeHeads
from gazeguard.policy import Policy, load_policy
from gazeguard.report import Finding, Report, Verdict, gaze_boxes
from gazeguard.trace import SEGMENTS, GazeTrace
from gazeguard.vision.batch_grids import image_grids, one_image_per_row
from gazeguard.vision.encoding import EncodedBatch, check_prompt, encode
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.image_tokens import image_token_id
from gazeguard.vision.images import load_image
from gazeguard.vision.inputs import context_length, has_pixels, model_inputs
from gazeguard.vision.text import check_text, decode

HEADS_FILE = "heads.json"
DEFAULT_PROMPT = "Describe the picture."
_LAST_WORD = re.compile(r"[^\W_][\w'-]*$")
MAX_REASON = 300  # characters that a processor may say
UNSEEN = 0.01  # a caption whose gaze heads never gave the picture this share of attention was written without it

# Ways of generating that cannot be watched: what tells them apart, and the way out.
_REFUSED = (
    (
        "continuous batching, which takes no pictures",
        lambda c: c.cache_implementation == "paged",
        "generate, and check_all() for many captions at once",
    ),
    (
        "classifier-free guidance without a cache",
        lambda c: (c.guidance_scale or 1) != 1 and c.use_cache is False,
        "use_cache=True",
    ),
    ("token healing, which rewrites the prompt", lambda c: c.token_healing, "token_healing=False"),
)


# What a policy that rewinds cannot do beside.
_NOT_REWOUND = (
    ("beams while phrases are taken back", lambda c: (c.num_beams or 1) > 1, "num_beams=1, or a policy without rewind"),
    (
        "speculation while phrases are taken back",
        lambda c: c.prompt_lookup_num_tokens or c.is_assistant,
        "no prompt look-up, or a policy without rewind",
    ),
    (
        "guidance while phrases are taken back",
        lambda c: (c.guidance_scale or 1) != 1,
        "no guidance, or a policy without rewind",
    ),
    (
        "attentions or hidden states of words that may be taken back",
        lambda c: c.output_attentions or c.output_hidden_states,
        "neither of them, or a policy without rewind",
    ),
)

_OF_A_PASS = ("position_ids", "cache_position")  # tensors that a pass is given beside its prompts and their pictures
_NAMED = frozenset(inspect.signature(GenerationMixin.generate).parameters)  # arguments that configure nothing


def _ends(config: GenerationConfig) -> set[int]:
    ends = config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def _line(error: Exception) -> str:
    """What a processor says, in one line that is not too long."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:MAX_REASON]


def _answered(answer: float) -> tuple[str, ...]:
    """In words: the log-odds of yes that the model gave when it was asked; NaN when it was not."""
    return () if np.isnan(answer) else (f"asked again, the model says it is {'' if answer > 0 else 'not '}there",)


def _values(made: Any) -> Sequence[Any]:
    """What ``generate`` gave beside the ids, if anything."""
    return () if isinstance(made, Tensor) else tuple(made.values())


def _no_batches(*_: Any, **__: Any) -> None:
    raise UnsupportedError(
        "GazeGuard cannot watch generate_batch: continuous batching takes no pictures. Use generate, and check_all() for "
        "many captions at once."
    )


class _Part(NamedTuple):
    """Captions that go through the model together: which rows of the whole they are, and what it reads."""

    rows: Sequence[int]
    captions: Sequence[str]
    batch: EncodedBatch
    keys: VisualKeys
    grids: Sequence[ImageGrid]


class Prepared(NamedTuple):
    """Captions and their pictures as the model reads them: see `GazeGuard.prepare`.

    unchecked: by their numbers, the rows that it cannot read; parts: the others
    """

    unchecked: Mapping[int, Report]
    parts: Sequence[_Part]


class GazeGuard:
    """Watches a model's gaze heads while it writes, and says which phrases the picture does not support.

    policy:   the name of a policy, the path of one, or a `Policy`
    heads:    `GazeHeads` or a file of them; by default ``heads.json`` in the model's own folder
    detector: `Detector`, or a file or folder of one; by default ``detector.json`` in the model's own folder, where its
              own heads are used, too. Without one everything is watched, but nothing is judged: every verdict is *unchecked*.
    grid:     where the cells of every prompt lie, for a model whose layout no rule of `gazeguard.grid` knows
    nlp:      a spaCy pipeline that finds the things of a caption, in place of the rules for English; see `phrases.chunk`

    After each call ``reports`` holds one `Report` per written caption.
    Raises `UnsupportedError` for a model that cannot be watched, `MismatchError` for heads or a detector of another one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        policy: str | Path | Policy = "mark",
        heads: GazeHeads | str | Path | None = None,
        detector: Detector | str | Path | None = None,
        grid: ImageGrid | None = None,
        nlp: Parser | None = None,
    ) -> None:
        image_token_id(model)
        self.model, self.processor, self.grid, self.nlp = model, processor, grid, nlp
        self.policy = policy if isinstance(policy, Policy) else load_policy(policy)
        self.heads = heads if isinstance(heads, GazeHeads) else GazeHeads.from_pretrained(heads or self._own(HEADS_FILE))
        self.heads.check_model(model)
        if self.heads.unusable:
            raise UnsupportedError(f"These heads of {self.heads.model_class} are not worth watching. {self.heads.unusable}")
        if detector is None and heads is None and (own := Path(model.name_or_path) / DETECTOR_FILE).is_file():
            detector = own
        self.detector = Detector.from_pretrained(detector) if isinstance(detector, str | Path) else detector
        if self.detector is not None:
            self.detector.check_heads(self.heads)
        elif self.policy.rewind is not None:
            raise InputError(
                f"Policy {self.policy.name!r} takes back what a detector doubts, and none is known for this model. Fit one "
                "with gazeguard train, or choose a policy without rewind."
            )
        if self.policy.verify is not None:
            if self.detector is None or not self.detector.uses_answers:
                raise MismatchError(
                    f"Policy {self.policy.name!r} asks the model about what a detector doubts, and this guard has no detector "
                    "that has learnt what the answers are worth (answer, in detector.json). Fit one with gazeguard train "
                    "--verify, or choose a policy without verify."
                )
            self._words = AnswerTokens.from_tokenizer(processor.tokenizer)
            tails(model, processor, ["Is it there?"])  # says so now if it cannot be asked
        self.recorder = AttentionRecorder(model, self.heads.heads)
        self.reports: list[Report] = []
        self._look: SteeringTarget | None = None

    def _own(self, name: str) -> Path:
        path = Path(self.model.name_or_path) / name
        if not path.is_file():
            raise InputError(
                f"No gaze heads are known for {self.model.name_or_path or 'this model'}: there is no {path}. Find them once "
                "with find_heads(model, processor) and pass them as heads=."
            )
        return path

    # ------------------------------------------------------------------------------------------------------- live

    def generate(self, inputs: Tensor | None = None, **arguments: Any) -> Any:
        """`model.generate` with the same arguments and the same result; ``reports`` then holds what was seen.

        picture_sizes: for each prompt the (width, height) of its pictures, if gazed boxes are wanted in their pixels; by
        default boxes are in pixels of what the processor made of them
        """
        sizes = arguments.pop("picture_sizes", None)
        if isinstance(arguments.get("custom_generate"), str):
            raise UnsupportedError(
                "GazeGuard runs no code from elsewhere: custom_generate is the name of a repository. Pass a function of yours."
            )
        ids = inputs if inputs is not None else arguments.get("input_ids")
        if ids is None or ids.ndim != 2 or not ids.shape[1]:
            raise InputError("The prompt has no token ids: generate got inputs_embeds alone. Pass input_ids.")
        options = {name: value for name, value in arguments.items() if name not in _NAMED}
        config = self.model._prepare_generation_config(arguments.get("generation_config"), **options)[0]
        mask = arguments.get("attention_mask")
        if mask is None and config.pad_token_id is not None and config.pad_token_id not in _ends(config):
            mask = ids != config.pad_token_id  # as generate does

        def run(more: Sequence[LogitsProcessor], loop: RewindLoop | None) -> Any:
            own = arguments | {"return_dict_in_generate": True}
            if more:
                own["logits_processor"] = LogitsProcessorList([*more, *(arguments.get("logits_processor") or ())])
            if loop is not None:
                if other := next((name for name in ("custom_generate", "assistant_model") if own.get(name)), None):
                    raise UnsupportedError(
                        f"Policy {self.policy.name!r} takes phrases back in a decode loop of its own, which leaves no room for "
                        f"{other}. Leave that out, or choose a policy without rewind."
                    )
                own["custom_generate"], loop.streamer = loop, own.pop("streamer", None)
            return type(self.model).generate(self.model, inputs, **own)

        made = self._watched(run, ids, mask, arguments, config, sizes)
        return made if config.return_dict_in_generate or isinstance(made, Tensor) else made.sequences

    @contextmanager
    def watch(self) -> Iterator[GazeGuard]:
        """Inside, `model.generate` is watched; outside, the model is what it was."""
        if "generate" in self.model.__dict__:
            raise UnsupportedError("This model's generate is already wrapped. Leave the other watch first.")
        self.model.generate, self.model.generate_batch = self.generate, _no_batches
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
        picture_sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decode loop that ``generate(custom_generate=guard)`` runs: transformers' own, watched.

        transformers hands such a loop no streamer and no assistant; `generate` takes both.
        """
        if generation_config.prompt_lookup_num_tokens or generation_config.is_assistant:
            raise UnsupportedError("custom_generate=guard cannot speculate. Call guard.generate with the same arguments.")
        if model.config.is_encoder_decoder:
            raise UnsupportedError(
                "custom_generate=guard gets no prompt from an encoder-decoder. Call guard.generate with the same arguments."
            )
        times = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if times > 1 and self.grid is None and not one_image_per_row(model_kwargs, len(input_ids)):
            raise UnsupportedError(
                "custom_generate=guard gets the pictures of a prompt in another order when several captions or beams are "
                "written for it, and some prompt has not just one. Call guard.generate with the same arguments."
            )
        wants_dict = generation_config.return_dict_in_generate
        generation_config.return_dict_in_generate = True
        own = model._beam_search if (generation_config.num_beams or 1) > 1 else model._sample

        def run(more: Sequence[LogitsProcessor], loop: RewindLoop | None) -> Any:
            decode = own if loop is None else partial(loop, model)
            return decode(
                input_ids,
                logits_processor=LogitsProcessorList([*more, *logits_processor]),
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **model_kwargs,
            )

        mask = model_kwargs.get("attention_mask")
        made = self._watched(run, input_ids, mask, model_kwargs, generation_config, picture_sizes)
        return made if wants_dict else made.sequences

    @torch.no_grad()
    def _watched(
        self,
        run: Callable[[Sequence[LogitsProcessor], RewindLoop | None], Any],
        ids: Tensor,
        mask: Tensor | None,
        inputs: Mapping[str, Any],
        config: GenerationConfig,
        sizes: Sequence[Sequence[tuple[int, int]]] | None,
    ) -> Any:
        """What ``run`` generates after prompts of these ``ids`` (batch, P), watched; sets ``reports``.

        sizes: of the pictures of every prompt; ``ids`` may hold each prompt several times, one after the other
        """
        for what, is_so, way_out in (*_REFUSED, *(_NOT_REWOUND if self.policy.rewind else ())):
            if is_so(config):
                raise UnsupportedError(f"GazeGuard cannot watch {what}. Generate with {way_out}.")
        if self.policy.rewind is not None and self.model.config.is_encoder_decoder:
            raise UnsupportedError(
                f"Policy {self.policy.name!r} takes phrases back, which a guard around an encoder-decoder cannot do. Choose a "
                "policy without rewind."
            )
        if sizes is not None:
            sizes = [own for own in sizes for _ in range(ids.shape[0] // len(sizes))]
        ends = _ends(config)
        keys = visual_keys(self.model, inputs, ids, mask)
        grids = image_grids(self.model, self.processor, inputs, keys.ids, keys.mask, sizes, self.grid)
        with self.recorder as recorder:
            recorder.begin(KeyLayout.from_ids(*keys), reordered=(config.num_beams or 1) > 1)
            if self._look is not None:
                self._look.steer(recorder, grids)
            rerank = (
                None if self.policy.rerank is None else RerankProcessor(recorder, self.policy.rerank, self.processor.tokenizer)
            )
            if self.policy.rewind is None:
                loop, made = None, run([] if rerank is None else [rerank], None)
                beams = getattr(made, "beam_indices", None)
                rows, cells = recorder.collect(beams), self._cells(beams)
            else:
                judge = _Judge(self, grids, ends)
                loop = RewindLoop(judge, self.policy.rewind.budget, list_delimiters(self.processor.tokenizer), rerank)
                made = run([], loop)
                whole = judge.seen()
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name not in _OF_A_PASS}
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask.long()}
        written = (made if isinstance(made, Tensor) else made.sequences)[:, keys.last + 1 :].cpu().numpy()
        stops = [next((i for i, token in enumerate(row.tolist()) if token in ends), len(row)) for row in written]
        captions = [row[:stop] for row, stop in zip(written, stops, strict=True)]
        if loop is None:
            whole = self._seen(rows, cells, captions)
        prompted = self._prompted(keys, mask)
        self.reports = []
        for b, ids in enumerate(captions):
            text, offsets = decode(self.processor.tokenizer, ids)
            own = slice(len(ids)) if loop is None else loop.passes[b, : len(ids)].tolist()
            grid = grids[b * len(grids) // len(captions)]
            trace = self._trace(whole, b, own, ids, text, offsets, grid, finished=stops[b] < len(written[b]))
            reason = self._too_long(prompted[b * len(prompted) // len(captions)] + len(ids))
            self.reports.append(self.unchecked(text, reason, trace) if reason else self.judge(trace))
        if self.policy.verify is not None:
            cache = loop.cache if loop is not None else next((v for v in _values(made) if isinstance(v, Cache)), None)
            self.reports = self._verified(self.reports, given, cache)
        return made

    @contextmanager
    def steer(
        self,
        targets: Target | Sequence[Target],
        strength: float = STRENGTH,
        mode: Mode = "both",
        prompt: bool = True,
        image: int = 0,
    ) -> Iterator[GazeGuard]:
        """Inside, the gaze heads look where they are told, in whatever this guard generates or checks: see `SteeringTarget`.

        with guard.steer((0, 0, 200, 150)):
            guard.generate(**inputs, picture_sizes=[[picture.size]])
        with guard.steer({0: left, 20: right}):  # from the 20th new token on, the other one
            guard.caption(picture, "Describe a panel.")
        """
        before, self._look = self._look, SteeringTarget(targets, strength, mode, prompt, image)
        try:
            yield self
        finally:
            self._look = before

    def caption(self, image: Any, prompt: str = DEFAULT_PROMPT, **arguments: Any) -> Report:
        """Write and watch one caption of a picture (a path or a PIL image); ``arguments`` go to ``generate``."""
        picture = load_image(image)
        batch = encode(self.model, self.processor, [picture], [prompt])
        self.generate(**batch.inputs, **{"max_new_tokens": 256, "picture_sizes": [[picture.size]], **arguments})
        return self.reports[0]

    def find_missed_objects(
        self, image: Any, report: Report, regions: int = 2, prompt: str = "Name one object."
    ) -> list[Report]:
        """Before giving up on a place: name what lies where a caption has not been.

        The gaze heads are turned to the ``regions`` of the picture on which they rested least while things were named, and the
        model answers ``prompt`` once for each, in one batch. What passes and was not named before is returned, as a report of
        its own; the caption stays as it is. It costs a short generation, and is done only when it is called.
        """
        if report.trace is None or not report.findings:
            raise InputError("The report has no trace of a caption that names things, so nothing says where it has not been.")
        picture, trace = load_image(image), report.trace
        named = [finding.claim.phrase.head for finding in report.findings if finding.claim.kind == "object"]
        gaze = np.array([trace.gaze[trace.tokens(head.start, head.end).start].mean(0) for head in named])
        batch = encode(self.model, self.processor, [picture] * regions, [prompt] * regions)
        before = self.reports
        with self.steer(undescribed_regions(trace.grid, gaze, regions)):
            self.generate(**batch.inputs, max_new_tokens=24, do_sample=False, picture_sizes=[[picture.size]] * regions)
        made, self.reports = self.reports, before
        known, found = {head.text.lower() for head in named}, []
        for answer in made:
            things = {finding.claim.phrase.head.text.lower() for finding in answer.findings}
            if answer.verdict == Verdict.PASS and not things & known:
                found.append(answer)
                known |= things
        return found

    # ----------------------------------------------------------------------------------------------------- replay

    def check(self, image: Any, caption: str, prompt: str = DEFAULT_PROMPT) -> Report:
        """Judge a caption that anything wrote, by one teacher-forced pass. ``prompt`` is what it answers.

        An empty caption, one longer than the model's context, a picture that cannot be read or that the processor refuses,
        and a prompt that names special tokens are *unchecked*.
        """
        return self.check_all([image], [caption], prompt)[0]

    def check_all(
        self, images: Sequence[Any], captions: Sequence[str], prompt: str | Sequence[str] = DEFAULT_PROMPT
    ) -> list[Report]:
        """`check` for a batch of pictures with one caption each, in one pass; a row that cannot be used is *unchecked*.

        prompt: what every caption answers, or one prompt per caption
        """
        return self.check_prepared(self.prepare(images, captions, prompt))

    def prepare(self, images: Sequence[Any], captions: Sequence[str], prompt: str | Sequence[str] = DEFAULT_PROMPT) -> Prepared:
        """`check_all` up to the model's pass, for `check_prepared`: another thread can do it while the model is busy."""
        prompts = [prompt] * len(captions) if isinstance(prompt, str) else prompt
        unchecked: dict[int, Report] = {}
        pictures: dict[int, Image.Image] = {}
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            try:
                check_text(caption, "caption")
                if not caption.strip():
                    raise InputError("the caption is empty")
                check_prompt(self.processor, prompts[i])
                pictures[i] = load_image(image)
            except InputError as error:
                unchecked[i] = self.unchecked(caption if isinstance(caption, str) else "", str(error))
        made = self._encoded(list(pictures), pictures, captions, prompts)
        return Prepared(unchecked | made.unchecked, made.parts)

    @torch.no_grad()
    def check_prepared(self, prepared: Prepared) -> list[Report]:
        """The reports of `check_all`, in the order of the captions."""
        reports = dict(prepared.unchecked)
        for part in prepared.parts:
            reports |= zip(part.rows, self._replayed(part), strict=True)
        return [reports[i] for i in sorted(reports)]

    def _encoded(
        self, todo: Sequence[int], pictures: Mapping[int, Image.Image], captions: Sequence[str], prompts: Sequence[str]
    ) -> Prepared:
        """The rows ``todo``, as the model reads those that fit into its context."""
        if not todo:
            return Prepared({}, [])
        told = [captions[i] for i in todo]
        try:
            batch = encode(self.model, self.processor, [pictures[i] for i in todo], [prompts[i] for i in todo], told)
        except GazeGuardError:
            raise
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:  # one picture's shape, say, refused for all
            if len(todo) == 1:
                return Prepared({todo[0]: self.unchecked(told[0], f"the processor refuses it: {_line(error)}")}, [])
            halves = (todo[: len(todo) // 2], todo[len(todo) // 2 :])
            first, second = (self._encoded(half, pictures, captions, prompts) for half in halves)
            return Prepared(first.unchecked | second.unchecked, [*first.parts, *second.parts])
        keys = visual_keys(self.model, batch.prompt, batch.prompt_ids, batch.prompt_mask)
        prompted = self._prompted(keys, batch.prompt_mask)
        long = {
            i: self.unchecked(captions[i], reason)
            for i, before, ids in zip(todo, prompted, batch.caption_ids, strict=True)
            if (reason := self._too_long(before + len(ids)))
        }
        if long:
            rest = self._encoded([i for i in todo if i not in long], pictures, captions, prompts)
            return Prepared(long | rest.unchecked, rest.parts)
        sizes = [[pictures[i].size] for i in todo]
        grids = image_grids(self.model, self.processor, batch.inputs, keys.ids, keys.mask, sizes, self.grid)
        return Prepared({}, [_Part(todo, told, batch, keys, grids)])

    def _replayed(self, part: _Part) -> list[Report]:
        """Reports of a part's rows, from one teacher-forced pass."""
        batch, grids = part.batch, part.grids
        with self.recorder as recorder:
            recorder.begin(KeyLayout.from_ids(*part.keys))
            if self._look is not None:
                self._look.steer(recorder, grids)
            # What the recorder hears is judged; the model's own logits of every position would be the largest tensor of all.
            few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
            given = model_inputs(self.model, batch.inputs)
            if not has_pixels(given):
                raise InputError(
                    "The picture did not reach the model: the processor made no pixels that its forward takes. Use the "
                    "processor of this model."
                )
            out = self.model(**given, use_cache=self.policy.verify is not None, **few)
            rows, cells = recorder.collect(), self._cells()
        whole = self._seen(rows, cells, batch.caption_ids)
        told = zip(batch.caption_ids, part.captions, batch.offsets, grids, strict=True)
        traces = [self._trace(whole, row, slice(len(of[0])), *of, finished=True) for row, of in enumerate(told)]
        reports = [self.judge(trace) for trace in traces]
        if self.policy.verify is None:
            return reports
        cache = next((value for value in out.values() if isinstance(value, Cache)), None)
        return self._verified(reports, batch.prompt, cache)

    def _prompted(self, keys: VisualKeys, mask: Tensor | None) -> list[int]:
        """How many tokens, padding aside, each row's decoder reads before what is written."""
        if self.model.config.is_encoder_decoder or mask is None or mask.ndim != 2:
            return [keys.last + 1] * len(keys.ids)
        return mask[:, : keys.last + 1].sum(1).tolist()

    def _too_long(self, tokens: int) -> str:
        """Why so many tokens cannot be judged; empty when the model's context holds them."""
        limit = context_length(self.model)
        return f"prompt and caption have {tokens} tokens, more than the model's context of {limit}" if tokens > limit else ""

    def verify(self, inputs: Mapping[str, Any]) -> list[Check]:
        """Does watching work for this model? Measured on a batch as the processor makes it: see `gazeguard.doctor`."""
        return run_self_test(self.model, self.processor, inputs, heads=self.recorder.heads, known=self.grid)

    # ---------------------------------------------------------------------------------------------------- judging

    def _seen(self, rows: CapturedActivations, cells: LogitLens | None, captions: Sequence[NDArray[np.int64]]) -> TraceBatch:
        """What ``rows`` tell of captions of these ids, (T,) each, which were written one word per row."""
        longest = max(len(ids) for ids in captions)
        written = np.zeros((len(captions), longest), np.int64)
        for row, ids in zip(written, captions, strict=True):
            row[: len(ids)] = ids
        rows = CapturedActivations(*(tensor[:, :longest] for tensor in vars(rows).values()))
        told = torch.from_numpy(written).to(rows.hidden.device)
        return trace_batch(self.recorder.backbone, self.recorder.heads, rows, told, cells)

    def _cells(self, beams: Tensor | None = None) -> LogitLens | None:
        """What was heard of the image cells, if the detector asks for what lies under the gaze."""
        return (
            self.recorder.logit_lens(beams)
            if self.detector is None or self.detector.uses("attended_logprob", "internal_confidence")
            else None
        )

    def _trace(self, whole: TraceBatch, row: int, passes: Sequence[int] | slice, *of: Any, finished: bool) -> GazeTrace:
        return whole.trace(row, passes, *of, heads=self.recorder.heads, model=self.heads.model, finished=finished)

    def _verified(self, reports: Sequence[Report], inputs: Mapping[str, Any], cache: Cache | None) -> list[Report]:
        """The reports, judged anew with the model's answers to whether what they doubt is there.

        inputs: the prompts that the captions, as many for each, were written after; cache: see `gazeguard.ask.answers`
        """
        asked = {
            (b, finding.claim.phrase): question(finding.claim.phrase)
            for b, report in enumerate(reports)
            for finding in report.findings
            if self._asks(finding.claim.kind, finding.risk)
        }
        if not asked:
            return list(reports)
        told = sorted(set(asked.values()))
        ends = dict(zip(told, tails(self.model, self.processor, told), strict=True))
        rows = [b * len(inputs["input_ids"]) // len(reports) for b, _ in asked]
        said = answers(self.model, inputs, rows, [ends[text] for text in asked.values()], self._words, cache).tolist()
        heard: dict[int, dict[Phrase, float]] = {}
        for (b, phrase), answer in zip(asked, said, strict=True):
            heard.setdefault(b, {})[phrase] = answer
        return [self.judge(report.trace, heard[b]) if b in heard else report for b, report in enumerate(reports)]

    def _asks(self, kind: str, risk: float) -> bool:
        """Whether the model is asked about a thing for the sake of a claim of this kind."""
        if self.detector.kinds[kind].answer is None or kind == "location":
            return False
        own = self.policy.verify.threshold
        return risk >= self.detector.threshold(kind, self.policy.threshold if own is None else own)

    def judge(self, trace: GazeTrace, told: Mapping[Phrase, float] | None = None) -> Report:
        """The verdict on a trace: which phrases are doubtful, where the gaze was, and why.

        told: for things of the caption that the model was asked about, the log-odds of its yes against its no
        """
        if len(trace) == 0:
            return self.unchecked(trace.text, "the caption is empty")
        if trace.segment_mass[..., SEGMENTS.index("image")].max() < UNSEEN:
            return self.unchecked(trace.text, "the gaze heads never looked at the picture", trace)
        if not (said := claims(trace.text, self.nlp)):
            return self.unchecked(trace.text, "the caption names nothing that could be checked", trace)
        if self.detector is None:
            return self.unchecked(trace.text, "no detector is fitted for this model", trace)
        if not (said := [claim for claim in said if claim.kind in self.detector.kinds]):
            return self.unchecked(trace.text, "the detector knows none of the kinds of claims in the caption", trace)
        spans = [span for c in said for span in (c.span, c.phrase.head, *c.phrase.attributes, c.related) if span is not None]
        if strange := next((span for span in spans if not trace.tokens(span.start, span.end)), None):
            return self.unchecked(trace.text, f"no token covers {strange.text!r}", trace)
        kinds = [claim.kind for claim in said]
        x = features.features(trace, said)
        if unknown := self.detector.unknown(x, kinds):
            return self.unchecked(trace.text, f"the model gave no finite number for {unknown}", trace)
        if not (np.isfinite(trace.logprobs).all() and np.isfinite(trace.segment_mass).all()):  # also what no feature reads
            return self.unchecked(trace.text, "the model gave no finite number for the caption's own words", trace)
        risks = self.detector.risk(x, kinds)
        heard = np.full(len(said), np.nan)
        if told:
            asked = [claim.phrase in told and self._asks(*of) for claim, *of in zip(said, kinds, risks, strict=True)]
            heard[asked] = [told[claim.phrase] for claim, was in zip(said, asked, strict=True) if was]
            risks = self.detector.update_with_answers(risks, heard, kinds)
        if not np.isfinite(risks).all():
            return self.unchecked(trace.text, "the detector gave no finite risk", trace)
        limits = {kind: self.detector.threshold(kind, self.policy.threshold) for kind in set(kinds)}
        flagged = [risk >= limits[kind] for risk, kind in zip(risks, kinds, strict=True)]
        # Of a thing that is not there nobody asks for its colour or place.
        absent = {claim.phrase for claim, flag in zip(said, flagged, strict=True) if flag and claim.kind == "object"}
        flagged = [
            flag and (claim.kind == "object" or claim.phrase not in absent) for claim, flag in zip(said, flagged, strict=True)
        ]
        of_flagged = iter(self.detector.reasons(x[flagged], [kind for kind, flag in zip(kinds, flagged, strict=True) if flag]))
        boxes = gaze_boxes(trace, [trace.tokens(claim.span.start, claim.span.end) for claim in said])
        findings = tuple(
            Finding(
                claim=claim,
                risk=float(risk),
                flagged=bool(flag),
                reasons=(next(of_flagged) if flag else ()) + _answered(answer),
                box=box,
                answer=None if np.isnan(answer) else float(logistic(answer)),
            )
            for claim, risk, flag, box, answer in zip(said, risks, flagged, boxes, heard, strict=True)
        )
        doubtful = [str(finding.claim) for finding in findings if finding.flagged]
        if doubtful:
            return self._made(trace.text, Verdict.FLAG, f"not supported by the picture: {', '.join(doubtful)}", findings, trace)
        if not trace.finished:
            return self._made(trace.text, Verdict.UNCHECKED, "the caption was cut off by the length limit", findings, trace)
        return self._made(trace.text, Verdict.PASS, "", findings, trace)

    def _doubtful(self, trace: GazeTrace, said: Sequence[Claim], things: Sequence[int]) -> Claim | None:
        """Which of these ``things`` among a caption's claims is to be taken back, the first of them; None if none is."""
        kinds = [said[i].kind for i in things]
        x = features.features(trace, said, things)
        if self.detector.unknown(x, kinds):
            return None  # the caption will be unchecked
        own = self.policy.rewind.threshold
        limit = self.detector.threshold("object", self.policy.threshold if own is None else own)
        over = self.detector.risk(x, kinds) >= limit
        return said[things[int(np.argmax(over))]] if over.any() else None

    def unchecked(self, caption: str, reason: str, trace: GazeTrace | None = None) -> Report:
        """The report on a caption that could not be checked, with the reason; never a pass."""
        return self._made(caption, Verdict.UNCHECKED, reason, (), trace)

    def _made(
        self, caption: str, verdict: Verdict, reason: str, findings: tuple[Finding, ...], trace: GazeTrace | None
    ) -> Report:
        doubtful, filtered_caption = [(f.claim.start, f.claim.end) for f in findings if f.flagged], caption
        if self.policy.on_flag == "drop":
            filtered_caption = without(caption, doubtful)
        elif self.policy.on_flag == "abstain" and verdict != Verdict.PASS:
            filtered_caption = ""
        return Report(
            caption, verdict, reason, findings, self.policy.name, self.heads.model, __version__, trace, filtered_caption
        )


@dataclass(eq=False)
class _Known:
    """What has been judged of one row: the things (start, end), and how many first tokens hold no others."""

    judged: set[tuple[int, int]] = field(default_factory=set)
    tokens: int = 0
    length: int = 0  # of the row when it was looked at last
    text: str = ""


class _Judge:
    """What a guard knows of a batch while phrases may be taken back; the ``judge`` of a `RewindLoop`.

    A thing is judged once it is complete, that is once another word stands behind it, by the features that it has in the end:
    none of them looks ahead. Colours and places are not taken back: another one would be a guess.
    """

    def __init__(self, guard: GazeGuard, grids: Sequence[ImageGrid], ends: set[int]) -> None:
        self.guard, self.grids, self.ends = guard, grids, ends
        self._words: list[list[int]] = []  # that every pass wrote, one per row
        self._seen: TraceBatch | None = None  # of so many passes as have been asked for
        self._known: list[_Known] = []

    def __call__(self, rows: Sequence[tuple[list[int], list[int], bool] | None]) -> list[CommittedPrefix]:
        self._known = self._known or [_Known() for _ in rows]
        for b, row in enumerate(rows):
            if row is None:
                continue
            tokens, passes, _ = row
            if passes[-1] == len(self._words):
                self._words.append([0] * len(rows))
            self._words[passes[-1]][b] = tokens[-1]
            if self._seen is not None:  # another word than was there
                self._seen = self._seen.truncate(passes[-1])
        return [CommittedPrefix(0) if row is None else self._settled(b, *row) for b, row in enumerate(rows)]

    def seen(self, lies: bool = True) -> TraceBatch:
        """The numbers of all passes, (batch, passes); with what ``lies`` under the gaze, which is costly, or without."""
        guard, recorder, done = self.guard, self.guard.recorder, 0 if self._seen is None else len(self._seen)
        if done < len(self._words):
            words = torch.tensor(self._words[done:], device=guard.model.device).T
            new = trace_batch(recorder.backbone, recorder.heads, recorder.collect(start=done), words, None)
            self._seen = new if self._seen is None else self._seen.concatenate(new)
        return self._seen.with_logit_lens(guard._cells(), torch.tensor(self._words).T) if lies else self._seen

    def _settled(self, b: int, tokens: list[int], passes: list[int], ended: bool) -> CommittedPrefix:
        guard, known, tokenizer = self.guard, self._known[b], self.guard.processor.tokenizer
        ids = np.array(tokens[:-1] if tokens[-1] in self.ends else tokens, np.int64)

        def text_of(some: Sequence[int]) -> str:
            return tokenizer.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        if len(tokens) <= known.length:  # it was taken back
            known.text = text_of(tokens[:-1])
            known.judged = {thing for thing in known.judged if thing[1] <= len(known.text)}
            known.tokens = min(known.tokens, len(tokens) - 1)
        before, text = known.text, text_of(ids.tolist())
        known.length, known.text = len(tokens), text
        if not ended:
            if text[len(before) : len(before) + 1].isalnum():
                return CommittedPrefix(known.tokens)  # it goes on with the last word
            last = _LAST_WORD.search(before)
            if guard.nlp is None and not (last and may_end_thing(last[0])):
                return CommittedPrefix(known.tokens)
        said = claims(text, guard.nlp)
        new = [
            i
            for i, claim in enumerate(said)
            if (ended or claim.end < len(text.rstrip()))
            and claim.kind == "object"
            and (claim.start, claim.end) not in known.judged
        ]
        if not new:
            return CommittedPrefix(known.tokens)
        text, offsets = decode(tokenizer, ids)
        grid = self.grids[b * len(self.grids) // len(self._known)]
        whole = self.seen(lies=False).select(b, passes[: len(ids)])
        cells = guard._cells()
        whole = whole.with_logit_lens(None if cells is None else cells.select(slice(b, b + 1)), torch.from_numpy(ids)[None])
        trace = guard._trace(whole, 0, slice(None), ids, text, offsets, grid, finished=True)
        doubtful = guard._doubtful(trace, said, new)
        known.judged |= {(said[i].start, said[i].end) for i in new}
        was, known.tokens = known.tokens, int(np.searchsorted(offsets[:, 1], max(said[i].end for i in new), side="right"))
        if doubtful is None:
            return CommittedPrefix(known.tokens)
        at = trace.tokens(*rollback_points(doubtful, text))
        return CommittedPrefix(was, range(max(was, at.start), at.stop))
