import dataclasses
from html.parser import HTMLParser

import pytest

from convert.manifest import Manifest
from convert.report import layer_series, page
from tests.support.configs import DENSE

MANIFEST = Manifest(
    options={"command": "carve", "experts": 4, "calibration": ["a<b>.txt"]},
    result=DENSE,
    source="small & <dense>",
    figures={"held_out_loss_dense": 2.8655},
    layers=[
        {"layer": 0, "recall": 0.7125, "output_scale": [1.5, 2.5], "kept": "yes"},
        {"layer": 2, "recall": 0.8, "output_scale": [1.75, 4.0]},
    ],
)


class Text(HTMLParser):
    """The words of a page, and its pictures; escapes are read as a browser would."""

    def __init__(self, source):
        super().__init__()
        self.words, self.pictures = [], []
        self.feed(source)

    def handle_data(self, data):
        self.words += data.split("\n")

    def handle_starttag(self, tag, attributes):
        assert tag != "b" and tag != "dense", "text was read as markup"
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])


def test_the_page_shows_figures_options_and_a_plot_for_each_figure():
    text = Text(page(MANIFEST))
    for word in ("carve small & <dense>", "2.8655", "a<b>.txt", "0.7125", "1.75 … 4", "output scale"):
        assert word in text.words, word
    (picture,) = text.pictures
    assert picture.startswith("data:image/png;base64,iVBOR")


def test_only_numbers_are_series():
    assert layer_series(MANIFEST.layers) == {
        "recall": [(0, [0.7125]), (2, [0.8])],
        "output_scale": [(0, [1.5, 2.5]), (2, [1.75, 4.0])],
    }


@pytest.mark.parametrize("layers", [[], [{"layer": 0}]])
def test_a_conversion_without_figures_has_no_plot(layers):
    assert not Text(page(dataclasses.replace(MANIFEST, layers=layers))).pictures


def test_the_same_manifest_gives_the_same_bytes():
    assert page(MANIFEST) == page(MANIFEST)
