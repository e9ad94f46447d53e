"""Is it true? Compares what a caption says, phrase by phrase, with what was drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gazeguard.claims.parse import Claim, Phrase, chunk, claims
from gazeguard.heads.strips import COLOURS, ORDINALS
from gazeguard.lab.world import NOUNS, Picture, Thing

_PANEL = re.compile(rf"\bpanel ({'|'.join(ORDINALS)})\b")


@dataclass(frozen=True)
class Mention:
    """One thing that a caption names, and what is true of it.

    phrase:  where the caption says it; order: 0 for the first thing named
    thing:   the drawn thing that it speaks of (the one that agrees best), None when there is none of that name
    present: the picture has such a thing anywhere; CHAIR counts the others
    placed:  it has one where the caption says (the panel of a strip, the place in a scene, anywhere if nothing is said)
    colour:  its colour is right; None when no colour is said or nothing is there
    """

    phrase: Phrase
    order: int
    thing: Thing | None
    present: bool
    placed: bool
    colour: bool | None

    @property
    def explained(self) -> str:
        """In words: what is true of the mention."""
        if not self.present:
            return "not in the picture"
        if not self.placed:
            return f"not there: it is {self.thing.place or f'in panel {ORDINALS[self.thing.panel]}'}"
        if self.colour is False:
            return f"it is {self.thing.colour}"
        said_small = any(part.text.lower() == "small" for part in self.phrase.attributes)
        return "it is not small" if said_small and not self.thing.small else "true"


def mentions(picture: Picture, caption: str) -> list[Mention]:
    """The things that a caption names, each compared with the picture. Words that the lab does not know are no things."""
    found: list[Mention] = []
    phrases = chunk(caption)
    for i, phrase in enumerate(phrases):
        noun = phrase.head.text.lower()
        if phrase.kind != "object" or noun not in NOUNS:
            continue
        named = [thing for thing in picture.things if thing.noun == noun]
        here = [thing for thing in named if _is_where_said(thing, picture, caption, phrases, i)]
        said = next((part.text.lower() for part in phrase.attributes if part.text.lower() in COLOURS), None)
        best = max(here or named, key=lambda thing: thing.colour == said, default=None)
        colour = None if said is None or best is None else best.colour == said
        found.append(Mention(phrase, len(found), best, bool(named), bool(here), colour))
    return found


def judged(picture: Picture, caption: str) -> list[tuple[Claim, Mention, bool]]:
    """The claims of a caption that are clearly true or false, each with its mention and whether it is false.

    Not clear, and left out: that a thing is there when it is somewhere else than said, attributes of a thing that is not
    where it is said to be, and the place of a thing that is nowhere.
    """
    of_phrase = {mention.phrase: mention for mention in mentions(picture, caption)}
    found = []
    for claim in claims(caption):
        mention, word = of_phrase.get(claim.phrase), claim.text.lower()
        if mention is None:
            continue
        if claim.kind == "object" and (mention.placed or not mention.present):
            found.append((claim, mention, not mention.present))
        elif claim.kind == "location" and mention.present:
            found.append((claim, mention, not mention.placed))
        elif claim.kind == "attribute" and mention.placed and word in COLOURS:
            found.append((claim, mention, not mention.colour))
        elif claim.kind == "attribute" and mention.placed and word == "small":
            found.append((claim, mention, not mention.thing.small))
    return found


def _is_where_said(thing: Thing, picture: Picture, caption: str, phrases: Sequence[Phrase], i: int) -> bool:
    if picture.panels:
        said = _PANEL.findall(caption[: phrases[i].start])
        return not said or ORDINALS[thing.panel] == said[-1]
    place = phrases[i + 1] if i + 1 < len(phrases) and phrases[i + 1].kind == "location" else None
    return place is None or place.text.lower() == thing.place
