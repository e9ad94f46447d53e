"""Is a policy read strictly, and a wrong one refused with the key, the value and what is allowed?"""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from labkit import ANYTHING
from pydantic import ValidationError

from gazeguard.errors import PolicyError
from gazeguard.policy import MAX_FILE_BYTES, SECTIONS, Policy, load_policy, parse_policy, policy_folder, policy_names

MINE = {"version": 1, "name": "mine"}
FULL = MINE | {
    "threshold": 0.25,
    "rerank": {"attribution": 0.5, "plausible": 0.02, "attended_logprob": 1.0, "end_bonus": 1.5, "layer": 2},
    "rewind": {"budget": 4, "threshold": "f1"},
    "verify": {"threshold": 0.125},
    "on_flag": "drop",
    "require": ("object",),
}


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_that_comes_along_loads_by_name_and_by_path(name):
    policy = load_policy(name)
    assert policy.name == name
    assert policy == load_policy(policy_folder() / f"{name}.yaml") == Policy.load(name)


def test_everything_a_policy_can_do_is_in_one_that_comes_along():
    along = [load_policy(name) for name in policy_names()]
    assert {policy.on_flag for policy in along} == {"keep", "drop", "abstain"}
    for section in SECTIONS:
        assert any(getattr(policy, section) for policy in along), section


def test_what_a_file_says_is_what_the_policy_holds(tmp_path):
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(FULL | {"require": ["object"]}))
    assert load_policy(tmp_path / "mine.yml").model_dump() == FULL
    least = parse_policy(MINE)
    assert (least.threshold, least.rerank, least.rewind, least.verify, least.on_flag) == ("f1", None, None, None, "keep")
    assert parse_policy(MINE | {"verify": {}}).verify.threshold is None


def test_a_policy_cannot_be_changed():
    policy = parse_policy(FULL)
    for part, key in ((policy, "threshold"), (policy.rewind, "budget")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, 1)


def test_every_key_is_explained():
    """policies/README.md has a row for each key of the schema."""
    told = (policy_folder() / "README.md").read_text(encoding="utf-8")
    keys = [name for name in Policy.model_fields if name not in SECTIONS]
    keys += [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields]
    assert [key for key in keys if f"| `{key}` |" not in told] == []
    assert [name for name in policy_names() if f"| `{name}` |" not in told] == []


KEYS = "Known keys: version, name, threshold, rerank, rewind, verify, on_flag, require."
RERANK_KEYS = "Known keys: rerank.attribution, rerank.plausible, rerank.attended_logprob, rerank.end_bonus, rerank.layer."
REWIND_KEYS = "Known keys: rewind.budget, rewind.threshold."
VERIFY_KEYS = "Known keys: verify.threshold."
RULES = "Input should be 'f1', 'precision_0.9', 'bound_0.05' or 'bound_0.02'"
NUMBER = "Input should be a valid number"
AT_LEAST = "Input should be greater than or equal to"
LEFT = "Input should be 'keep', 'drop' or 'abstain'"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (MINE | {"treshold": 0.5}, f"key 'treshold' (value 0.5) is not known. {KEYS}"),
        (MINE | {"action": "mark"}, f"key 'action' (value 'mark') is not known. {KEYS}"),
        (["mark"], f"['mark'] is given, but a policy is a mapping of keys to values. {KEYS}"),
        (None, f"None is given, but a policy is a mapping of keys to values. {KEYS}"),
        ({"version": 1}, f"key 'name' is missing. {KEYS}"),
        (MINE | {"version": 2}, "key 'version' has the value 2: Input should be 1."),
        (MINE | {"name": ""}, "key 'name' has the value '': String should have at least 1 character."),
        (MINE | {"name": 3}, "key 'name' has the value 3: Input should be a valid string."),
        (MINE | {"name": 16**5000}, "key 'name' has the value of type int: Input should be a valid string."),
        (MINE | {"threshold": 2}, f"key 'threshold' has the value 2: {RULES} or Input should be less than or equal to 1."),
        (MINE | {"threshold": "0.5"}, f"key 'threshold' has the value '0.5': {RULES} or Input should be a valid number."),
        (MINE | {"on_flag": "cut"}, f"key 'on_flag' has the value 'cut': {LEFT}."),
        (MINE | {"on_flag": ["drop"]}, f"key 'on_flag' has the value ['drop']: {LEFT}."),
        (MINE | {"require": "object"}, "key 'require' has the value 'object': Input should be a list."),
        (MINE | {3: 4}, "key '3' has the value 3: Keys should be strings."),
        (MINE | {"rewind": 3}, f"key 'rewind' has the value 3, but it holds keys of its own. {REWIND_KEYS}"),
        (MINE | {"rewind": {"budget": -1}}, f"key 'rewind.budget' has the value -1: {AT_LEAST} 0."),
        (MINE | {"rewind": {"budget": 1.0}}, "key 'rewind.budget' has the value 1.0: Input should be a valid integer."),
        (MINE | {"rewind": {"budget": 1, "f": 3}}, f"key 'rewind.f' (value 3) is not known. {REWIND_KEYS}"),
        (
            MINE | {"verify": True},
            f"key 'verify' has the value True, but it holds keys of its own. {VERIFY_KEYS}",
        ),
        (MINE | {"verify": {"ask": 1}}, f"key 'verify.ask' (value 1) is not known. {VERIFY_KEYS}"),
        (MINE | {"verify": {"threshold": "f2"}}, f"key 'verify.threshold' has the value 'f2': {RULES} or {NUMBER}."),
        (MINE | {"rerank": {"content": 1}}, f"key 'rerank.content' (value 1) is not known. {RERANK_KEYS}"),
    ],
)
def test_what_is_wrong_is_said(data, said):
    with pytest.raises(PolicyError) as caught:
        parse_policy(data, "mine.yaml")
    assert str(caught.value) == f"mine.yaml: {said}"


def test_an_endless_value_is_shown_short():
    with pytest.raises(PolicyError) as caught:
        parse_policy(MINE | {"name": "x" * 100_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("key", ["threshold", "rerank.attribution", "rerank.plausible", "rewind.threshold", "verify.threshold"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_no_number_out_of_range_is_taken(key, value):
    *section, last = key.split(".")
    wrong = {last: value} if not section else {section[0]: FULL[section[0]] | {last: value}}
    with pytest.raises(PolicyError, match=f"key '{key}' has the value"):
        parse_policy(FULL | wrong)


@pytest.mark.parametrize("name", ["nobody", "", "../policies/mark", "mark "])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(PolicyError) as caught:
        load_policy(name)
    assert str(caught.value) == (
        f"Unknown policy {name!r}; expected one of: {', '.join(policy_names())}; or the path of a .yaml file."
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
    path.write_text("\n".join([*lines, "name: *a29"]))
    with pytest.raises(PolicyError, match=r"cannot be read as YAML: it has an alias, \*a0\. Write the value out"):
        load_policy(path)


@given(ANYTHING | st.fixed_dictionaries({key: st.just(value) | ANYTHING for key, value in FULL.items()}))
@example(FULL)
@example(FULL | {3: 4})
@example(FULL | {"rewind": {3: 4}})
def test_any_data_is_a_policy_or_refused(data):
    """Nothing else comes out, and what is taken is kept as it was given."""
    try:
        policy = parse_policy(data)
    except PolicyError as error:
        assert str(error).startswith("the policy: ")  # noqa: PT017
        return
    assert isinstance(policy, Policy)
    kept = policy.model_dump()
    for key, value in data.items():
        inner = value if isinstance(value, dict) else {}
        assert inner.items() <= kept[key].items() if isinstance(value, dict) else kept[key] == value


@given(st.text())
@example("version: 1\nname: x\nleft: drop")
def test_any_text_is_a_policy_or_refused(path, text):
    path.write_text(text, encoding="utf-8")
    try:
        assert isinstance(load_policy(path), Policy)
    except PolicyError as error:
        assert str(path) in str(error)  # noqa: PT017
