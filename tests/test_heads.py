"""Are heads scored and chosen as the papers say, and is a heads file refused where it does not belong?"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labkit import ANYTHING, processor, untrained
from PIL import Image
from pydantic import ValidationError
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gazeguard import lab
from gazeguard.artifacts import MAX_FILE_BYTES
from gazeguard.errors import ArtifactError, InputError, MismatchError, UnsupportedError
from gazeguard.heads import discovery
from gazeguard.heads.artifact import GazeHeads, Score, fingerprint
from gazeguard.heads.discovery import choose_heads, described_rows, find_heads, noun_rows, panel_mass, panel_shares
from gazeguard.heads.scoring import MAX_SHARE, contrast, outstanding, overlap, score, settled
from gazeguard.heads.strips import Strip, draw_strips
from gazeguard.lab.training.tiny_model import build_llava, build_llava_processor, build_model
from gazeguard.vision.grid import ImageGrid

PANELS = 4
FLAT = [[0.05] * PANELS] * PANELS


def attending(mass: float) -> np.ndarray:
    """A head with so much attention on the described panel and a tenth of it on every other."""
    return np.full((PANELS, PANELS), mass / 10) + np.eye(PANELS) * mass * 0.9


def strips(*heads: np.ndarray, n: int = 10, noise: float = 0.0) -> np.ndarray:
    """(strips, H, described, attended + 1), nothing on sinks"""
    rng = np.random.default_rng(0)
    made = np.stack([np.stack(heads)] * n).astype(np.float32)
    return np.pad(made + noise * rng.random(made.shape, np.float32), ((0, 0), (0, 0), (0, 0), (0, 1)))


def figures(**own: tuple[float, ...]) -> Score:
    """A score of four heads; what is not given is 0.1 for each."""
    names = ("mass", "selectivity", "contrast", "hit_rate", "shuffled_mass", "sink_mass")
    return Score(**dict.fromkeys(names, (0.1,) * 4) | {"matrix": ((0.7, 0.1), (0.2, 0.6))} | own)


HEADS = GazeHeads(
    model="0123456789abcdef",
    model_class="M",
    heads=((0, 1), (1, 0)),
    all_heads=((0, 0), (0, 1), (1, 0), (1, 1)),
    narration=figures(mass=(0.1, 0.8, 0.7, 0.2), contrast=(0.1, 0.8, 0.7, 0.2)),
    query=figures(mass=(0.3, 0.4, 0.5, 0.6), selectivity=(0.4, 0.3, 0.2, 0.1)),
    strips=4,
    panels=6,
    split_half=1,
)


# ---------------------------------------------------------------------------------------------------------- scoring


@given(st.integers(2, 6), st.integers(0, 999), st.floats(-2, 2), st.floats(0.1, 5))
def test_contrast_is_blind_to_what_does_not_move_with_the_words(panels, seed, shift, scale):
    """Shifting all attention changes nothing, scaling scales, swapping panels for said and attended alike is nothing."""
    rng = np.random.default_rng(seed)
    matrix = rng.random((3, panels, panels))
    order = rng.permutation(panels)
    np.testing.assert_allclose(contrast(matrix + shift), contrast(matrix), atol=1e-9)
    np.testing.assert_allclose(contrast(matrix * scale), contrast(matrix) * scale, atol=1e-9)
    np.testing.assert_allclose(contrast(matrix[:, order][:, :, order]), contrast(matrix), atol=1e-9)
    np.testing.assert_allclose(contrast(np.eye(panels)), 1)
    np.testing.assert_allclose(contrast(np.ones((panels, panels))), 0, atol=1e-12)


def test_the_scores_of_known_matrices():
    """Mass is the diagonal, selectivity its share of the row, and the null is what a shuffle leaves."""
    scores = score(strips(attending(0.6), np.array(FLAT), n=400), np.random.default_rng(0))
    assert scores.mass == pytest.approx((0.6, 0.05), abs=1e-5)
    assert scores.selectivity == pytest.approx((1 / 1.3, 0.25), abs=1e-5)
    assert scores.contrast == pytest.approx((0.54, 0), abs=1e-5)
    assert scores.shuffled_mass == pytest.approx((0.6 * (1 + 0.3) / 4, 0.05), abs=0.02)
    assert scores.hit_rate == pytest.approx((1, 1 / PANELS)), "a head that likes all alike is right for the first panel"
    assert scores.sink_mass == (0, 0)
    chosen = score(strips(attending(0.6), np.array(FLAT)), np.random.default_rng(0), [0])
    np.testing.assert_allclose(chosen.matrix, attending(0.6), atol=1e-6)


def test_the_null_keeps_a_head_that_likes_one_panel_whatever_is_said():
    """Such a head loses nothing by the shuffle; its contrast is 0 and its selectivity chance."""
    likes_first = np.zeros((PANELS, PANELS))
    likes_first[:, 0] = 0.8
    scores = score(strips(likes_first, n=400), np.random.default_rng(0))
    assert scores.mass == pytest.approx((0.2,))
    assert scores.shuffled_mass[0] == pytest.approx(0.2, abs=0.03)
    assert scores.contrast == pytest.approx((0,))
    assert scores.selectivity == pytest.approx((1 / PANELS,))


@pytest.mark.parametrize(
    ("scores", "count"),
    [
        ([0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 2),
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9], 1),
        ([0.95, 0.8, 0.7, 0.6, 0.0, 0.0, 0.0, 0.0], 2),  # four stand out, more than a quarter of the heads
        ([0.95, 0.7, 0.6, 0.55, *[0.05] * 20], 4),  # the largest drop within them is no border
        ([0.9, 0.1], 1),
    ],
)
def test_what_stands_out_is_told_from_the_rest(scores, count):
    assert outstanding(np.array(scores)) == count


@given(st.lists(st.integers(-64, 64), min_size=2, max_size=40), st.integers(0, 999))
def test_laws_of_what_stands_out(numbers, seed):
    """At least one, at most a quarter; the order of the heads, another zero and another scale change nothing."""
    scores = np.array(numbers) / 64
    k = outstanding(scores)
    assert 1 <= k <= max(1, int(len(scores) * MAX_SHARE))
    assert outstanding(np.random.default_rng(seed).permutation(scores)) == k
    assert outstanding(scores * 2) == k
    ranked = np.sort(scores)[::-1]
    spread = [np.var(ranked[:i]) * i + np.var(ranked[i:]) * (len(ranked) - i) for i in range(1, len(ranked))]
    within = spread[: max(1, int(len(scores) * MAX_SHARE))]
    assert within[k - 1] <= min(within) + 1e-9, "no other allowed cut leaves less variance within its sides"


def test_the_planted_heads_are_chosen():
    """Among noisy heads those that follow the words, in the order of layers; both halves agree; fingerprint included."""
    heads = tuple((layer, head) for layer in range(2) for head in range(4))
    matrices = [np.array(FLAT)] * 8
    matrices[1], matrices[6] = attending(0.7), attending(0.8)
    narrated = strips(*matrices, noise=0.01)
    found = choose_heads(untrained(), heads, {"narration": narrated, "query": strips(*[np.array(FLAT)] * 8)})
    assert found.heads == ((0, 1), (1, 2))
    assert found.split_half == 1
    assert (found.strips, found.panels, found.model_class) == (10, PANELS, "Idefics3ForConditionalGeneration")
    assert found.others() == tuple(head for head in heads if head not in found.heads)
    found.check_model(untrained())


def test_no_usable_gaze_heads_is_a_result():
    """Heads near chance are chosen all the same, with their figures and the verdict."""
    flat = strips(*[np.array(FLAT)] * 4, noise=0.01)
    found = choose_heads(untrained(), ((0, 0), (0, 1), (1, 0), (1, 1)), {"narration": flat, "query": flat})
    assert re.fullmatch(
        r"No usable gaze heads: the best 1 of 4 heads attend most to the panel that is being described in \d+% of the cases "
        r"\(chance 25%, needed 62%\) and have 2\d% of their attention mass on it \(chance 25%, needed 50%\)\. Where this "
        r"model attends cannot be read from these strips; try strips of another style, or of your own\. The words may be the "
        r"cause, too: this model may be used to another prompt, other leads \(\"In panel one there is\"\) or other questions\. "
        r"JSON files of pages of your own set them: docs/fitting\.md has their format\.",
        found.unusable,
    )
    with pytest.raises(UnsupportedError, match="No usable gaze heads: the best 1 of 4"):
        found.check_usable()


def test_heads_fixed_in_space_are_no_gaze_heads():
    """A head that holds much on the last panel is right once in so many; the gate tells it from one that follows."""
    fixed = np.full((PANELS, PANELS), 0.05)
    fixed[:, -1] += np.linspace(0.6, 0.9, PANELS)  # and a little more when that panel is said, so that its contrast is positive
    found = choose_heads(untrained(), ((0, 0), (0, 1), (1, 0), (1, 1)), {"query": strips(fixed, *[np.array(FLAT)] * 3)})
    assert found.heads == ((0, 0),)
    assert "in 25% of the cases" in found.unusable
    assert found.ranked_by == "query"
    with pytest.raises(InputError, match="strips without narrations, so they have no narration score"):
        found.score("narration")


def test_sinks_are_found_and_left_out():
    """A token that gets much whatever is described is taken out; one that gets much when its panel is described stays."""
    regions = torch.zeros(1, 30, 3)
    for panel in range(3):
        regions[0, panel * 10 : panel * 10 + 10, panel] = 1
    looked = torch.full((1, 2, 3, 30), 0.001)
    looked[0, 0, :, 4] = 0.5  # head 0: a sink in the first panel
    for panel in range(3):
        looked[0, 1, panel, panel * 10] = 0.5  # head 1: a gaze
    made = panel_mass(looked, regions)
    torch.testing.assert_close(made[0, 0, :, 3], torch.full((3,), 0.5))
    torch.testing.assert_close(made[0, 0, :, :3], torch.tensor([[0.009, 0.01, 0.01]] * 3))
    torch.testing.assert_close(made[0, 1, :, 3], torch.zeros(3))
    torch.testing.assert_close(made[0, 1, :, :3].diagonal(), torch.full((3,), 0.509))


def test_a_search_ends_when_the_choice_no_longer_changes():
    """Not before 24 strips, and not while the halves disagree."""
    clear = strips(attending(0.8), *[np.array(FLAT)] * 7, n=32, noise=0.01)
    assert [settled(clear[:n]) for n in (8, 16, 24, 32)] == [False, False, True, True]
    torn = clear.copy()
    torn[::2, 1, :, :PANELS] += 2 * attending(0.8).astype(np.float32)
    torn[::2, 0, :, :PANELS] = 0
    assert not settled(torn)


def test_sets_of_heads_overlap_by_what_is_in_both():
    assert overlap([1, 2, 3], [3, 2, 1]) == 1
    assert overlap([1, 2, 3], [1, 2, 3, 4, 5, 6]) == 0.5
    assert overlap([1], [2]) == 0


@pytest.mark.slow
def test_the_choice_does_not_depend_on_the_number_of_panels(lab_vlm):
    """The same heads at two to six panels, and strips cut short say so: by the rows that predict nouns."""
    found = [find_heads(*lab_vlm, draw_strips(8, panels=panels, size=(144, 144)), progress=False) for panels in range(2, 7)]
    assert len({each.heads for each in found}) == 1
    assert [each.length_agreement for each in found] == [None, 1, 1, 1, 1]


def test_strips_cut_short_may_choose_other_heads(lab_vlm, monkeypatch):
    """The figure can fail: where the short strips are of one colour, nothing in them can be attended to."""
    plain = Strip.shortened

    def blank(strip: Strip, panels: int) -> Strip:
        short = plain(strip, panels)
        return replace(short, image=Image.new("RGB", short.image.size, "white"))

    monkeypatch.setattr(Strip, "shortened", blank)
    found = find_heads(*lab_vlm, draw_strips(4, panels=3, size=(144, 144)), progress=False)
    assert found.length_agreement < 1


def test_the_rows_of_the_narration_probe_are_those_that_predict_nouns():
    """The first token of each noun of each panel; of a panel without nouns, every token of its description."""
    (strip,) = draw_strips(1, panels=2)
    words = [
        "In",
        " panel",
        " one",
        ":",
        " a",
        " red",
        " fire",
        " hyd",
        "rant",
        " and",
        " a",
        " cup",
        ".",
        " Two",
        ":",
        " nothing",
    ]
    ends = np.cumsum([len(word) for word in words])
    offsets = np.stack((ends - [len(word) for word in words], ends), 1)
    strip = replace(strip, narration="".join(words), spans=((offsets[4, 0], offsets[11, 1]), (offsets[15, 0], offsets[15, 1])))
    assert noun_rows(strip, offsets).nonzero()[1].tolist() == [6, 11, 15]
    assert described_rows(strip, offsets).nonzero()[1].tolist() == [*range(4, 12), 15]


class Interrupted(Exception):
    pass


def test_an_interrupted_search_goes_on_where_it_stopped(lab_vlm, tmp_path, monkeypatch):
    """Killed in the second batch, it shows only what is left, and finds what an unbroken search finds."""
    pages, keep = draw_strips(6, size=(144, 144)), tmp_path / "search.safetensors"
    whole = find_heads(*lab_vlm, pages, batch_size=2, progress=False)
    shown = []
    real = discovery.PROBES["query"]

    def failing(show):
        shown.append(len(show.strips))
        if len(shown) == 2:
            raise Interrupted
        return real(show)

    monkeypatch.setitem(discovery.PROBES, "query", failing)
    with pytest.raises(Interrupted):
        find_heads(*lab_vlm, pages, batch_size=2, progress=False, keep=keep)
    assert find_heads(*lab_vlm, pages, batch_size=2, progress=False, keep=keep) == whole
    assert len(shown) == 4, "one before, one that failed, two after"
    with pytest.raises(MismatchError, match="holds a search with another model or other strips"):
        find_heads(*lab_vlm, pages[:4], batch_size=2, progress=False, keep=keep)
    keep.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"is no interrupted search for heads \(.*\)\. Delete it"):
        find_heads(*lab_vlm, pages, batch_size=2, progress=False, keep=keep)


def test_the_lab_narrates_in_stairs(lab_vlm):
    """The shipped file's own staircase: the strongest panel is the one that is being described, nearly always."""
    heads = GazeHeads.from_pretrained(lab.checkpoint_path() / "heads.json")
    described = [step for step in heads.staircase if step.described_panel is not None]
    assert "".join(step.text for step in heads.staircase).startswith("In panel one there is a")
    assert np.mean([np.argmax(step.panel_mass) == step.described_panel for step in described]) > 0.8
    assert heads.unusable == ""
    assert heads.split_half == 1


@pytest.mark.parametrize("style", ["strip", "scene"])
def test_heads_are_found_with_other_styles_of_strips(lab_vlm, style):
    """One row of panels, which the lab's model has never seen, and boxes in scenes: the search runs, and says what it sees."""
    model, own = lab_vlm
    found = find_heads(model, own, draw_strips(4, panels=4, style=style, size=(144, 144)), progress=False)
    assert (found.panels, found.strips) == (4, 4)
    assert found.narration.mass != found.query.mass


def test_strips_without_words_are_asked_about(lab_vlm):
    silent = [replace(strip, narration="", spans=()) for strip in draw_strips(2, size=(144, 144))]
    found = find_heads(*lab_vlm, silent, progress=False)
    assert (found.narration, found.ranked_by, found.staircase) == (None, "query", ())
    assert found.ranking() == found.ranking("query")


def test_panels_that_the_model_cannot_see_are_refused():
    """A crop that takes half of a panel away, and panels smaller than two tokens."""
    (strip,) = draw_strips(1, size=(144, 144))
    with pytest.raises(InputError, match=r"The model sees \d+% of panel 1: its processor crops the 144 x 144 image"):
        panel_shares(ImageGrid.regular(12, 12, (144, 144), view=(0.2, 0.0, 0.8, 1.0)), strip)
    with pytest.raises(InputError, match=r"Panel 1 of 6 has 1\.5 image tokens; discovery needs 2 for each"):
        panel_shares(ImageGrid.regular(3, 3, (144, 144)), strip)


def test_a_processor_that_crops_is_found_out():
    """CLIP's own way, the shortest edge and then the middle, leaves two of six panels in a row; a square page it keeps."""
    cropping = build_llava_processor()
    cropping.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 144}, crop_size={"height": 144, "width": 144})
    torch.manual_seed(0)
    model = build_llava(cropping, width=32, layers=2).eval()
    with pytest.raises(InputError, match=r"The model sees 0% of panel 1: its processor crops the 1152 x 192 image\. Show it"):
        find_heads(model, cropping, draw_strips(2, style="strip"), progress=False)
    assert find_heads(model, cropping, draw_strips(2), progress=False).strips == 2


def test_panels_of_unlike_area_count_alike(lab_vlm):
    """A head that attends evenly to the image has no contrast, however large the panels are."""
    regions = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    weighed = regions * (regions.sum(0).mean() / regions.sum(0))
    made = panel_mass(torch.full((1, 1, 2, 4), 0.25), weighed[None])
    torch.testing.assert_close(made[0, 0, :, 0], made[0, 0, :, 1])


@pytest.mark.parametrize("pages", [[], draw_strips(1), [*draw_strips(1, panels=2), *draw_strips(1, panels=3)]], ids=len)
def test_too_few_or_unlike_strips_are_refused(pages):
    with pytest.raises(InputError, match=r"needs at least two strips with the same number of panels.*got \d strips"):
        find_heads(untrained(), processor(), pages, progress=False)


def test_an_untrained_model_has_no_gaze_heads():
    """The real way from strips to a verdict: nothing to find, and it is said."""
    found = find_heads(untrained(), processor(), draw_strips(3, size=(144, 144)), progress=False)
    assert found.unusable.startswith("No usable gaze heads")


def test_panels_share_out_the_tokens():
    """Each token belongs to panels by area: over a full page the shares of an image token sum to 1."""
    (strip,) = draw_strips(1, size=(144, 144))
    shares = panel_shares(ImageGrid.regular(12, 12, (144, 144)), strip)
    assert shares.shape == (144, 6)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(shares.sum(0), 24, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- keeping


def test_json_keeps_every_figure(tmp_path):
    """Read again from the folder and from the file."""
    HEADS.save_pretrained(tmp_path / "own")
    assert GazeHeads.from_pretrained(tmp_path / "own") == HEADS
    assert GazeHeads.from_pretrained(tmp_path / "own" / "heads.json") == HEADS
    with pytest.raises(ArtifactError, match=r"There is no heads\.json in the folder"):
        GazeHeads.from_pretrained(tmp_path)


def test_heads_go_to_the_hub_and_come_back(tmp_path, monkeypatch):
    """What is uploaded is what `save_pretrained` writes; a hub id is downloaded with the options that are given."""
    uploaded, asked = {}, []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **options):
            uploaded.update({path.name: path.read_text() for path in Path(folder_path).iterdir()})
            return f"https://hub/{repo_id}/{options['commit_message']}"

    assert HEADS.push_to_hub("heads", Api(), commit_message="first") == "https://hub/me/heads/first"
    assert uploaded == {"heads.json": HEADS.to_json()}

    def download(repo_id, name, **options):
        asked.append((repo_id, name, options))
        (tmp_path / name).write_text(uploaded[name])
        return tmp_path / name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert GazeHeads.from_pretrained("me/heads", revision="v1") == HEADS
    assert asked == [("me/heads", "heads.json", {"revision": "v1"})]


def test_repr_is_one_line():
    assert repr(HEADS) == str(HEADS) == "GazeHeads(2 of 4 heads of M: (0, 1), (1, 0))"
    many = HEADS.model_copy(update={"heads": HEADS.all_heads * 2, "unusable": "none follows"})
    assert repr(many) == "GazeHeads(8 of 4 heads of M, unusable: (0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1), ...)"


def test_mass_is_looked_up_by_head():
    assert HEADS.mass([(1, 0), (0, 1)]).tolist() == [0.7, 0.8]
    assert HEADS.mass([(1, 1)], "query").tolist() == [0.6]


def test_rankings_and_controls():
    """Best first, by either score and any figure; a matched set has as many heads of every layer, and no gaze head."""
    assert HEADS.ranking() == ((0, 1), (1, 0), (1, 1), (0, 0))
    assert HEADS.ranking("query", "selectivity") == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert HEADS.ranking("query", "mass")[0] == (1, 1)
    assert HEADS.matched(np.random.default_rng(0)) == ((0, 0), (1, 1))
    assert HEADS.with_heads([(1, 1)]).heads == ((1, 1),)
    many = HEADS.model_copy(update={"heads": ((0, 0), (0, 1))})
    assert len(many.matched(np.random.default_rng(0))) == 2, "a layer that is short is made up for by the next"


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_distinct_matched_sets_are_counted(widths, data):
    """As many as a hundred draws show, which see all of so few; every set has the size of the gaze heads if it can."""
    all_heads = tuple((layer, head) for layer, width in enumerate(widths) for head in range(width))
    chosen = data.draw(st.lists(st.sampled_from(all_heads), unique=True, min_size=1, max_size=len(all_heads)))
    heads = HEADS.model_copy(update={"all_heads": all_heads, "heads": tuple(chosen)})
    rng = np.random.default_rng(0)
    drawn = {heads.matched(rng) for _ in range(400)}
    assert len(drawn) == heads.distinct_matched_sets()
    assert all(len(each) <= len(chosen) for each in drawn)


def test_a_control_with_one_set_alone_says_so(caplog):
    HEADS.matched(np.random.default_rng(0))
    assert "only 1 distinct layer-matched set" in caplog.text
    caplog.clear()
    free = HEADS.model_copy(update={"all_heads": (*HEADS.all_heads, (1, 2))})
    free.matched(np.random.default_rng(0))
    assert (free.distinct_matched_sets(), caplog.text) == (2, "")


def test_gaze_heads_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        HEADS.heads = ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_stored_as_fp16_has_one_fingerprint_however_it_is_loaded(dtype):
    stored = copy.deepcopy(untrained()).half().float()
    assert fingerprint(stored) == fingerprint(copy.deepcopy(stored).to(dtype))


def test_other_weights_are_another_model():
    """Another seed, another size, or one changed projection."""
    torch.manual_seed(1)
    seed, size = build_model(processor(), 32, 2), build_model(processor(), 32, 3)
    changed = copy.deepcopy(untrained())
    with torch.no_grad():
        changed.model.text_model.layers[1].self_attn.o_proj.weight *= 1.1
    assert len({fingerprint(model) for model in (untrained(), seed, size, changed)}) == 4


def test_the_heads_of_another_model_are_refused():
    with pytest.raises(MismatchError) as caught:
        HEADS.check_model(untrained())
    assert str(caught.value) == (
        "These gaze heads belong to another model (M, fingerprint 0123456789abcdef); this one is "
        f"Idefics3ForConditionalGeneration, fingerprint {fingerprint(untrained())}. "
        "Find its own: gazeguard fit, or find_heads(model, processor) in Python."
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("heads") / "heads.json"


@given(ANYTHING)
def test_any_json_is_refused(path, anything):
    path.write_text(json.dumps(anything))
    with pytest.raises(ArtifactError, match=r"is not a file of gaze heads: .*gazeguard heads MODEL writes one"):
        GazeHeads.from_pretrained(path)


@given(st.sampled_from(sorted(HEADS.model_dump())), ANYTHING)
def test_any_json_in_one_place_is_refused_or_makes_gaze_heads(path, key, value):
    path.write_text(json.dumps(HEADS.model_dump() | {key: value}))
    try:
        loaded = GazeHeads.from_pretrained(path)
    except ArtifactError as error:
        assert "heads.json is not a file of gaze heads: " in str(error)  # noqa: PT017
        assert key in str(error)  # noqa: PT017
        return
    assert all(isinstance(number, int) for head in loaded.heads for number in head)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000], ids=lambda t: t[:3])
def test_what_is_no_json_is_refused(path, text):
    path.write_bytes(text)
    with pytest.raises(ArtifactError, match=r"heads\.json cannot be read as a file of gaze heads \("):
        GazeHeads.from_pretrained(path)


def test_a_missing_or_huge_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot be read as a file of gaze heads .*No such file"):
        GazeHeads.from_pretrained(tmp_path / "gone.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ArtifactError, match=f"is larger than {MAX_FILE_BYTES} bytes, more than any file of gaze heads"):
        GazeHeads.from_pretrained(tmp_path / "huge.json")


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "connector", "vision_model"])
def test_noise_on_any_part_that_decides_the_gaze_is_another_model(part):
    """A merged fine-tune, say: LoRA's usual targets are queries and values."""
    changed = copy.deepcopy(untrained())
    weights = [value for name, value in changed.named_parameters() if part in name and value.ndim > 1]
    if part == "lm_head":
        weights = [changed.get_output_embeddings().weight]
    assert weights
    with torch.no_grad():
        for weight in weights:
            weight += 0.02 * torch.randn_like(weight)
    own = fingerprint(untrained())
    assert fingerprint(changed) != own
    found = HEADS.model_copy(update={"model": own})
    found.check_model(untrained())
    with pytest.raises(MismatchError, match="belong to another model"):
        found.check_model(changed)


def other_dtype(model):
    return model.half()


def quantised(model):
    for layer in model.model.text_model.layers:
        layer.self_attn.o_proj.weight = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    return model


def fine_tuned(model):
    with torch.no_grad():
        model.model.text_model.layers[0].self_attn.q_proj.weight += 0.01
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_dtype, "Other weights, or the same ones rounded to another dtype: these are float16"),
        (quantised, "Its weights are quantised"),
        (fine_tuned, "The output projections of attention are the same, .* this is a fine-tune of it"),
    ],
)
def test_a_changed_copy_is_refused_with_the_likely_reason(change, reason):
    own = {"model": fingerprint(untrained()), "model_class": type(untrained()).__name__}
    with pytest.raises(MismatchError, match=rf"belong to another model .*\. {reason}.* Find its own"):
        HEADS.model_copy(update=own).check_model(change(copy.deepcopy(untrained())))


class Packed(torch.nn.Module):
    """As torch's own dynamic quantisation leaves it: the weight is a method."""

    in_features = 32

    def weight(self):
        return torch.zeros(32, 32)


def test_a_layer_without_a_weight_that_can_be_read_is_refused_by_name():
    changed = copy.deepcopy(untrained())
    for layer in changed.model.text_model.layers:
        layer.self_attn.o_proj = Packed()
    with pytest.raises(UnsupportedError, match=r"test_heads\.Packed holds no tensor of its weight"):
        HEADS.check_model(changed)


def test_a_part_of_a_fingerprint_is_no_fingerprint():
    own = fingerprint(untrained())
    HEADS.model_copy(update={"model": own}).check_model(untrained())
    for other in (own[:16], "", "0" * 32, own[:16] + "0" * 16):
        with pytest.raises(MismatchError):
            HEADS.model_copy(update={"model": other}).check_model(untrained())
