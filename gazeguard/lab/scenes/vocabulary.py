"""Vocabulary of the scenes world: everyday objects by theme, their characters in OpenMoji, plural forms, colours."""

from __future__ import annotations

from gazeguard.heads.pictographs import COLOURS, GLYPHS

# theme -> noun -> character. Earlier nouns of a theme are drawn more often than later ones.
THEMES: dict[str, dict[str, str]] = {
    "kitchen": {
        "cup": "☕", "plate": "🍽", "knife": "🔪", "spoon": "🥄", "bowl": "🥣", "teapot": "🫖", "bottle": "🍾", "pan": "🍳",
        "wine glass": "🍷", "jar": "🫙", "salt shaker": "🧂", "ice cube": "🧊",
    },
    "food": {
        "apple": "🍎", "banana": "🍌", "pizza": "🍕", "cake": "🎂", "burger": "🍔", "carrot": "🥕", "egg": "🥚", "donut": "🍩",
        "strawberry": "🍓", "lemon": "🍋", "pear": "🍐", "watermelon": "🍉",
    },
    "pets": {
        "dog": "🐕", "cat": "🐈", "rabbit": "🐇", "mouse": "🐁", "parrot": "🦜", "bone": "🦴", "turtle": "🐢", "hamster": "🐹",
        "angelfish": "🐠", "snake": "🐍", "hedgehog": "🦔", "lizard": "🦎",
    },
    "farm": {
        "cow": "🐄", "horse": "🐎", "sheep": "🐑", "pig": "🐖", "tractor": "🚜", "goat": "🐐", "rooster": "🐓", "duck": "🦆",
        "chick": "🐥", "donkey": "🫏", "basket": "🧺", "turkey": "🦃",
    },
    "wild": {
        "elephant": "🐘", "giraffe": "🦒", "lion": "🦁", "zebra": "🦓", "monkey": "🐒", "palm tree": "🌴", "bear": "🐻",
        "fox": "🦊", "cactus": "🌵", "owl": "🦉", "crocodile": "🐊", "frog": "🐸", "camel": "🐫", "mushroom": "🍄",
    },
    "street": {
        "car": "🚗", "bus": "🚌", "bicycle": "🚲", "traffic light": "🚦", "stop sign": "🛑", "taxi": "🚕", "van": "🚚",
        "motorcycle": "🏍", "train": "🚂", "scooter": "🛴", "mailbox": "📫", "ambulance": "🚑", "gas pump": "⛽", "moped": "🛵",
    },
    "sky": {
        "sun": "☀", "cloud": "☁", "bird": "🐦", "plane": "✈", "moon": "🌙", "star": "⭐", "rainbow": "🌈", "balloon": "🎈",
        "kite": "🪁", "butterfly": "🦋", "helicopter": "🚁", "rocket": "🚀",
    },
    "office": {
        "laptop": "💻", "book": "📕", "pencil": "✏", "keyboard": "⌨", "phone": "☎", "clock": "⏰", "envelope": "✉",
        "printer": "🖨", "calendar": "📅", "ruler": "📏", "paper clip": "📎", "briefcase": "💼",
    },
    "sport": {
        "football": "⚽", "basketball": "🏀", "tennis ball": "🎾", "trophy": "🏆", "skateboard": "🛹", "medal": "🏅",
        "baseball": "⚾", "boxing glove": "🥊", "frisbee": "🥏", "dartboard": "🎯", "paddle": "🏓", "hockey stick": "🏒",
    },
    "home": {
        "chair": "🪑", "couch": "🛋", "bed": "🛏", "television": "📺", "door": "🚪", "window": "🪟", "light bulb": "💡",
        "mirror": "🪞", "potted plant": "🪴", "teddy bear": "🧸", "candle": "🕯", "key": "🔑", "bathtub": "🛁", "toilet": "🚽",
        "broom": "🧹",
    },
    "wear": {
        "shirt": "👕", "shoe": "👟", "hat": "👒", "dress": "👗", "umbrella": "☂", "backpack": "🎒", "watch": "⌚", "sock": "🧦",
        "boot": "👢", "coat": "🧥", "scarf": "🧣", "ring": "💍", "crown": "👑", "top hat": "🎩",
    },
    "sea": {
        "fish": "🐟", "ship": "🚢", "whale": "🐋", "sailboat": "⛵", "crab": "🦀", "dolphin": "🐬", "shark": "🦈",
        "octopus": "🐙", "anchor": "⚓", "shell": "🐚", "lobster": "🦞", "squid": "🦑",
    },
    "music": {
        "guitar": "🎸", "piano": "🎹", "drum": "🥁", "violin": "🎻", "trumpet": "🎺", "microphone": "🎤", "saxophone": "🎷",
        "radio": "📻", "bell": "🔔", "accordion": "🪗", "banjo": "🪕",
    },
}  # fmt: skip

CHARACTERS: dict[str, str] = {noun: character for theme in THEMES.values() for noun, character in theme.items()}
THEME_OF: dict[str, str] = {noun: theme for theme, nouns in THEMES.items() for noun in nouns}
PICTOGRAPHS: tuple[str, ...] = tuple(GLYPHS)
NOUNS: tuple[str, ...] = (*CHARACTERS, *(noun for noun in PICTOGRAPHS if noun not in CHARACTERS))
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)

# Objects that are drawn alike: the hardest absent ones to ask for.
LOOK_ALIKES: tuple[tuple[str, ...], ...] = (
    ("whale", "dolphin", "shark"), ("fish", "angelfish"), ("sheep", "goat"), ("cow", "horse", "donkey"),
    ("lizard", "crocodile"), ("dog", "cat"), ("rooster", "turkey"), ("duck", "chick", "bird"), ("crab", "lobster"),
    ("octopus", "squid"), ("car", "taxi"), ("van", "ambulance"), ("motorcycle", "moped", "bicycle"),
    ("guitar", "banjo", "violin"), ("trumpet", "saxophone"), ("bear", "teddy bear"), ("spoon", "knife"),
    ("bowl", "cup", "teapot"), ("hat", "top hat"), ("boot", "shoe", "sock"), ("sailboat", "ship"),
    ("basketball", "football", "tennis ball", "baseball"), ("coat", "shirt"), ("door", "window", "mirror"),
    ("couch", "chair", "bed"), ("clock", "watch"), ("plane", "helicopter", "rocket"), ("lemon", "banana", "pear"),
    ("apple", "strawberry"), ("trophy", "medal"), ("mouse", "hamster", "hedgehog"), ("keyboard", "piano"),
    ("candle", "light bulb"), ("jar", "salt shaker", "bottle"), ("zebra", "giraffe"),
)  # fmt: skip

_PLURALS = {
    "sheep": "sheep", "fish": "fish", "angelfish": "angelfish", "squid": "squid", "mouse": "mice", "knife": "knives",
    "scarf": "scarves",
}  # fmt: skip


def plural(noun: str) -> str:
    """The plural of a noun of the vocabulary: ``mice``, ``foxes``, ``palm trees``."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def look_alikes(noun: str) -> tuple[str, ...]:
    """The other nouns whose drawings resemble this one's."""
    return tuple(other for group in LOOK_ALIKES if noun in group for other in group if other != noun)
