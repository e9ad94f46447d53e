"""Training of the part-of-speech tagger of `gazeguard.claims`: its lexicon and its weights, from open sources.

The lexicon joins the NIH SPECIALIST lexicon (as LemmInflect distributes it) and Brill's (as TextBlob does). The weights are the
mean of averaged perceptrons over two sources: sentences of a small grammar of captions, whose classes are exact by construction
and whose words come from the whole lexicon, and real captions with the classes of a spaCy pipeline, but for captions of images
from which a labelled test sentence was drawn. ``pip install lemminflect textblob spacy`` and a pipeline of spaCy.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import gazeguard.claims
from evals.records import DATA, Data
from gazeguard.claims import tagger
from gazeguard.claims.vocabulary import MEANINGS

FOLDER = Path(gazeguard.claims.__file__).parent / "data"
LABELS = Path(__file__).resolve().parents[1] / "tests" / "data" / "reading"
VERBS = frozenset((Path(__file__).parent / "tagger_verbs.txt").read_text("utf-8").split("\n", 1)[1].split())
EPOCHS, MODELS, GRAMMAR_SENTENCES, SILVER_WEIGHT, SCALE, LEAST = 6, 4, 30_000, 2, 10, 7
_BRILL = {
    "NN": "N", "NNS": "N", "JJ": "a", "JJR": "a", "JJS": "a", "RB": "r", "VBG": "g", "VBN": "e", "VBZ": "v", "VBD": "e",
    "VB": "v", "VBP": "v",
}  # fmt: skip
_SPACY = {
    "NN": "N", "NNS": "N", "NNP": "N", "NNPS": "N", "JJ": "a", "JJR": "a", "JJS": "a", "RB": "r", "RBR": "r", "RBS": "r",
    "VBZ": "v", "VBP": "v", "VB": "v", "VBN": "e", "VBG": "g",
}  # fmt: skip

Example = tuple[list[str], list[str], list[str]]  # words, closed classes, true classes ("" where unknown)


class Sources(NamedTuple):
    """What the two lexicons say.

    Attributes:
        forms: Word -> its (part of speech, lemma) pairs.
        likely: Word -> its most frequent Penn tag.
    """

    forms: dict[str, set[tuple[str, str]]]
    likely: dict[str, str]


def sources() -> Sources:
    """Read both lexicons from the libraries that distribute them."""
    forms: dict[str, set[tuple[str, str]]] = defaultdict(set)
    packed = files("lemminflect").joinpath("resources/lemma_lu.csv.gz").read_bytes()
    for line in gzip.decompress(packed).decode().splitlines():
        word, part, lemma = line.rsplit(",", 2)
        if re.fullmatch(r"[a-z][a-z'-]*", word):
            forms[word].add((part, lemma.split("/")[0]))
    text = files("textblob").joinpath("en/en-lexicon.txt").read_text("utf-8")
    pairs = (line.split() for line in text.splitlines() if not line.startswith(";"))
    return Sources(dict(forms), {pair[0]: pair[1] for pair in pairs if len(pair) == 2})


def classes(word: str, known: Sources) -> str:
    """The classes that a word can have, the most likely first; "" for one of the closed lists or of neither lexicon."""
    likely = known.likely.get(word, "")
    found = {_class(word, part, lemma, likely) for part, lemma in known.forms.get(word, ())}
    letters = set("".join(found))
    if likely in _BRILL and not letters:
        letters = {_BRILL[likely]}
    if likely == "JJ" and not letters & set("ega"):
        letters.add("a")
    if word.endswith("ing") and _BRILL.get(likely) == "N":
        letters.add("N")
    if "r" in letters and ("a" in letters or likely in ("NN", "NNS")) and likely != "RB":
        letters.discard("r")
    if letters == {"N", "a"} and likely in ("JJR", "JJS"):
        letters = {"a"}
    if letters & set("eg"):
        letters.discard("a")  # "painted": a participle modifies, too
    if word.endswith("ic") and letters == {"N"} and len(word) > 6:
        letters.add("a")
    first = "v" if word in VERBS else _BRILL.get(likely, "")
    return "".join(sorted(letters, key=lambda letter: (letter != first, tagger.TAGS.index(letter))))


def _class(word: str, part: str, lemma: str, likely: str) -> str:
    if part != "verb":
        return {"noun": "N", "adj": "a", "adv": "r"}.get(part, "")
    if word.endswith("ing") and word != lemma:
        return "g"
    if word == lemma or word.endswith("s"):
        return "v"
    return "e" if word.endswith("ed") or likely == "VBN" else "v" if likely == "VBD" else "ve"


def write_lexicon(known: Sources) -> int:
    """Write ``lexicon.txt.gz``: one line per set of classes; returns the number of words."""
    tagged = {word for word, tag in known.likely.items() if tag in _BRILL and re.fullmatch(r"[a-z][a-z-]*[a-z]", word)}
    groups: dict[str, list[str]] = defaultdict(list)
    for word in sorted(known.forms.keys() | tagged):
        if word not in MEANINGS and len(word) > 1 and (letters := classes(word, known)):
            groups[letters].append(word)
    text = "\n".join(f"{letters}\t{' '.join(words)}" for letters, words in sorted(groups.items()))
    (FOLDER / "lexicon.txt.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    tagger.lexicon.cache_clear()
    tagger.classes_of.cache_clear()
    return sum(map(len, groups.values()))


# ------------------------------------------------------------------------------------------------------------- grammar


class Pools:
    """The words that the grammar draws from, by class; verbs by their forms: "v" the base, "s", "g", "e"."""

    def __init__(self, known: Sources) -> None:
        self.known = known
        likely, forms = self.known.likely, self.known.forms
        open_words = sorted(word for word in forms if word not in MEANINGS and len(word) > 2)
        self.singular = [
            w for w in open_words if likely.get(w) == "NN" and {lemma for part, lemma in forms[w] if part == "noun"} == {w}
        ]
        self.plural = [
            w for w in open_words if likely.get(w) == "NNS" and any(part == "noun" and lemma != w for part, lemma in forms[w])
        ]
        self.adjectives = [
            w for w in open_words if likely.get(w) in ("JJ", "JJR", "JJS", "VBN") and any(part == "adj" for part, _ in forms[w])
        ]
        self.adjectives += ["red", "blue", "white", "small", "large", "green"] * 20
        self.adverbs = [w for w in open_words if w.endswith("ly") and likely.get(w) == "RB"]
        self.verbs = list(self._verbs())

    def _verbs(self) -> Iterator[dict[str, str]]:
        """Regular verbs by their forms: "v" the base, "s", "g", "e"."""
        table: dict[str, dict[str, str]] = defaultdict(dict)
        for word, pairs in sorted(self.known.forms.items()):
            for part, lemma in pairs:
                if part == "verb":
                    table[lemma][self._form(word, lemma)] = word
        for lemma, forms in sorted(table.items()):
            common = self.known.likely.get(forms.get("s", "")) in ("VBZ", "NNS") or self.known.likely.get(lemma) in (
                "VB",
                "VBP",
            )
            if {"s", "g", "v", "e"} <= forms.keys() and common and lemma not in MEANINGS and len(lemma) > 2:
                yield forms

    def _form(self, word: str, lemma: str) -> str:
        if word == lemma:
            return "v"
        if word.endswith("s"):
            return "s"
        if word.endswith("ing"):
            return "g"
        return "e" if word.endswith("ed") or self.known.likely.get(word) == "VBN" else "x"


@dataclass
class Grammar:
    """Random sentences of captions with the class of every open-class word."""

    pools: Pools
    seed: int = 1
    words: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def sentence(self) -> list[tuple[str, str]]:
        """A sentence: words with their classes, "" for function words and signs."""
        self.words = []
        weights = {
            self._clause: 50, self._apposition: 2, self._genitive: 2, self._coordinated: 2, self._two_verbs: 2, self._bare: 2,
            self._presented: 8, self._fragment: 17, self._request: 8, self._label: 7,
        }  # fmt: skip
        self.random.choices(list(weights), list(weights.values()))[0]()
        return self.words

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _add(self, text: str, letter: str = "") -> None:
        self.words += [(word, letter) for word in text.split()]

    def _any(self, *texts: str) -> None:
        self._add(self.random.choice(texts))

    def _noun(self, plural: bool) -> None:
        if self._chance(0.22):
            self._add(self.random.choice(self.pools.singular), "N")
        self._add(self.random.choice(self.pools.plural if plural else self.pools.singular), "N")

    def _modifier(self) -> None:
        if self._chance(0.1):
            self._add(self.random.choice(self.pools.adverbs), "r")
        if self._chance(0.18):
            self._add(self.random.choice(self.pools.verbs)["e"], "e")
        elif self._chance(0.1):
            self._add(self.random.choice(self.pools.verbs)["g"], "g")
        else:
            self._add(self.random.choice(self.pools.adjectives), "a")

    def _phrase(self, deep: bool = False, plural: bool | None = None) -> bool:
        """A noun phrase; returns whether its verb is plural."""
        plural = self._chance(0.35) if plural is None else plural
        if not plural:
            self._any("a", "a", "the", "the", "an", "his", "her", "its", "another")
        elif self._chance(0.45):
            self._any("the", "two", "three", "several", "some", "many", "his", "her", "their")
        for _ in range(self.random.choice([0, 0, 1, 1, 1, 2])):
            self._modifier()
            if self._chance(0.08):
                self._any("and", ",")
                self._modifier()
        self._noun(plural)
        if not deep and self._chance(0.1):
            self._list()
            plural = True
        if not deep and self._chance(0.25):
            self._prepositional()
        if not deep and self._chance(0.1):
            self._participle()
        return plural

    def _list(self) -> None:
        for _ in range(self.random.choice([1, 1, 2])):
            self._add(",")
            self._item()
        if self._chance(0.5):
            self._add(",")
        self._any("and", "and", "or")
        self._item()

    def _item(self) -> None:
        plural = self._chance(0.6)
        if not plural:
            self._any("a", "the", "an", "its")
        if self._chance(0.3):
            self._modifier()
        self._noun(plural)

    def _prepositional(self) -> None:
        self._any(
            "in", "on", "at", "with", "near", "behind", "under", "beside", "above", "of", "of", "across", "against", "along",
            "through", "over", "into", "between", "toward", "next to", "in front of", "on top of", "from", "by",
        )  # fmt: skip
        self._phrase(deep=True)

    def _participle(self) -> None:
        verb = self.random.choice(self.pools.verbs)
        if self._chance(0.5):
            self._add(verb["g"], "g")
            if self._chance(0.5):
                self._phrase(deep=True)
            else:
                self._prepositional()
        else:
            self._add(verb["e"], "e")
            self._prepositional()

    def _predicate(self, plural: bool) -> None:
        verb, be = self.random.choice(self.pools.verbs), "are" if plural else "is"
        kind = self.random.choices("vgeas", [50, 12, 12, 16, 10])[0]
        if kind == "v":
            if self._chance(0.12):
                self._add(self.random.choice(self.pools.adverbs), "r")
            self._add(verb["v" if plural else "s"], "v")
            self._complement()
        elif kind in "ge":
            self._add(be)
            self._add(verb[kind], kind)
            if kind == "g" and self._chance(0.5):
                self._phrase()
            else:
                self._prepositional()
        elif kind == "a":
            self._add(be)
            self._adjectives()
        else:
            self._add("seem" if plural else "seems", "v")
            self._add("to")
            if self._chance(0.4):
                self._add("be")
                self._adjectives()
            else:
                self._add(verb["v"], "v")
                self._complement()

    def _complement(self) -> None:
        kind = self.random.choices("nprx", [42, 32, 19, 7])[0]
        if kind == "n":
            self._phrase()
        elif kind == "p":
            self._prepositional()
        elif kind == "r":
            self._add(self.random.choice(self.pools.adverbs), "r")
        if self._chance(0.2):
            self._prepositional()

    def _adjectives(self) -> None:
        if self._chance(0.2):
            self._any("very", "quite", "slightly")
        self._add(self.random.choice(self.pools.adjectives), "a")
        if self._chance(0.4):
            self._any("and", ",")
            self._add(self.random.choice(self.pools.adjectives), "a")
        if self._chance(0.2):
            self._prepositional()

    def _clause(self) -> None:
        if self._chance(0.1):
            self._prepositional()
            self._add(",")
        plural = self._phrase()
        if self._chance(0.07):
            self._any(", that", ", which", ", who")
            self._predicate(plural)
            self._add(",")
        self._predicate(plural)
        if self._chance(0.15):
            self._any(", while", "while", ", and", "and", "as", ", but")
            self._predicate(self._phrase())
        if self._chance(0.18):
            self._add(",")
            self._participle()
        elif self._chance(0.1):  # "..., its tail wagging"
            self._any(", its", ", her", ", his", ", their")
            self._noun(self._chance(0.4))
            self._add(self.random.choice(self.pools.verbs)["g"], "g")
        self._add(".")

    def _apposition(self) -> None:
        plural = self._phrase(deep=True)
        self._any(",", ", possibly")
        self._phrase(deep=True, plural=plural)
        self._add(",")
        self._predicate(plural)
        self._add(".")

    def _genitive(self) -> None:
        self._phrase(deep=True, plural=False)
        self._add("'s")
        plural = self._chance(0.3)
        self._noun(plural)
        self._predicate(plural)
        self._add(".")

    def _coordinated(self) -> None:
        self._phrase(deep=True, plural=False)
        self._add("and")
        self._phrase(deep=True, plural=False)
        self._predicate(plural=True)
        self._add(".")

    def _two_verbs(self) -> None:
        plural = self._phrase(deep=True)
        self._predicate(plural)
        self._add("and")
        self._predicate(plural)
        self._add(".")

    def _bare(self) -> None:
        if self._chance(0.6):
            self._modifier()
        self._noun(plural=True)
        self._predicate(plural=True)
        self._add(".")

    def _presented(self) -> None:
        words = self.random.choice(
            ["there is", "there are", "it =shows", "the image =features", "she =wears", "he =holds", "they =carry"]
        )
        for word in words.split():
            self._add(word.strip("="), "v" if word[0] == "=" else "")
        self._phrase()
        if self._chance(0.4):
            self._list()
        self._add(".")

    def _fragment(self) -> None:
        self._phrase()
        if self._chance(0.5):
            self._participle()
        if self._chance(0.3):
            self._add(",")
            self._participle()
        if self._chance(0.3):
            self._add("with")
            self._phrase()
            self._add("and")
            self._phrase()
        self._any(".", ".", ":")

    def _request(self) -> None:
        self._any("do you want me to", "would you like me to", "let me", "i can", "you can")
        self._add(self.random.choice(self.pools.verbs)["v"], "v")
        self._phrase()
        self._add("?")

    def _label(self) -> None:
        self._noun(self._chance(0.5))
        for sign in ":,":
            self._add(sign)
            self._add(self.random.choice(self.pools.adjectives), "a")
        self._add(",")
        self._participle()
        self._add(".")


# ------------------------------------------------------------------------------------------------------------ training


def example(sentence: Sequence[tuple[str, str]]) -> Example:
    """A sentence as the tagger sees it."""
    words = [word.lower() for word, _ in sentence]
    closed = [_closed(word) for word in words]
    return words, closed, [letter if letter in tagger.TAGS else "" for _, letter in sentence]


def _closed(word: str) -> str:
    if not re.search(r"\w", word):
        return "." if word in ".!?" else ","
    return "n" if word.isdigit() else MEANINGS.get(word, "")


def silver(pipeline: str, data: Path) -> list[Example]:
    """Sentences of LLaVA-1.5's captions with a spaCy pipeline's classes, without the images of labelled sentences."""
    import spacy

    nlp = spacy.load(pipeline, disable=["ner", "lemmatizer", "parser"])
    nlp.enable_pipe("senter")
    folder = data / "opera-llava-1.5"
    rows = {path.name: _lines(path) for path in sorted(folder.glob("*.jsonl"))}
    drawn = [row for path in sorted(LABELS.glob("drawn.*.jsonl")) for row in _lines(path)]
    taken = {rows[Path(row["file"]).name][row["row"]]["image_id"] for row in drawn if row["file"].startswith("opera")}
    texts = [row["caption"] for part in rows.values() for row in part if row["image_id"] not in taken]
    result: dict[str, Example] = {}
    for document in nlp.pipe(texts, batch_size=64):
        for sentence in document.sents:
            words = [(token.text, _penn(token.text, token.tag_)) for token in sentence if not token.is_space]
            result.setdefault(sentence.text.strip(), example(words))
    return list(result.values())


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _penn(word: str, tag: str) -> str:
    return ("e" if word.endswith("ed") else "v") if tag == "VBD" else _SPACY.get(tag, "")


class Perceptron:
    """Averaged perceptron over the features of `gazeguard.claims.tagger`."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.weights: dict[str, list[int]] = defaultdict(lambda: [0] * len(tagger.TAGS))
        self.sums: dict[str, list[int]] = defaultdict(lambda: [0] * len(tagger.TAGS))
        self.steps = 0

    def train(self, examples: list[Example]) -> None:
        """One epoch."""
        self.random.shuffle(examples)
        for words, closed, labels in examples:
            self._sentence(words, closed, labels)

    def _sentence(self, words: Sequence[str], closed: Sequence[str], labels: Sequence[str]) -> None:
        seen = tagger.context(words, closed)
        first = second = "."
        previous, finite, determiner = "", "0", "0"
        for i, word in enumerate(words):
            state = seen[i]
            if not closed[i] and len(state) > 1:
                after = (seen[i + 1] if i + 1 < len(words) else ".", seen[i + 2] if i + 2 < len(words) else ".")
                keys = tagger.features(word, state, (second, first, previous), after, finite + determiner)
                state = self._decide(keys, state, labels[i])
            determiner = tagger.next_determiner(determiner, state, word)
            finite = tagger.next_finite(finite, state)
            second, first, previous = first, state, word

    def _decide(self, keys: Sequence[str], choice: str, label: str) -> str:
        """The class of a word, after an update if it was wrong; half of the time the true one, so that errors do not spread."""
        if self.random.random() < 0.1:
            keys = [key for key in keys if key[0] not in "wW"]  # so that the model does without the word, too
        scores = {
            letter: sum(self.weights[k][tagger.TAGS.index(letter)] for k in keys if k in self.weights) for letter in choice
        }
        best = max(choice, key=scores.__getitem__)
        self.steps += 1
        if label and label in choice and best != label:
            for key in keys:
                for letter, step in ((label, 1), (best, -1)):
                    at = tagger.TAGS.index(letter)
                    self.weights[key][at] += step
                    self.sums[key][at] += step * self.steps
        return label if label and label in choice and self.random.random() < 0.5 else best

    def averaged(self) -> dict[str, list[float]]:
        """The averages over all steps."""
        return {
            key: [weight - total / self.steps for weight, total in zip(row, self.sums[key], strict=True)]
            for key, row in self.weights.items()
        }


def mean(models: Sequence[dict[str, list[float]]]) -> dict[str, list[int]]:
    """The mean of several models, in tenths, without features that hardly count."""
    zeros = [0.0] * len(tagger.TAGS)
    result = {}
    for key in sorted({key for model in models for key in model}):
        columns = zip(*(model.get(key, zeros) for model in models), strict=True)
        values = [round(sum(column) / len(models) * SCALE) for column in columns]
        if max(map(abs, values)) >= LEAST:
            result[key] = values
    return result


def main(
    spacy: Annotated[str, typer.Option("--spacy", help="The spaCy pipeline that gives real captions their classes.")],
    data: Data = DATA,
) -> None:
    """Write the lexicon and the weights of the tagger into the package."""
    known = sources()
    typer.echo(f"{write_lexicon(known)} words", err=True)
    grammar = Grammar(Pools(known))
    examples = [example(grammar.sentence()) for _ in range(GRAMMAR_SENTENCES)] + silver(spacy, data) * SILVER_WEIGHT
    models = []
    for seed in range(MODELS):  # their mean depends less on the order of the sentences than one alone
        model = Perceptron(seed)
        for _ in range(EPOCHS):
            model.train(examples)
        models.append(model.averaged())
    table = mean(models)
    text = json.dumps(table, separators=(",", ":"), sort_keys=True)
    (FOLDER / "weights.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    typer.echo(f"{len(table)} features", err=True)


if __name__ == "__main__":
    typer.run(main)
