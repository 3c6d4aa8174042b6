"""The command line does what the library does, and says so in a stable form."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from drawn import bars_of, drawn, panels
from files_support import PATHS, adapted_net, contents, net, parts
from safetensors.torch import load_file
from test_checkpoint import save
from torch import nn
from typer.testing import CliRunner

import lora_plus
from lora_plus import files, load_adapter, save_adapter
from lora_plus.cli import app as cli
from lora_plus.cli import arguments
from lora_plus.files import save as saving
from lora_plus.files.formats import FORMATS
from lora_plus.surgery import combine_adapters, methods, resize_adapter

COMMANDS = ["inspect", "convert", "diff", "combine", "resize", "merge", "extract", "verify"]


def call(*arguments: object) -> Any:
    environment = {"COLUMNS": "60", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=environment)


def output(*arguments: object) -> str:
    result = call(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def as_json(*arguments: object) -> Any:
    return json.loads(output(*arguments, "--json"))


def failed(*arguments: object) -> str:
    """The one text on stderr."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    return result.stderr


def misused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), "embed": nn.Embedding(9, 6)})


def adapted(seed: int = 1, **options: Any) -> nn.Module:
    return randomise(lora_plus.inject_lora(small(), **{"targets": ["layers.*"], "r": 2, "alpha": 3, **options}), seed)


@pytest.fixture
def a(tmp_path: Path) -> Path:
    save_adapter(adapted(), tmp_path / "a.safetensors", metadata={"task_type": "CAUSAL_LM"})
    return tmp_path / "a.safetensors"


@pytest.fixture
def b(tmp_path: Path) -> Path:
    save_adapter(adapted(2, r=3, targets=["layers.1", "embed"]), tmp_path / "b")
    return tmp_path / "b"


# ---- adapter files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", PATHS)
def test_inspect_tells_what_is_in_a_file(form: str, tmp_path: Path) -> None:
    path = tmp_path / PATHS[form]
    model = adapted_net()
    save_adapter(model, path, metadata={"revision": "main"})
    found = as_json("inspect", path)
    assert (found["path"], found["format"], found["metadata"]) == (str(path), form, {"revision": "main"})
    assert found["bytes"] == sum(map(len, contents(path).values())) if path.is_dir() else len(path.read_bytes())
    assert found["trained"] == {"head": 5 * 5 + 5 + 4 * 5 + 1}
    layers = {row["name"]: row for row in found["layers"]}
    assert {name: row["kind"] for name, row in layers.items()} == {
        "embed": "Embedding",
        "conv": "Conv1d",
        "proj": "Linear",
    }
    proj = layers["proj"]
    assert (proj["r"], proj["alpha"], proj["scale"], proj["shape"], proj["dtype"]) == (3, 3, 1, [5, 6], "float32")
    update = (model.proj.lora_B["default"].double() @ model.proj.lora_A["default"].double()).detach()
    values = torch.linalg.svdvals(update).square()
    assert proj["norm"] == pytest.approx(float(update.norm()), rel=1e-6)
    assert proj["largest_share"] == pytest.approx(float(values[0] / values.sum()), rel=1e-6)
    text = output("inspect", path, "--layers")
    assert f"{path}: {form} format" in text
    assert "trained in full: head, 51 numbers" in text
    assert "revision: main" in text


def test_inspect_groups_layers_whose_names_differ_in_numbers(a: Path) -> None:
    lines = output("inspect", a).splitlines()
    assert lines[1] == "2 layers, 48 parameters, float32"
    assert lines[-1].split()[:7] == ["layers.*", "Linear", "2", "2", "3", "1.5", "lora"]
    assert [line.split()[0] for line in output("inspect", a, "--layers").splitlines()[-2:]] == ["layers.0", "layers.1"]


def test_tables_are_neither_wrapped_nor_cut_where_there_is_no_terminal(a: Path) -> None:
    lines = output("inspect", a, "--layers").splitlines()
    assert len(lines[-1]) > 60  # the width that the environment says
    assert lines[-1].rstrip() == lines[-1]


@pytest.mark.parametrize("form", PATHS)
def test_inspect_draws_the_numbers_that_it_tells(form: str, tmp_path: Path) -> None:
    path, picture = tmp_path / PATHS[form], tmp_path / "picture.png"
    save_adapter(adapted_net(), path)
    found: list[Any] = []
    arguments = "inspect", path, "--plot", picture
    figure = drawn(lambda _: found.append(as_json(*arguments)), into=tmp_path)
    rows = {row["name"]: row for row in found[0]["layers"]}
    norms, ranks, spectra, _ = panels(figure).values()
    assert bars_of(norms) == {name: row["norm"] for name, row in rows.items()}
    assert bars_of(ranks) == {name: row["effective_rank"] for name, row in rows.items()}
    assert [list(line.get_ydata()) for line in spectra.lines] == [row["singular_values"] for row in rows.values()]
    assert found[0]["plot"] == str(picture) and picture.is_file()
    assert figure.get_suptitle().startswith("3 layers, r = 2 to 3; ")


def test_inspect_overwrites_a_picture_with_force_only(a: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.svg").write_text("before")
    said = failed("inspect", a, "--plot", tmp_path / "a.svg")
    assert "a.svg' exists already; give another name, or pass --force to overwrite it" in said
    assert (tmp_path / "a.svg").read_text() == "before"
    lines = output("inspect", a, "--plot", tmp_path / "a.svg", "--force").splitlines()
    assert lines[:-2] == output("inspect", a).splitlines()
    assert lines[-2:] == ["", f"wrote {tmp_path / 'a.svg'}: {(tmp_path / 'a.svg').stat().st_size / 1024:.1f} KiB"]
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_written(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nan.safetensors").write_bytes(a.read_bytes()[:-4] + b"\0\0\xc0\x7f")  # the last float32
    before = sorted(tmp_path.iterdir())
    assert "has values that are not finite" in failed("inspect", tmp_path / "nan.safetensors", "--plot", "a.svg")
    assert "it must end in .svg, .png or .pdf" in failed("inspect", a, "--plot", tmp_path / "new" / "a.gif")
    assert "it must end in .svg, .png or .pdf" in failed("inspect", "missing", "--plot", a, "--force")
    assert "missing" in failed("inspect", "missing", "--plot", tmp_path / "new" / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    hint = "error: drawing needs matplotlib >= 3.8, which is not installed; run: pip install 'lora-plus[plot]'\n"
    assert failed("inspect", a, "--plot", tmp_path / "a.svg") == hint
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("source", "target"), [("native", "peft"), ("peft", "native")])
def test_convert_writes_what_the_model_would(source: str, target: str, tmp_path: Path) -> None:
    save_adapter(adapted_net(), tmp_path / source / PATHS[source])
    model = load_adapter(net(), tmp_path / source / PATHS[source])
    save_adapter(model, tmp_path / "wanted.safetensors")
    out = tmp_path / target / PATHS[target]
    assert as_json("convert", tmp_path / source / PATHS[source], out)["format"] == target
    save_adapter(load_adapter(net(), out), tmp_path / "found.safetensors")
    ours, theirs = (parts(tmp_path / f"{name}.safetensors") for name in ("found", "wanted"))
    assert (ours.tensors, ours.document) == (theirs.tensors, theirs.document)


@pytest.mark.parametrize("command", ["convert", "resize"])
def test_texts_that_a_format_has_no_room_for_are_left_out_and_named(command: str, a: Path, tmp_path: Path) -> None:
    save_adapter(adapted(), a, metadata={"task_type": "CAUSAL_LM", "note": "x"})
    options = ["--r", "1"] if command == "resize" else []
    for out, gone in (("b.safetensors", []), ("peft", ["note"]), ("c.safetensors", ["note", "task_type"])):
        to = ["--to", "kohya"] if out == "c.safetensors" else []
        assert as_json(command, a, tmp_path / out, *options, *to, "--force")["left_out"] == gone
    text = output(command, a, tmp_path / "peft", *options, "--force")
    assert "left out, because the format cannot hold it: note\n" in text
    assert as_json("inspect", tmp_path / "peft")["metadata"] == {"task_type": "CAUSAL_LM"}


def test_convert_keeps_metadata_or_drops_it(a: Path, tmp_path: Path) -> None:
    output("convert", a, tmp_path / "one", "--to", "peft")
    output("convert", a, tmp_path / "two", "--no-keep-metadata")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two")]
    assert [config["task_type"] for config in configs] == ["CAUSAL_LM", None]


@pytest.mark.parametrize("form", FORMATS)
def test_convert_tells_the_format_that_it_wrote(form: str, a: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert as_json("convert", a, out, "--to", form, "--no-keep-metadata")["format"] == form


def test_convert_refuses_what_a_format_cannot_express(tmp_path: Path) -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4)})
    save_adapter(lora_plus.inject_lora(model, ["lstm.weight_ih_l0"]), tmp_path / "a.safetensors")
    text = failed("convert", tmp_path / "a.safetensors", tmp_path / "out")
    assert text.startswith("error: the adapter cannot be written in PEFT's format:\n  'lstm.weight_ih_l0': how PEFT")
    assert not (tmp_path / "out").exists()


def test_diff_compares_updates(a: Path, b: Path) -> None:
    found = as_json("diff", a, b)
    assert (found["only_a"], found["only_b"], found["equal"]) == (["layers.0"], ["embed"], False)
    (layer,) = found["layers"]
    assert (layer["name"], layer["settings"]) == ("layers.1", {"r": [2, 3]})
    updates = [
        each.lora_adapters["default"].spec.scale * each.lora_B["default"].double() @ each.lora_A["default"].double()
        for each in (adapted()["layers"][1], adapted(2, r=3, targets=["layers.1", "embed"])["layers"][1])
    ]
    wanted = ((updates[0] - updates[1]).norm() / updates[0].norm()).item()
    assert layer["relative"] == pytest.approx(wanted, rel=1e-6)
    text = output("diff", a, b)
    assert "only in the first: layers.0\nonly in the second: embed\n" in text
    assert "r 2 and 3" in text


def test_diff_names_the_model_itself(a: Path, tmp_path: Path) -> None:
    itself = tmp_path / "itself.safetensors"
    save_adapter(lora_plus.inject_lora(nn.Linear(4, 4), [""], r=2), itself)
    assert "only in the second: (model)\n" in output("diff", a, itself)
    assert output("diff", itself, itself).splitlines()[-1].split()[0] == "(model)"


def test_diff_of_one_adapter_in_two_formats_is_none(a: Path, tmp_path: Path) -> None:
    output("convert", a, tmp_path / "peft")
    assert as_json("diff", a, tmp_path / "peft")["equal"]
    assert "no difference" in output("diff", a, tmp_path / "peft")


def test_an_error_is_a_line_of_json_where_that_is_asked_for(a: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.safetensors").write_bytes(b"")
    for given in (("inspect", tmp_path / "plain.safetensors"), ("convert", a, a), ("inspect", tmp_path / "none")):
        told = json.loads(failed(*given, "--json"))
        text = failed(*given).rstrip()
        assert f"error: {told['error']}" == text
        assert all(line in text for line in told.get("problems", []))
    assert json.loads(failed("inspect", tmp_path / "plain.safetensors", "--json"))["problems"] != []


def test_an_infinite_difference_is_a_text_in_json(a: Path, tmp_path: Path) -> None:
    save_adapter(lora_plus.inject_lora(small(), ["layers.*"], r=2), tmp_path / "zero.safetensors")
    found = as_json("diff", tmp_path / "zero.safetensors", a)
    assert [layer["relative"] for layer in found["layers"]] == ["inf", "inf"]


METHODS = [
    {"method": "sum"},
    {"method": "svd", "r": 2},
    {"method": "ties", "r": 2, "density": 0.5},
    {"method": "dare", "r": 2, "density": 0.5},
    {"method": "dare_ties", "r": 2, "density": 0.5},
]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])
def test_combine_is_that_of_the_library(options: dict[str, Any], a: Path, b: Path, tmp_path: Path) -> None:
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    out = tmp_path / "out.safetensors"
    found = as_json("combine", a, b, out, *flags, "--weight", "1", "--weight", "-0.5", "--seed", 4)
    model = load_adapter(load_adapter(small(), a, adapter="a"), b, adapter="b")
    generator = torch.Generator().manual_seed(4) if options["method"].startswith("dare") else None
    report = combine_adapters(model, ["a", "b"], weights=[1, -0.5], generator=generator, **options)
    save_adapter(model, tmp_path / "wanted.safetensors", adapter="combined")
    assert out.read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    assert (found["ranks"], found["errors"]) == (report.ranks, report.errors)


def test_combine_sums_three_and_their_names_may_have_dots(a: Path, tmp_path: Path) -> None:
    dotted = tmp_path / "a.v1.safetensors"
    dotted.write_bytes(a.read_bytes())
    output("combine", a, dotted, a, tmp_path / "out.safetensors")
    figures = [as_json("inspect", path)["layers"][0]["norm"] for path in (a, tmp_path / "out.safetensors")]
    assert figures[1] == pytest.approx(3 * figures[0], rel=1e-6)


@pytest.mark.parametrize("r", [1, 4])
def test_resize_is_that_of_the_library(r: int, a: Path, tmp_path: Path) -> None:
    found = as_json("resize", a, tmp_path / "out.safetensors", "--r", r)
    model = load_adapter(small(), a)
    report = resize_adapter(model, r=r, generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "wanted.safetensors", metadata={"task_type": "CAUSAL_LM"})
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    assert (found["ranks"], found["errors"]) == (report.ranks, report.errors)


def test_what_cannot_be_resized_names_the_file(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.layers[1].lora_B["default"].fill_(1e38)
    save_adapter(model, tmp_path / "large.safetensors")
    text = failed("resize", tmp_path / "large.safetensors", tmp_path / "out.safetensors", "--r", 1)
    assert text.startswith(f"error: adapter '{tmp_path / 'large.safetensors'}' cannot be resized:\n  'layers.1': ")


def test_an_out_without_a_name_of_its_own_is_refused(a: Path, tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / ".."
    assert failed("convert", a, out) == f"error: '{out}' ends in '..'; give the path of the folder itself\n"
    assert not (tmp_path / "nowhere").exists()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_merge_is_that_of_the_library(a: Path, b: Path, tmp_path: Path) -> None:
    base = save(
        {f"model.{name}": tensor for name, tensor in small().state_dict().items()}, tmp_path / "base.safetensors"
    )
    out = tmp_path / "out.safetensors"
    options = ["--weight", "2", "--weight", "-1", "--dtype", "bfloat16", "--rename", "=model"]
    found = as_json("merge", base, a, b, out, *options)
    report = lora_plus.merge_checkpoint(
        base, [a, b], tmp_path / "wanted.safetensors", weights=[2, -1], dtype=torch.bfloat16, names={"": "model"}
    )
    assert out.read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    assert found == {"path": str(out), **vars(report)}
    assert "merged 3 layers" in output("merge", base, a, b, tmp_path / "again.safetensors", "--rename", "=model")


def test_merging_tells_how_far_it_is(a: Path, tmp_path: Path) -> None:
    base, steps = save(small(), tmp_path / "base.safetensors"), []
    lora_plus.merge_checkpoint(
        base, a, tmp_path / "out.safetensors", progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_extract_is_that_of_the_library(a: Path, tmp_path: Path) -> None:
    base = save(small(), tmp_path / "base.safetensors")
    lora_plus.merge_checkpoint(base, a, tmp_path / "tuned.safetensors")
    options = ["--r", 2, "--target", "layers.*", "--exclude", "layers.0", "--kind", "embed=Embedding"]
    found = as_json("extract", base, tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", *options)
    assert found["ranks"] == {"layers.1": 2}
    assert found["ignored"] == ["layers.0.weight"]
    assert found["errors"]["layers.1"] < 1e-5
    relative = as_json("diff", a, tmp_path / "out.safetensors")["layers"][0]["relative"]
    assert relative < 1e-5


def test_verify_lists_all_that_does_not_fit(a: Path, tmp_path: Path) -> None:
    base = save(small(), tmp_path / "base.safetensors")
    assert output("verify", base, a) == f"{a} fits {base}: 2 tensors adapted, 0 replaced\n"
    other = save({"layers.0.weight": torch.ones(6, 5)}, tmp_path / "other.safetensors")
    result = call("verify", other, a, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["fits"] is False
    assert found["problems"] == [
        "'layers.0': its weight has shape (6, 6) in the adapter, (6, 5) in the checkpoint",
        "the checkpoint has no tensor 'layers.1.weight' (did you mean 'layers.0.weight'?)",
    ]
    text = call("verify", other, a)
    assert text.exit_code == 1
    assert text.stdout.splitlines() == [f"{a} does not fit {other}:", *(f"  {line}" for line in found["problems"])]
    assert not call("verify", base, a, "--rename", "layers=blocks").stdout.startswith(f"{a} fits")
    within = save(
        {f"model.{name}": tensor for name, tensor in small().state_dict().items()}, tmp_path / "in.safetensors"
    )
    assert "or --rename =model? So all are in the checkpoint" in call("verify", within, a).stdout.splitlines()[1]


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def test_a_bad_file_gives_all_problems_without_a_traceback(a: Path) -> None:
    file = parts(a)
    file.document["layers"]["layers.0"]["r"] = 0
    del file.tensors["layers.1.lora_A"]
    a.write_bytes(file.bytes())
    lines = failed("inspect", a).splitlines()
    assert lines[0] == f"error: adapter {str(a)!r} cannot be read:"
    assert lines[1:] == [
        "  layer 'layers.0': r must be positive, got 0",
        "  tensor 'layers.1.lora_A' is missing",
    ]


ABSENT = {
    "inspect": ["none"],
    "convert": ["none", "out"],
    "diff": ["none", "none"],
    "combine": ["none", "none", "out"],
    "resize": ["none", "out", "--r", "1"],
    "merge": ["none", "none", "out"],
    "extract": ["none", "none", "out", "--r", "1"],
    "verify": ["none", "none"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_not_there_is_named(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert failed(command, *ABSENT[command]).startswith("error: there is no ")
    assert not contents(tmp_path)


@pytest.mark.parametrize("command", ["convert", "combine", "resize", "extract", "merge"])
def test_nothing_is_overwritten_unasked(command: str, a: Path, tmp_path: Path) -> None:
    base = save(small(), tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    inputs = {"combine": [a, a], "extract": [base, base], "merge": [base, a]}.get(command, [a])
    options = ["--r", "1"] if command in ("resize", "extract") else []
    assert f"{str(out)!r} exists already; give another name" in failed(command, *inputs, out, *options)
    assert out.read_text() == "precious"


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
@pytest.mark.parametrize("command", ["convert", "combine", "resize", "extract"])
def test_what_appears_meanwhile_stays(
    command: str, out: str, a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = save(small(), tmp_path / "base.safetensors"), small()
    torch.nn.init.normal_(other.layers[0].weight)
    tuned, path = save(other, tmp_path / "tuned.safetensors"), tmp_path / out
    inputs = {"combine": [a, a], "extract": [base, tuned]}.get(command, [a])
    options = ["--r", "1"] if command in ("resize", "extract") else []
    serialize = saving.write_tensors

    def serialize_late(*arguments: Any) -> None:
        serialize(*arguments)
        path.write_text("precious")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", serialize_late)
        assert f"{str(path)!r} appeared meanwhile" in failed(command, *inputs, path, *options)
    assert path.read_text() == "precious"
    path.unlink()
    path.mkdir()
    if out == "out":
        output(command, *inputs, path, *options)  # an empty folder may be there
    assert not list(tmp_path.glob(".*"))


def test_force_overwrites(a: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    output("convert", a, out, "--force")
    assert out.read_bytes() == a.read_bytes()


USAGE = [
    (["convert", "a", "b", "--to", "gguf"], "'gguf' is not one of 'native', 'peft'"),
    (["combine", "a", "b"], "name two adapters or more, and then OUT"),
    (["combine", "a", "b", "c", "--method", "mean"], "'mean' is not one of 'sum', 'svd', 'ties'"),
    (["resize", "a", "b"], "Missing option '--r'"),
    (["resize", "a", "b", "--r", "0"], "Invalid value for '--r'"),
    (["resize", "a", "b", "--r", "1", "--seed", str(2**64)], "Invalid value for '--seed'"),
    (["merge", "a", "b", "c", "--dtype", "int8"], "'int8' is not one of"),
    (["merge", "a", "b", "c", "--rename", "model"], "'model' has no '='; write for example old=new"),
    (["extract", "a", "b", "c", "--r", "1", "--kind", "embed"], "'embed' has no '='"),
    (["inspect"], "Missing argument: give FILE"),
    (["merge", "a", "b"], "Missing argument: give BASE ADAPTER... OUT; OUT is not given"),
    (["merge", "a", "b", "--weight", "2"], "Missing argument: give BASE ADAPTER... OUT; OUT is not given"),
    (["merge", "a"], "Missing argument: give BASE ADAPTER... OUT; ADAPTER... and OUT are not given"),
    (["merge"], "Missing argument: give BASE ADAPTER... OUT"),
    (["combine", "a"], "Missing argument: give FILE FILE... OUT; OUT is not given"),
    (["combine", "a", "b", "c", "--weight", "1", "-0.5"], "-0.5 is after no option; give the option again, as in"),
    (["combine", "a", "b", "c", "--weight", "1", "-x"], "No such option: -x"),
    (["frobnicate"], "No such command 'frobnicate'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), USAGE, ids=lambda value: "-".join(value) if isinstance(value, list) else ""
)
def test_wrong_usage_has_status_2(arguments: list[str], message: str) -> None:
    assert message in misused(*arguments)


def test_the_version_is_told() -> None:
    assert output("--version") == f"lora-plus {lora_plus.__version__}\n"


def test_choices_are_those_of_the_library() -> None:
    for command, names in (("convert", FORMATS), ("combine", methods.METHODS)):
        text = " ".join(output(command, "--help").replace("│", " ").split())
        assert all(name in text for name in names)
        options = {"convert": ["--to"], "combine": ["c", "--method"]}[command]
        listed = ", ".join(map(repr, names))
        assert f"'x' is not one of {listed}." in misused(command, "a", "b", *options, "x")


def test_no_model_is_asked_for_where_none_would_help(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder").mkdir()
    base = save(small(), tmp_path / "base.safetensors")
    for path in (tmp_path / "empty.safetensors", tmp_path / "folder", base):
        assert failed("inspect", path).startswith(f"error: adapter {str(path)!r} cannot be read:\n  ")


def test_a_base_in_the_place_of_the_adapter_is_named(a: Path, tmp_path: Path) -> None:
    base = save(small(), tmp_path / "base.safetensors")
    text = failed("merge", a, base, tmp_path / "out.safetensors")
    assert text == (
        f"error: {str(a)!r} is an adapter, and {str(base)!r} is none: the two seem swapped; give the checkpoint first, "
        "and then its adapters\n"
    )
    assert failed("verify", a, base) == text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_every_command_prints_json(command: str) -> None:
    text = output(command, "--help")
    assert f"lora-plus {command} " in text
    assert "--json" in text
    assert command in output("--help")


def test_what_packages_say_to_each_other_is_not_told(a: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = files.read_adapter

    def warned(path: Path) -> Any:
        warnings.warn("an old name", DeprecationWarning, stacklevel=2)
        warnings.warn("something is odd", UserWarning, stacklevel=2)
        return read(path)

    monkeypatch.setattr(files, "read_adapter", warned)
    assert call("inspect", a).stderr == "warning: something is odd\n"


def test_warnings_are_one_line_each(tmp_path: Path) -> None:
    embedded = randomise(lora_plus.inject_lora(small(), ["embed"], r=2))
    save_adapter(embedded, tmp_path / "a.safetensors")
    (tmp_path / "base").mkdir()
    save(small(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    result = call("merge", tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: 'embed.weight' may be the weight of the head too")
    assert result.stderr.count("\n") == 1
    assert "note: 'embed.weight' may be" in output("verify", tmp_path / "base", tmp_path / "a.safetensors")


def test_help_and_completion_offer_what_the_tables_have() -> None:
    assert list(arguments.FORMAT_NAMES) == list(FORMATS)
    assert list(arguments.METHOD_NAMES) == list(methods.METHODS)


# ---- as a user would -------------------------------------------------------------------------------------------------


def without(absent: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line as it is where a package is not installed."""
    monkeypatch.setitem(sys.modules, absent, None)  # importing it fails as if it were not installed
    for name in [name for name in sys.modules if name.startswith((f"{absent}.", "lora_plus.cli"))]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("lora_plus.cli.app")


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_the_command_says_how_to_install_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        without(package, monkeypatch).main()
    assert re.fullmatch(
        rf"lora-plus needs {package} >= [\d.]+, which is not installed; run: pip install 'lora-plus\[cli\]'",
        str(stop.value.code),
    )


def test_another_package_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="dataclasses"):
        without("dataclasses", monkeypatch)


def shell(folder: Path, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-W", "error", "-m", "lora_plus", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_a_process_ends_with_one_line_and_its_status(tmp_path: Path) -> None:
    assert shell(tmp_path, "inspect", "none", status=1) == "error: there is no adapter at 'none'\n"


@pytest.mark.slow
def test_a_session_from_tuned_checkpoints_to_a_merged_one(a: Path, b: Path, tmp_path: Path) -> None:
    save(small(), tmp_path / "base.safetensors")
    shell(tmp_path, "merge", "base.safetensors", "a.safetensors", "tuned.safetensors")
    assert "rank 2" in shell(tmp_path, "extract", "base.safetensors", "tuned.safetensors", "c.safetensors", "--r", "2")
    shell(tmp_path, "convert", "c.safetensors", "c", "--to", "peft")
    shell(tmp_path, "resize", "c", "d.safetensors", "--r", "3")
    shell(tmp_path, "combine", "d.safetensors", "b", "e.safetensors")
    assert "layers.1" in shell(tmp_path, "inspect", "e.safetensors", "--layers")
    found = json.loads(shell(tmp_path, "diff", "a.safetensors", "d.safetensors", "--json"))
    assert max(layer["relative"] for layer in found["layers"]) < 1e-5
    assert "fits" in shell(tmp_path, "verify", "base.safetensors", "e.safetensors")
    shell(tmp_path, "merge", "base.safetensors", "e.safetensors", "out.safetensors")
    both = lora_plus.merge_and_unload(adapted()).state_dict()
    other = lora_plus.merge_and_unload(adapted(2, r=3, targets=["layers.1", "embed"])).state_dict()
    merged, plain = load_file(tmp_path / "out.safetensors"), small().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, both[name] + other[name] - plain[name], rtol=1e-4, atol=1e-5)
