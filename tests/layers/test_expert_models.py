"""Mixture-of-experts models of transformers: adapted experts give what W + s B A gives, without that matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_plus
from lora_plus.layers import LoRAParameter
from lora_plus.model import dense_reads

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:Calling register_constant"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "DeepseekV3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 8,
        **LATENT,
    },
}  # fmt: skip
WAYS = ("eager", "batched_mm", "grouped_mm")
"""The ways of transformers to compute experts that a CPU can."""
IDS = torch.arange(14).reshape(2, 7) * 5 % 31 + 1

in_all_ways = pytest.mark.parametrize("way", WAYS)
of_all_families = pytest.mark.parametrize("family", FAMILIES)


def adapted(family: str, way: str, dtype: torch.dtype = torch.float64, r: int = 3, **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("this transformers has one way only")
    model.set_experts_implementation(way)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.2)
    lora_plus.inject_lora(model, ["experts.gate_up_proj", "experts.down_proj"], r=r)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(std=0.3)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def results(model: nn.Module) -> list[Tensor]:
    """The logits, and the gradients of all factors."""
    logits = model(IDS).logits
    return [logits, *torch.autograd.grad(logits.square().sum(), trained(model))]


@pytest.fixture
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped products by the operator that transformers has for what torch's own cannot: it knows float64."""
    moe = pytest.importorskip("transformers.integrations.moe")
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)


@of_all_families
@in_all_ways
def test_experts_compute_what_the_dense_weights_compute(
    any_dtype: None, family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(family, way)
    model.double()
    assert dense_reads(model, IDS) == {}
    output = results(model)
    monkeypatch.setattr(LoRAParameter, "terms", lambda self: None)
    wanted = results(model)
    assert len(wanted) == 1 + len(trained(model)) and all(each.any() for each in wanted)
    for one, other in zip(output, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * max(1.0, other.abs().max().item()))


@of_all_families
@in_all_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_with_torch_s_own_products(family: str, way: str, dtype: torch.dtype) -> None:
    model = adapted(family, way, dtype)
    assert dense_reads(model, IDS) == {}
    twin = copy.deepcopy(model).double()
    twin.set_experts_implementation("eager")
    output, wanted = results(model), results(twin)
    bound = 400 * torch.finfo(dtype).eps
    if dtype is torch.float32:  # where rounding decides which experts a token gets there is nothing to compare
        for one, other in zip(output, wanted, strict=True):
            assert (one.double() - other).abs().max() <= bound * other.abs().max()
    assert all(each.isfinite().all() for each in output)


KEPT = {"eager": 0.25, "batched_mm": 0.25, "grouped_mm": 0.25}
"""Bytes that are kept for backward besides those that the frozen model keeps, as a part of the experts' size."""


def kept_for_backward(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps, without parameters and without keeping anything twice."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


@of_all_families
@in_all_ways
def test_little_is_kept_for_backward(any_dtype: None, family: str, way: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    changes = {name: size for name, size in sizes.items() if name in {**SIZES, **FAMILIES[family]}}
    model = adapted(family, way, torch.float32, **changes)
    experts = sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim == 3 and not p.requires_grad)
    embedded = model.get_input_embeddings()(IDS[:, :2]).requires_grad_()
    run = lambda: model(inputs_embeds=embedded).logits  # noqa: E731
    with lora_plus.disabled(model):
        frozen = kept_for_backward(model, run)
    assert kept_for_backward(model, run) - frozen <= KEPT[way] * experts


@of_all_families
def test_experts_train_and_are_saved_merged_and_checked(family: str) -> None:
    model = adapted(family, "eager", torch.float32)
    before = model.eval()(IDS).logits
    assert len(lora_plus.check_adapters(model, IDS)) == len(trained(model)) / 2
    with lora_plus.merged(model), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    with lora_plus.disabled(model):
        assert not torch.equal(model(IDS).logits, before)
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.slow
@of_all_families
@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_compiled_experts_give_the_same(family: str, way: str) -> None:
    model = adapted(family, way, torch.float32).eval()
    wanted = results(model)
    torch._dynamo.reset()
    output = results(torch.compile(model, backend="aot_eager"))
    for one, other in zip(output, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
