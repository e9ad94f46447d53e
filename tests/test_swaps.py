"""Are claims made false by one word alone, and is everything else of the caption as it was?"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gazeguard.claims.parse import parse
from gazeguard.fitting.swaps import companions, cooccurrence, nouns_of, sites, swap
from gazeguard.lab.world import NOUNS, describe, random_drawing

OWN = (
    "There is a dog next to the cup at the top left and two cats.",
    "A man sits on a wooden bench under a tree in the middle of the image. The bench is brown.",
    "Two dogs stand on the left side of the image. An orange umbrella lies on the right.",
    "The first panel shows a red heart. In the second panel there is an old clock behind a small vase.",
)


def lab_captions() -> st.SearchStrategy[str]:
    """Captions of lab drawings, as its model writes them."""
    made = st.tuples(st.integers(0, 10**6), st.sampled_from(("strip", "scene")))
    return made.map(lambda it: describe(random_drawing(random.Random(it[0]), it[1], True), random.Random(it[0])))


@given(st.sampled_from(OWN) | lab_captions(), st.randoms(use_true_random=False), st.sampled_from((*NOUNS, "elephant", "apple")))
def test_a_swap_changes_its_own_words_and_nothing_else(text, rng, noun):
    """The claims are the same in number, kind and order; those named are other ones, and no others."""
    caption = parse(text)
    site = rng.choice(sites(caption))
    swapped = swap(caption, site, noun if site.options is None else rng.choice(site.options))
    if swapped is None:
        assert site.kind == "object" or text in OWN  # the noun that stood there; "a stone bench", which is one noun
        return
    text, new = caption.text, swapped.caption.text
    assert [claim.kind for claim in swapped.caption.claims] == [claim.kind for claim in caption.claims]
    assert swapped.word.lower() in new.lower()
    assert new.endswith(text[site.end :])
    start = min(caption.claims[i].phrase.start for i in site.claims)
    assert new.startswith(text[: min(start, site.start)])
    for i, (before, after) in enumerate(zip(caption.claims, swapped.caption.claims, strict=True)):
        assert before.kind == site.kind or i not in swapped.claims
        if before.kind == site.kind and i not in swapped.claims and site.kind in ("object", "attribute", "count"):
            assert before.span.text.lower() == after.span.text.lower()


@pytest.mark.parametrize(
    ("text", "kind", "word", "expected"),
    [
        ("There is a red star.", "object", "umbrella", "There is a red umbrella."),
        ("There is a star and a cup.", "object", "umbrella", "There is an umbrella and a cup."),
        ("Two dogs stand there.", "object", "fox", "Two foxes stand there."),
        ("There is a red apple.", "attribute", "orange", None),  # two may call it either
        ("There is a blue apple.", "attribute", "orange", "There is an orange apple."),
        ("In panel two there is a star.", "location", "In panel one", "In panel one there is a star."),
        ("There is a star at the top left.", "location", "on the right", "There is a star on the right."),
        ("There is a star at the top left.", "location", "at the top", None),  # true of it, if vaguely
        ("Two dogs stand there.", "count", "three", "Three dogs stand there."),
        ("A dog sits under the table.", "relation", None, None),  # the verb is part of the relation
        ("A dog is behind the table.", "relation", "under", "A dog is under the table."),
    ],
)
def test_swaps_of_each_kind(text, kind, word, expected):
    caption = parse(text)
    site = next((site for site in sites(caption) if site.kind == kind), None)
    if expected is None:
        assert site is None or word not in site.options
    else:
        assert site.options is None or word in site.options
        assert swap(caption, site, word).caption.text == expected


def test_a_location_of_several_objects_is_one_swap():
    """All claims that hang on the words become false with them."""
    caption = parse("In panel two there is a red star and a blue moon.")
    (site,) = (site for site in sites(caption) if site.kind == "location")
    swapped = swap(caption, site, "In panel three")
    assert {str(swapped.caption.claims[i]) for i in swapped.claims} == {
        "In panel three (a red star)",
        "In panel three (a blue moon)",
    }


def test_company_comes_first_and_what_is_named_never():
    captions = [parse(f"There is a {a} and a {b}.") for a, b in (("star", "moon"), ("star", "moon"), ("cup", "sun"))]
    company = cooccurrence(captions)
    assert company["star"]["moon"] == 2
    found = companions(["star"], company, random.Random(0), 3)
    assert found[0] == "moon"
    assert set(found) == {"moon", "cup", "sun"}
    assert nouns_of(captions[0]) == ["star", "moon"]
    assert companions(nouns_of(captions[0]), company, random.Random(0), 9) != []
    assert not set(companions(nouns_of(captions[0]), company, random.Random(0), 9)) & {"star", "moon"}
