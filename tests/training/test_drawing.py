"""Where figures of layers are drawn, and the file that a picture becomes."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
from drawn import REFUSED, bars_of, drawn, map_of, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_plus.training.drawing import ENDINGS, centred, picture, rounded
from lora_plus.training.layer_map import Layout

LLAMA = [f"model.layers.{n}.{part}" for n in range(11) for part in ("self_attn.q_proj", "mlp.up_proj")]
UNET = [
    f"{side}_blocks.{n}.attentions.{m}.blocks.0.{part}"
    for side in ("down", "up")
    for n in range(2)
    for m in range(2)
    for part in ("attn.to_q", "attn.to_out.0")
]
LAYOUTS = {
    "projections by depth": (LLAMA, ["q_proj", "up_proj"], [*map(str, range(11))]),
    "a head has no depth": ([*LLAMA, "lm_head"], ["q_proj", "up_proj", "lm_head"], [*map(str, range(11)), "-"]),
    "numbers that all layers of a form share are left out": (
        UNET,
        ["down_blocks.attentions.blocks.attn.to_q", "down_blocks.attentions.blocks.attn.to_out",
         "up_blocks.attentions.blocks.attn.to_q", "up_blocks.attentions.blocks.attn.to_out"],
        ["0.0", "0.1", "1.0", "1.1"],
    ),
    "experts": ([f"l.{n}.experts.{m}.{part}" for n in (2, 10) for m in (0, 1) for part in "ud"], ["u", "d"],
                ["2.0", "2.1", "10.0", "10.1"]),
    "one projection": ([f"layers.{n}.q" for n in range(3)], ["0.q", "1.q", "2.q"], []),
    "one of each": (["encoder.a", "encoder.b", "head"], ["a", "b", "head"], []),
    "the model itself": ([""], ["(model)"], []),
    "ends that two share": (["up.a.x", "down.a.x", "c"], ["up.a.x", "down.a.x", "c"], []),
    "more digits than Python reads": (
        [f"l.{'9' * 5000}.{part}" for part in "ab"] + ["l.1.a", "l.1.b"], ["a", "b"], ["1", "9" * 5000]
    ),
    "a map that is nearly empty": ([f"l.{n}.p{n}" for n in range(20)] + ["l.1.p0"],
        ["0.p0", *(f"p{n}" for n in range(1, 20)), "1.p0"], []),
    "names that differ in zeros only": (["l.1.a", "l.01.a", "l.1.b"], ["a", "b"], ["1", "01"]),
}  # fmt: skip


def label(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:11]}…{text[-20:]}"


@pytest.mark.parametrize(("names", "rows", "columns"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_map_where_names_have_projections_and_depths_and_else_bars(
    names: list[str], rows: list[str], columns: list[str]
) -> None:
    layout = Layout.of(names)
    assert layout.rows == [label(row) for row in rows]
    assert layout.columns == [label(column) for column in columns]
    assert len(set(layout.places)) == len(names)
    if not columns:
        assert layout.places == [(n, 0) for n in range(len(names))]


PARTS = st.one_of(st.sampled_from(["layers", "q", "0", "1", "10", "01", "*", "²", "٣"]), st.text(max_size=4))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(PARTS, max_size=4).map(".".join), min_size=1, max_size=12, unique=True))
def test_layers_of_any_names_have_a_labelled_place_each(names: list[str]) -> None:
    layout = Layout.of(names)
    assert len(layout.places) == len(set(layout.places)) == len(names)
    assert {row for row, _ in layout.places} == set(range(len(layout.rows)))
    assert {column for _, column in layout.places} == set(range(len(layout.columns) or 1))
    assert all(text and text.isprintable() for text in [*layout.rows, *layout.columns])


def test_each_layer_is_drawn_at_its_projection_and_depth(tmp_path: Path) -> None:
    def plot(path: Path) -> None:
        with picture(path, 9, 3) as figure:
            Layout.of(LLAMA[::-1]).draw(figure.subplots(), range(1, 23), "title", 8.0)

    (panel, _) = drawn(plot, into=tmp_path).axes
    wanted = {(part, str(n)): 22 - 2 * n - (part == "up_proj") for n in range(11) for part in ("q_proj", "up_proj")}
    assert map_of(panel) == wanted
    assert sorted(texts(panel)) == sorted(rounded(value, 2) for value in wanted.values())


def test_what_is_no_number_is_empty_and_what_is_infinite_at_the_end_of_the_scale(tmp_path: Path) -> None:
    values = [1.0, math.nan, -math.inf, -2.0, math.inf]

    def plot(names: list[str], path: Path) -> None:
        with picture(path, 5, 3) as figure:
            Layout.of(names).draw(figure.subplots(), values, "title", 4.0, zero=True)

    panel = drawn(plot, [*"abcde"], into=tmp_path).axes[0]
    assert bars_of(panel) == {"a": 1, "b": 0, "c": -2, "d": -2, "e": 2}
    assert texts(panel) == [" nan", " -inf", " inf"]
    panel = drawn(plot, ["0.a", "0.b", "1.a", "1.b", "c"], into=tmp_path).axes[0]
    assert map_of(panel) == {("a", "0"): 1, ("a", "1"): -2, ("b", "1"): -2, ("c", "-"): 2}
    assert texts(panel) == ["1.0", "-inf", "-2.0", "inf"]
    (mesh,) = (each for each in panel.collections if hasattr(each, "get_coordinates"))
    assert mesh.get_clim() == (-2, 2), "zero is in the middle of two hues"


def test_a_title_is_broken_to_its_panel_and_cells_without_room_have_no_numbers(tmp_path: Path) -> None:
    def plot(room: float, path: Path) -> None:
        with picture(path, room, 3) as figure:
            layout = Layout.of(["0.a", "0.b", "1.a", "1.b", "2.a", "2.b"])
            layout.draw(figure.subplots(), range(6), "Norm of the update of all layers", room)

    wide, narrow = (drawn(plot, room, into=tmp_path).axes[0] for room in (3.5, 1.3))
    assert wide.get_title(loc="left") == "Norm of the update of all layers" and len(texts(wide)) == 6
    assert narrow.get_title(loc="left") == "Norm of the update\nof all layers" and texts(narrow) == []


@pytest.mark.parametrize("form", ["layer{}_", "layers.{}.{}"])
def test_thousands_of_layers_are_few_artists_on_one_page(form: str, tmp_path: Path) -> None:
    names = [form.format(n, part) for n in range(1000) for part in ("a", "b")[: 1 + form.count(".{}") // 2]]

    def plot(path: Path) -> None:
        layout = Layout.of(names)
        with picture(path, 5, layout.height) as figure:
            layout.draw(figure.subplots(), range(len(names)), "title", 4.0)

    figure = drawn(plot, into=tmp_path)
    assert figure.get_figheight() < 8
    panel = figure.axes[0]
    assert len(panel.get_children()) < 20
    assert max(len(axis.get_ticklabels()) for axis in (panel.xaxis, panel.yaxis)) <= 40


@pytest.mark.parametrize("ending", [*ENDINGS])
def test_equal_pictures_are_equal_files(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["$x_{$", "\x1b[2J\n", "名前", "a" * 10_000]  # no formula, nothing that acts, no letter of the font, long
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        with picture(tmp_path / folder / f"p{ending}", 3, 2) as figure:
            Layout.of(names).draw(figure.subplots(), range(4), "title", 2.0)
    one, two = ((tmp_path / folder / f"p{ending}").read_bytes() for folder in ("one", "two"))
    assert one == two and one.startswith({".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[ending])


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jpg", ".svg", "a.svg.gz"])
def test_another_ending_is_refused_and_leaves_the_disk_as_it_was(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED.format(f".*{name}")), picture(tmp_path / name, 3, 2):
        raise AssertionError("nothing is to be drawn")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_drawing_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.svg").write_text("before")
    with pytest.raises(RuntimeError, match="in between"), picture(tmp_path / "a.svg", 3, 2):
        raise RuntimeError("in between")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.svg", "before")]


def test_a_picture_leaves_the_settings_of_matplotlib_and_of_warnings(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before, filters = dict(matplotlib.rcParams), list(warnings.filters)
    with picture(tmp_path / "a.svg", 3, 2):
        pass
    assert dict(matplotlib.rcParams) == before and warnings.filters == filters


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.8, 3, "0.800"), (12.3, 2, "12"), (1500.0, 2, "1.5e+03"), (-0.0512, 2, "-0.051"), (0.0, 2, "0.0"),
     (math.inf, 2, "inf"), (1.0, 1, "1")],
)  # fmt: skip
def test_numbers_are_written_with_the_digits_that_count(value: float, digits: int, text: str) -> None:
    assert rounded(value, digits) == text


@pytest.mark.parametrize("map_", ["viridis", "PuOr", "gray", "hsv"])
def test_a_number_in_a_cell_is_readable_whatever_its_colour(map_: str) -> None:
    """A contrast of 4.5 is what WCAG 2 asks of text."""
    matplotlib = pytest.importorskip("matplotlib")

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for n in range(256):
        cell = matplotlib.colormaps[map_](n)
        darker, lighter = sorted(map(luminance, (cell, matplotlib.colors.to_rgb(centred(cell)["color"]))))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, n
