"""The rows of the papers' tables, by name: what each changes in a preset's configuration."""

from typing import Any

from .attention import ATTENTION

# The SAL-ViT paper's. Where a budget B of self-attention layers stands, the paper's search chose them but it does not
# say which; private latency depends on their number alone, so the first B stand in for measurements of latency.
METHODS: dict[str, dict[str, Any]] = {
    "SA softmax": dict(attention="self", normalizer="softmax"),
    "SA 2Quad": dict(attention="self", normalizer="2quad"),
    "SA 2ReLU": dict(attention="self", normalizer="2relu"),
    "SA L2Q": dict(attention="self", normalizer="l2q"),
    "SA scaling": dict(attention="scaling"),
    "EA softmax": dict(attention="external", normalizer="softmax"),
    "EA 2Quad": dict(attention="external", normalizer="2quad"),
    "EA 2ReLU": dict(attention="external", normalizer="2relu"),
    "EA L2Q": dict(attention="external", normalizer="l2q"),
    "EA scaling": dict(attention="external", normalizer="scaling"),
    "SAL-ViT B=3": dict(attention=3, normalizer="l2q"),
    "SAL-ViT B=2": dict(attention=2, normalizer="l2q"),
    "SAL-ViT B=1": dict(attention=1, normalizer="l2q"),
}

# The order of Table 2, and of what is compared besides; a row that is not named here follows, by its label.
_ORDER = (
    "Linformer",
    "Linformer, heads",
    "CosFormer",
    "Hamburger",
    "SOFT",
    "Performer",
    "Performer ReLU",
    "Nystromformer",
    "Dilated hybrid",
    "Linformer L2Q",
    "Nystromformer L2Q",
    "Dilated L2Q",
    "SA separate",
)


def _declared() -> dict[str, dict[str, Any]]:
    """The rows that mechanisms declare in their files."""
    rows = {
        label: {"attention": name, **changes}
        for name, mechanism in ATTENTION.items()
        for label, changes in mechanism.rows.items()
    }
    places = {label: place for place, label in enumerate(_ORDER)}
    return {label: rows[label] for label in sorted(rows, key=lambda label: (places.get(label, len(places)), label))}


# Efficient attention with its own paper's normaliser, and with L2Q.
MECHANISMS = _declared()
ROWS = METHODS | MECHANISMS
