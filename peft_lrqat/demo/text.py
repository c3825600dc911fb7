"""Text for the offline demo: the help topics that every CPython carries, split by topic name."""

import hashlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal, get_args


Split = Literal["train", "heldout"]

# Topics whose text is almost entirely a section of a longer topic (on the right). They add nothing.
SECTIONS_OF_OTHERS = {
    "async": "compound",
    "class": "compound",
    "else": "compound",
    "for": "compound",
    "function": "compound",
    "if": "compound",
    "try": "compound",
    "while": "compound",
    "with": "compound",
    "attribute-access": "specialnames",
    "callable-types": "specialnames",
    "context-managers": "specialnames",
    "customization": "specialnames",
    "numeric-types": "specialnames",
    "sequence-types": "specialnames",
    "dynamic-features": "execmodel",
    "exceptions": "execmodel",
    "naming": "execmodel",
    "augassign": "assignment",
    "id-classes": "identifiers",
    "in": "comparisons",
    "typesseq-mutable": "typesseq",
}


def model_path() -> Path:
    """Directory of the small trained language model that ships with this package."""
    return Path(__file__).parent / "model"


def split_of(name: str) -> Split:
    """Side of the topic `name`. It depends only on the name: the same in every Python version."""
    return "heldout" if hashlib.sha256(name.encode()).digest()[0] % 8 == 1 else "train"


def load_topics(split: Split) -> list[str]:
    """Texts of one side of `pydoc_data.topics`, sorted by topic name.

    About one topic in eight is held out, chosen by a hash of its name. No held-out text is a copy
    of a training text: topics that repeat a section of a longer one (`SECTIONS_OF_OTHERS`) are left
    out of both sides, and held-out paragraphs that also occur in a training topic (apart from line
    breaks and indentation) are dropped.

    The wording of a topic differs a little between Python versions; its side does not.
    """
    if split not in get_args(Split):
        raise ValueError(
            f"`split` must be one of {', '.join(get_args(Split))}, but it is {split!r}"
        )
    distinct = sorted(set(topics) - set(SECTIONS_OF_OTHERS))
    train = [topics[name].strip() for name in distinct if split_of(name) == "train"]
    if split == "train":
        return train
    seen = {_words(paragraph) for text in train for paragraph in text.split("\n\n")}
    heldout = [topics[name].strip() for name in distinct if split_of(name) == "heldout"]
    kept = ["\n\n".join(p for p in text.split("\n\n") if _words(p) not in seen) for text in heldout]
    return [text for text in kept if text]


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())
