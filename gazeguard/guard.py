"""Who watches? `GazeGuard`: around ``model.generate``, or over a caption that anything wrote.

guard = GazeGuard(model, processor, policy="mark")
ids = guard.generate(**inputs, max_new_tokens=100)      # as model.generate; guard.reports says what was seen
with guard.watch():
    ids = model.generate(**inputs, max_new_tokens=100)  # the same
report = guard.check(image, "In panel one there is a red star.")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

from gazeguard import __version__, features
from gazeguard.decode import RerankProcessor
from gazeguard.detector import FILE_NAME as DETECTOR_FILE
from gazeguard.detector import Detector
from gazeguard.doctor import Check, examine
from gazeguard.errors import InputError, UnsupportedError
from gazeguard.grid import ImageGrid
from gazeguard.heads import GazeHeads
from gazeguard.inputs import decode, encode, grids_of, has_pixels, image_token_id, load_image, model_inputs
from gazeguard.phrases import Parser, claims
from gazeguard.policy import Policy, load_policy
from gazeguard.repair import without
from gazeguard.report import Finding, Report, Verdict, gaze_boxes
from gazeguard.steer import STRENGTH, Look, Mode, Target
from gazeguard.tap import Prompts, Rows, Tap, content, judge_words, keys_of
from gazeguard.trace import SHARES, GazeTrace

HEADS_FILE = "heads.json"
DEFAULT_PROMPT = "Describe the picture."
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


_NAMED = frozenset(inspect.signature(GenerationMixin.generate).parameters)  # arguments that configure nothing


def _ends(config: GenerationConfig) -> set[int]:
    ends = config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def _no_batches(*_: Any, **__: Any) -> None:
    raise UnsupportedError(
        "GazeGuard cannot watch generate_batch: continuous batching takes no pictures. Use generate, and check_all() for "
        "many captions at once."
    )


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
        if self.policy.rewind is not None:
            raise UnsupportedError(f"Policy {self.policy.name!r} rewinds, which this version does not do. Leave rewind out.")
        self.heads = heads if isinstance(heads, GazeHeads) else GazeHeads.load(heads or self._own(HEADS_FILE))
        self.heads.check_model(model)
        if self.heads.unusable:
            raise UnsupportedError(self.heads.unusable)
        if detector is None and heads is None and (own := Path(model.name_or_path) / DETECTOR_FILE).is_file():
            detector = own
        self.detector = Detector.from_pretrained(detector) if isinstance(detector, str | Path) else detector
        if self.detector is not None:
            self.detector.check_heads(self.heads)
        self.tap = Tap(model, self.heads.heads)
        self.reports: list[Report] = []
        self._look: Look | None = None

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

        def run(more: Sequence[LogitsProcessor]) -> Any:
            own = dict(arguments)
            if more:
                own["logits_processor"] = LogitsProcessorList([*more, *(arguments.get("logits_processor") or ())])
            return type(self.model).generate(self.model, inputs, **own | {"return_dict_in_generate": True})

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
        wants_dict = generation_config.return_dict_in_generate
        generation_config.return_dict_in_generate = True
        loop = model._beam_search if (generation_config.num_beams or 1) > 1 else model._sample

        def run(more: Sequence[LogitsProcessor]) -> Any:
            return loop(
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
        run: Callable[[Sequence[LogitsProcessor]], Any],
        ids: Tensor,
        mask: Tensor | None,
        inputs: Mapping[str, Any],
        config: GenerationConfig,
        sizes: Sequence[Sequence[tuple[int, int]]] | None,
    ) -> Any:
        """What ``run`` generates after prompts of these ``ids`` (batch, P), watched; sets ``reports``.

        sizes: of the pictures of every prompt; ``ids`` may hold each prompt several times, one after the other
        """
        for what, is_so, way_out in _REFUSED:
            if is_so(config):
                raise UnsupportedError(f"GazeGuard cannot watch {what}. Generate with {way_out}.")
        if sizes is not None:
            sizes = [own for own in sizes for _ in range(ids.shape[0] // len(sizes))]
        keys = keys_of(self.model, inputs, ids, mask)
        grids = grids_of(self.model, self.processor, inputs, keys.ids, keys.mask, sizes, self.grid)
        with self.tap as tap:
            tap.begin(Prompts.of(*keys), reordered=(config.num_beams or 1) > 1)
            if self._look is not None:
                self._look.steer(tap, grids)
            made = run([RerankProcessor(tap, self.policy.rerank)] if self.policy.rerank is not None else [])
            beams = getattr(made, "beam_indices", None)
            rows, states = tap.collect(beams), tap.states(beams)
        written = (made if isinstance(made, Tensor) else made.sequences)[:, keys.last + 1 :]
        ends = _ends(config)
        captions, texts, offsets, finished = [], [], [], []
        for row in written.cpu().numpy():
            stop = next((i for i, token in enumerate(row.tolist()) if token in ends), len(row))
            text, where = decode(self.processor.tokenizer, row[:stop])
            captions.append(row[:stop])
            texts.append(text)
            offsets.append(where)
            finished.append(stop < len(row))
        grids = [grid for grid in grids for _ in range(len(captions) // len(grids))]
        self.reports = self._report(rows, states, grids, captions, texts, offsets, finished)
        return made

    @contextmanager
    def look_at(
        self,
        targets: Target | Sequence[Target],
        strength: float = STRENGTH,
        mode: Mode = "both",
        prompt: bool = True,
        image: int = 0,
    ) -> Iterator[GazeGuard]:
        """Inside, the gaze heads look where they are told, in whatever this guard generates or checks: see `Look`.

        with guard.look_at((0, 0, 200, 150)):
            guard.generate(**inputs, picture_sizes=[[picture.size]])
        with guard.look_at({0: left, 20: right}):  # from the 20th new token on, the other one
            guard.caption(picture, "Describe a panel.")
        """
        before, self._look = self._look, Look(targets, strength, mode, prompt, image)
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

    # ----------------------------------------------------------------------------------------------------- replay

    def check(self, image: Any, caption: str, prompt: str = DEFAULT_PROMPT) -> Report:
        """Judge a caption that anything wrote, by one teacher-forced pass. ``prompt`` is what it answers.

        An empty caption, one longer than the model's context and a picture that cannot be read are *unchecked*.
        """
        return self.check_all([image], [caption], prompt)[0]

    @torch.no_grad()
    def check_all(
        self, images: Sequence[Any], captions: Sequence[str], prompt: str | Sequence[str] = DEFAULT_PROMPT
    ) -> list[Report]:
        """`check` for a batch of pictures with one caption each, in one pass; a row that cannot be used is *unchecked*.

        prompt: what every caption answers, or one prompt per caption
        """
        prompts = [prompt] * len(captions) if isinstance(prompt, str) else prompt
        reports: dict[int, Report] = {}
        pictures: dict[int, Image.Image] = {}
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            try:
                pictures[i] = load_image(image)
                if not caption.strip():
                    raise InputError("the caption is empty")
            except InputError as error:
                reports[i] = self._unchecked(caption, str(error))
        todo = [i for i in pictures if i not in reports]
        if todo:
            reports |= self._replay(todo, pictures, captions, prompts)
        return [reports[i] for i in range(len(captions))]

    def _replay(
        self, todo: Sequence[int], pictures: Mapping[int, Image.Image], captions: Sequence[str], prompts: Sequence[str]
    ) -> dict[int, Report]:
        """Reports of the rows ``todo``, from one teacher-forced pass over those that fit into the context."""
        told = [captions[i] for i in todo]
        batch = encode(self.model, self.processor, [pictures[i] for i in todo], [prompts[i] for i in todo], told)
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or float("inf")
        keys = keys_of(self.model, batch.prompt, batch.prompt_ids, batch.prompt_mask)
        lengths = [keys.last + 1 + len(ids) for ids in batch.caption_ids]
        long = {
            i: self._unchecked(captions[i], f"prompt and caption have {n} tokens, more than the model's context of {limit}")
            for i, n in zip(todo, lengths, strict=True)
            if n > limit
        }
        if long:
            rest = [i for i in todo if i not in long]
            return long | (self._replay(rest, pictures, captions, prompts) if rest else {})
        sizes = [[pictures[i].size] for i in todo]
        grids = grids_of(self.model, self.processor, batch.inputs, keys.ids, keys.mask, sizes, self.grid)
        with self.tap as tap:
            tap.begin(Prompts.of(*keys))
            if self._look is not None:
                self._look.steer(tap, grids)
            # What the tap hears is judged; the model's own logits of every position would be the largest tensor of all.
            few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
            given = model_inputs(self.model, batch.inputs)
            if not has_pixels(given):
                raise InputError(
                    "The picture did not reach the model: the processor made no pixels that its forward takes. Use the "
                    "processor of this model."
                )
            self.model(**given, use_cache=False, **few)
            rows, states = tap.collect(), tap.states()
        done = self._report(rows, states, grids, batch.caption_ids, told, batch.offsets, [True] * len(todo))
        return dict(zip(todo, done, strict=True))

    def verify(self, inputs: Mapping[str, Any]) -> list[Check]:
        """Does watching work for this model? Measured on a batch as the processor makes it: see `gazeguard.doctor`."""
        return examine(self.model, self.processor, inputs, heads=self.tap.heads, known=self.grid)

    # ---------------------------------------------------------------------------------------------------- judging

    def _report(
        self,
        rows: Rows,
        states: Tensor | None,
        grids: Sequence[ImageGrid],
        captions: Sequence[NDArray[np.int64]],
        texts: Sequence[str],
        offsets: Sequence[NDArray[np.int64]],
        finished: Sequence[bool],
    ) -> list[Report]:
        longest = max(len(ids) for ids in captions)
        written = np.zeros((len(captions), longest), np.int64)
        for row, ids in zip(written, captions, strict=True):
            row[: len(ids)] = ids
        rows = Rows(*(tensor[:, :longest] for tensor in vars(rows).values()))
        told = torch.from_numpy(written).to(rows.hidden.device)
        words = judge_words(self.tap.backbone, self.tap.heads, rows, told)
        if states is not None and (self.detector is None or self.detector.uses("content", "named")):
            lies, named = content(self.tap.backbone, states, rows.gaze, told)
        else:
            lies = named = torch.full_like(words.logprobs, torch.nan)
        reports = []
        for b, (grid, ids) in enumerate(zip(grids, captions, strict=True)):

            def of(tensor: Tensor, row: int = b, length: int = len(ids)) -> NDArray[np.float32]:
                return tensor[row, :length].float().cpu().numpy()

            trace = GazeTrace(
                text=texts[b],
                token_ids=np.asarray(ids, np.int64),
                offsets=offsets[b],
                logprobs=of(words.logprobs),
                entropy=of(words.entropy),
                gaze=of(rows.gaze)[..., : len(grid)],
                shares=of(rows.shares),
                readout=of(words.readout),
                content=of(lies),
                named=of(named),
                heads=self.tap.heads,
                grid=grid,
                model=self.heads.model,
                finished=finished[b],
            )
            reports.append(self.judge(trace))
        return reports

    def judge(self, trace: GazeTrace) -> Report:
        """The verdict on a trace: which phrases are doubtful, where the gaze was, and why."""
        if len(trace) == 0:
            return self._unchecked(trace.text, "the caption is empty")
        if trace.shares[..., SHARES.index("picture")].max() < UNSEEN:
            return self._unchecked(trace.text, "the gaze heads never looked at the picture", trace)
        if not (said := claims(trace.text, self.nlp)):
            return self._unchecked(trace.text, "the caption names nothing that could be checked", trace)
        if self.detector is None:
            return self._unchecked(trace.text, "no detector is fitted for this model", trace)
        if not (said := [claim for claim in said if claim.kind in self.detector.kinds]):
            return self._unchecked(trace.text, "the detector knows none of the kinds of claims in the caption", trace)
        kinds = [claim.kind for claim in said]
        x = features.features(trace, said)
        if unknown := self.detector.unknown(x, kinds):
            return self._unchecked(trace.text, f"the model gave no finite number for {unknown}", trace)
        if not (np.isfinite(trace.logprobs).all() and np.isfinite(trace.shares).all()):  # also what no feature reads
            return self._unchecked(trace.text, "the model gave no finite number for the caption's own words", trace)
        risks = self.detector.risk(x, kinds)
        limits = {kind: self.detector.threshold(kind, self.policy.threshold) for kind in set(kinds)}
        flagged = [risk >= limits[kind] for risk, kind in zip(risks, kinds, strict=True)]
        # Of a thing that is not there nobody asks for its colour or place.
        absent = {claim.phrase for claim, flag in zip(said, flagged, strict=True) if flag and claim.kind == "object"}
        flagged = [
            flag and (claim.kind == "object" or claim.phrase not in absent) for claim, flag in zip(said, flagged, strict=True)
        ]
        of_flagged = iter(self.detector.reasons(x[flagged], [kind for kind, flag in zip(kinds, flagged, strict=True) if flag]))
        boxes = gaze_boxes(trace, [trace.tokens(claim.said.start, claim.said.end) for claim in said])
        findings = tuple(
            Finding(
                claim=claim,
                risk=float(risk),
                flagged=bool(flag),
                reasons=next(of_flagged) if flag else (),
                box=box,
            )
            for claim, risk, flag, box in zip(said, risks, flagged, boxes, strict=True)
        )
        doubtful = [str(finding.claim) for finding in findings if finding.flagged]
        if doubtful:
            return self._made(trace.text, Verdict.FLAG, f"not supported by the picture: {', '.join(doubtful)}", findings, trace)
        if not trace.finished:
            return self._made(trace.text, Verdict.UNCHECKED, "the caption was cut off by the length limit", findings, trace)
        return self._made(trace.text, Verdict.PASS, "", findings, trace)

    def _unchecked(self, caption: str, reason: str, trace: GazeTrace | None = None) -> Report:
        return self._made(caption, Verdict.UNCHECKED, reason, (), trace)

    def _made(
        self, caption: str, verdict: Verdict, reason: str, findings: tuple[Finding, ...], trace: GazeTrace | None
    ) -> Report:
        doubtful, repaired = [(f.claim.start, f.claim.end) for f in findings if f.flagged], caption
        if self.policy.left == "drop":
            repaired = without(caption, doubtful)
        elif self.policy.left == "abstain" and verdict != Verdict.PASS:
            repaired = ""
        return Report(caption, verdict, reason, findings, self.policy.name, self.heads.model, __version__, trace, repaired)
