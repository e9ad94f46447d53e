"""Tracer: model, processor and gaze heads -> `GazeTrace`, live (around ``generate``) or by replay of a caption.

Nothing is judged here; `gazeguard.judge` does that, and `gazeguard.guard` joins the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.cache_utils import Cache

from gazeguard import _compat
from gazeguard.attention.backbone import Backbone
from gazeguard.attention.buffers import CapturedActivations, sent
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.logit_lens import LogitLens
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.steering import SteeringTarget
from gazeguard.attention.trace_batch import TraceBatch, trace_batch
from gazeguard.attention.visual_keys import VisualKeys, visual_key_source, visual_keys
from gazeguard.claims.language import unknown_share
from gazeguard.decoding.call import GeneratedIds, cache_of
from gazeguard.decoding.rewind import Draft
from gazeguard.errors import GazeGuardError, InputError, given
from gazeguard.heads.artifact import GazeHeads
from gazeguard.trace import GazeTrace
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.encoding import EncodedBatch, check_prompt, encode
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.image_tokens import image_token_ids
from gazeguard.vision.images import BACKGROUND, background_colour, image_key, load_image
from gazeguard.vision.inputs import check_inputs, context_length, has_pixels, model_inputs
from gazeguard.vision.packing import ATTEND_BOTH_WAYS, Packing, worth_packing
from gazeguard.vision.text import check_text, decode

MAX_UNKNOWN_SHARE = 0.1  # of a prompt's or caption's tokens; above it the model did not read what was written
NO_TOKEN = -1
MAX_REASON = 300  # characters of a processor's error that a reason repeats

ImageSizes = Sequence[Sequence[tuple[int, int]]]
Images = Mapping[int, Image.Image]
Texts = Sequence[str]


class Prompts(NamedTuple):
    """A batch of prompts as the recorder needs it.

    Attributes:
        keys: The keys that generated tokens attend to.
        grids: The image grid of each prompt.
        lengths: For each prompt the tokens, without padding, that the decoder reads before a caption.
        unknown_shares: For each prompt the share of its text tokens that the tokenizer does not know.
        padded_right: For each prompt whether padding stands where its caption begins.
    """

    keys: VisualKeys
    grids: Sequence[ImageGrid]
    lengths: Sequence[int]
    unknown_shares: Sequence[float]
    padded_right: Sequence[bool]

    @property
    def start(self) -> int:
        """The position of the first generated token."""
        return self.keys.last + 1


class ReplayPart(NamedTuple):
    """Captions that go through the model together: their numbers in the whole, and what the model reads.

    Where captions are packed, several of them belong to one of the prompts: ``batch.rows`` says to which.
    """

    rows: Sequence[int]
    captions: Sequence[str]
    batch: EncodedBatch
    prompts: Prompts


class Prepared(NamedTuple):
    """Captions and their images as the model reads them: see `Tracer.prepare`.

    Attributes:
        unchecked: By their numbers, the captions that the model cannot read, each with the reason.
        parts: The others.
    """

    unchecked: Mapping[int, tuple[str, str]]
    parts: Sequence[ReplayPart]


class Captured(NamedTuple):
    """What the recorder captured of a batch; without a logit lens where it is not wanted, or there are no image tokens."""

    activations: CapturedActivations
    lens: LogitLens | None

    def unpacked(self, packing: Packing | None) -> Captured:
        """The same with a row for each caption, of captions that shared rows."""
        if packing is None:
            return self
        device = self.activations.hidden.device
        rows, steps = torch.tensor(packing.rows, device=device), torch.from_numpy(packing.steps).to(device)
        activations = CapturedActivations(*(tensor[rows[:, None], steps] for tensor in vars(self.activations).values()))
        return Captured(activations, None if self.lens is None else self.lens.select(rows))


@dataclass(eq=False)
class Tracer:
    """Makes gaze traces of one model.

    Attributes:
        model: The model.
        processor: Its processor.
        heads: Its gaze heads.
        grid: Where the image tokens of every prompt lie, for a model whose layout no rule of `gazeguard.vision` knows.
        lens: Whether the logit lens on image tokens is read; it costs time, and the fields that need it are NaN without.
        steering: Where the gaze heads are made to attend, if anywhere.
        background: The colour on which transparent images are composed: see `load_image`.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    heads: GazeHeads
    grid: ImageGrid | None = None
    lens: bool = True
    steering: SteeringTarget | None = None
    background: str = BACKGROUND

    def __post_init__(self) -> None:
        """Make the recorder; raises `UnsupportedError` for a model that cannot be recorded."""
        background_colour(self.background)
        self.recorder = AttentionRecorder(self.model, self.heads.heads)

    # ---------------------------------------------------------------------------------------------------- recording

    def prompts(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None, sizes: ImageSizes | None = None) -> Prompts:
        """Describe a batch of prompts.

        Args:
            inputs: The whole batch.
            ids: (batch, P) int64, the prompts.
            mask: (batch, P), 0 for padding; None where nothing is.
            sizes: For each prompt the (width, height) of its images, pixels; by default their sizes after the processor.

        Raises:
            InputError: The image did not reach a prompt.
            UnsupportedError: No rule knows the layout of the image tokens.
        """
        check_inputs(self.model, inputs)
        keys = visual_keys(self.model, inputs, ids, mask)
        grids = image_grids(self.model, self.processor, inputs, keys.ids, keys.mask, sizes, self.grid)
        return self._described(keys, grids, ids, mask)

    def _described(self, keys: VisualKeys, grids: Sequence[ImageGrid], ids: Tensor, mask: Tensor | None) -> Prompts:
        lengths, unknown = self._lengths(keys, mask), self._unknown_shares(ids, mask)
        return Prompts(keys, grids, lengths, unknown, self._padded_right(len(ids), mask))

    def _lengths(self, keys: VisualKeys, mask: Tensor | None) -> list[int]:
        if self.model.config.is_encoder_decoder or mask is None or mask.ndim != 2:
            return [keys.last + 1] * len(keys.ids)
        return mask[:, : keys.last + 1].sum(1).tolist()

    def _padded_right(self, prompts: int, mask: Tensor | None) -> list[bool]:
        if self.model.config.is_encoder_decoder or mask is None or mask.ndim != 2:
            return [False] * prompts
        return (mask[:, -1] == 0).tolist()

    @contextmanager
    def record(self, prompts: Prompts, reordered: bool = False) -> Iterator[AttentionRecorder]:
        """Inside, what the model does after these prompts is recorded, and steered if this tracer steers.

        Args:
            prompts: The prompts.
            reordered: Whether rows of the batch are reordered between tokens, as in beam search.
        """
        with self.recorder as recorder:
            recorder.begin(KeyLayout.from_ids(*prompts.keys), reordered=reordered)
            if self.steering is not None:
                self.steering.steer(recorder, prompts.grids)
            yield recorder

    @contextmanager
    def steer(self, target: SteeringTarget) -> Iterator[None]:
        """Inside, whatever is recorded is steered."""
        before, self.steering = self.steering, target
        try:
            yield
        finally:
            self.steering = before

    def capture(self, beams: Tensor | None = None) -> Captured:
        """What the recorder has captured; to be called while it records.

        Args:
            beams: (captions, T) int64, the row of the batch that each token was generated in, if rows were reordered.
        """
        return Captured(self.recorder.collect(beams), self.logit_lens(beams))

    def logit_lens(self, beams: Tensor | None = None) -> LogitLens | None:
        """The logit lens on image tokens, if it is wanted and there are any."""
        return self.recorder.logit_lens(beams) if self.lens else None

    def trace_batch(self, captured: Captured, captions: Sequence[NDArray[np.int64]]) -> TraceBatch:
        """The numbers of captions with these ids, (T,) each, which were generated one token per decoding step."""
        longest = max(len(ids) for ids in captions)
        tokens = np.zeros((len(captions), longest), np.int64)
        for row, ids in zip(tokens, captions, strict=True):
            row[: len(ids)] = ids
        activations = CapturedActivations(*(tensor[:, :longest] for tensor in vars(captured.activations).values()))
        return self.numbers(activations, torch.from_numpy(tokens).to(activations.hidden.device), captured.lens)

    def numbers(self, activations: CapturedActivations, tokens: Tensor, lens: LogitLens | None) -> TraceBatch:
        """The numbers of tokens (captions, T), from the activations at the steps that generated them."""
        batch = trace_batch(self.recorder.backbone, self.recorder.heads, activations, tokens, lens)
        # Steering changes the states of the image tokens, which then say nothing of how far the image is from known ones.
        return batch if self.steering is None else replace(batch, image_state=None)

    def trace(self, batch: TraceBatch, row: int, steps: Sequence[int] | slice, *caption: Any, finished: bool) -> GazeTrace:
        """One trace out of a batch; ``caption`` is its ids, text, offsets and grid."""
        return batch.trace(row, steps, *caption, heads=self.recorder.heads, model=self.heads.model, finished=finished)

    def traces(
        self,
        batch: TraceBatch,
        captions: Sequence[GeneratedIds],
        prompts: Prompts,
        passes: Sequence[Sequence[int]] | None = None,
    ) -> list[GazeTrace]:
        """The traces of generated captions.

        Args:
            batch: Their numbers.
            captions: Their ids.
            prompts: What they were generated after, each for equally many captions.
            passes: For each caption the decoding step of each token; by default one after the other.
        """
        traces = []
        for row, caption in enumerate(captions):
            text, offsets = decode(self.processor.tokenizer, caption.ids)
            steps = slice(len(caption.ids)) if passes is None else passes[row]
            grid = prompts.grids[row * len(prompts.grids) // len(captions)]
            traces.append(self.trace(batch, row, steps, caption.ids, text, offsets, grid, finished=caption.finished))
        return traces

    def unreadable(self, prompts: Prompts, number: int, caption: NDArray[np.int64]) -> str:
        """Why a caption cannot be traced; empty when it can.

        Args:
            prompts: The batch.
            number: Which of them it follows.
            caption: (T,) token ids.
        """
        limit, tokens = context_length(self.model), prompts.lengths[number] + len(caption)
        if prompts.padded_right[number]:
            return "the prompt is padded on the right, so that the caption continues its padding: padding_side='left'"
        if tokens > limit:
            return f"prompt and caption have {tokens} tokens, more than the model's context of {limit}"
        shares = {"prompt": prompts.unknown_shares[number], "caption": unknown_share(caption.tolist(), self._unknown_token())}
        found = next((text for text, share in shares.items() if share > MAX_UNKNOWN_SHARE), None)
        return f"the tokenizer does not know {shares[found]:.0%} of the {found}'s tokens" if found else ""

    def _unknown_token(self) -> int | None:
        """The id that stands for what the tokenizer does not know; None where it has none of its own."""
        tokenizer = self.processor.tokenizer
        others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id

    def _unknown_shares(self, ids: Tensor, mask: Tensor | None) -> list[float]:
        """For each prompt (batch, P) the share of its text tokens that the tokenizer does not know."""
        unknown, image = self._unknown_token(), torch.tensor(image_token_ids(self.model), device=ids.device)
        text = ~torch.isin(ids, image)
        if mask is not None and mask.ndim == 2:
            text &= mask[:, : ids.shape[1]].bool()
        return [unknown_share(row[real].tolist(), unknown) for row, real in zip(ids, text, strict=True)]

    # ------------------------------------------------------------------------------------------------------- replay

    def prepare(self, images: Sequence[Any], captions: Sequence[str], prompts: Sequence[str], packed: bool = False) -> Prepared:
        """Encode captions for `replay`; needs no GPU, so that another thread can do it while the model is busy.

        Args:
            images: One per caption: paths, bytes or PIL images.
            captions: The captions.
            prompts: What each caption answers.
            packed: Captions of one image (the same object, path or bytes) and prompt may share a row of the batch.
        """
        unchecked: dict[int, tuple[str, str]] = {}
        loaded: dict[int, Image.Image] = {}
        opened: dict[Hashable, Image.Image] = {}
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            try:
                check_text(caption, "caption")
                if not caption.strip():
                    raise InputError("the caption is empty")
                if "\0" in caption:
                    raise InputError("the caption has NUL characters, as text read in a wrong encoding has")
                check_prompt(self.processor, prompts[i])
                key = image_key(image)
                loaded[i] = opened[key] = opened[key] if key in opened else load_image(image, self.background)
            except InputError as error:
                unchecked[i] = caption if isinstance(caption, str) else "", str(error)
        packed = packed and self.steering is None and can_pack(self.model, self.recorder.backbone)
        rest = self._encode(list(loaded), loaded, captions, prompts, packed)
        return Prepared({**unchecked, **rest.unchecked}, rest.parts)

    def _encode(self, rows: Sequence[int], images: Images, captions: Texts, prompts: Texts, packed: bool) -> Prepared:
        """Some rows as the model reads them; those that it cannot read, or that its context does not hold, are unchecked."""
        if not rows:
            return Prepared({}, [])
        texts, (first, shared) = [captions[i] for i in rows], _shared_prompts(rows, images, prompts) if packed else (rows, ())
        try:
            batch = encode(self.model, self.processor, [images[i] for i in first], [prompts[i] for i in first], texts, shared)
        except GazeGuardError:
            raise
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:  # one image's shape, say, refused for all
            if len(rows) == 1:
                return Prepared({rows[0]: (texts[0], f"the processor refuses it: {_first_line(error)}")}, [])
            halves = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
            one, other = (self._encode(half, images, captions, prompts, packed) for half in halves)
            return Prepared({**one.unchecked, **other.unchecked}, [*one.parts, *other.parts])
        keys = visual_keys(self.model, batch.prompt, batch.prompt_ids, batch.prompt_mask)
        encoded = self._described(keys, (), batch.prompt_ids, batch.prompt_mask)
        unreadable = {
            i: (captions[i], reason)
            for i, number, ids in zip(rows, batch.rows, batch.caption_ids, strict=True)
            if (reason := self.unreadable(encoded, number, ids))
        }
        if unreadable:
            rest = self._encode([i for i in rows if i not in unreadable], images, captions, prompts, packed)
            return Prepared({**unreadable, **rest.unchecked}, rest.parts)
        sizes = [[images[i].size] for i in (rows if batch.packing is None else first)]
        grids = image_grids(self.model, self.processor, batch.inputs, keys.ids, keys.mask, sizes, self.grid)
        return Prepared({}, [ReplayPart(rows, texts, batch, encoded._replace(grids=grids))])

    def run(self, part: ReplayPart, use_cache: bool = False) -> Any:
        """The model's output of one teacher-forced pass over a part's captions."""
        # The recorder's capture is what counts; the model's own logits of every position would be the largest tensor.
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        inputs = model_inputs(self.model, part.batch.inputs)
        if not has_pixels(inputs):
            raise InputError(
                "The image did not reach the model: the processor made no pixels that its forward takes. Use the processor "
                "of this model."
            )
        return self.model(**inputs, use_cache=use_cache, **few)

    @torch.no_grad()
    def replay(self, part: ReplayPart, use_cache: bool = False) -> tuple[list[GazeTrace], Cache | None]:
        """The traces of a part's captions, from one teacher-forced pass, and the pass's cache if it is wanted."""
        batch, grids = part.batch, part.prompts.grids
        with self.record(part.prompts):
            output = self.run(part, use_cache)
            captured = self.capture()
        numbers = self.trace_batch(captured.unpacked(batch.packing), batch.caption_ids)
        rows = zip(batch.caption_ids, part.captions, batch.offsets, [grids[row] for row in batch.rows], strict=True)
        traces = [self.trace(numbers, i, slice(len(row[0])), *row, finished=True) for i, row in enumerate(rows)]
        return traces, cache_of(output)


def can_pack(model: PreTrainedModel, backbone: Backbone) -> bool:
    """Whether several captions of one prompt can share a row: every layer attends to all keys that a mask allows it.

    The image must be part of the prompt, which is read from the left, and no layer may keep a state or a window of its own.
    """
    return (
        _compat.attention_kernel(next(iter(backbone.attention.values()))) == "sdpa"
        and _compat.own_cache_kinds(model) == _compat.PLAIN_LAYERS
        and not model.config.is_encoder_decoder
        and visual_key_source(model) is None
        and model.config.model_type not in ATTEND_BOTH_WAYS
        and "position_ids" in inspect.signature(model.forward).parameters
    )


class DraftTraces:
    """Traces of the captions of a batch while they are being written, one forward pass after the other."""

    def __init__(self, tracer: Tracer, prompts: Prompts) -> None:
        """Start the traces of captions that follow these prompts, while the tracer records."""
        self.tracer, self.prompts = tracer, prompts
        self._tokens: list[list[int]] = []  # that each pass generated, one per row; `NO_TOKEN` for a row that is done
        self._batch: TraceBatch | None = None  # of as many passes as have been asked for
        self._replaced: set[tuple[int, int]] = set()  # row and pass of tokens that are others now than in it

    def update(self, drafts: Sequence[Draft | None]) -> None:
        """Take note of the newest token of every draft, which replaces another one after a rollback."""
        for row, draft in enumerate(drafts):
            if draft is None:
                continue
            newest = draft.passes[-1]
            if newest == len(self._tokens):
                self._tokens.append([NO_TOKEN] * len(drafts))
            self._tokens[newest][row] = draft.tokens[-1]
            if self._batch is not None and newest < len(self._batch):
                self._replaced.add((row, newest))

    def trace_batch(self) -> TraceBatch:
        """The numbers of all passes, (batch, passes); each is computed once, when it is asked for first."""
        done = 0 if self._batch is None else len(self._batch)
        if done < len(self._tokens):
            new = self._numbers(slice(None), slice(done, len(self._tokens)))
            self._batch = new if self._batch is None else self._batch.concatenate(new)
        for row, number in sorted(self._replaced):
            one = self._numbers(slice(row, row + 1), slice(number, number + 1))
            self._batch = given(self._batch).with_token(row, number, one)
        self._replaced.clear()
        return given(self._batch)

    def _numbers(self, rows: slice, passes: slice) -> TraceBatch:
        """The numbers of some rows and passes."""
        tracer, lens = self.tracer, self.tracer.logit_lens()
        captured = tracer.recorder.collect(start=passes.start)
        count = passes.stop - passes.start
        part = CapturedActivations(*(tensor[rows, :count] for tensor in vars(captured).values()))
        tokens = sent(self._tokens[passes], tracer.model.device).T[rows]
        # Rows that are done need no numbers: they get the model's top token, which needs no other token's logit.
        tokens = tokens.where(tokens >= 0, part.top_ids[..., 0].clamp(min=0))
        return tracer.numbers(part, tokens, None if lens is None else lens.select(rows))

    def trace(self, row: int, draft: Draft, ids: NDArray[np.int64]) -> GazeTrace:
        """The trace of one draft, whose ids without an end token are ``ids`` (T,)."""
        text, offsets = decode(self.tracer.processor.tokenizer, ids)
        grid = self.prompts.grids[row * len(self.prompts.grids) // len(self._tokens[0])]
        numbers = self.trace_batch().select(row, draft.passes[: len(ids)])
        return self.tracer.trace(numbers, 0, slice(None), ids, text, offsets, grid, finished=True)


def _shared_prompts(rows: Sequence[int], images: Images, prompts: Texts) -> tuple[Sequence[int], Sequence[int]]:
    """The captions with which each image and prompt comes first, and for each caption which of them is its own.

    All captions, and nothing, where it is not worth it to pack them.
    """
    asked = [(id(images[i]), prompts[i]) for i in rows]
    numbers = {each: number for number, each in enumerate(dict.fromkeys(asked))}
    shared = [numbers[each] for each in asked]
    return ([rows[shared.index(number)] for number in range(len(numbers))], shared) if worth_packing(shared) else (rows, ())


def _first_line(error: Exception) -> str:
    """What a processor says, in one line that is not too long."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:MAX_REASON]
