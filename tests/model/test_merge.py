"""Merging over a whole model: all or nothing, ties, rounding, and what is refused while merged."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, explicit, parameters_of, randomise
from parameter_cases import PARAMETER_CASES, ParameterCase
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import lora_plus
from lora_plus import inject_lora, merge_and_unload, merge_lora, merged, unmerge_lora
from lora_plus.model import active_adapters, merge
from lora_plus.tensors import matrix as functional


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).to(dtype)
    return randomise(inject_lora(model, "all-linear", r=4), size=0.05)


def test_merged_restores_the_previous_state() -> None:
    model = net().eval()
    weights = [model[0].weight, model[2].weight]
    with merged(model):
        assert model[0].weight is not weights[0]
        with merged(model):
            pass
        assert model[0].weight is not weights[0], "the inner block must leave the outer one's state"
    assert model[0].weight is weights[0] and model[2].weight is weights[1]
    merge_lora(model)
    with merged(model):
        pass
    assert model[0].weight is not weights[0]
    with pytest.raises(ZeroDivisionError), merged(model):
        raise ZeroDivisionError
    unmerge_lora(model)
    assert model[0].weight is weights[0]


def test_a_failed_merge_leaves_the_model_as_it_was() -> None:
    model, x = net(), torch.randn(3, 16)
    with torch.no_grad():
        model[2].lora_B["default"][0, 0] = torch.nan
    weights, before = [model[0].weight, model[2].weight], model[0](x)
    with pytest.raises(ValueError, match=r"nothing was merged, because of:\n  '2': the merged weight is not finite"):
        merge_lora(model)
    assert model[0].weight is weights[0] and model[0].lora_merge is None and torch.equal(model[0](x), before)
    with pytest.raises(ValueError, match="not finite"):
        merge_and_unload(model)
    assert isinstance(model[0], lora_plus.LoRALinear)


def test_an_overflow_in_half_precision_is_refused_but_the_base_s_own_infinities_are_kept() -> None:
    model = net(torch.float16)
    with torch.no_grad():
        model[0].lora_B["default"].fill_(1e5)
    with pytest.raises(ValueError, match=r"'0': the merged weight is not finite in torch.float16"):
        merge_lora(model)
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = -torch.inf
    assert merge_and_unload(model)[0].weight[0, 0] == -torch.inf


def test_states_that_make_no_sense_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="the model is not merged"):
        unmerge_lora(model)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"'0': it is merged already; call unmerge_lora\(model\) first"):
        merge_lora(model)
    for call in (lambda: inject_lora(model, ["0"], adapter="b"), lambda: lora_plus.set_adapter(model, "default"),
                 lambda: lora_plus.delete_adapter(model, "default")):  # fmt: skip
        with pytest.raises(ValueError, match=r"the model is merged \('0' is\); call unmerge_lora\(model\) first"):
            call()
    with pytest.raises(RuntimeError, match=r"layer '0' is merged; call unmerge_lora\(model\) before loading"):
        model.load_state_dict(model.state_dict())
    with pytest.raises(KeyError, match="the model has no adapter 'nope': it has 'default'"):
        merge_lora(model, adapters=["nope"])
    unmerge_lora(model)
    lora_plus.set_adapter(model, [])
    with pytest.raises(ValueError, match="there is no active adapter to merge"):
        merge_lora(model)
    with pytest.raises(KeyError, match="it has none; call inject_lora first"):
        merge_lora(nn.Linear(2, 2), adapters=["default"])


def test_training_while_merged_is_an_error() -> None:
    model, x = net(), torch.randn(2, 16)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"is merged, so its adapters would get no gradient; call unmerge_lora"):
        model(x)
    with torch.no_grad():
        model(x)
    model.eval()(x)


def test_changing_an_adapter_while_merged_is_an_error() -> None:
    model, x = net().eval(), torch.randn(2, 16)
    y = model(x)
    merge_lora(model)
    with torch.no_grad():
        model[0].lora_B["default"].add_(1)
    with pytest.raises(ValueError, match="an adapter of this LoRALinear was changed while it was merged"):
        model(x)
    unmerge_lora(model)
    assert not torch.allclose(model(x), y)


def test_moving_a_merged_model_moves_the_kept_weight_too() -> None:
    model, x = net().eval(), torch.randn(2, 16)
    y = model(x).double()
    merge_lora(model)
    model.double()
    assert model(x.double()).dtype == torch.float64
    unmerge_lora(model)
    assert model[0].weight.dtype == torch.float64
    torch.testing.assert_close(model(x.double()), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_and_the_loss_is_reported(dtype: torch.dtype) -> None:
    model = net(dtype)
    base = model[0].weight.detach().clone()
    wanted = explicit(model)[0].weight
    report = merge_lora(model)
    assert report.layers == ["0", "2"]
    # computed in float32: at most a tie may fall on the other side of the correctly rounded float64 result
    off = (model[0].weight != wanted.to(dtype)).sum()
    assert off <= 1
    update = wanted - base.double()
    lost = ((model[0].weight.double() - base.double()) - update).norm() / update.norm()
    assert report.lost["0"] == pytest.approx(lost.item(), rel=1e-3) and report.lost["0"] > 0
    assert "of the update in the median layer" in str(report)
    assert "of the update" in str(lora_plus.lora_summary(model))


def test_full_precision_reports_no_loss() -> None:
    assert merge_lora(net()).lost == {}


def test_merging_one_of_two_tied_layers_leaves_the_other_alone_and_says_so() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    bits = model["embed"].weight.detach().clone()
    randomise(inject_lora(model, ["head"], r=2))
    x = torch.randn(3, 4)
    y = model["head"](x)
    with pytest.warns(UserWarning, match=r"the weight of 'head' is shared with embed\.weight: merging gives") as warned:
        report = merge_lora(model)
    assert str(warned[0].message).endswith("to keep the tie, use inject_lora(..., tied='both')")
    assert warned[0].filename == __file__
    assert report.untied == [("head", ["embed.weight"])]
    assert torch.equal(model["embed"].weight, bits) and model["embed"].weight is not model["head"].weight
    torch.testing.assert_close(model.eval()["head"](x), y)
    unmerge_lora(model)
    assert model["embed"].weight is model["head"].weight


def test_only_the_named_adapters_are_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).double()
    inject_lora(model, ["0"], r=2, adapter="a")
    inject_lora(model, ["0"], r=2, adapter="b")
    randomise(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    for name in ("a", "b"):
        lora_plus.set_adapter(model, name)
        wanted = model.eval()(x)
        lora_plus.set_adapter(model, ["a", "b"])
        with merged(model, adapters=[name]):
            torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
        twin = merge_and_unload(copy.deepcopy(model), adapters=[name])
        torch.testing.assert_close(twin(x), wanted, rtol=1e-12, atol=1e-12)


def of_two_adapters() -> nn.Module:
    """Adapter "a" on a layer and on rows of another, "b" on the layer, on a cell and on a computed weight."""
    parts = OrderedDict(
        both=nn.Linear(4, 4), rows=nn.Linear(4, 4), cell=nn.GRUCell(4, 4),
        norm=parametrizations.weight_norm(nn.Linear(4, 4)),
    )  # fmt: skip
    model = nn.Sequential(parts).double().eval()
    inject_lora(model, ["both", "rows.k"], r=2, adapter="a", fused={"rows": ["q", "k"]})
    inject_lora(model, ["both", "cell", "norm"], r=2, adapter="b")
    return randomise(model)


@pytest.mark.parametrize("active", ["b", ["a", "b"], {"b": 0.5}, {"a": 0.5, "b": 2.0}], ids=str)
def test_merged_others_than_the_active_ones_are_as_if_they_were_chosen(active: Any) -> None:
    model, x = of_two_adapters(), torch.randn(3, 4, dtype=torch.float64)
    strength = active.get("a", 1.0) if isinstance(active, dict) else 1.0
    lora_plus.set_adapter(model, {"a": strength})
    wanted = model(x)
    plain = [key for key in model.state_dict() if "lora" not in key]
    lora_plus.set_adapter(model, active)
    y, names = model(x), active_adapters(model)
    assert not torch.allclose(y, wanted)
    with lora_plus.disabled(model):
        base = model(x)
    with merged(model, adapters=["a"]):
        assert active_adapters(model) == names
        torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
        assert list(model.state_dict()) == plain
        with lora_plus.disabled(model):
            assert torch.equal(model(x), base)
        torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
        twin = copy.deepcopy(model)
        with merged(model, adapters=["a"]):
            pass
    assert torch.equal(model(x), y) and active_adapters(model) == names
    torch.testing.assert_close(twin(x), wanted, rtol=1e-12, atol=1e-12)
    unmerge_lora(twin)
    assert torch.equal(twin(x), y)
    unloaded = merge_and_unload(copy.deepcopy(model), adapters=["a"])
    torch.testing.assert_close(unloaded(x), wanted, rtol=1e-12, atol=1e-12)
    assert list(unloaded.state_dict()) == plain
    assert torch.equal(model(x), y)


def test_what_is_not_merged_is_locked_as_well() -> None:
    model = of_two_adapters()
    report = merge_lora(model, adapters=["a"])
    assert report.layers == ["both", "rows"]
    for call in (lambda: lora_plus.delete_adapter(model, "b"), lambda: lora_plus.set_adapter(model, "b"),
                 lambda: merge_and_unload(model), lambda: merge_lora(model, adapters=["b"])):  # fmt: skip
        with pytest.raises(ValueError, match="merged"):
            call()
    with pytest.raises(RuntimeError, match=r"layer 'cell\.lora_parameters.* is merged; call unmerge_lora"):
        model.load_state_dict(model.state_dict())
    lora_plus.rename_adapter(model, "b", "c")
    merge_and_unload(model, adapters=["a"])
    assert not [key for key in model.state_dict() if "lora" in key]


def test_of_a_quantized_layer_only_what_is_merged_becomes_dense() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    inject_lora(model, ["0"], r=2, adapter="a")
    randomise(inject_lora(model, ["0", "1"], r=2, adapter="b"))
    merge_and_unload(model, adapters=["a"], dequantize=True)
    assert type(model[0]) is nn.Linear and type(model[1]) is bitsandbytes.nn.Linear4bit


def in_place(parameters: list[nn.Parameter]) -> None:
    torch._foreach_add_([parameter.detach() for parameter in parameters], 0.1)


def by_vector(parameters: list[nn.Parameter]) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters) + 0.1, parameters)


@pytest.mark.parametrize("change", [in_place, by_vector])
def test_a_changed_adapter_is_found_before_its_old_update_is_kept(change: Callable[..., None]) -> None:
    model, x = net().double().eval(), torch.randn(2, 16, dtype=torch.float64)
    y = model(x)
    merge_lora(model)
    change([*parameters_of(model[0]), *parameters_of(model[2])])
    for call in (lambda: merge_and_unload(model), lambda: merged(model).__enter__()):
        with pytest.raises(ValueError, match="was changed while it was merged"):
            call()
    twins = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model)), "original": model}
    twins["moved"] = copy.deepcopy(model).float().double()
    for way, twin in twins.items():
        if way != "original" or change is in_place:
            for _ in range(2):
                with pytest.raises(ValueError, match="was changed while it was merged"):
                    twin(x)
        with pytest.raises(ValueError, match="was changed while it was merged"):
            merge_and_unload(twin)
        unmerge_lora(twin)
        assert not torch.allclose(twin(x), y)
        merge_and_unload(twin)


def test_leaving_merged_brings_a_changed_adapter_into_force() -> None:
    model, x = net().eval(), torch.randn(2, 16)
    with merged(model):
        for layer in (model[0], model[2]):
            layer.lora_B["default"].data.zero_()
    with lora_plus.disabled(model):
        base = model(x)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "moved", "float"])
def test_copies_of_a_merged_model_that_nothing_has_changed_stay_merged(way: str) -> None:
    model, x = net().double().eval(), torch.randn(2, 16, dtype=torch.float64)
    with torch.no_grad():
        model[0].lora_B["default"].mul_(2)  # so that the counters are not zero
    merge_lora(model)
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "deepcopy": copy.deepcopy, "pickle": lambda each: pickle.loads(pickle.dumps(each)),
        "moved": lambda each: each.share_memory(), "float": lambda each: each.float().double(),
    }  # fmt: skip
    wanted = model(x)
    twin = ways[way](model)
    torch.testing.assert_close(twin(x), wanted, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        twin[2].lora_A["default"].mul_(2)
    with pytest.raises(ValueError, match="was changed while it was merged"):
        twin(x)


def test_modules_trained_in_full_stay_trained_when_unloading() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    inject_lora(model, ["0"], r=2, train_also=["1"])
    randomise(model)
    nn.init.constant_(model[1].weight, 3.0)
    x = torch.randn(3, 4)
    y = model(x)
    plain = merge_and_unload(model)
    assert type(plain[0]) is nn.Linear and all(p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(plain(x), y)
    assert lora_plus.remove_lora(plain)[1].weight[0, 0] == 3.0


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_parametrized_weight_is_adapted_but_not_merged(wrap: object) -> None:
    model = nn.Sequential(wrap(nn.Linear(4, 4)))  # type: ignore[operator]
    x = torch.randn(3, 4)
    base = model(x)
    inject_lora(model, ["0"], r=2)
    assert torch.equal(model(x), base)
    randomise(model)
    y = model(x)
    assert not torch.allclose(y, base)
    with pytest.raises(ValueError, match="'0': its weight is computed by a parametrization"):
        merge_lora(model)
    assert torch.equal(model(x), y)


def test_garbage_is_not_collected_while_weights_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, on = net(), []
    compute = merge.merged_weight
    monkeypatch.setattr(merge, "merged_weight", lambda *args: (on.append(gc.isenabled()), compute(*args))[1])
    merge_lora(model)
    assert on == [False, False] and gc.isenabled()


def test_channels_last_weights_stay_channels_last() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    plain = merge_and_unload(randomise(inject_lora(conv, ["0"], r=2)))
    assert plain[0].weight.is_contiguous(memory_format=torch.channels_last)


# ---- in blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 10, 100, 10_000])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("o i -> o i", (5, 7)), ("n d -> d n", (7, 5)), ("o i h w -> o (i h w)", (6, 2, 3, 2)),
        ("i o k -> o (i k)", (2, 6, 3)), ("e o i -> e o i", (3, 4, 5)), ("e i o -> e o i", (3, 4, 5)),
    ],
)  # fmt: skip
def test_blocks_are_whole_rows_and_cover_a_weight_once(
    monkeypatch: pytest.MonkeyPatch, layout: str, shape: tuple[int, ...], elements: int
) -> None:
    monkeypatch.setattr(functional, "_LEAST_ROWS", 1)
    weight = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    matrix, covered = functional.to_matrix(weight, layout), torch.zeros_like(weight)
    for stored, rows in functional.blocks(layout, shape, elements):
        assert torch.equal(functional.to_matrix(weight[stored], layout), matrix[rows])
        assert weight[stored].numel() <= max(elements, matrix.shape[-1])
        covered[stored] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("case", [*CASES, *PARAMETER_CASES], ids=lambda case: case.name)
def test_merging_in_small_blocks_gives_the_same(monkeypatch: pytest.MonkeyPatch, case: Case | ParameterCase) -> None:
    whole, blocks = (case.adapted() for _ in range(2))
    whole_report = merge_lora(whole)
    monkeypatch.setattr(functional, "_LEAST_ROWS", 1)
    monkeypatch.setattr(functional, "block_elements", lambda device: 1)
    assert merge_lora(blocks).layers == whole_report.layers
    for name, value in blocks.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-13, atol=1e-13)


class Largest(TorchDispatchMode):
    """Notes the sizes of new tensors, in elements, and what is computed with tensors of the largest size."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.steps: list[tuple[int, str]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view:
            size = max((each.numel() for each in (*args, result) if isinstance(each, Tensor)), default=0)
            self.steps.append((size, function._schema.name.removeprefix("aten::")))
        if isinstance(result, Tensor) and not (function.is_view or function._schema.is_mutable or result.is_meta):
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_merge_needs_no_more_memory_than_the_new_weight_and_a_block(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, variant: str
) -> None:
    monkeypatch.setattr(functional, "block_elements", lambda device: 64 * 96)
    model = inject_lora(nn.Linear(96, 512).to(dtype), "all-linear", r=2, variant=variant)
    with Largest() as largest:
        merge_lora(model)
    assert sorted(largest.sizes)[-1] == 512 * 96  # the merged weight
    assert sorted(largest.sizes)[-2] == 64 * 96


@pytest.mark.parametrize(
    ("dtype", "passes"),
    [
        # what makes the weight, and whether it is finite
        (torch.float32, ["empty_like", "copy_", "addmm", "sum"]),
        # in float32 and rounded; what rounding lost
        (torch.bfloat16, ["empty_like", "empty", "copy_", "addmm", "copy_", "sub_", "linalg_vector_norm"]),
    ],
    ids=str,
)
def test_a_merge_passes_over_a_weight_as_rarely_as_can_be(dtype: torch.dtype, passes: list[str]) -> None:
    model = inject_lora(nn.Linear(96, 512, bias=False).to(dtype), "all-linear", r=2)
    with Largest() as largest:
        merge_lora(model)
    assert [name for size, name in largest.steps if size >= 512 * 96] == passes


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_what_rounding_lost_is_estimated_from_every_eighth_block(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "block_elements", lambda device: 64 * 96)
    model = nn.Sequential(nn.Linear(96, 64 * 64).bfloat16())
    randomise(inject_lora(model, "all-linear", r=2, variant=variant))
    base, exact = model[0].weight.detach().clone(), copy.deepcopy(model).float()
    merge_lora(exact)
    with Largest() as largest:
        report = merge_lora(model)
    assert [name for _, name in largest.steps].count("sub_") == 64 / 8
    error, update = (model[0].weight - exact[0].weight).norm(), (exact[0].weight - base).norm()
    assert report.lost["0"] == pytest.approx(float(error / update), rel=0.05)
    assert "(sampled)" in str(report)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_what_rounding_lost_is_measured_by_the_update_also_where_that_is_a_small_difference(init: str) -> None:
    model = inject_lora(nn.Linear(48, 64, bias=False, dtype=torch.bfloat16), "all-linear", r=4, init=init)
    base = model.weight.double()
    with torch.no_grad():
        model.lora_B["default"].add_(1e-4 * torch.randn(64, 4))
    update = explicit(model).weight - base
    lost = merge_lora(model).lost[""]
    off = (model.weight.double() - base - update).norm() / update.norm()
    assert lost == pytest.approx(off.item(), rel=1e-3)
