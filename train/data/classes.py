"""The mapping from a source's labels to classes: ``healthy=0 npdr=2,3``."""

from __future__ import annotations

import re
import shlex

from retinar.engine.errors import InputError

DEFAULT_CLASSES = "healthy=0 npdr=2,3"
"""The paper's two classes; grades 1, 4 and 5 (ungradable in OIA-DDR) are left out."""

GRADES = ("0", "1", "2", "3", "4", "5")

# A class name becomes a folder name, on any system.
_CLASS_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


def class_name(name: str) -> str:
    """The name itself when it can be a folder's name on any system; InputError otherwise."""
    if not _CLASS_NAME.fullmatch(name):
        raise InputError(
            f"expected a class name of letters, digits, '_', '-' and '.', got {name!r}: map it, --classes NAME=LABEL"
        )
    return name


def parse_classes(text: str) -> dict[str, tuple[str, ...]]:
    """Class name -> its labels, in the order given. Quotes protect labels with blanks: ``npdr="mild npdr",severe``.

    Raises InputError for a class without labels, an unusable name, or a label in two classes.
    """
    form = 'expected classes as "healthy=0 npdr=2,3"'
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{form}, got {text!r} with an open quote: close it") from error
    classes: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for word in words:
        name, equals, values = word.partition("=")
        labels = tuple(label.strip() for label in values.split(","))
        if not equals or not all(labels):
            raise InputError(f"{form}, got {word!r}: write NAME=LABEL,LABEL without blanks")
        if class_name(name) in classes:
            raise InputError(f"class {name!r} occurs twice in {text!r}: join its labels with commas")
        for label in labels:
            if label in owner:
                raise InputError(f"label {label!r} belongs to {owner[label]} and {name} in {text!r}: give it to one")
            owner[label] = name
        classes[name] = labels
    if not classes:
        raise InputError(f"{form}, got an empty mapping: name at least one class")
    return classes


def format_classes(classes: dict[str, tuple[str, ...]]) -> str:
    """The text that :func:`parse_classes` reads back."""
    return " ".join(shlex.quote(f"{name}={','.join(labels)}") for name, labels in classes.items())
