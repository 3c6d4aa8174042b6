"""The benchmark for a GPU, on the CPU and tiny: every row runs, and whatever goes wrong the rest is published."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import comparing
import gpu
import gpu_rows
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

Tables = list[dict[str, Any]]


def tables(row: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tables:
    monkeypatch.setattr(sys, "argv", ["gpu_rows.py", row, "--tiny", "--into", str(folder)])
    gpu_rows.main()
    return json.loads((folder / f"{row}.json").read_text())["tables"]


QUICK = {"experts"}
PAIRS = (("lora_plus", "peft"), ("lora_plus, DoRA", "peft, DoRA"))


@pytest.mark.peers
@pytest.mark.parametrize(
    "row", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in gpu_rows.ROWS]
)
def test_a_row_has_times_memory_and_the_same_gradients(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    found = tables(row, tmp_path, monkeypatch)
    assert found
    for table in found:
        for line in table["rows"]:
            assert line["step"]["median"] > 0
            assert row == "optimizer" or line["peak"]["median"] > 0
            assert line.get("what") == "frozen" or line["grad A"]["median"] > 0 < line["grad B"]["median"]
        lines = {line["what"]: line for line in table["rows"] if "what" in line}
        for ours, theirs in PAIRS if row != "experts" else ():
            for part in ("grad A", "grad B") if ours in lines else ():
                assert lines[ours][part]["median"] == pytest.approx(lines[theirs][part]["median"], rel=1e-4)


@pytest.mark.slow
def test_what_is_not_installed_or_fails_is_a_line_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = comparing.build

    def failing(peer: str, *args: Any, **settings: Any) -> Any:
        if peer == "lora_plus":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return build(peer, *args, **settings)

    monkeypatch.setattr(comparing, "build", failing)
    monkeypatch.setitem(sys.modules, "peft", None)
    for table in tables("experts", tmp_path, monkeypatch):
        frozen, ours, *theirs = table["rows"]
        assert frozen["step"]["median"] > 0
        assert ours["adapters"] == "out of memory" and {line["adapters"] for line in theirs} == {"not installed"}


def test_a_step_without_gradients_is_no_training() -> None:
    model = torch.nn.Linear(2, 2)
    model.lora_A = model.lora_B = torch.nn.Parameter(torch.zeros(2))
    model.lora_A.grad = torch.zeros(2)
    with pytest.raises(ValueError, match="the gradient of lora_A is 0"):
        comparing.norms(model)


TABLE = {"title": "one", "rows": [{"what": "x|y", "step": {"unit": "s", "rounds": [1.0, 3.0, 2.0]}}]}
PASSES = "print('5 passed in 1 s')"


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch, tests: str, rows: dict[str, str], seconds: float) -> int:
    """Run the parts as these programs, the others end at once; a row writes one table before its own."""

    def row(names: list[str], into: str, options: argparse.Namespace) -> list[str]:
        content = {"processor": "a chip", "versions": {"torch": "2"}, "tables": [TABLE]}
        write = f"open({into!r} + '/{names[0]}.json', 'w').write({json.dumps(content)!r})\n"
        return [sys.executable, "-c", write + rows.get(names[0], "")]

    monkeypatch.setattr(gpu, "tests_command", lambda options: [sys.executable, "-c", tests])
    monkeypatch.setattr(gpu, "rows_command", row)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    return gpu.measure(argparse.Namespace(device="cpu", tiny=False, seconds=seconds, out=folder))


def sections(folder: Path) -> dict[str, str]:
    head, *rows = (folder / "gpu.md").read_text().split("\n## ")
    return {"": head} | dict(zip(gpu_rows.ROWS, rows, strict=True))


def test_a_row_that_crashes_costs_only_what_it_had_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert publish(tmp_path, monkeypatch, PASSES, {"layers": "raise SystemError('bad')"}, 60) == 0
    found = sections(tmp_path)
    assert "5 passed in 1 s" in found[""] and "a chip, torch 2" in found[""]
    for name, text in found.items():
        assert not name or "| x\\|y | 2 s |" in text
        assert ("Ended with exit code 1: `SystemError: bad`" in text) is (name == "layers")
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"].keys() == gpu_rows.ROWS.keys()


@pytest.mark.slow
def test_what_has_no_time_left_is_not_begun_and_the_rest_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    assert publish(tmp_path, monkeypatch, PASSES, {"attention": hangs}, 5) == 0
    found = sections(tmp_path)
    assert "Stopped after" in found["attention"] and "x\\|y" in found["attention"] and "x\\|y" in found["experts"]
    assert "Not run: no time was left." in found["layers"] and "Not run" in found["compiled"]


def test_the_exit_code_says_whether_the_tests_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert publish(tmp_path, monkeypatch, "print('1 failed in 1 s'); exit(1)", {}, 60) == 1
    assert "1 failed in 1 s" in sections(tmp_path)[""]


def test_nothing_is_run_without_a_device_and_nothing_tiny_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        gpu.main()


def test_the_page_is_of_these_rows() -> None:
    published = (gpu.ROOT / "benchmarks" / "results" / "gpu.md").read_text()
    assert published == gpu.page({}) or ("not been run" not in published and gpu.INTRODUCTION in published)


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    script = gpu.ROOT / "benchmarks" / "gpu.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(script), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    assert all("| lora_plus |" in text or name in ("", "optimizer") for name, text in sections(tmp_path).items())
