"""CHAIR, POPE and AMBER give the figures that are known of public files, and refuse what they would count wrongly.

The public files are not part of the project; where they are not at hand, those tests are skipped.
"""

import gzip
import json
import random
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef, precision_score, recall_score

from evals import amber, chair, coco_ground_truth, pope, records
from evals.chair import Lineage, WordLists
from evals.common import write
from evals.counting import chair_figures, count, indexed, pope_figures
from evals.words import lemma, lemmas, library, nouns, singulars
from gazeguard.errors import InputError

DATA = records.DATA
on_public_files = pytest.mark.skipif(not DATA.is_dir(), reason=f"no public data at {DATA}; set {records.DATA_VARIABLE}")
SPLITS = ("random", "popular", "adversarial")
LISTS = WordLists(
    synonyms={
        "dog": "dog",
        "puppy": "dog",
        "hot dog": "hot dog",
        "seat": "chair",
        "toilet": "toilet",
        "tie": "tie",
        "bus": "bus",
    },
    double_words={"hot dog": "hot dog", "baby dog": "dog"},
)
VOCABULARY = {"sky": (), "person": ("man", "woman"), "ship": (), "sea": ("water",), "lake": ("water",), "sign": ()}


def values(figures):
    return {key: made["value"] for key, made in figures.items()}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------- counting

KINDS = st.sampled_from("abcd")
CAPTIONS = st.lists(st.tuples(st.lists(KINDS, max_size=5), st.frozensets(KINDS)), min_size=2, max_size=5)


def counted(captions):
    """Figures of captions that name kinds, where a kind is false that is not there."""
    return values(chair_figures([[(k, k not in there) for k in named] for named, there in captions], [t for _, t in captions]))


@settings(max_examples=25, deadline=None)
@given(CAPTIONS)
def test_laws_of_chair(captions):
    """Shares lie in 0..1; a false mention shows in both; order says nothing, repeats count in CHAIR_i alone."""
    made = counted(captions)
    assert all(0 <= value <= 1 for value in made.values())
    assert (made["chair_i"] == 0) == (made["chair_s"] == 0)
    assert counted([(named[::-1], there) for named, there in captions]) == made
    once = counted([(sorted(set(named)), there) for named, there in captions])
    assert once | {"chair_i": 0} == made | {"chair_i": 0}
    worse = counted([([*named, "e"], there) for named, there in captions])
    assert worse["chair_s"] == 1
    assert worse["recall"] == made["recall"]


@pytest.mark.parametrize("name", ["nltk.tokenize", "textblob.en"])
def test_a_plain_install_is_told_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"^\w+ is not installed. Install it: pip install '.\[evals\]' in the checkout$"):
        library(name)


def test_chair_by_hand():
    """Two captions, five mentions, two of them false, in one caption."""
    made = counted([(["a", "a", "b", "b"], {"a", "c"}), (["a"], {"a"})])
    assert made == {"chair_s": 0.5, "chair_i": 0.4, "recall": 0.6667, "precision": 0.6667, "f1": 0.6667}
    assert set(counted([([], set()), ([], set())]).values()) == {0}


ANSWERS = st.lists(st.tuples(*[st.sampled_from(["yes", "no"])] * 2), min_size=2, max_size=30)


@settings(max_examples=25, deadline=None)
@given(ANSWERS, st.sampled_from(["yes", "no"]))
def test_yes_no_figures_are_those_of_scikit_learn(pairs, positive):
    labels, answers = zip(*pairs, strict=True)
    made = values(pope_figures(labels, answers, [str(i) for i in range(len(pairs))], positive))
    for key, metric in (("precision", precision_score), ("recall", recall_score), ("tpr", recall_score), ("f1", f1_score)):
        assert made[key] == pytest.approx(metric(labels, answers, pos_label=positive, zero_division=0), rel=1e-3)
    if len(set(labels)) == 2:  # scikit-learn warns of one class alone
        assert made["mcc"] == pytest.approx(matthews_corrcoef(labels, answers), rel=1e-3, abs=1e-9)
        false = [answer for label, answer in pairs if label != positive]
        assert made["fpr"] == pytest.approx(false.count(positive) / len(false), rel=1e-3)
    assert made["accuracy"] == pytest.approx(np.mean(np.array(labels) == np.array(answers)), rel=1e-3)


def test_neither_answer_is_wrong_and_not_positive():
    made = values(pope_figures(["no", "no", "yes", "yes"], ["neither", "no", "neither", "yes"], list("abcd"), "no"))
    assert made["accuracy"] == 0.5
    assert (made["precision"], made["recall"], made["fpr"], made["yes_rate"]) == (1, 0.5, 0, 0.25)


def test_an_interval_draws_images_not_questions():
    """Asking everything twice narrows nothing; six questions to an image are one draw."""
    labels, answers, images = ["yes", "no"] * 20, ["yes", "no", "no", "yes"] * 10, [str(i // 4) for i in range(40)]
    once = pope_figures(labels, answers, images)
    assert once == pope_figures(labels * 2, answers * 2, images * 2)
    assert once["accuracy"]["ci"] == [0.5, 0.5]
    assert indexed(["b", "a", "b"])[0].tolist() == [0, 1, 0]


def test_one_image_has_a_value_and_no_interval():
    made = pope_figures(["yes", "no"], ["yes", "yes"], ["a", "a"])
    assert made["accuracy"] == {"value": 0.5, "ci": None}
    assert made["mcc"] == {"value": 0, "ci": None}


def test_a_file_of_figures_without_a_model(tmp_path):
    """What others wrote has no weights of the lab; a count stays whole."""
    write(tmp_path / "o.json", {"questions": count(14216)}, False, checkpoint=None, lineage="A")
    made = json.loads((tmp_path / "o.json").read_text())
    assert made["meta"]["lab_weights"] is None
    assert made["meta"]["lineage"] == "A"
    assert made["figures"]["questions"] == {"value": 14216, "ci": None}


# ------------------------------------------------------------------------------------------------------- words


def test_lineage_a_puts_every_word_into_the_singular():
    """Its dead words included: "bus" and "has" lose their s, and "ties" becomes "ty"."""
    text = "Two dogs and a bus. It has people, ties!"
    assert " ".join(singulars(text)) == "two dog and a bu . it ha person , ty !"


@pytest.mark.parametrize(
    ("text", "known", "base"),
    [
        ("a man is seated", {"seat"}, "a man is seat"),
        ("the boy tied a knot", {"tie"}, "the boy tie a knot"),
        ("a seating area", {"seat"}, "a seating area"),  # a noun here
        ("two buses", {"bus"}, "two bus"),
        ("three benches", {"bench"}, "three bench"),
        ("wine glasses", {"glass", "glas"}, "wine glass"),
        ("the women are in boats", {"woman", "boat"}, "the woman are in boat"),
        ("a man caring for mice", {"car", "mouse"}, "a man care for mouse"),
        ("batting", {"bat"}, "bat"),
        ("men with vases", {"man", "vase"}, "men with vas"),  # as WordNet has it
        ("the stars shine", {"moon"}, "the stars shine"),
    ],
)
def test_lineage_b_takes_base_forms_of_verbs_and_nouns(text, known, base):
    assert lemmas(text, known) == base.split()


def test_nouns_are_tagged_and_keep_their_case():
    assert nouns("A man is with two horses. The Sky is blue.", {"man", "horse", "sky"}) == ["man", "horse", "Sky"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_any_text_can_be_read(text):
    """No text breaks the readers; a base form is known or the word itself, unless it is irregular."""
    known = frozenset({"dog", "tie", "glass"})
    assert len(singulars(text)) == len(lemmas(text, known))
    nouns(text, known)
    for word in text.split():
        assert lemma(word, "noun", known) in known | {word} or word in ("men", "vases")


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"image_id": 1, "caption": "a"}\n{"image_id": "2", "caption": "b"}\n', "line 2: image_id: Input should be a valid"),
        (b'{"image_id": 1, "caption": "a"}\n\n{"image_id": 2}\n', "line 3: caption: Field required"),
        (b'{"image_id": 1.5, "caption": "a"}', "line 1: image_id: Input should be a valid integer"),
        (b'{"image_id": true, "caption": "a"}', "line 1: image_id: Input should be a valid integer"),
        (b'{"image_id": 1, "caption": null}', "line 1: caption: Input should be a valid string"),
        (b'{"image_id": 1, "caption": "%s"}' % (b"a" * 100_001), "line 1: caption: String should have at most 100000"),
        (b"\n\xff\n", "line 2: Invalid JSON"),
        (b"[" * 10_000, "line 1: Invalid JSON"),
        (b"\n \n", "holds no rows. Each line is one JSON object: image_id (a whole number), caption (text)."),
    ],
)
def test_a_bad_row_is_told_by_its_line(content, said, tmp_path):
    """And with the keys that a row has."""
    path = tmp_path / "captions.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as told:
        records.read_lines(path, chair.Caption)
    assert said in str(told.value)
    assert str(path) in str(told.value)
    assert "image_id (a whole number), caption (text)" in str(told.value)


def test_a_row_may_say_more_than_is_asked(tmp_path):
    path = lines(tmp_path / "c.jsonl", [{"image_id": 1, "caption": "a", "model": "x"}])
    assert records.read_lines(path, chair.Caption) == [chair.Caption(image_id=1, caption="a")]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "file.json"
    path.write_bytes(content)
    for read in (lambda: records.read_lines(path, pope.Answer), lambda: records.read_json(path, list[amber.Item], "items")):
        with suppress(InputError):
            read()


def test_files_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    """Absent, cut off, or larger than any benchmark's, also after unpacking."""
    with pytest.raises(InputError, match=r"absent.json cannot be read: .* --data or GAZEGUARD_EVALDATA gives"):
        records.read_json(tmp_path / "absent.json", dict, "words")
    packed = gzip.compress(json.dumps({"a": ["b"] * 1000}).encode())
    for content in (packed[:-9], packed[:20], b"nothing", packed[:12] + b"\xff" * 20):
        (tmp_path / "bad.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"bad.gz cannot be read"):
            records.read_json(tmp_path / "bad.gz", dict, "words")
    (tmp_path / "good.gz").write_bytes(packed)
    assert records.read_json(tmp_path / "good.gz", dict, "words") == {"a": ["b"] * 1000}
    monkeypatch.setattr(records, "MAX_FILE_BYTES", 1000)
    assert len(packed) < 1000
    with pytest.raises(InputError, match=r"good.gz is larger than 1000 bytes"):
        records.read_json(tmp_path / "good.gz", dict, "words")


def test_an_error_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as left, records.errors_told():
        raise InputError("So it is not.")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: So it is not.\n"


# ------------------------------------------------------------------------------------------------------- CHAIR


@pytest.mark.parametrize(
    ("caption", "lineage", "named"),
    [
        ("A puppy eats a hot dog.", "A", ["dog", "hot dog"]),
        ("A baby dog, two dogs.", "A", ["dog", "dog"]),
        ("The seat is near the toilet.", "A", ["toilet"]),
        ("The seats are red.", "A", ["chair"]),
        ("Buses and a bus", "A", ["bus"]),
        ("Buses and a bus", "B", ["bus", "bus"]),
        ("He is seated and has ties", "A", []),
        ("He is seated and has ties", "B", ["chair", "tie"]),
        ("", "A", []),
        ("", "B", []),
    ],
)
def test_the_objects_that_a_caption_names(caption, lineage, named):
    """Double words, the toilet's seat, and what the lineages see otherwise."""
    assert chair.objects(chair.tokens(caption, Lineage(lineage), LISTS), LISTS) == named


@on_public_files
@pytest.mark.parametrize("name", ["greedy", "beam5", "ours"])
def test_lineage_a_is_the_reference_to_four_digits(name):
    wanted = json.loads((DATA / "chair" / "reference_scores_lineageA_opera_llava15.json").read_text())[f"{name}.jsonl"]
    rows, truth, lists = chair.read(DATA / "opera-llava-1.5" / f"{name}.jsonl", Lineage.A, DATA)
    made = values(chair.chair(rows, truth, lists, Lineage.A))
    assert made == {
        "chair_s": wanted["CHAIRs"],
        "chair_i": wanted["CHAIRi"],
        "recall": wanted["Recall"],
        "mentions": wanted["mentions"],
        "hallucinated": wanted["hallucinated"],
        "captions": wanted["n"],
    }


@on_public_files
@pytest.mark.parametrize(
    ("name", "mentions", "hallucinated"), [("greedy", 3785, 481), ("beam5", 3807, 527), ("ours", 3649, 464)]
)
def test_lineage_b_counts_what_wordnet_would(name, mentions, hallucinated):
    """The counts are those that WordNet 3.0 gave in the place of our base forms, with the same tags (measured once)."""
    rows, truth, lists = chair.read(DATA / "opera-llava-1.5" / f"{name}.jsonl", Lineage.B, DATA)
    made = values(chair.chair(rows, truth, lists, Lineage.B))
    assert (made["mentions"], made["hallucinated"]) == (mentions, hallucinated)
    assert {"precision", "f1", "length"} <= made.keys()


@on_public_files
def test_lineage_b_is_near_an_independent_count():
    """Another reader of the same ground truth had CHAIR_s .450 and CHAIR_i .1264 on the greedy captions."""
    rows, truth, lists = chair.read(DATA / "opera-llava-1.5" / "greedy.jsonl", Lineage.B, DATA)
    made = values(chair.chair(rows, truth, lists, Lineage.B))
    assert made["chair_s"] == pytest.approx(0.450, abs=0.003)
    assert made["chair_i"] == pytest.approx(0.1264, abs=0.001)


@on_public_files
def test_five_hundred_captions_take_less_than_five_seconds():
    start = time.process_time()
    rows, truth, lists = chair.read(DATA / "opera-llava-1.5" / "greedy.jsonl", Lineage.B, DATA)
    chair.chair(rows, truth, lists, Lineage.B)
    assert time.process_time() - start < 5


@on_public_files
def test_chair_refuses_what_it_cannot_count(tmp_path):
    row = {"image_id": 9, "caption": "a bowl"}
    with pytest.raises(InputError, match=r"twice.jsonl has image_id 9 more than once. Give one row for each."):
        chair.read(lines(tmp_path / "twice.jsonl", [row, row]), Lineage.A, DATA)
    with pytest.raises(InputError, match=r"other.jsonl has image_id 1, which is no image of COCO 2014"):
        chair.read(lines(tmp_path / "other.jsonl", [row, row | {"image_id": 1}]), Lineage.A, DATA)


@on_public_files
@pytest.mark.parametrize("lineage", ["A", "B"])
def test_chair_writes_its_figures_and_names_the_lineage(lineage, tmp_path):
    captions = lines(tmp_path / "c.jsonl", [{"image_id": 9, "caption": "Bowls of broccoli."}, {"image_id": 25, "caption": ""}])
    chair.main(captions, Lineage(lineage), tmp_path / "o.json", DATA)
    made = json.loads((tmp_path / "o.json").read_text())
    assert made["meta"]["lineage"].startswith(f"{lineage}: ")
    assert {"nltk", "textblob", "seed", "files"} <= made["meta"].keys()
    assert made["meta"]["image_ids"] == ["9", "25"]
    assert values(made["figures"])["chair_s"] == 0
    assert values(made["figures"])["mentions"] == 2


# -------------------------------------------------------------------------------------------------------- POPE


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes.", "yes"),
        ("No", "no"),
        ("No, there is not.", "no"),
        ("There is not a dog", "no"),
        ("There is no dog. Yes.", "no"),
        ("Yes. There is no cat.", "yes"),
        ("NO", "yes"),
        ("No!", "yes"),
        ("No\nIt is not", "no"),  # by "not"; "No\nIt" is one word
        ("I cannot tell", "yes"),
        ("", "yes"),
    ],
)
def test_the_rule_of_the_first_sentence(answer, said):
    assert pope.yes_or_no(answer) == said


def pope_files(split, folder, answer):
    """A real file of questions, and a file of answers in reverse order."""
    questions = DATA / "pope" / f"coco_pope_{split}.json"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    given = [{"question_id": row["question_id"], "answer": answer(row)} for row in reversed(rows)]
    return questions, lines(folder / "answers.jsonl", given)


@on_public_files
@pytest.mark.parametrize("split", SPLITS)
def test_identities_of_pope(split, tmp_path):
    """All yes, all no, all right, and by chance, over the 3,000 questions of a real file."""

    def figures(answer):
        pope.main(*pope_files(split, tmp_path, answer), tmp_path / "o.json")
        return values(json.loads((tmp_path / "o.json").read_text())["figures"])

    half = {"accuracy": 0.5, "mcc": 0, "questions": 3000}
    yes = half | {"precision": 0.5, "recall": 1, "f1": 0.6667, "yes_rate": 1, "fpr": 1, "tpr": 1}
    assert figures(lambda row: "Yes, it is. No doubt.") == yes
    assert figures(lambda row: "No.") == half | dict.fromkeys(("precision", "recall", "f1", "yes_rate", "fpr", "tpr"), 0)
    right = figures(lambda row: {"yes": "Yes", "no": "There is no such thing."}[row["label"]])
    assert right == dict.fromkeys(("accuracy", "precision", "recall", "f1", "tpr", "mcc"), 1) | {
        "yes_rate": 0.5,
        "fpr": 0,
        "questions": 3000,
    }
    rng = random.Random(0)
    chance = figures(lambda row: rng.choice(["Yes", "No"]))
    assert chance["accuracy"] == pytest.approx(0.5, abs=0.03)
    assert chance["mcc"] == pytest.approx(0, abs=0.06)
    assert chance["tpr"] - chance["fpr"] == pytest.approx(2 * chance["accuracy"] - 1, abs=1e-3)


@on_public_files
def test_pope_refuses_files_that_do_not_match(tmp_path):
    questions, answers = pope_files("random", tmp_path, lambda row: "Yes")
    short = tmp_path / "coco_pope_random.json"
    short.write_text("".join(questions.read_text().splitlines(keepends=True)[:2910]))
    with pytest.raises(InputError, match=r"coco_pope_random.json has 2910 questions: it is the short file of random questions"):
        pope.join_answers(short, answers)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    few = lines(tmp_path / "few.jsonl", rows[:2910])
    with pytest.raises(InputError, match=r"few.jsonl has 2910 answers, but .*coco_pope_random.json has 3000 questions"):
        pope.join_answers(questions, few)
    twice = lines(tmp_path / "twice.jsonl", [*rows[:-1], rows[0]])
    with pytest.raises(InputError, match=r"twice.jsonl has question_id 3000 more than once"):
        pope.join_answers(questions, twice)
    other = lines(tmp_path / "other.jsonl", [*rows[:-1], {"question_id": 9999, "answer": "Yes"}])
    with pytest.raises(InputError, match=r"other.jsonl has no answer to question_id 1 of .* Are they of the same split\?"):
        pope.join_answers(questions, other)


# ------------------------------------------------------------------------------------------------------- AMBER


def scene(truth, hallu=()):
    return amber.Scene(id=1, type="generative", truth=tuple(truth), hallu=tuple(hallu))


@pytest.mark.parametrize(
    ("kept", "truth", "hallu", "counts"),
    [
        # kept, unsafe, covered, truth, expected, hallu
        (["man", "person"], ["person"], ["sky"], (2, 0, 1, 1, 0, 1)),  # a word of its own and one that counts as it
        (["person"], ["man"], [], (1, 1, 0, 1, 0, 0)),  # but not the other way round
        (["ship", "ship"], ["ship", "ship"], [], (2, 0, 1, 2, 0, 0)),  # of two equal things one is covered
        (["water"], ["sea", "lake"], [], (1, 0, 1, 2, 0, 0)),
        (["sky", "sky"], ["sea"], ["sky", "ship"], (2, 2, 0, 1, 1, 2)),
        (["ship"], ["sea"], ["sky"], (1, 1, 0, 1, 0, 1)),  # invented, and not among the expected
        (["sign", "sky"], ["sea", "sign"], ["sky"], (2, 1, 0, 2, 1, 1)),  # a safe word counts below and nowhere else
        ([], ["sea"], ["sky"], (0, 0, 0, 1, 0, 1)),
    ],
)
def test_what_a_description_tells(kept, truth, hallu, counts):
    assert amber.count_description(kept, scene(truth, hallu), VOCABULARY, {"sign"}) == amber.DescriptionCounts(*counts)


def test_figures_of_descriptions_by_hand():
    made = values(amber.generative([amber.DescriptionCounts(4, 1, 2, 5, 1, 2), amber.DescriptionCounts(0, 0, 0, 5, 0, 2)]))
    assert made == {"chair": 0.25, "cover": 0.2, "hal": 0.5, "cog": 0.25, "nouns": 4, "responses": 2}


def test_only_yes_and_no_are_answers():
    assert [amber.yes_or_no(said) for said in ("Yes", "No", "yes", "No.", "")] == ["yes", "no", *["neither"] * 3]


@on_public_files
def test_the_files_of_amber_have_the_known_rows():
    benchmark = amber.read_benchmark(DATA)
    types = [item.type for item in benchmark.items.values()]
    known = {
        "generative": 1004,
        "discriminative-hallucination": 4924,
        "discriminative-attribute-state": 4764,
        "discriminative-attribute-number": 2072,
        "discriminative-attribute-action": 792,
        "discriminative-relation": 975,
        "relation": 689,
    }
    assert {kind: types.count(kind) for kind in dict.fromkeys(types)} == known
    assert list(known) == list(amber.DIMENSIONS)
    assert (len(types), len(benchmark.vocabulary), len(set(benchmark.image.values()))) == (15220, 340, 1004)
    assert benchmark.items.keys() == benchmark.image.keys()
    assert len(benchmark.safe) == 9


def respond(benchmark, scenes, questions):
    """A response to every item."""
    return {n: scenes(item) if isinstance(item, amber.Scene) else questions(item) for n, item in benchmark.items.items()}


@on_public_files
def test_identities_of_amber(tmp_path):
    """Naming what is there invents nothing; naming what is not covers nothing new; all right, and all no."""
    benchmark = amber.read_benchmark(DATA)
    right = respond(benchmark, lambda item: f"There is a {', a '.join(item.truth)}.", lambda item: item.truth.capitalize())
    path = tmp_path / "responses.json"
    path.write_text(json.dumps([{"id": n, "response": said} for n, said in right.items()]))
    amber.main(path, tmp_path / "o.json", DATA)
    made = values(json.loads((tmp_path / "o.json").read_text())["figures"])
    assert (made["chair"], made["hal"], made["cog"], made["amber_score"]) == (0, 0, 0, 1)
    assert made["cover"] == pytest.approx(0.914, abs=0.001)  # the most that can be had: equal things, safe words
    assert all(made[f"{key}{part}"] == 1 for key in ("accuracy", "precision", "recall", "f1") for part in amber.PARTS)

    wrong = respond(benchmark, lambda item: f"There is a {', a '.join(item.hallu)}.", lambda item: "No")
    made = values(amber.measure(wrong, benchmark))
    assert made["hal"] > 0.95
    assert made["chair"] > 0.9
    assert made["cog"] > 0.8
    noes = 9427 / 14216
    assert made["precision"] == made["accuracy"] == pytest.approx(noes, abs=1e-4)
    assert made["recall"] == 1
    assert made["amber_score"] == pytest.approx((1 - made["chair"] + made["f1"]) / 2, abs=1e-4)
    assert made["questions_relation"] == 975 + 689


@on_public_files
def test_amber_takes_whole_dimensions(tmp_path):
    """One alone, and nothing of the rest; a part of one is refused."""
    benchmark = amber.read_benchmark(DATA)
    relation = [n for n, item in benchmark.items.items() if amber.DIMENSIONS[item.type] == "relation"]
    made = amber.measure(dict.fromkeys(relation, "yes"), benchmark)
    assert set(made) == {
        f"{key}_relation" for key in ("accuracy", "precision", "recall", "f1", "yes_rate", "neither", "questions")
    }
    assert values(made)["neither_relation"] == len(relation)
    assert values(made)["accuracy_relation"] == 0

    path = tmp_path / "r.json"

    def refused(rows, said):
        path.write_text(json.dumps(rows))
        with pytest.raises(InputError, match=said):
            amber.read_responses(path, benchmark.items)

    refused([{"id": n, "response": "No"} for n in relation[1:]], r"answers 1663 of the 1664 items of the dimension relation")
    refused([{"id": 99999, "response": "No"}], r"has id 99999, which AMBER does not have; expected ids from 1 to 15220")
    refused([{"id": 1, "response": "No"}] * 2, r"has id 1 more than once")
    refused([], r"holds no responses")
    refused([{"id": 1, "response": "a"}, {"id": "2"}], r"item 2: id: Input should be a valid integer")


def test_colours_name_no_object_where_asked():
    """An orange that is eaten counts, an orange kite does not; both lineages without the option stay as they are."""
    lists = WordLists(synonyms={"orange": "orange", "kite": "kite", "male": "person"}, double_words={})
    caption = "An orange kite hangs over an orange near a male dog. The kite is orange."
    assert chair.without_colours(caption, lists) == "An red kite hangs over an orange near a male dog. The kite is red."
    for lineage in Lineage:
        assert chair.objects(chair.tokens(caption, lineage, lists), lists).count("orange") == 3
        plain = chair.without_colours(caption, lists)
        assert chair.objects(chair.tokens(plain, lineage, lists), lists).count("orange") == 1


# ------------------------------------------------------------------------------------- files of other tools


def test_usual_key_names_of_other_tools_are_read(tmp_path):
    """LLaVA's files of answers have question_id and text; rows that `gazeguard caption --rows` wrote have caption."""
    row = {"question_id": 3, "text": "No, there is none.", "prompt": "Is there a dog?"}
    path = lines(tmp_path / "answers.jsonl", [row])
    assert records.read_lines(path, pope.Answer)[0].answer == row["text"]
    assert records.read_lines(path, chair.Caption) == [chair.Caption(image_id=3, caption=row["text"])]
    assert amber.Response.model_validate(row) == amber.Response(id=3, response=row["text"])


@pytest.mark.parametrize(
    ("response", "read"),
    [
        ("Yes.", "Yes"),
        ("no, there is not", "No"),
        ("Yes", "Yes"),
        ("Nothing", "Nothing"),
        ("", ""),
        ("?", "?"),
        ("A no", "A no"),
    ],
)
def test_an_answer_of_amber_is_normalised_by_its_first_word(response, read):
    assert amber.normalised(response) == read


@on_public_files
def test_normalised_figures_stand_beside_the_strict_ones(capsys):
    """A model that always adds a full stop has none of AMBER's answers right, and all of the normalised ones."""
    benchmark = amber.read_benchmark(DATA)
    relation = {n: item for n, item in benchmark.items.items() if amber.DIMENSIONS[item.type] == "relation"}
    answers = {n: f"{item.truth.capitalize()}." for n, item in relation.items()}
    assert amber.measure(answers, benchmark)["accuracy_relation"]["value"] == 0
    assert amber.normalised_figures(answers, benchmark)["accuracy_relation_normalised"]["value"] == 1
    assert "warning: 1664 of 1664 answers are not the bare word" in capsys.readouterr().err
    strict = {n: answer[:-1] for n, answer in answers.items()}
    assert amber.normalised_figures(strict, benchmark) == {}


def annotations(folder, split, segmented, captions):
    """COCO's two files of a split: (image, category) pairs and (image, caption) pairs."""
    categories = [{"id": 18, "name": "dog"}, {"id": 62, "name": "chair"}]
    of = [{"image_id": image, "category_id": category, "segmentation": [[0.0, 1.0]]} for image, category in segmented]
    written = [{"image_id": image, "id": n, "caption": text} for n, (image, text) in enumerate(captions)]
    (folder / f"instances_{split}.json").write_text(json.dumps({"info": {}, "categories": categories, "annotations": of}))
    (folder / f"captions_{split}.json").write_text(json.dumps({"info": {}, "annotations": written}))


def test_the_ground_truth_is_made_of_segmentations_and_captions(tmp_path):
    """Both splits, both lineages; what it writes is what evals.chair reads, byte for byte the same each time."""
    (tmp_path / "chair").mkdir()
    chair.lists_file(tmp_path).write_text(LISTS.model_dump_json())
    annotations(tmp_path, "train2014", [(1, 18)], [(1, "A man sits on a bench."), (2, "Nothing here.")])
    annotations(tmp_path, "val2014", [(7, 62), (7, 62)], [(7, "Two dogs on seats.")])
    coco_ground_truth.main(tmp_path, tmp_path)
    written = {lineage: chair.truth_file(tmp_path, lineage).read_bytes() for lineage in chair.Lineage}
    coco_ground_truth.main(tmp_path, tmp_path)
    for lineage in chair.Lineage:
        assert chair.truth_file(tmp_path, lineage).read_bytes() == written[lineage]
        truth = records.read_json(chair.truth_file(tmp_path, lineage), dict[str, frozenset[str]], "truth")
        assert truth.keys() == {"1", "2", "7"}
        assert truth["1"] >= {"dog"}
        assert truth["2"] == set()
        assert truth["7"] == {"dog", "chair"}


def test_a_missing_annotation_file_is_named(tmp_path):
    (tmp_path / "chair").mkdir()
    chair.lists_file(tmp_path).write_text(LISTS.model_dump_json())
    with pytest.raises(InputError, match=r"instances_train2014.json cannot be read"):
        coco_ground_truth.main(tmp_path, tmp_path)
