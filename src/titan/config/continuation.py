"""Which keys a run may change when it goes on, and which would make another run of it."""

from __future__ import annotations

from titan.config.keys import flatten
from titan.config.schema import TitanConfig

CONTINUED = (
    "model.",
    "tokenizer.kind",
    "tokenizer.fingerprint",
    "data.kind",
    "data.path",
    "data.dataset",
    "data.subset",
    "data.revision",
    "data.split",
    "data.format",
    "data.text_field",
    "data.messages_field",
    "data.components",
    "data.packing",
    "data.bad_documents",
    "data.mask_documents",
    "data.streaming",
    "data.streams",
    "data.shuffle_window",
    "training.seq_len",
    "training.global_batch_size",
    "training.seed",
)
"""Keys, or groups of them, that a resumed run must not change."""


def changed_keys(before: TitanConfig, now: TitanConfig) -> dict[str, tuple[object, object]]:
    """Return the keys whose values differ, each with both values."""
    old, new = flatten(before), flatten(now)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def refused_keys(changes: dict[str, tuple[object, object]]) -> list[str]:
    """Return those of the changed keys that decide the weights or the data.

    A tokenizer is held by what it is, wherever its file lies. A run of before there were fingerprints is held by the
    path instead.
    """
    if changes.get("tokenizer.fingerprint", ("", ""))[0] is None:
        held = tuple("tokenizer.path" if key == "tokenizer.fingerprint" else key for key in CONTINUED)
        return [key for key in changes if key.startswith(held)]
    return [key for key in changes if key.startswith(CONTINUED)]
