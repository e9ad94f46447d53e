"""Ground truth of captions in the lab: the mentions and claims of a caption compared with the drawing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gazeguard.claims.parse import Claim, Phrase, chunk, claims
from gazeguard.errors import given
from gazeguard.heads.pictographs import COLOURS
from gazeguard.heads.strips import ORDINALS
from gazeguard.lab.world import NOUNS, Drawing, DrawnObject

_PANEL = re.compile(rf"\bpanel ({'|'.join(ORDINALS)})\b")


@dataclass(frozen=True)
class Mention:
    """One object that a caption names, compared with the drawing.

    phrase:  the words that name it
    order:   0 for the first object named
    object:  the drawn object that is meant (the one that agrees best); None when there is none of that name
    present: the drawing has such an object anywhere; CHAIR counts the others
    located: it has one at the location that the caption names (the panel of a strip, the location in a scene, anywhere if
             none is named)
    colour:  whether the colour is right; None when none is named or no object is there
    """

    phrase: Phrase
    order: int
    object: DrawnObject | None
    present: bool
    located: bool
    colour: bool | None

    @property
    def explanation(self) -> str:
        """The truth in words."""
        if not self.present:
            return "not in the image"
        item = given(self.object)
        if not self.located:
            return f"not there: it is {item.location or f'in panel {ORDINALS[given(item.panel)]}'}"
        if self.colour is False:
            return f"it is {item.colour}"
        called_small = any(part.text.lower() == "small" for part in self.phrase.attributes)
        return "it is not small" if called_small and not item.small else "true"


def mentions(drawing: Drawing, caption: str) -> list[Mention]:
    """The objects that a caption names, each compared with the drawing; nouns that the lab does not know are left out."""
    found: list[Mention] = []
    phrases = chunk(caption)
    for i, phrase in enumerate(phrases):
        noun = phrase.head.text.lower()
        if phrase.kind != "object" or noun not in NOUNS:
            continue
        candidates = [each for each in drawing.objects if each.noun == noun]
        located = [each for each in candidates if _is_at_named_location(each, drawing, caption, phrases, i)]
        colour = next((part.text.lower() for part in phrase.attributes if part.text.lower() in COLOURS), None)
        best = max(located or candidates, key=lambda each: each.colour == colour, default=None)
        right_colour = None if colour is None or best is None else best.colour == colour
        found.append(Mention(phrase, len(found), best, bool(candidates), bool(located), right_colour))
    return found


def decided_claims(drawing: Drawing, caption: str) -> list[tuple[Claim, Mention, bool]]:
    """The claims of a caption that the drawing decides, each with its mention and whether it is false.

    Left out, since they are neither clearly true nor false: that an object exists when it is at another location than named,
    attributes of such an object, and the location of an object that does not exist.
    """
    by_phrase = {mention.phrase: mention for mention in mentions(drawing, caption)}
    found = []
    for claim in claims(caption):
        mention, word = by_phrase.get(claim.phrase), claim.text.lower()
        if mention is None:
            continue
        if claim.kind == "object" and (mention.located or not mention.present):
            found.append((claim, mention, not mention.present))
        elif claim.kind == "location" and mention.present:
            found.append((claim, mention, not mention.located))
        elif claim.kind == "attribute" and mention.located and word in COLOURS:
            found.append((claim, mention, not mention.colour))
        elif claim.kind == "attribute" and mention.located and word == "small":
            found.append((claim, mention, not given(mention.object).small))
    return found


def _is_at_named_location(each: DrawnObject, drawing: Drawing, caption: str, phrases: Sequence[Phrase], i: int) -> bool:
    """Whether a drawn object is at the location that the caption names for phrase ``i``; True if it names none."""
    if drawing.panels:
        named = _PANEL.findall(caption[: phrases[i].start])
        return not named or ORDINALS[given(each.panel)] == named[-1]
    location = phrases[i + 1] if i + 1 < len(phrases) and phrases[i + 1].kind == "location" else None
    return location is None or location.text.lower() == each.location
