"""Is a policy read strictly, and a wrong one refused with the key, the value and what is allowed?"""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from labkit import ANYTHING
from pydantic import ValidationError

from gazeguard.errors import PolicyError
from gazeguard.policy import MAX_FILE_BYTES, Policy, load_policy, parse_policy, policy_folder, policy_names

RERANK = {"version": 1, "name": "mine", "action": "rerank", "strength": 0.5, "plausible": 0.02}
RULES = "Input should be 'f1', 'precision_0.9', 'bound_0.05' or 'bound_0.02'"
MARK = {"version": 1, "name": "mine", "action": "mark"}


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_that_comes_along_loads_by_name_and_by_path(name):
    policy = load_policy(name)
    assert policy.name == name
    assert policy == load_policy(policy_folder() / f"{name}.yaml")


def test_every_action_comes_along():
    assert {load_policy(name).action for name in policy_names()} == {"mark", "rerank"}


def test_what_a_file_says_is_what_the_policy_holds(tmp_path):
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(RERANK | {"threshold": 0.25}))
    assert load_policy(tmp_path / "mine.yml").model_dump() == RERANK | {"threshold": 0.25}
    assert parse_policy(MARK).threshold == "f1"


def test_a_policy_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        parse_policy(MARK).threshold = 0.1


MARK_KEYS = "Keys of a mark policy: version, name, threshold, action."
RERANK_KEYS = "Keys of a rerank policy: version, name, threshold, action, strength, plausible."
ACTIONS = "Allowed actions: mark, rerank."


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (MARK | {"treshold": 0.5}, f"key 'treshold' (value 0.5) is not known. {MARK_KEYS}"),
        (MARK | {"strength": 1}, f"key 'strength' (value 1) is not known. {MARK_KEYS}"),
        (RERANK | {"action": "rewrite"}, f"action 'rewrite' is given. {ACTIONS}"),
        (RERANK | {"action": ["mark"]}, f"action ['mark'] is given. {ACTIONS}"),
        ({"version": 1, "name": "mine"}, f"no action is given. {ACTIONS}"),
        (["mark"], f"['mark'] is given, but a policy is a mapping of keys to values. {ACTIONS}"),
        (None, f"None is given, but a policy is a mapping of keys to values. {ACTIONS}"),
        ({k: v for k, v in RERANK.items() if k != "strength"}, f"key 'strength' is missing. {RERANK_KEYS}"),
        (MARK | {"version": 2}, "key 'version' has the value 2: Input should be 1."),
        (MARK | {"name": ""}, "key 'name' has the value '': String should have at least 1 character."),
        (MARK | {"name": 3}, "key 'name' has the value 3: Input should be a valid string."),
        (
            MARK | {"threshold": 2},
            "key 'threshold' has the value 2: " + RULES + " or Input should be less than or equal to 1.",
        ),
        (
            MARK | {"threshold": "0.5"},
            "key 'threshold' has the value '0.5': " + RULES + " or Input should be a valid number.",
        ),
        (RERANK | {"strength": -1}, "key 'strength' has the value -1: Input should be greater than or equal to 0."),
        (RERANK | {"plausible": 0}, "key 'plausible' has the value 0: Input should be greater than 0."),
        (MARK | {"name": 16**5000}, "key 'name' has the value of type int: Input should be a valid string."),
    ],
)
def test_what_is_wrong_is_said(data, said):
    with pytest.raises(PolicyError) as caught:
        parse_policy(data, "mine.yaml")
    assert str(caught.value) == f"mine.yaml: {said}"


def test_an_endless_value_is_shown_short():
    with pytest.raises(PolicyError) as caught:
        parse_policy(MARK | {"name": "x" * 100_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("key", ["threshold", "strength", "plausible"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_no_number_out_of_range_is_taken(key, value):
    with pytest.raises(PolicyError, match=f"key '{key}' has the value"):
        parse_policy(RERANK | {key: value})


@pytest.mark.parametrize("name", ["nobody", "", "../policies/mark", "mark "])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(PolicyError) as caught:
        load_policy(name)
    assert str(caught.value) == (
        f"There is no policy {name!r}. Known policies: {', '.join(policy_names())}; or give the path of a .yaml file."
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("policies") / "mine.yaml"


# PyYAML's constructors raise ValueError, KeyError, AttributeError and IndexError for these.
@pytest.mark.parametrize(
    "text",
    ["a: [", "a: 2001-99-99", "!!bool x", "!!timestamp x", "!!int ''", "a: " + "1" * 5000, "[" * 3000, "? {}\n: 1",
     "!!python/object/apply:os.getcwd []", "\t"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_yaml_is_refused(path, text):
    path.write_text(text)
    with pytest.raises(PolicyError, match=r"mine\.yaml cannot be read as YAML: "):
        load_policy(path)


def test_bytes_that_are_no_text_are_refused(path):
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match=r"mine\.yaml cannot be read as YAML: .*can't decode"):
        load_policy(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"gone\.yaml cannot be read as YAML: .*No such file"):
        load_policy(tmp_path / "gone.yaml")


def test_a_large_file_is_not_read(path):
    path.write_text("#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(PolicyError, match=f"is larger than {MAX_FILE_BYTES} bytes; a policy has a handful of lines"):
        load_policy(path)


def test_a_billion_laughs_are_not_laughed(path):
    """Anchors make a kilobyte of YAML into terabytes; the file is refused before it is unfolded."""
    lines = ["a0: &a0 [lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    path.write_text("\n".join([*lines, "action: *a29"]))
    with pytest.raises(PolicyError, match=r"cannot be read as YAML: it has an alias, \*a0\. Write the value out"):
        load_policy(path)


@given(ANYTHING | st.fixed_dictionaries({key: st.just(value) | ANYTHING for key, value in RERANK.items()}))
@example(RERANK)
@example(RERANK | {3: 4})
def test_any_data_is_a_policy_or_refused(data):
    """Nothing else comes out, and what is taken is kept as it was given."""
    try:
        policy = parse_policy(data)
    except PolicyError as error:
        assert str(error).startswith("the policy: ")  # noqa: PT017
        return
    assert isinstance(policy, Policy)
    assert {key: getattr(policy, key) for key in data} == data


@given(st.text())
@example("version: 1\nname: x\naction: mark")
def test_any_text_is_a_policy_or_refused(path, text):
    path.write_text(text, encoding="utf-8")
    try:
        assert isinstance(load_policy(path), Policy)
    except PolicyError as error:
        assert str(path) in str(error)  # noqa: PT017
