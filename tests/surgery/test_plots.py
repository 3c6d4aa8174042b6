"""The picture of an adapter has the numbers that are measured, whatever the layers are called."""

from __future__ import annotations

import statistics
import sys
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case
from drawn import REFUSED, bars_of, drawn, map_of, panels
from parameter_cases import PARAMETER_CASES, ParameterCase
from test_measures import layer

from lora_plus.files.save import describe
from lora_plus.model.state import State
from lora_plus.surgery import LayerMeasures, measure, plot_measures

NORM, RANK = "Norm of the update s·B·A (Frobenius)", "Effective rank of the update"
VALUES, ENERGY = "Singular values of s·B·A", "Energy share of the first k"


def measured(ranks: dict[str, int], still: tuple[str, ...] = ()) -> list[LayerMeasures]:
    """Of layers of these ranks, with random updates but for those that stand still."""
    generator = torch.Generator().manual_seed(0)
    draw: Any = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [measure(name, layer(draw(r, 9), draw(8, r) * (name not in still), 0.5)) for name, r in ranks.items()]


BLOCKS = {f"layers.{n}.{part}": 4 if part == "q" else 2 for n in range(3) for part in "qv"}


@pytest.mark.parametrize("case", [CASES[0], PARAMETER_CASES[0]], ids=lambda case: case.name)
def test_bars_have_the_measures_of_a_case(case: Case | ParameterCase, tmp_path: Path) -> None:
    found = describe(State(case.adapted()), "default").layers
    figures = [measure(name, each) for name, each in found.items()]
    shown = panels(drawn(plot_measures, figures, into=tmp_path))
    assert list(bars_of(shown[NORM]).values()) == [each.norm for each in figures]
    assert list(bars_of(shown[RANK]).values()) == [each.effective_rank for each in figures]
    for line, each in zip(shown[VALUES].lines, figures, strict=True):
        assert tuple(line.get_ydata()) == each.singular_values


def test_maps_and_lines_have_the_measures_of_layers_by_projection_and_depth(tmp_path: Path) -> None:
    figures = measured({**BLOCKS, "head": 3})
    shown = panels(drawn(plot_measures, figures, into=tmp_path))
    places = [*((part, str(n)) for n in range(3) for part in "qv"), ("head", "-")]
    assert map_of(shown[NORM]) == {place: each.norm for place, each in zip(places, figures, strict=True)}
    assert map_of(shown[RANK]) == {place: each.effective_rank for place, each in zip(places, figures, strict=True)}
    assert [text.get_text() for text in shown[ENERGY].get_legend().get_texts()] == ["q", "v", "head"]
    for row, part in enumerate(["q", "v", "head"]):
        spectra = [each.singular_values for each in figures if each.name.endswith(part)]
        assert list(shown[VALUES].lines[row].get_ydata()) == [statistics.median(k) for k in zip(*spectra, strict=True)]
        band = shown[VALUES].collections[row].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == (min(map(min, spectra)), max(map(max, spectra)))
        shares = [[part / each.norm**2 for part in accumulate(s**2 for s in each.singular_values)]
                  for each in figures if each.name.endswith(part)]  # fmt: skip
        wanted = [statistics.median(k) for k in zip(*[[*each, 1, 1][:4] for each in shares], strict=True)]
        assert list(shown[ENERGY].lines[row].get_ydata()) == pytest.approx(wanted, rel=1e-12)


def test_more_projections_than_colours_have_one_line_for_all_layers(tmp_path: Path) -> None:
    figures = measured({f"layers.{n}.{part}": 2 for n in range(2) for part in "abcdefghi"})
    (line,) = panels(drawn(plot_measures, figures, into=tmp_path))[VALUES].lines
    wanted = [statistics.median(each.singular_values[k] for each in figures) for k in range(2)]
    assert list(line.get_ydata()) == wanted


def test_layers_without_an_update_are_named_and_have_no_spectrum(tmp_path: Path) -> None:
    figures = measured(BLOCKS, still=("layers.1.v", "layers.2.v"))
    figure = drawn(plot_measures, figures, into=tmp_path)
    assert set(map_of(panels(figure)[RANK])) == {("q", "0"), ("q", "1"), ("q", "2"), ("v", "0")}
    assert map_of(panels(figure)[NORM])["v", "1"] == 0
    said = "2 layers (layers.1.v, layers.2.v) without an update: s·B·A is zero, as before training"
    assert said in figure.get_suptitle()
    norms = sorted(each.norm for each in figures if each.norm)
    assert f"6 layers, r = 2 to 4; the median layer: norm {statistics.median(norms):#.2g}" in figure.get_suptitle()


@pytest.mark.parametrize("width", [4.8, 7.5, 12.0])
def test_it_has_the_width_that_is_asked_for_and_the_same_numbers(width: float, tmp_path: Path) -> None:
    figure = drawn(partial(plot_measures, width=width), figures := measured(BLOCKS), into=tmp_path)
    assert figure.get_figwidth() == width
    assert list(map_of(panels(figure)[NORM]).values()) == [each.norm for part in "qv" for each in figures
                                                          if each.name.endswith(part)]  # fmt: skip


@pytest.mark.parametrize("names", [["fc"], [*BLOCKS]], ids=["bars", "map"])
def test_an_adapter_that_was_never_trained_says_so_and_has_norms_only(names: list[str], tmp_path: Path) -> None:
    figure = drawn(plot_measures, measured(dict.fromkeys(names, 2), still=tuple(names)), into=tmp_path)
    assert [*panels(figure)] == [NORM]
    assert figure.get_suptitle().endswith("No layer has an update: s·B·A is zero, as before training")


def test_updates_whose_squares_overflow_are_named_and_have_no_spectrum(tmp_path: Path) -> None:
    large = measure("b", layer(torch.full((2, 3), 1e200, dtype=torch.float64), torch.eye(4, 2, dtype=torch.float64)))
    for others in (measured({"a": 2}), []):
        figure = drawn(plot_measures, [*others, large], into=tmp_path)
        shown = panels(figure)
        assert [len(panel.lines) for panel in shown.values() if panel in (shown.get(VALUES),)] == [1] * len(others)
        said = " ".join(figure.get_suptitle().split())
        assert said.endswith("1 layer (b) with numbers so large that their squares overflow float64")


def test_singular_values_of_rounding_errors_do_not_stretch_the_axis(tmp_path: Path) -> None:
    A = torch.eye(3, 8, dtype=torch.float64)
    B = torch.eye(8, 3, dtype=torch.float64) * torch.tensor([2.0, 1.0, 1e-17])
    panel = panels(drawn(plot_measures, [measure("a", layer(A, B))], into=tmp_path))[VALUES]
    assert panel.get_ylim() == pytest.approx((2e-5, 2.5))


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_measures(measured({**BLOCKS, "$x_{$\x1b\n": 1}), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<g id=") > 50


def test_what_cannot_be_drawn_is_refused_and_leaves_the_disk_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = measured(BLOCKS)
    with pytest.raises(ValueError, match=REFUSED.format(".*a.html")):
        plot_measures(figures, tmp_path / "a.html")
    with pytest.raises(ValueError, match="there is no layer to draw"):
        plot_measures([], tmp_path / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"drawing needs matplotlib >= 3\.8, which is not installed; run: pip"):
        plot_measures(figures, tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []
