"""Rooms import one way only, and importing the library loads nothing optional."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_plus.cli.app import COMMANDS

PACKAGE = Path(__file__).parent.parent / "lora_plus"

ROOMS = ["text", "errors", "packages", "tensors", "layers", "model", "training", "files", "surgery", "engines", "cli"]
"""Each imports those before it only."""

OUTSIDE = {"version", "", "__main__"}
"""What is in no room: anybody may import the version, and the others import rooms."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(module: str) -> set[str]:
    """The modules of this package that one of them imports, also for types only, by their names inside the package."""
    path = MODULES[module]
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            parts = ["lora_plus", *package[: len(package) - node.level + 1], *parts]
        if parts[0] == "lora_plus":
            base = parts[1:]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in MODULES else ".".join(base))
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def test_rooms_import_one_way() -> None:
    back = {
        f"{module} <- {other}"
        for module in MODULES
        if room(module) not in OUTSIDE
        for other in imports(module)
        if room(other) in ROOMS and ROOMS.index(room(module)) < ROOMS.index(room(other))
    }
    assert back == set()


def test_every_file_has_a_room_and_a_docstring() -> None:
    for module, path in MODULES.items():
        assert room(module) in {*ROOMS, *OUTSIDE}, module
        assert ast.get_docstring(ast.parse(path.read_text())), path


CORE_LINES, READ_FIRST_LINES = 4611, 2600
"""Lines of code that the core has at most, and those files of it that a reader begins with; docstrings, comments and
blank lines are not counted."""


def files_in_the_map() -> dict[str, bool]:
    """What the map in CONTRIBUTING.md names: each file, as a module, and whether it is of the core."""
    tree = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("## The house")[1].split("```")[1]
    found, folder = {}, ""
    for line in tree.strip().splitlines():
        inside = re.match(r"( *)([a-z/]+)/", line)
        if inside:
            folder = f"{folder.split('.')[0]}." if inside[1] else ""
            folder += inside[2].replace("/", ".") + "."
        elif not line.startswith(" "):
            folder = ""
        found |= {folder + name: bool(star) for name, star in re.findall(r"(\w+)\.py( \*)?", line)}
    return found


def test_the_map_names_every_file() -> None:
    rooms = {"tensors", "layers", "model", "training", "files", "surgery", "engines", "text", "errors", "packages"}
    files = {name for name, path in MODULES.items() if room(name) in rooms and path.name != "__init__.py"}
    assert set(files_in_the_map()) == {name for name in files if not name.startswith("files.peft")}


def code_lines(path: Path) -> int:
    source = path.read_text()
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for each in tokens if each.type not in silent for line in range(each.start[0], each.end[0] + 1)}
    return len(code - docstrings)


def test_the_core_is_small_and_imports_no_other_file() -> None:
    core = {name for name, is_core in files_in_the_map().items() if is_core}
    assert {name: others for name in core if (others := imports(name) - core - {"version"})} == {}
    assert sum(code_lines(MODULES[name]) for name in core) <= CORE_LINES


def test_what_is_read_first_is_core_and_can_be_read_in_an_hour() -> None:
    order = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("Read the core in this order")[1].split("\n\n")[0]
    folder, first = "", []
    for inside, name in re.findall(r"`(?:(\w+)/)?(\w+)\.py`", order):
        folder = inside or folder
        first.append(f"{folder}.{name}")
    assert len(first) == 20 and all(files_in_the_map()[name] for name in first)
    assert sum(code_lines(MODULES[name]) for name in first) <= READ_FIRST_LINES


Fresh = Callable[[str], str]
FORKING = """
import io, json, os, sys, torch, safetensors, einops
from contextlib import redirect_stdout
for line in sys.stdin:
    receive, send = os.pipe()
    if not os.fork():
        with redirect_stdout(io.StringIO()) as printed:
            exec(json.loads(line), {})
        os.write(send, printed.getvalue().encode())
        os._exit(0)
    os.close(send)
    with open(receive) as pipe:
        printed = pipe.read()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(json.dumps(printed if code == 0 else None), flush=True)
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    """What code prints in a process of its own that has torch, safetensors and einops, and not yet this library.

    Importing those takes seconds, so one process does it and forks for each code. Warnings are errors there.
    """
    command = [sys.executable, "-W", "error", "-c", FORKING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def run(code: str) -> str:
            print(json.dumps(code), file=process.stdin, flush=True)
            printed = json.loads(process.stdout.readline())
            assert printed is not None, "the code failed; stderr has its traceback"
            return printed.strip()

        yield run


def test_importing_the_library_loads_no_other_package(fresh: Fresh) -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import lora_plus\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert fresh(code) == "['lora_plus']"


def test_importing_the_library_takes_at_most_50_milliseconds(fresh: Fresh, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        f"sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}\n"
        "start = time.process_time()\n"
        "import lora_plus\n"
        "print(time.process_time() - start)"
    )
    assert min(float(fresh(code)) for _ in range(2)) <= 0.05


def test_a_name_imports_the_rooms_that_it_needs_only(fresh: Fresh) -> None:
    code = (
        "import sys\n"
        "from lora_plus import inject_lora\n"
        "print(sorted({'lora_plus.files', 'lora_plus.surgery', 'lora_plus.cli'} & set(sys.modules)))"
    )
    assert fresh(code) == "[]"


def test_help_and_completion_of_the_command_line_do_not_import_torch() -> None:
    lines = ["--help", "--version", "inspect", *(f"{command.__name__} --help" for command in COMMANDS)]
    completed = {"c": "combine", "combine --method ": "ties", "convert --to ": "kohya", "merge --dtype ": "float16"}
    code = (
        "import contextlib, io, os, runpy, sys\n"
        "def main(line, **environment):\n"
        "    sys.argv[1:] = line.split()\n"
        "    os.environ.update(environment)\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        runpy.run_module('lora_plus', run_name='__main__')\n"
        "    assert not {'torch', 'numpy'} & set(sys.modules), (line, environment)\n"
        "    return out.getvalue()\n"
        f"for line in {lines}:\n"
        "    assert 'lora-plus' in main(line) or line == 'inspect'\n"
        f"for line, word in {completed}.items():\n"
        "    words = {'COMP_WORDS': 'lora-plus ' + line, 'COMP_CWORD': str(line.count(' ') + 1)}\n"
        "    assert word in main('', _LORA_PLUS_COMPLETE='complete_bash', **words).split(), line\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_collecting_the_default_tests_imports_no_package_that_takes_seconds(
    imported_by_collecting: set[str], request: pytest.FixtureRequest
) -> None:
    if not {"not engines", "not studies"} <= set(request.config.option.markexpr.split(" and ")):
        pytest.skip("the tests on engines and of the studies are collected too")
    assert imported_by_collecting & {"peft", "transformers", "torch._dynamo"} == set()


def test_public_names_are_all_there_and_no_others(fresh: Fresh) -> None:
    code = (
        "import lora_plus, sys\n"
        "assert callable(lora_plus.training.sweep) and callable(lora_plus.surgery.combine_adapters)\n"
        "from lora_plus import inject_lora\n"
        "assert inject_lora is lora_plus.inject_lora\n"
        "assert {name for name in lora_plus.__all__ if not hasattr(lora_plus, name)} == set()\n"
        "assert set(lora_plus.__all__) <= set(dir(lora_plus)) and not hasattr(lora_plus, 'nothing')"
    )
    assert fresh(code) == ""


@pytest.mark.parametrize(
    "first", ["lora_plus.model.storage", "lora_plus.training.groups", "lora_plus.files.load", "lora_plus.engines.zero"]
)
def test_engines_are_known_whatever_is_imported_first(fresh: Fresh, first: str) -> None:
    code = (
        f"import sys, {first}\n"
        "from lora_plus.model.storage import FINDERS\n"
        "from lora_plus.model.tree import WRAPPERS\n"
        "assert {'lora_plus.engines.' + name for name in ('fsdp1', 'zero', 'dtensor')} == "
        "{find.__module__ for find in FINDERS.values()}\n"
        "assert {'FullyShardedDataParallel', 'DeepSpeedEngine'} < {wrapper.name for wrapper in WRAPPERS}\n"
        "assert not {'deepspeed', 'torch.distributed.fsdp', 'torch.distributed.tensor'} & set(sys.modules)"
    )
    assert fresh(code) == ""


def test_the_core_knows_no_engine_by_name() -> None:
    for module, path in MODULES.items():
        if room(module) in ("tensors", "layers", "model"):
            tree = ast.parse(path.read_text())
            docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
            words += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
            found = [word for word in words if isinstance(word, str) and re.search("(?i)deepspeed|FullySharded", word)]
            assert not found, module
