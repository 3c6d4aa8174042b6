"""The traps: small models on which an adapter is easily dropped, doubled or corrupted.

A scenario does the same in either library and says what came of it. `traps` runs them and writes the table.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from traps import (
    OURS,
    PEFT,
    Library,
    Make,
    Outcome,
    R,
    Trap,
    base_weights,
    built,
    explicit,
    factors,
    judged,
    merge_changes,
    randomise,
    trainable,
    unchanged,
)

Scenario = Callable[[Library], Outcome]

# ---- models and inputs ----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A model of the given parts and forward; a part may be anything that can be an attribute."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def around(layer: Callable[[], nn.Module], run: Callable[[Any, Tensor], Tensor] = lambda net, x: net.l(x)) -> Make:
    """A model that holds one layer as ``l``."""
    return lambda: Net(run, l=layer())


def twins(change: Callable[[Any], object] = lambda net: None) -> Make:
    """A model of two linear layers, a and b, of which something is changed."""

    def make() -> nn.Module:
        net = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
        change(net)
        return net

    return make


def tied() -> nn.Module:
    net = Net(lambda net, x: net.head(net.embed(x)), embed=nn.Embedding(9, 4), head=nn.Linear(4, 9, bias=False))
    net.head.weight = net.embed.weight  # type: ignore[union-attr]
    return net


def listed() -> nn.Module:
    layer = nn.Linear(6, 6)
    return Net(lambda net, x: net.also[0](x), l=layer, also=[layer])


def with_forward() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.forward = partial(nn.Linear.forward, layer)  # type: ignore[method-assign]
    return layer


def pruned() -> nn.Module:
    layer = nn.Linear(6, 5, dtype=torch.float64)
    with torch.no_grad():
        return prune.random_unstructured(layer, "weight", 0.5)  # type: ignore[no-any-return]


def nested() -> nn.Module:
    inner = Net(lambda net, x: net.q(x), q=nn.Linear(6, 6))
    return Net(lambda net, x: net.q(net.z(x)), z=inner, q=nn.Linear(6, 6))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2)  # type: ignore[arg-type]


PADDING = torch.tensor([[False, False, False, False, False], [False, False, False, True, True]])
LINEAR = around(lambda: nn.Linear(6, 5))
TWINS = twins()
ATTENTION = around(
    lambda: nn.MultiheadAttention(16, 2, batch_first=True), lambda net, x: net.l(x, x, x, need_weights=False)[0]
)
READ = around(lambda: nn.Linear(6, 5), lambda net, x: F.linear(x, net.l.weight, net.l.bias))
BARE = around(lambda: Net(lambda net, x: F.linear(x, net.weight), weight=nn.Parameter(torch.randn(5, 6))))
LSTM = around(lambda: nn.LSTM(6, 5, batch_first=True), lambda net, x: net.l(x)[0])
INDEX = torch.arange(9).reshape(3, 3)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---- scenarios ------------------------------------------------------------------------------------------------------


def adapted(library: Library, make: Make, targets: Any, **settings: Any) -> Any:
    """The model with an adapter whose A and B are random, in eval mode."""
    model = library.inject(built(make), targets, **settings).eval()
    randomise(model)
    return model


def effect(
    make: Make, targets: Any, x: Tensor, *, unmerged: bool = True, merge: bool = False, grad: bool = True,
    check: bool = False, **settings: Any,
) -> Scenario:  # fmt: skip
    """Compare the output in eval mode: unmerged, merged, or both. ``check`` asks first whether the adapter is live."""

    def scenario(library: Library) -> Outcome:
        model = adapted(library, make, targets, **settings)
        matrices = factors(library, model)
        if settings.get("parameters"):  # PEFT names the module, not the parameter
            matrices = dict(zip(targets, matrices.values(), strict=True))
        if check:
            library.check(model, x)
        outputs, changed = {}, True
        with torch.set_grad_enabled(grad):
            if unmerged:
                outputs[""] = model(x)
            if merge:
                changed = merge_changes(library, model)
                outputs["merged, it "] = model(x)
            right, base = explicit(make, matrices)(x), built(make)(x)
        outcomes = [judged(output, right, base, when) for when, output in outputs.items()]
        outcomes += [] if changed else [Outcome("wrong", "merging has changed no weight")]
        return next((outcome for outcome in outcomes if outcome.verdict == "wrong"), outcomes[-1])

    return scenario


def padded(grad: bool) -> Scenario:
    """The rows of an encoder's output that are not padding."""

    def scenario(library: Library) -> Outcome:
        model, x = adapted(library, encoder, ["linear1", "linear2"]), floats(2, 5, 8)
        models = (model, explicit(encoder, factors(library, model)), built(encoder))
        with torch.set_grad_enabled(grad):
            got, right, base = (m(x, src_key_padding_mask=PADDING)[~PADDING] for m in models)
        return judged(got, right, base)

    return scenario


def gradient(library: Library) -> Outcome:
    """The derivative along a random direction of all adapter tensors, beside a finite difference of the reference."""
    model, x, step = adapted(library, encoder_layer, "all-linear").train(), floats(2, 5, 8), 1e-5
    parameters = trainable(model)
    directions = [torch.randn(p.shape, dtype=torch.float64) for p in parameters]
    weights = floats(2, 5, 8).cos()
    (model(x) * weights).sum().backward()
    slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True) if p.grad is not None)
    ends = []
    with torch.no_grad():
        for shift in (step, -2 * step):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(shift * d)
            ends.append((explicit(encoder_layer, factors(library, model))(x) * weights).sum().item())
    right = (ends[0] - ends[1]) / (2 * step)
    without = sum(p.grad is None for p in parameters)
    detail = f"slope {slope:.4f} along a random direction, {right:.4f} by finite differences of W + s B A"
    if without:
        detail += f"; {without} of {len(parameters)} adapter tensors get no gradient"
    return Outcome("right" if math.isclose(slope, right, rel_tol=1e-6) and not without else "wrong", detail)


def drift(library: Library) -> Outcome:
    model = library.inject(built(ATTENTION).bfloat16(), ["l"])
    before = base_weights(model)["l.in_proj_weight"]
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    x = floats(4, 6, 16).bfloat16()
    for _ in range(200):
        (model(x).float() - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return unchanged(before, base_weights(model)["l.in_proj_weight"])


def cycles(library: Library) -> Outcome:
    model = library.inject(built(around(lambda: nn.Linear(64, 64))).bfloat16(), ["l"])
    randomise(model, size=0.05)  # updates smaller than the weight, as training makes them
    before = base_weights(model)["l.weight"]
    for _ in range(100):
        assert merge_changes(library, model)
        library.unmerge(model)
    return unchanged(before, base_weights(model)["l.weight"])


def nan_merged(library: Library) -> Outcome:
    model = adapted(library, LINEAR, ["l"])
    before = base_weights(model)["l.weight"]
    trainable(model)[0].data[0, 0] = torch.nan
    assert merge_changes(library, model)
    library.unmerge(model)
    return unchanged(before, base_weights(model)["l.weight"])


def changed_while_merged(library: Library) -> Outcome:
    model = adapted(library, LINEAR, ["l"])
    before, parameters = base_weights(model)["l.weight"], trainable(model)
    assert merge_changes(library, model)
    with torch.no_grad():
        parameters[0].add_(1)
    library.unmerge(model)
    return unchanged(before, base_weights(model)["l.weight"])


def hooked(library: Library) -> Outcome:
    model, x, seen = built(LINEAR), floats(4, 6), []
    layer: Any = model.l
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model = library.inject(model, ["l"])
    randomise(model)
    model(x)
    return judged(seen[-1], explicit(LINEAR, factors(library, model))(x), built(LINEAR)(x), "what the hook sees ")


def frozen_by_hand(library: Library) -> Outcome:
    model = adapted(library, LINEAR, ["l"])
    for parameter in trainable(model):
        parameter.requires_grad_(False)
    with library.disabled(model):
        model(floats(4, 6))
    count = len(trainable(model))
    return Outcome("wrong" if count else "right", f"{count} of the 2 frozen tensors are trainable afterwards")


def unmatched(library: Library) -> Outcome:
    places = factors(library, library.inject(built(TWINS), ["a", "nope"]))
    return Outcome("wrong", f"accepted; adapted is {', '.join(places)}")


def reloaded(
    make: Make, targets: Any, x: Tensor, *, second: str = "", scales: dict[str, float] | None = None, **settings: Any
) -> Scenario:
    """Save the adapter, beside a second one if that has a name, load it into the plain model, and compare."""

    def scenario(library: Library) -> Outcome:
        model = adapted(library, make, targets, **settings)
        right = explicit(make, factors(library, model), scales)(x)
        if second:
            library.inject(model, targets, adapter=second)
        with tempfile.TemporaryDirectory() as folder:
            library.save(model, Path(folder))
            loaded = library.load(built(make), Path(folder))
        return judged(loaded.eval()(x), right, built(make)(x), "loaded, it ")

    return scenario


def tampered(change: Callable[[dict[str, Tensor]], object]) -> Scenario:
    """Load what PEFT saved after a change of its tensors."""

    def scenario(library: Library) -> Outcome:
        saved, x = adapted(PEFT, TWINS, ["a", "b"]), floats(4, 6)
        with tempfile.TemporaryDirectory() as folder:
            PEFT.save(saved, Path(folder))
            path = Path(folder, "adapter_model.safetensors")
            state = load_file(path)
            change(state)
            save_file(state, path, {"format": "pt"})
            loaded = library.load(built(TWINS), Path(folder))
        return judged(loaded.eval()(x), explicit(TWINS, factors(PEFT, saved))(x), built(TWINS)(x), "loaded, it ")

    return scenario


def new_base(library: Library) -> Outcome:
    net, x = built(LINEAR), floats(4, 6)
    model = library.inject(net, ["l"])
    randomise(model)
    net.load_state_dict(built(LINEAR, seed=1).state_dict(), strict=False)
    right = explicit(LINEAR, factors(library, model), seed=1)(x)
    return judged(model(x), right, built(LINEAR, seed=1)(x))


# ---- the table ------------------------------------------------------------------------------------------------------


def trap(name: str, what: str, scenario: Scenario) -> Trap:
    return Trap(name, what, partial(scenario, PEFT), partial(scenario, OURS))


def merging(layer: Callable[[], nn.Module], x: Tensor) -> Scenario:
    """Adapt one layer, compare, merge, compare."""
    return effect(around(layer), ["l"], x, merge=True)


HALVES = ["linear1", "linear2"]
X, IMAGE, SEQUENCE = floats(4, 6), floats(2, 4, 7, 7), floats(2, 4, 9)
TRAPS = (
    trap("nn.TransformerEncoderLayer, no_grad", "linear1 and linear2 are adapted; eval mode under torch.no_grad().",
         effect(encoder_layer, HALVES, floats(2, 5, 8), grad=False)),
    trap("nn.TransformerEncoderLayer, gradients on", "The same in eval mode with gradients on.",
         effect(encoder_layer, HALVES, floats(2, 5, 8))),
    trap("nn.TransformerEncoder with padding, no_grad", "Two layers, eval mode, src_key_padding_mask, torch.no_grad().",
         padded(grad=False)),
    trap("nn.TransformerEncoder with padding, gradients on", "The same with gradients on.", padded(grad=True)),
    trap("all-linear on nn.TransformerEncoderLayer", 'The gradients of all that the target "all-linear" adapts.',
         gradient),
    trap("nn.MultiheadAttention", "All its projections are adapted; one forward.",
         effect(ATTENTION, ["l"], floats(4, 5, 16))),
    trap("nn.MultiheadAttention, merged", "The same, merged before the first forward.",
         effect(ATTENTION, ["l"], floats(4, 5, 16), unmerged=False, merge=True)),
    trap("nn.MultiheadAttention in training", "Its in_proj_weight in bfloat16 after 200 steps of AdamW.", drift),
    trap("dilated convolution", "nn.Conv1d with dilation=2, padding=2.",
         merging(lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), SEQUENCE)),
    trap('dilated convolution, padding="same"', 'nn.Conv1d with dilation=2, padding="same".',
         merging(lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), SEQUENCE)),
    trap("circular padding", 'nn.Conv2d with padding_mode="circular".',
         merging(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGE)),
    trap("flat 3-d kernel", "nn.Conv3d with kernel (1, 1, 3), merged.",
         merging(lambda: nn.Conv3d(2, 3, (1, 1, 3)), floats(2, 2, 3, 4, 5))),
    trap("grouped convolution", "nn.Conv2d with groups=2, merged.",
         merging(lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE)),
    trap("transposed convolution", "nn.ConvTranspose1d, merged.",
         merging(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), SEQUENCE)),
    trap("weight_norm", "An nn.Linear under torch's weight_norm, merged.",
         merging(lambda: parametrizations.weight_norm(nn.Linear(6, 5)), X)),
    trap("spectral_norm", "An nn.Linear under torch's spectral_norm, merged.",
         merging(lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), X)),
    trap("pruned layer", "An nn.Linear pruned by torch.nn.utils.prune, merged.", merging(pruned, X)),
    trap("embedding with max_norm", "nn.Embedding with max_norm=1, merged.",
         effect(around(lambda: nn.Embedding(9, 4, max_norm=1.0)), ["l"], INDEX, merge=True)),
    trap("nn.LSTM", "All its matrices are adapted by naming the module, and merged.",
         effect(LSTM, ["l"], floats(2, 3, 6), merge=True)),
    trap("nn.LSTM, one matrix", "Its weight_ih_l0 is adapted as a parameter, and merged.",
         effect(LSTM, ["l.weight_ih_l0"], floats(2, 3, 6), merge=True, parameters=True)),
    trap("one layer under two names", "The model calls one nn.Linear as a and as b; both names are targets.",
         effect(twins(lambda net: setattr(net, "b", net.a)), ["a", "b"], X, merge=True)),
    trap("two layers with one weight", "Two adapted nn.Linear share their weight, and are merged.",
         effect(twins(lambda net: setattr(net.b, "weight", net.a.weight)), ["a", "b"], X, merge=True)),
    trap("tied head", "The adapted head shares its weight with the embedding, and is merged.",
         effect(tied, ["head"], INDEX, merge=True)),
    trap("layer in a Python list", "The forward takes the layer from a plain list.", effect(listed, ["l"], X)),
    trap("weight read by others", "The forward is F.linear(x, self.l.weight); the target is the layer l.",
         effect(READ, ["l"], X, check=True)),
    trap("weight read by others, as a parameter", "The same; the target is the parameter l.weight.",
         effect(READ, ["l.weight"], X, parameters=True)),
    trap("bare parameter", "A module multiplies by its own 2-d parameter, which is the target.",
         effect(BARE, ["l.weight"], X, merge=True, parameters=True)),
    trap("replaced forward", "Before injecting, layer.forward was assigned, as offloading tools do.",
         merging(with_forward, X)),
    trap("forward hook", "A hook on the layer, registered before injecting, looks at its output.", hooked),
    trap("merge cycles", "Base weight in bfloat16 after merging and unmerging 100 times.", cycles),
    trap("NaN in the adapter", "Merged with the default settings and unmerged; the base weight.", nan_merged),
    trap("adapter changed while merged", "Merged, changed, unmerged; the base weight.", changed_while_merged),
    trap("disabling", "An adapter frozen by hand is disabled for a with block.", frozen_by_hand),
    trap("overlapping alpha_pattern", 'alpha_pattern={"z.q": 64, "q": 4}, saved and loaded.',
         reloaded(nested, ["q"], X, alpha_pattern={"z.q": 64, "q": 4}, scales={"z.q": 64 / R, "q": 4 / R})),
    trap("adapter named like a module", "A second adapter is called z, as a submodule is; the first is saved, loaded.",
         reloaded(nested, ["q"], X, second="z")),
    trap("misspelt target", 'The targets are ["a", "nope"].', unmatched),
    trap("alpha is NaN", 'alpha=float("nan").', effect(LINEAR, ["l"], X, alpha=math.nan)),
    trap("base weight in an adapter's file", "A PEFT folder whose file also has a weight of the base.",
         tampered(lambda state: state.update({"base_model.model.a.base_layer.weight": torch.zeros(6, 6)}))),
    trap("tensor missing in an adapter's file", "A PEFT folder whose file lacks one tensor.",
         tampered(lambda state: state.pop("base_model.model.a.lora_B.weight"))),
    trap("NaN in an adapter's file", "A PEFT folder with one value that is not a number.",
         tampered(lambda state: state["base_model.model.a.lora_B.weight"].view(-1)[0].fill_(torch.nan))),
    trap("base checkpoint after injecting", "load_state_dict(checkpoint of another base, strict=False).", new_base),
)  # fmt: skip
