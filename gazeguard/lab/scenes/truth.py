"""Truth of captions of the scenes lab: every mention of a known noun, compared with what was drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gazeguard.claims.parse import Claim, claims
from gazeguard.heads.strips import ORDINALS
from gazeguard.lab.scenes.captions import LOCATIONS, NUMBERS, RANKS
from gazeguard.lab.scenes.vocabulary import COLOUR_NAMES, NOUNS, plural
from gazeguard.lab.scenes.world import DrawnImage, DrawnObject

_FORMS = {form: noun for noun in NOUNS for form in (plural(noun), noun)}
_NOUN = re.compile(rf"\b({'|'.join(sorted(_FORMS, key=len, reverse=True))})\b", re.IGNORECASE)
_BEFORE = re.compile(rf"\b((?:(?:an?|the|{'|'.join(NUMBERS[1:])}|small|{'|'.join(COLOUR_NAMES)})\s+)+)$", re.IGNORECASE)
_COLOUR = re.compile(rf"\b({'|'.join(COLOUR_NAMES)})\b", re.IGNORECASE)
_AFTER_COLOUR = re.compile(rf"\s+(?:is|are)\s+({'|'.join(COLOUR_NAMES)})\b", re.IGNORECASE)
_AFTER_LOCATION = re.compile(
    rf"(?:\s+(?:is|are|stands?|lies?|sits?))?\s+({'|'.join(sorted(LOCATIONS, key=len, reverse=True))})\b", re.IGNORECASE
)
_PANEL = re.compile(rf"\bpanel ({'|'.join(ORDINALS)}|[1-6])\b|\b({'|'.join(RANKS)}) panel\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Mention:
    """One object that a caption names, and what is true of it.

    start, end: the characters of the noun in the caption
    order:      0 for the first mention of the caption
    colour:     the colour that is claimed, None for none; ``colour_right`` is None when none is claimed or the objects of
                that noun have colours of their own
    location:   the location that is claimed in a scene; panel: the 0-based panel on a comic page
    item:       the drawn object that agrees best, None when there is none of that noun
    present:    the image has such an object anywhere; CHAIR counts the mentions without
    placed:     it has one where the caption claims, True if nothing is claimed
    repeated:   an earlier mention of the caption has the same noun (and panel)
    """

    start: int
    end: int
    noun: str
    order: int
    number: int
    colour: str | None
    location: str | None
    panel: int | None
    item: DrawnObject | None
    present: bool
    placed: bool
    colour_right: bool | None
    repeated: bool


def mentions(image: DrawnImage, caption: str) -> list[Mention]:
    """The mentions of known nouns in a caption, in order; words that the world does not know are no mentions."""
    found: list[Mention] = []
    for match in _NOUN.finditer(caption):
        noun = _FORMS[match.group().lower()]
        before = _BEFORE.search(caption[: match.start()])
        words = before.group(1).lower().split() if before else []
        colour = next((word for word in words if word in COLOUR_NAMES), None)
        if predicate := _AFTER_COLOUR.match(caption, match.end()):
            colour = predicate.group(1).lower()
        location_match = _AFTER_LOCATION.match(caption, match.end())
        location = location_match.group(1).lower() if location_match and not image.panels else None
        panel = _panel(caption[: match.start()]) if image.panels else None
        item, placed, colour_right = _best(image.objects, noun, colour, location, panel)
        repeated = any(other.noun == noun and other.panel == panel for other in found)
        number = next((NUMBERS.index(word) for word in words if word in NUMBERS), 1)
        found.append(
            Mention(
                *match.span(),
                noun,
                len(found),
                number,
                colour,
                location,
                panel,
                item,
                item is not None,
                placed,
                colour_right,
                repeated,
            )
        )
    return found


def _panel(text: str) -> int | None:
    """The panel that was named last, 0-based."""
    named = [match.group(1) or match.group(2) for match in _PANEL.finditer(text)]
    if not named:
        return None
    word = named[-1].lower()
    return int(word) - 1 if word.isdigit() else (ORDINALS if word in ORDINALS else RANKS).index(word)


def _best(
    objects: Sequence[DrawnObject], noun: str, colour: str | None, location: str | None, panel: int | None
) -> tuple[DrawnObject | None, bool, bool | None]:
    """The object that agrees best with the claims, whether it is where it is claimed, and whether the colour is right."""
    named = [item for item in objects if item.noun == noun]
    here = [item for item in named if location in (None, item.location) and panel in (None, item.panel)]
    best = max(here or named, key=lambda item: item.colour == colour, default=None)
    known = best is not None and colour is not None and best.colour is not None
    return best, bool(here), (best.colour == colour if best is not None and known else None)


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over captions. CHAIR counts every mention; recall counts the drawn nouns (per image) that are named."""

    captions: int = 0
    hallucinated_captions: int = 0
    mentions: int = 0
    hallucinated: int = 0
    drawn: int = 0
    named: int = 0
    coloured: int = 0
    wrong_colour: int = 0
    located: int = 0
    wrong_location: int = 0

    def add(self, image: DrawnImage, caption: str) -> Scores:
        """The sums with one caption more."""
        found = mentions(image, caption)
        false = sum(not mention.present for mention in found)
        drawn = {item.noun for item in image.objects}
        placed = [mention for mention in found if mention.present and (mention.location or mention.panel is not None)]
        return Scores(
            self.captions + 1,
            self.hallucinated_captions + bool(false),
            self.mentions + len(found),
            self.hallucinated + false,
            self.drawn + len(drawn),
            self.named + len(drawn & {mention.noun for mention in found}),
            self.coloured + sum(mention.colour_right is not None for mention in found),
            self.wrong_colour + sum(mention.colour_right is False for mention in found),
            self.located + len(placed),
            self.wrong_location + sum(not mention.placed for mention in placed),
        )

    def rates(self) -> dict[str, float]:
        """CHAIR_i, CHAIR_s, recall, and the shares of wrong colours and locations among those claimed."""
        return {
            "chair_i": self.hallucinated / max(1, self.mentions),
            "chair_s": self.hallucinated_captions / max(1, self.captions),
            "recall": self.named / max(1, self.drawn),
            "wrong_colour": self.wrong_colour / max(1, self.coloured),
            "wrong_location": self.wrong_location / max(1, self.located),
        }


def decided_claims(image: DrawnImage, caption: str) -> list[tuple[Claim, Mention, bool]]:
    """The claims of a caption that the drawing decides, each with its mention and whether it is false.

    Left out, since they are neither clearly true nor false: that an object exists when it is at another location than named,
    attributes of such an object, the location of an object that does not exist, colours of drawings that have their own, and
    relations to other objects.
    """
    by_noun_end = {mention.end: mention for mention in mentions(image, caption)}
    found = []
    for claim in claims(caption):
        mention, word = by_noun_end.get(claim.phrase.head.end), claim.text.lower()
        if mention is None:
            continue
        if claim.kind == "object" and (mention.placed or not mention.present):
            found.append((claim, mention, not mention.present))
        elif claim.kind == "location" and mention.present and _says_location(claim, mention):
            found.append((claim, mention, not mention.placed))
        elif claim.kind == "attribute" and mention.placed and word in COLOUR_NAMES and mention.colour_right is not None:
            found.append((claim, mention, not mention.colour_right))
        elif claim.kind == "attribute" and mention.placed and mention.item is not None and word == "small":
            found.append((claim, mention, not mention.item.small))
    return found


def _says_location(claim: Claim, mention: Mention) -> bool:
    """Whether a claim of kind "location" is about the location that `mentions` has compared: a ninth of a scene, or a panel."""
    words = f"{claim.text} {claim.related.text if claim.related else ''}".lower()
    return mention.location in words if mention.location is not None else mention.panel is not None and "panel" in words
