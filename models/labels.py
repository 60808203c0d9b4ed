"""Describe the labels that a network was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_LISTED_CLASSES = 5


@dataclass(frozen=True)
class TrainedLabels:
    """The labels that a network was trained on.

    Attributes:
        images_per_class: Number of training images of each class, or None if it is unknown.
        has_null_class: Whether the network was trained on the null class, which classifier-free
            guidance requires.
    """

    images_per_class: Sequence[int] | None = None
    has_null_class: bool = True

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TrainedLabels":
        """Return the labels that the config.json of a checkpoint records.

        Checkpoints of older versions do not record the number of images per class.
        """
        return cls(config["data"].get("images_per_class"), config.get("cfg_prob", 0.1) > 0)

    def list_classes(self, num_classes: int) -> list[int]:
        """Return the classes with training images, or all classes if these are unknown."""
        if self.images_per_class is None:
            return list(range(num_classes))
        return [k for k, count in enumerate(self.images_per_class) if count]


def describe_empty_classes(images_per_class: Sequence[int], class_names: list[str]) -> str | None:
    """Return a phrase such as "no images of 1 of 3 classes: ...", or None if no class is empty."""
    empty = [k for k, count in enumerate(images_per_class) if not count]
    if not empty:
        return None
    names = [
        str(k) if class_names[k] == str(k) else f"{k} ({class_names[k]})"
        for k in empty[:MAX_LISTED_CLASSES]
    ]
    if len(empty) > len(names):
        names.append(f"{len(empty) - len(names):,} more")
    return (
        f"no images of {len(empty):,} of {len(class_names):,} classes: {', '.join(names)}; random "
        "and balanced labels leave these classes out"
    )
