"""Figures: what is drawn, and that a method looks the same wherever it is drawn."""

import pandas as pd
import pytest

from salvit_core import MECHANISMS, METHODS, figures


def looks(figure):
    """Colour, dashes and marker by the names in a figure's legend."""
    handles, names = figure.legends[0].legend_handles, [text.get_text() for text in figure.legends[0].get_texts()]
    return {
        name: (line.get_color(), line.get_linestyle(), line.get_marker())
        for name, line in zip(names, handles, strict=True)
    }


def table(names):
    return pd.DataFrame({"method": names, "series": names, "x": [1.0] * len(names), "accuracy": [50.0] * len(names)})


def test_a_method_looks_the_same_in_every_figure():
    one = looks(figures.accuracy_against({"ours": table(["SA softmax", "SAL-ViT", "EA L2Q"])}))
    other = looks(figures.accuracy_against({"paper": table(["MPCViT", "EA L2Q"]), "ours": table(["SA softmax"])}))
    grown = pd.DataFrame({"series": ["Linformer", "SA softmax"] * 2, "tokens": [64, 64, 256, 256], "ms": [1, 2, 3, 4]})
    third = looks(figures.curves(grown, "tokens", {"ms": "ms"}))
    for name in ("SA softmax", "EA L2Q"):
        assert one[name] == other[name]
    assert one["SA softmax"] == third["SA softmax"]
    assert len({look[0] for look in one.values()}) == 3


@pytest.mark.parametrize("names", [[*METHODS], ["SA softmax", "SA L2Q", "EA softmax", "EA L2Q", *MECHANISMS]])
def test_all_methods_of_a_study_are_told_apart(names):
    assert len(set(looks(figures.accuracy_against({"ours": table(names)})).values())) == len(names)


def test_figures_without_dates_are_equal_files(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_folder", lambda: tmp_path)
    contents = []
    for _ in range(2):
        figures.save(figures.accuracy_against({"ours": table(["SA softmax"])}), "one")
        contents.append([(tmp_path / f"one.{kind}").read_bytes() for kind in ("png", "pdf")])
    assert contents[0] == contents[1]
