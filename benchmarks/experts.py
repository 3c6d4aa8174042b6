"""What do adapters of experts cost on a CPU, beside W + s B A as a matrix and beside PEFT's target_parameters?

The mixture models of transformers at small sizes, with adapters on both stacks of all experts. "Kept" is what the
forward keeps for backward beyond what it keeps of the frozen model, as a part of the experts' own size. A step is a
forward and a backward pass down to the embedded input. "Dense" is the same adapters where reading a weight makes the
sum. PEFT loads what lora_plus saved, and all compute the same, which is checked.

    python benchmarks/experts.py
    python benchmarks/experts.py --families Mixtral --ways eager --experts 16 --tokens 512
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import warnings
from typing import Any

import torch
from measuring import Call, Spread, count, interleaved
from memory import saved
from options import DTYPES, common_parser, parse
from report import Cell, Report
from torch import Tensor, nn

import lora_plus
from lora_plus.layers import LoRAParameter

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    "Qwen3Moe": {"head_dim": 32},
    "GptOss": {"head_dim": 32},
    "DeepseekV3": {
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 32, "q_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    },
}  # fmt: skip
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
WAYS = ("eager", "batched_mm", "grouped_mm")
"""The ways of transformers to compute experts."""


def made(family: str, way: str, width: int, options: argparse.Namespace) -> nn.Module:
    """A model of random weights, frozen."""
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), width),
        **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), options.experts),
        **FAMILIES[family],
    }
    config = getattr(transformers, f"{family}Config")
    names = set(config().to_dict()) | set(getattr(config, "attribute_map", {}))
    model = getattr(transformers, f"{family}ForCausalLM")(config(**{k: v for k, v in sizes.items() if k in names}))
    model.set_experts_implementation(way)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=width**-0.5)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


def contenders(base: nn.Module, r: int) -> dict[str, nn.Module]:
    """The models that are compared; they share the parameters of the base."""
    own = lora_plus.inject_lora(sharing(base), STACKS, r=r, alpha=2 * r)
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    dense = copy.deepcopy(own, shared(base))
    for module in dense.modules():
        if isinstance(module, LoRAParameter):
            module.__dict__["terms"] = lambda: None
    return {"frozen": base, "lora_plus": own, "dense": dense, "peft": of_peft(own, base)}


def of_peft(own: nn.Module, base: nn.Module) -> nn.Module:
    """PEFT's model of the same adapter."""
    import peft

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for what that deprecates
        lora_plus.save_adapter(own, folder)
        model: nn.Module = peft.PeftModel.from_pretrained(sharing(base), folder, is_trainable=True)  # type: ignore[arg-type]
    return model


def shared(base: nn.Module) -> dict[int, Any]:
    return {id(parameter): parameter for parameter in base.parameters()}


def sharing(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base, shared(base))


def compare(family: str, way: str, width: int, dtype: str, options: argparse.Namespace) -> list[list[Cell]]:
    """A row for each contender."""
    base = made(family, way, width, options).to(DTYPES[dtype])
    experts = sum(parameter.nbytes for parameter in base.parameters() if parameter.ndim == 3)
    models = contenders(base, options.r)
    x = torch.randn(1, options.tokens, width, dtype=DTYPES[dtype]).requires_grad_()
    outputs = {name: model(inputs_embeds=x).logits for name, model in models.items() if name != "frozen"}
    for other in outputs.values() if dtype == "float32" else ():
        torch.testing.assert_close(other, outputs["dense"], rtol=1e-3, atol=1e-3)

    def steps(model: nn.Module) -> tuple[Call, Call]:
        def forward() -> Tensor:
            return model(inputs_embeds=x).logits  # type: ignore[no-any-return]

        def step() -> None:
            forward().square().mean().backward()

        return forward, step

    runs = {name: steps(model) for name, model in models.items()}
    kept = {name: saved(forward, models[name]).median for name, (forward, _) in runs.items()}
    seconds = interleaved({name: step for name, (_, step) in runs.items()}, options)
    rows: list[list[Cell]] = []
    for name, spread in seconds.items():
        share: Spread = count((kept[name] - kept["frozen"]) / experts, "x")
        rows.append([name, spread, *(spread.over(seconds[other]) for other in ("frozen", "dense", "peft")), share])
    return rows


COLUMNS = ("adapters", "step", "step / frozen", "step / dense", "step / peft", "kept / experts")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager", "grouped_mm"])
    parser.add_argument(
        "--width", type=int, nargs="+", default=[64, 512], help="of the model, and inside of each expert"
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--r", type=int, default=8)
    options = parse(parser, width=[64], tokens=32, ways=["eager"])
    report = Report(__doc__, options)
    for family, way, width, dtype in itertools.product(options.families, options.ways, options.width, options.dtype):
        sizes = f"{options.layers} layers of {options.experts} experts of {width} x {width}"
        title = f"{family}, {way}, {dtype}: {sizes}, {options.tokens} tokens, r = {options.r}"
        report.table(title, COLUMNS, compare(family, way, width, dtype, options), drawn=COLUMNS[2:3])
    report.close()


if __name__ == "__main__":
    main()
