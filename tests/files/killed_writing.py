"""Writes adapters and checkpoints in forked processes that are killed, and prints what was on the disk then.

A program of its own, run by test_interruptions.py: a process that has started threads must not be forked.

    python killed_writing.py FOLDER          kills before each of Python's calls to the file system
    python killed_writing.py FOLDER COUNT    kills after so many delays, spread over the time that the work takes, and
                                             when a file gets longer than so many sizes, whatever the machine's load
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from files_support import contents
from safetensors.torch import save_file
from torch import nn

import lora_plus

WIDTH, LAYERS = 384, 3
CALLS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.scandir",
    "shutil.copyfile",
}
"""What Python tells its audit hooks of the file system."""


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def adapted(seed: int, alpha: int) -> nn.Module:
    model = lora_plus.inject_lora(base(), "all-linear", r=16, alpha=alpha)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    return model


@dataclass(frozen=True)
class Work:
    """Something to write in a folder."""

    write: Callable[[Path], object]
    old: Callable[[Path], object]
    """Writes what is there before."""


def save(path: str, seed: int, alpha: int) -> Callable[[Path], object]:
    model = adapted(seed, alpha)
    return lambda folder: lora_plus.save_adapter(model, folder / path)


def merge(base: str, out: str) -> Callable[[Path], object]:
    """A merge; as it refuses to replace anything, what it wrote before is removed first."""

    def write(folder: Path) -> None:
        if (folder / out).is_dir():
            shutil.rmtree(folder / out)
        (folder / out).unlink(missing_ok=True)
        lora_plus.merge_checkpoint(folder / base, folder / "adapter.safetensors", folder / out)

    return write


def write_base(folder: Path) -> None:
    """A checkpoint as one file and as shards, and an adapter."""
    state = {name: tensor.contiguous() for name, tensor in base().state_dict().items()}
    save_file(state, folder / "base.safetensors")
    (folder / "base").mkdir()
    files = {name: f"model-{name[0]}.safetensors" for name in state}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / "base" / file)
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "base" / "config.json").write_text("{}")
    save("adapter.safetensors", 1, 3)(folder)


WORKS: dict[str, Callable[[], Work]] = {
    "native file": lambda: Work(save("a.safetensors", 2, 4), save("a.safetensors", 1, 3)),
    "PEFT folder": lambda: Work(save("a", 2, 3), save("a", 1, 3)),
    "PEFT folder with other settings": lambda: Work(save("a", 2, 4), save("a", 1, 3)),
    "checkpoint file": lambda: Work(merge("base.safetensors", "out.safetensors"), write_base),
    "checkpoint shards": lambda: Work(merge("base", "out"), write_base),
}


class Ground:
    """A folder in which a work is done, killed, looked at and done again."""

    def __init__(self, folder: Path, work: Work) -> None:
        self.folder, self.work = folder, work
        folder.mkdir(parents=True)
        work.old(folder)
        self.old = contents(folder)
        work.write(folder)
        self.new = contents(folder)
        self.reset()

    def reset(self) -> None:
        shutil.rmtree(self.folder)
        for name, data in self.old.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(data)

    def fork(self, prepare: Callable[[], None] = lambda: None) -> tuple[int, int]:
        """A process that has prepared and begun the work, and a pipe in which it says that it is done."""
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            prepare()
            os.write(send, b"begun")
            self.work.write(self.folder)
            os.write(send, b"done")
            os._exit(0)
        os.close(send)
        os.read(receive, 5)
        return child, receive

    def seconds(self) -> float:
        """How long the work takes."""
        child, receive = self.fork()
        begin = time.perf_counter()
        os.read(receive, 4)
        took = time.perf_counter() - begin
        assert ended(child, receive) == 0
        return took

    def kill_after(self, delay: float) -> None:
        child, receive = self.fork()
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert ended(child, receive) in (0, -signal.SIGKILL)

    def kill_before(self, step: int) -> bool:
        """Whether the work had so many steps."""
        code = ended(*self.fork(partial(kill_before, step)))
        assert code in (0, -signal.SIGKILL)
        return code != 0

    def kill_at_size(self, size: int) -> None:
        assert ended(*self.fork(partial(kill_at_size, size))) == -signal.SIGXFSZ

    def found(self) -> dict[str, object]:
        """What is there under the names that count, and beside them, and what the next run makes of it."""
        there = contents(self.folder)
        hidden = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if HIDDEN.search(str(path))}
        seen = {name: data for name, data in there.items() if name not in hidden}
        state = "old" if seen == self.old else "new" if seen == self.new else "other"
        said = loading(self.folder / "a") if state == "other" else None
        self.work.write(self.folder)
        finished = contents(self.folder) == self.new and not [*self.folder.rglob(".*")]
        return {"state": state, "said": said, "left": len(hidden), "finished by the next run": finished}


HIDDEN = re.compile(r"/\.[^/]+")


def ended(child: int, receive: int) -> int:
    """The exit code of a process."""
    os.close(receive)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def loading(path: Path) -> str:
    try:
        lora_plus.load_adapter(base(), path)
    except ValueError as error:
        return str(error)
    return "loaded"


def kill_before(step: int) -> None:
    """Have this process killed before one of its calls to the file system."""
    left = step

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in CALLS:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def kill_at_size(size: int) -> None:
    """Have this process killed as soon as one of its files would have more bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def at_random(ground: Ground, count: int) -> Iterator[dict[str, object]]:
    """Kills at moments and sizes that are spread evenly, each at random within its share of the time or the bytes."""
    times = []
    for _ in range(5):
        times.append(ground.seconds())
        ground.reset()
    chance = random.Random(0)
    for number in range(count):
        ground.kill_after(1.1 * median(times) * (number + chance.random()) / count)
        yield ground.found()
        ground.reset()
    longest = max(len(data) for name, data in ground.new.items() if data != ground.old.get(name))
    for number in range(count):
        ground.kill_at_size(int(longest * (number + chance.random()) / count))
        yield ground.found()
        ground.reset()


def at_steps(ground: Ground) -> Iterator[dict[str, object]]:
    """Kills before the first call to the file system, before the second, and so on to the last one."""
    os.fsync = lambda handle: None  # the files of a killed process are there whether they have reached the disk or not
    step = 0
    while ground.kill_before(step):
        yield ground.found()
        ground.reset()
        step += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *count = sys.argv[1:]
    for work, make in WORKS.items():
        ground = Ground(Path(folder, work), make())
        for entry in at_random(ground, int(count[0])) if count else at_steps(ground):
            print(json.dumps({"work": work, **entry}))
