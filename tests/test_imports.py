"""Imports go one way only, and importing the library loads nothing optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lora_plus"

STRATA = [
    {"names"},
    {"arguments"},
    {
        "version",
        "regular_files",
        "wrappers",
        "sharding",
        "functional",
        "adapter_tensors",
        "calls",
        "collector",
        "freezing",
        "fused_kernels",
        "class_swap",
        "random_state",
        "quantized",
        "nested",
        "text_table",
        "json_text",
    },
    {
        "trial",
        "assigned_forward",
        "candidates",
        "init",
        "variants",
        "formats.adapter",
        "formats.peft_names",
        "atomic_files",
        "fused_linear",
        "module_tree",
        "replicas",
    },
    {
        "trained",
        "new_adapter",
        "adapter_site",
        "formats.peft_patterns",
        "renaming",
        "config",
        "low_rank",
        "merge_state",
        "streaming",
        "sample_adapters",
    },
    {
        "adapted_weight",
        "shallow_copy",
        "figures",
        "unread_tensors",
        "formats.peft_renaming",
        "formats.peft_tensors",
        "formats.target",
        "formats.peft_config",
    },
    {
        "lora_layer",
        "parameters",
        "formats.native",
        "formats.pairs",
        "formats.peft_limits",
        "formats.peft_reader",
        "formats.portable",
        "unsaved",
    },
    {"layers", "parts", "formats.kohya", "formats.peft", "formats.readers"},
    {"places", "peft_shapes", "checkpoint_files", "formats.diffusers", "bare_tree"},
    {"targets", "adapter_files", "model_target", "checkpoint_target"},
    {"peft_folder"},
    {"inject", "checkpoint_plan"},
    {"adapters", "optim"},
    {
        "merge",
        "check",
        "combine",
        "mixed_batch",
        "another_adapter",
        "gradient_init",
        "diagnostics",
        "lr_fold",
        "lr_guard",
        "refill",
        "reset",
    },
    {"io", "extract", "checkpoint", "side_by_side", "optimizer_check", "rebinding"},
    {"export", "bare_model", "extract_checkpoint", "sweep"},
    {"public"},
    {"__init__"},
    {"integrations.peft", "integrations.deepspeed", "integrations.tensor_parallel", "integrations.trained_state"},
    {"integrations.transformers", "integrations.lightning"},
    {"integrations"},
    {"commands.extras", "commands.usage"},
    {"commands.arguments", "commands.show"},
    {"commands"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
"""A file imports from the strata above its own only."""


def stratum(module: str) -> int:
    return next(level for level, names in enumerate(STRATA) if module in names or module.partition(".")[0] in names)


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports at run time, by their name inside the package."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            inside = node.level > 0 or (node.module or "").startswith("lora_plus")
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            rest = (node.module or "").split(".") if node.level else (node.module or "").split(".")[1:]
            if inside:
                target = ".".join([*base, *filter(None, rest)])
                found |= {target} if target and target != "formats" else {
                    ".".join(filter(None, [target, alias.name])) for alias in node.names
                }  # fmt: skip
    return found


def test_imports_go_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name.endswith(".__init__") or name.startswith(("demo", "cli")):
            continue
        for other in imports(path):
            assert stratum(other) < stratum(name), f"{name} imports {other}"


def test_every_file_has_a_stratum_and_a_docstring() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        assert name.endswith(".__init__") or stratum(name) >= 0
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_importing_the_library_loads_no_other_package() -> None:
    code = (
        "import sys, torch, safetensors, einops\n"
        "before = set(sys.modules)\n"
        "import lora_plus\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lora_plus']"


def test_the_command_lines_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "import lora_plus.cli\n"
        "from typer.testing import CliRunner\n"
        "for line in (['--help'], ['merge', '--help'], ['demo', '--help'], ['--version'], ['inspect']):\n"
        "    CliRunner().invoke(lora_plus.cli.app, line)\n"
        "print(sorted({'torch', 'numpy', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_not_files_of_the_same_name_in_whatever_order_they_are_imported() -> None:
    code = (
        "import lora_plus.sweep, lora_plus.bare_model, lora_plus.extract_checkpoint, sys\n"
        "assert all(map(callable, (lora_plus.sweep, lora_plus.bare_model, lora_plus.extract_checkpoint)))\n"
        "from lora_plus import inject_lora, adapter_files\n"
        "import lora_plus.merge as merge\n"
        "assert inject_lora is lora_plus.inject_lora and merge is sys.modules['lora_plus.merge']\n"
        "assert {name for name in lora_plus.__all__ if not hasattr(lora_plus, name)} == set()\n"
        "assert set(lora_plus.__all__) <= set(dir(lora_plus)) and not hasattr(lora_plus, 'nothing')"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
