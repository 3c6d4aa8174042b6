"""Tensor parallelism: layers cut together with their adapters compute and train what one process does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, Conv1D, Holder, ScaledLinear, randomise
from engine_model import (
    LR,
    WEIGHT_DECAY,
    base_model,
    batches,
    distance,
    lora_model,
    loss_of,
    optimizer_for,
    train,
    trained,
)
from processes import Processes
from test_variants import Gain
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.utils.parametrizations import weight_norm

import lora_plus as lp
from lora_plus.engines.tensor_parallel import ColwiseLoRA, RowwiseLoRA
from lora_plus.tensors import fused_linear
from lora_plus.tensors.variant import VARIANTS

STEPS = 4
STYLES: tuple[Any, ...] = (ColwiseLoRA, RowwiseLoRA)
Plan = dict[str, ParallelStyle]


def whole_plan(column: Any = ColwiseLoRA, row: Any = RowwiseLoRA) -> Plan:
    """Attention and feed-forward network cut in pairs, as usual; the embedding by its vocabulary, and the head."""
    return {
        "embedding": row(input_layouts=Replicate()),
        **{f"blocks.*.{name}": column() for name in ("q", "k", "v", "up")},
        **{f"blocks.*.{name}": row() for name in ("o", "down")},
        "head": column(output_layouts=Replicate()),
    }


def sequence_plan() -> Plan:
    """The same, with a part of every sequence on each rank between the layers that are cut."""
    whole, part = Replicate(), Shard(1)
    return {
        "embedding": RowwiseLoRA(input_layouts=whole, output_layouts=part),
        **{name: SequenceParallel() for name in ("norm", "blocks.*.norm")},
        **{f"blocks.*.{name}": ColwiseLoRA(input_layouts=part) for name in ("q", "k", "v", "up")},
        **{f"blocks.*.{name}": RowwiseLoRA(output_layouts=part) for name in ("o", "down")},
        "head": ColwiseLoRA(input_layouts=part, output_layouts=whole),
    }


PLANS = {"whole": whole_plan, "sequence": sequence_plan}


def mesh(size: int = 2) -> DeviceMesh:
    return init_device_mesh("cpu", (size,))


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of any entry; one of the two, or both, may be on a mesh."""
    one, other = (t.full_tensor() if isinstance(t, DTensor) else t for t in (one.detach(), other.detach()))
    return float((one - other).abs().max())


# ---- one layer -------------------------------------------------------------------------------------------------------

MORE_CASES = [
    Case("linear-pissa", lambda: nn.Linear(6, 5), CASES[0].make_input, {"init": "pissa"}),
    Case("linear-pissa-dora", lambda: nn.Linear(6, 5), CASES[0].make_input, {"init": "pissa", "variant": "dora"}),
    Case("linear-r-1", lambda: nn.Linear(6, 5), CASES[0].make_input, {"r": 1}),
    Case("linear-qkv", lambda: nn.Linear(6, 9), CASES[0].make_input, {"fused": {"layer": ["q", "k", "v"]}}),
]
# torch 2.13 has no rule for the product of a matrix with one sample that is no batch
CUT = [case for case in CASES if case.layer().weight.ndim == 2 and case.name != "linear-unbatched"] + MORE_CASES
REFUSED = {("embedding-max-norm", RowwiseLoRA), ("embedding-dora", RowwiseLoRA)}
TAKEN = [(case, style) for case in CUT for style in STYLES if (case.name, style) not in REFUSED]


def cut(model: nn.Module, style: Any) -> nn.Module:
    whole = Replicate()
    return parallelize_module(model, mesh(), {"layer": style(input_layouts=whole, output_layouts=whole)})


def laws_of_a_layer() -> dict[tuple[str, str, str], float]:
    """By case, style and law: how far a cut layer is from the whole one."""
    fused_linear._LEAST_WORK = 0  # as if it were large
    found = {}
    for case, style in TAKEN:
        reference = case.adapted()
        model = cut(copy.deepcopy(reference), style)
        x, cut_x = (case.input().requires_grad_(case.input().is_floating_point()) for _ in range(2))
        y, cut_y = reference(x), model(cut_x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
        y.backward(dy)
        cut_y.backward(dy)
        with torch.no_grad():
            without_gradients = model(cut_x)
        parameters, expected = dict(model.named_parameters()), dict(reference.named_parameters())
        flags = [{name: p.requires_grad for name, p in each.items()} for each in (parameters, expected)]
        assert flags[0] == flags[1]
        trainable = [name for name, p in expected.items() if p.requires_grad]
        # what reads a gradient, an optimizer say, finds no partial sums
        assert all(parameters[name].grad.placements == parameters[name].placements for name in trainable)
        laws = {
            "output": difference(cut_y, y),
            "output without gradients": difference(without_gradients, y),
            "gradients": max(difference(parameters[name].grad, expected[name].grad) for name in trainable),
            "gradient of the input": difference(cut_x.grad, x.grad) if x.requires_grad else 0.0,
        }
        found |= {(case.name, style.__name__, law): value for law, value in laws.items()}
    return found


def test_a_cut_layer_computes_what_the_whole_one_does(two_processes: Processes) -> None:
    for found in two_processes(laws_of_a_layer):
        assert len(found) == 4 * len(TAKEN) and len(TAKEN) > 30
        assert {key: value for key, value in found.items() if value > 1e-12} == {}


def starts_of_a_layer() -> dict[tuple[str, str], float]:
    """By case and style: how far a cut layer with a new adapter is from the plain layer that is cut."""
    found = {}
    for case, style in TAKEN:
        if case.name != "embedding-max-norm":  # torch cannot cut the plain one
            adapted, plain = lp.inject_lora(case.model(), ["layer"], **case.settings), case.model()
            outputs = [cut(model, style)(case.input()) for model in (adapted, plain)]
            found[case.name, style.__name__] = difference(*outputs)
    return found


def test_a_new_adapter_leaves_the_output_of_a_cut_layer(two_processes: Processes) -> None:
    for found in two_processes(starts_of_a_layer):
        rounded = {key for key in found if "pissa" in key[0] or (key[1] == "RowwiseLoRA" and "dora" in key[0])}
        assert len(rounded) == 7 and all(found[key] <= 1e-12 for key in rounded)
        assert {key: value for key, value in found.items() if value and key not in rounded} == {}


ALL_CONTAINERS = {"r": 1, "init": "pissa", "variant": "dora"}
# (layer, settings, what the first of two ranks has under ColwiseLoRA, and under RowwiseLoRA)
SHAPES: list[tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (
        lambda: nn.Linear(6, 4),
        ALL_CONTAINERS,
        {"weight": (2, 6), "bias": (2,), "A": (1, 6), "B": (2, 1), "A0": (1, 6), "B0": (2, 1), "magnitude": (2,)},
        {"weight": (4, 3), "bias": (4,), "A": (1, 3), "B": (4, 1), "A0": (1, 3), "B0": (4, 1), "magnitude": (4,)},
    ),
    (
        lambda: Conv1D(4, 6),
        {"r": 1},
        {"weight": (6, 2), "bias": (2,), "A": (1, 6), "B": (2, 1)},
        {"weight": (3, 4), "bias": (4,), "A": (1, 3), "B": (4, 1)},
    ),
    (
        lambda: nn.Embedding(6, 4),
        {"r": 1},
        {"weight": (6, 2), "A": (1, 6), "B": (2, 1)},
        {"weight": (3, 4), "A": (1, 3), "B": (4, 1)},
    ),
]


def shapes_of_layers() -> list[list[dict[str, tuple[int, ...]]]]:
    found = []
    for make, settings, *_ in SHAPES:
        found.append([])
        for style in STYLES:
            model = lp.inject_lora(nn.Sequential(make()), ["0"], **settings)
            parallelize_module(model, mesh(), {"0": style()})
            tensors = {name.removeprefix("lora_").partition(".")[0]: p for name, p in model[0].named_parameters()}
            found[-1].append({name: tuple(p.to_local().shape) for name, p in tensors.items()})
    return found


def test_what_a_rank_has_of_a_layer(two_processes: Processes) -> None:
    for found in two_processes(shapes_of_layers):
        assert found == [[column, row] for _, _, column, row in SHAPES]


def own_variant() -> list[tuple[tuple[int, ...], float]]:
    """For each style, what a rank has of the tensor of a variant from outside, and how far the cut layer is off."""
    VARIANTS["gain"] = Gain()
    found = []
    for style in STYLES:
        reference = randomise(lp.inject_lora(Holder(nn.Linear(6, 4)).double(), ["layer"], variant="gain"))
        model, x = cut(copy.deepcopy(reference), style), torch.randn(3, 6, dtype=torch.float64)
        shape = tuple(model.layer.lora_gain["default"].to_local().shape)
        found.append((shape, difference(model(x), reference(x))))
    return found


def test_a_variant_from_outside_is_cut_along_what_it_states(two_processes: Processes) -> None:
    for found in two_processes(own_variant):
        assert [shape for shape, _ in found] == [(2,) if style is ColwiseLoRA else (4,) for style in STYLES]
        assert max(difference for _, difference in found) <= 1e-12


def after_another_seed() -> list[Tensor]:
    torch.manual_seed(torch.distributed.get_rank())
    model = lp.inject_lora(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)), ["0", "1"])
    parallelize_module(model, mesh(), {"0": ColwiseLoRA(), "1": RowwiseLoRA()})
    # read where every rank has all of it, and gathered where each has a part
    return [model[0].lora_A["default"].to_local().detach(), model[1].lora_A["default"].full_tensor().detach()]


def test_all_ranks_start_from_the_adapters_of_the_first(two_processes: Processes) -> None:
    one, other = two_processes(after_another_seed)
    torch.manual_seed(0)
    whole = lp.inject_lora(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)), ["0", "1"])
    for ours, theirs, layer in zip(one, other, whole, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(ours, layer.lora_A["default"])


def several_adapters() -> list[float]:
    """Outputs and gradients of a pair of layers with two adapters, then of one of them, and without."""
    found = []
    for style, other in (STYLES, STYLES[::-1]):
        torch.manual_seed(0)
        reference = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5)).double()
        lp.inject_lora(reference, ["0", "1"], r=2, adapter="one")
        lp.inject_lora(reference, ["0", "1"], r=3, adapter="other", variant="lora_fa")
        lp.set_adapter(randomise(reference), {"one": 0.5, "other": 1.0})
        whole = {"output_layouts": Replicate()}
        model = copy.deepcopy(reference)
        parallelize_module(
            model, mesh(), {"0": style(**whole), "1": other(input_layouts=Replicate(), **whole, use_local_output=False)}
        )
        x = torch.arange(8).reshape(2, 4)
        y, expected = model(x), reference(x)
        assert isinstance(y, DTensor)
        y.full_tensor().square().sum().backward()
        expected.square().sum().backward()
        pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
        assert [p.grad is None for p, _ in pairs] == [q.grad is None for _, q in pairs]
        lp.set_adapter(model, "one", trainable=True)  # gradients lie as their parameters also where they come later
        model(x).sum().backward()
        assert all(p.grad.placements == p.placements for p, _ in pairs if p.requires_grad)
        with lp.disabled(model), lp.disabled(reference):
            found += [difference(y, expected), difference(model(x), reference(x))]
        found += [difference(p.grad, q.grad) for p, q in pairs if q.requires_grad]
    return found


def test_several_adapters(two_processes: Processes) -> None:
    assert all(max(found) <= 1e-12 and len(found) == 8 for found in two_processes(several_adapters))


def plain_layers_and_other_arguments() -> None:
    """A plain layer is cut as torch cuts it, to the bit; a layer gets all the arguments of its call."""
    x, plain = torch.randn(2, 4, 6), nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    for ours, theirs in ((ColwiseLoRA, ColwiseParallel), (RowwiseLoRA, RowwiseParallel)):
        settings = {"input_layouts": Shard(1), "output_layouts": Shard(1)}
        outputs = [
            parallelize_module(copy.deepcopy(plain), mesh(), {"0": style(**settings), "1": style(**settings)})(x)
            for style in (ours, theirs)
        ]
        assert torch.equal(*outputs)
    layer = randomise(lp.inject_lora(ScaledLinear(6, 5), [""], r=2))
    expected = layer(x, 3.0)
    assert (
        difference(parallelize_module(layer, mesh(), ColwiseLoRA(output_layouts=Replicate()))(x, 3.0), expected) <= 1e-6
    )


def test_plain_layers_and_other_arguments(two_processes: Processes) -> None:
    two_processes(plain_layers_and_other_arguments)


def collectives() -> dict[str, list[dict[str, int]]]:
    """What is sent by a layer that is cut by column, the next by row, the backward, and a step of the optimizer."""
    return {variant: collectives_of(variant) for variant in ("lora", "dora")}


def collectives_of(variant: str) -> list[dict[str, int]]:
    model = lp.inject_lora(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)), ["0", "1"], r=2, variant=variant)
    parallelize_module(model, mesh(), {"0": ColwiseLoRA(), "1": RowwiseLoRA()})
    optimizer, tensors = optimizer_for(model), [torch.randn(4, 6, requires_grad=True)]
    parts: list[Callable[[], Any]] = [
        lambda: tensors.append(model[0](tensors[-1])),
        lambda: tensors.append(model[1](tensors[-1])),
        lambda: tensors[-1].sum().backward(),
        optimizer.step,
    ]
    found = []
    for part in parts:
        with CommDebugMode() as counter:
            part()
        found.append({str(kind).rpartition(".")[2]: count for kind, count in counter.get_comm_counts().items()})
    return found


def test_how_often_ranks_wait_for_each_other(two_processes: Processes) -> None:
    for found in two_processes(collectives):
        # what the ranks have of a frozen layer and of its update is added up together
        assert found["lora"] == [{}, {"all_reduce": 1}, {"all_reduce": 3}, {}]
        column, row, _, step = found["dora"]  # whose norm of cut rows is a sum, too
        assert (column, row, step) == ({}, {"all_reduce": 2}, {})


# ---- a model ---------------------------------------------------------------------------------------------------------

# (plan, settings, dtype, how far the trained weights may be from those of one process)
TRAINED: list[tuple[str, dict[str, Any], torch.dtype, float]] = [
    ("whole", {}, torch.float32, 1e-5),
    ("whole", {"embedding": True}, torch.float64, 1e-10),
    ("whole", {"r": 1, "variant": "dora"}, torch.float64, 1e-10),
    ("whole", {"init": "pissa"}, torch.float64, 1e-10),
    ("whole", {"variant": "lora_fa"}, torch.float64, 1e-10),
    ("sequence", {}, torch.float32, 1e-5),
    ("sequence", {"embedding": True}, torch.float64, 1e-10),
]


def after_training(plan: str, settings: dict[str, Any], dtype: torch.dtype) -> float:
    model, one_process = (lora_model(**settings).to(dtype) for _ in range(2))
    parallelize_module(model, mesh(), PLANS[plan]())
    for each in (model, one_process):
        train(each, optimizer_for(each), batches(STEPS))
    assert distance(trained(one_process), trained(lora_model(**settings).to(dtype))) > 1e-3
    return distance(trained(model), trained(one_process))


@pytest.mark.parametrize(("plan", "settings", "dtype", "tolerance"), TRAINED)
def test_training_is_that_of_one_process(
    two_processes: Processes, plan: str, settings: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    assert max(two_processes(after_training, plan, settings, dtype)) <= tolerance


def base_and_ratio_one() -> None:
    """To the bit: the base that torch cuts, while B is zero; and plain LoRA, with a ratio of 1."""
    tokens = batches(1)[0]
    base = parallelize_module(base_model(), mesh(), whole_plan(ColwiseParallel, RowwiseParallel))
    adapted = parallelize_module(lora_model(embedding=True), mesh(), whole_plan())
    assert torch.equal(base(tokens), adapted(tokens))
    plain = parallelize_module(lora_model(embedding=True), mesh(), whole_plan())
    train(adapted, optimizer_for(adapted, lr_ratio=1.0), batches(STEPS))
    parameters = [p for p in plain.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    train(plain, torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY), batches(STEPS))
    assert distance(trained(adapted), trained(plain)) == 0


def test_the_base_and_plain_lora_are_met_to_the_bit(two_processes: Processes) -> None:
    two_processes(base_and_ratio_one)


def with_a_parallel_loss() -> float:
    """The gradients where no rank ever has a whole row of logits."""
    model, one_process = (lora_model(non_zero=True).double() for _ in range(2))
    parallelize_module(model, mesh(), whole_plan() | {"head": ColwiseLoRA(use_local_output=False)})
    tokens = batches(1)[0]
    with loss_parallel():
        loss_of(model, tokens).backward()
    loss_of(one_process, tokens).backward()
    pairs = zip(model.parameters(), one_process.parameters(), strict=True)
    return max(difference(p.grad, q.grad) for p, q in pairs if q.requires_grad)


def test_a_loss_of_logits_that_are_never_whole(two_processes: Processes) -> None:
    assert max(two_processes(with_a_parallel_loss)) <= 1e-10


def under_fully_shard(replicas: int, ranks: int) -> float:
    """Tensor parallel inside, ``fully_shard`` around it; each replica has its share of the batch."""
    both = init_device_mesh("cpu", (replicas, ranks), mesh_dim_names=("dp", "tp"))
    model, one_process = (lora_model(embedding=True) for _ in range(2))
    parallelize_module(model, both["tp"], whole_plan())
    for block in [*model.blocks, model]:
        fully_shard(block, mesh=both["dp"])
    # of the logits, which are a rank's view of what all have; nothing changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    train(model, optimizer_for(model), batches(STEPS, rank=both["dp"].get_local_rank(), world=replicas))
    train(one_process, optimizer_for(one_process), batches(STEPS))
    return distance(trained(model), trained(one_process))


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_with_fully_shard(two_processes: Processes, shape: tuple[int, int]) -> None:
    assert max(two_processes(under_fully_shard, *shape)) <= 1e-5


@pytest.mark.slow
def test_with_fully_shard_on_four_processes() -> None:
    processes = Processes(4)
    try:
        assert max(processes(under_fully_shard, 2, 2)) <= 1e-5
    finally:
        processes.close()


def save(path: str) -> None:
    model = parallelize_module(lora_model(embedding=True, non_zero=True), mesh(), sequence_plan())
    lp.save_adapter(model, path)


def test_the_file_is_that_of_one_process(two_processes: Processes, tmp_path: Path) -> None:
    two_processes(save, str(tmp_path / "cut.safetensors"))
    lp.save_adapter(lora_model(embedding=True, non_zero=True), tmp_path / "one.safetensors")
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def trained_norms() -> list[float]:
    """Modules trained in full that are on the mesh show their original values while disabled, and after removal."""
    model, tokens = parallelize_module(lora_model(), mesh(), sequence_plan()), batches(1)[0]
    train(model, optimizer_for(model, lr=0.1), batches(STEPS))
    adapted, base = model(tokens).detach().clone(), base_model()(tokens)
    with lp.disabled(model):
        found = [difference(model(tokens), base)]
    assert torch.equal(model(tokens), adapted) and difference(adapted, base) > 0.1
    lp.remove_lora(model)
    return [*found, difference(model(tokens), base)]


def test_modules_trained_in_full_have_their_original_values(two_processes: Processes) -> None:
    assert all(max(found) <= 1e-5 for found in two_processes(trained_norms))


# ---- what is refused -------------------------------------------------------------------------------------------------


class Quantized(nn.Parameter):
    """A weight with the mark of bitsandbytes."""

    quant_state = "packed"


def refused() -> None:
    for style in STYLES:
        for make, settings, error, message in [
            (lambda: nn.Conv1d(4, 4, 1), {}, TypeError, "cannot shard a LoRAConv1d, only linear layers and embeddings"),
            (lambda: nn.LSTM(4, 4), None, TypeError, "cannot shard a LSTM, only linear layers and embeddings"),
            (lambda: weight_norm(nn.Linear(4, 4)), {}, TypeError, "whose weight is quantized or computed"),
            (lambda: nn.Linear(4, 4), {"dropout": 0.1}, ValueError, "dropout on a cpu mesh"),
        ]:
            model = nn.Sequential(make())
            if settings is not None:
                lp.inject_lora(model, ["0"], r=2, **settings)
            with pytest.raises(error, match=message):
                parallelize_module(model, mesh(), {"0": style()})
            assert not any(isinstance(p, DTensor) for p in model.parameters())
        model = lp.inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"])
        lp.merge_lora(model)
        with pytest.raises(ValueError, match=r"merged; call unmerge_lora\(model\) first"):
            parallelize_module(model, mesh(), {"0": style()})
        quantized = nn.Sequential(nn.Linear(4, 4))
        quantized[0].weight = Quantized(torch.zeros(4, 4))
        with pytest.raises(TypeError, match="whose weight is quantized"):
            parallelize_module(quantized, mesh(), {"0": style()})
    for case, style in ((case, style) for case in CUT for style in STYLES if (case.name, style) in REFUSED):
        with pytest.raises(ValueError, match=r"DoRA adapter or max_norm.*use ColwiseLoRA"):
            cut(case.adapted(), style)


def test_what_cannot_be_cut_is_refused_and_left_whole(two_processes: Processes) -> None:
    two_processes(refused)


def in_the_wrong_order() -> None:
    model = parallelize_module(base_model(), mesh(), whole_plan())
    before = model.state_dict()
    # also for a layer that is whole: nothing would make its adapter the same on all ranks
    for targets in (["q"], ["norm"], "all-linear"):
        with pytest.raises(
            ValueError, match=r"sharded by fully_shard or tensor parallelism.*before the model is sharded"
        ):
            lp.inject_lora(model, targets, train_also=())
    assert model.state_dict().keys() == before.keys()
    adapted = parallelize_module(lora_model(), mesh(), whole_plan())
    with pytest.raises(ValueError, match="sharded by fully_shard or tensor parallelism"):
        lp.add_adapter(adapted, "other", like="default")
    with pytest.raises(RuntimeError, match="already been called on this module"):
        parallelize_module(adapted, mesh(), whole_plan())


def test_adapters_come_before_the_mesh(two_processes: Processes) -> None:
    two_processes(in_the_wrong_order)


def torch_is_loud() -> None:
    for column in (ColwiseParallel, RowwiseParallel):
        for make in (lambda: nn.Linear(4, 4), lambda: nn.Embedding(4, 4)):
            with pytest.raises((KeyError, AttributeError)):
                parallelize_module(lp.inject_lora(nn.Sequential(make()), ["0"]), mesh(), {"0": column()})
    with pytest.warns(UserWarning, match="'query' could not be resolved: no submodule matching"):
        parallelize_module(lora_model(), mesh(), {"blocks.*.query": ColwiseLoRA()})


def test_what_torch_itself_does_not_pass_over(two_processes: Processes) -> None:
    two_processes(torch_is_loud)


def samples_of_their_own() -> None:
    model = lora_model(train_also=())
    lp.add_adapter(model, "other", like="default")
    parallelize_module(model, mesh(), whole_plan())
    tokens, said = batches(1, size=2)[0], "is cut by tensor parallelism, where all samples have the same adapters"
    with pytest.raises(ValueError, match=said), lp.adapter_per_sample(model, ["default", "other"]):
        model(tokens)
    with lp.adapter_per_sample(model, ["other", "other"]):
        model(tokens)


def test_all_samples_have_the_same_adapters(two_processes: Processes) -> None:
    two_processes(samples_of_their_own)
