"""The laws of an adapted model on models of other packages, built from tiny configs with random weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_plus

try:
    import torchvision  # before transformers, which asks whether it is there
except ImportError:
    pass
except RuntimeError:
    # its kernels were built for another torch; their names are all that importing its models takes
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

pytestmark = [
    pytest.mark.peers,
    # said by nn.TransformerEncoder itself when it is given a padding mask
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

MODES = {"train": (True, True), "eval": (False, True), "eval without gradients": (False, False)}
"""For each: whether the model is in training mode, and whether gradients are recorded."""
EVAL_MODES = [mode for mode in MODES if mode != "train"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How far a merged model may be from the unmerged one, relative to the largest output."""


@dataclass(frozen=True)
class Model:
    """A model of another package in one setting."""

    name: str
    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: tuple[Any, ...] = ("all-linear",)
    unread: tuple[str, ...] = ()
    """Targets that the model never calls: it reads their weight, so that an adapter there has no effect."""
    same_kernels: bool = True
    """False where torch picks a kernel by what requires a gradient, or fuses layers that have no adapter."""

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same model at every call; dropout is 0 throughout."""
        torch.manual_seed(0)
        model = self.make().to(dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # a head of zeros would hide all that comes before it
                nn.init.normal_(parameter, std=0.1)
        if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # torch's grouped product knows no float64
        return model

    def adapted(self) -> nn.Module:
        return lora_plus.inject_lora(self.base(), self.targets, r=4)

    def live(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """With adapters that have moved, and none where it would have no effect."""
        targets = [target for target in self.targets if target not in self.unread]
        model = lora_plus.inject_lora(self.base(dtype), targets, r=4, exclude=self.unread)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in trained(model).values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.1 * noise).to(parameter.dtype))
        return model

    def output(self, model: nn.Module, mode: str) -> Tensor:
        training, gradients = MODES[mode]
        dtype = next(model.parameters()).dtype
        inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in self.inputs.items()}
        with torch.set_grad_enabled(gradients):
            y = model.train(training)(**inputs)
        return y if isinstance(y, Tensor) else y[0]

    def inert(self, names: list[str]) -> set[str]:
        return {name for name in names if name.endswith(self.unread)} if self.unread else set()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def types(model: nn.Module) -> dict[str, str]:
    """By name: a parametrized layer has a class of its own in every model."""
    return {name: str(type(module)) for name, module in model.named_modules()}


def adapted_layers(model: nn.Module) -> list[str]:
    return [row.name for row in lora_plus.lora_summary(model).rows]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ---- the models ------------------------------------------------------------------------------------------------------


def transformers(model: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model_class = getattr(pytest.importorskip("transformers"), model)
        return model_class(model_class.config_class(**config))

    return make


def torchvision(model: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("torchvision").models, model)(*args, **options)


def timm(model: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(model, num_classes=3, **options)


def resnet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


class PaddedEncoder(nn.Module):
    """Two post-norm layers; what torch leaves in the padded places is not part of the output."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)[~padding]


SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MOE = {**SIZES, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
IDS = torch.arange(14).reshape(2, 7) * 5 % 31 + 1
TEXT = {"input_ids": IDS}
GPT2 = transformers("GPT2LMHeadModel", vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0,
                    embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
T5 = transformers("T5ForConditionalGeneration", vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                  dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
MIXTRAL = transformers("MixtralForCausalLM", **MOE)
MAMBA = transformers("MambaForCausalLM", vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2,
                     time_step_rank=2, use_cache=False)  # fmt: skip
DEBERTA = transformers("DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["c2p", "p2c"],
                       position_buckets=4, norm_rel_ebd="layer_norm", pooler_dropout=0.0, **SIZES,
                       **NO_DROPOUT)  # fmt: skip
WHISPER = transformers("WhisperForConditionalGeneration", vocab_size=32, num_mel_bins=4, d_model=16, encoder_layers=2,
                       decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                       decoder_ffn_dim=24, max_source_positions=6, max_target_positions=8, pad_token_id=0,
                       bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.0)  # fmt: skip
WAV2VEC2 = transformers("Wav2Vec2ForCTC", conv_dim=(8, 8), conv_stride=(3, 2), conv_kernel=(4, 3),
                        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
                        apply_spec_augment=False, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0,
                        activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, **SIZES)  # fmt: skip
VIT = torchvision("VisionTransformer", image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24,
                  num_classes=3)  # fmt: skip
SWIN = torchvision("SwinTransformer", [2, 2], 16, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=3)
TIMM_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}

MODELS = [
    Model("llama", transformers("LlamaForCausalLM", num_key_value_heads=1, **SIZES), TEXT),
    Model("bert", transformers("BertForSequenceClassification", **SIZES, **NO_DROPOUT), TEXT),
    Model("gpt2", GPT2, TEXT),
    Model("t5", T5, {**TEXT, "decoder_input_ids": IDS[:, :4]}),
    Model("mixtral", MIXTRAL, TEXT),
    Model("mixtral-experts", MIXTRAL, TEXT,
          ("all-linear", "experts.gate_up_proj", "experts.down_proj", "gate.weight")),
    Model("gpt-oss-transposed-experts", transformers("GptOssForCausalLM", head_dim=8, **MOE), TEXT,
          ("all-linear", "experts.gate_up_proj", "experts.down_proj")),
    Model("mamba", MAMBA, TEXT, ("all-linear", "conv1d")),
    Model("mamba-weights", MAMBA, TEXT, ("in_proj", "x_proj", "out_proj", "dt_proj.weight")),
    Model("deberta", DEBERTA, TEXT, ("all-linear", "rel_embeddings"), unread=("rel_embeddings",)),
    Model("deberta-weights", DEBERTA, TEXT, ("all-linear", "rel_embeddings.weight")),
    Model("whisper", WHISPER, {"input_features": floats(2, 4, 12), "decoder_input_ids": IDS[:, :4]}),
    Model("wav2vec2", WAV2VEC2, {"input_values": floats(2, 60)}),
    Model("torchvision-resnet", resnet, {"x": floats(8, 3, 16, 16)}, ("all-linear", nn.Conv2d)),
    Model("torchvision-vit", VIT, {"x": floats(2, 3, 8, 8)}, same_kernels=False),
    Model("torchvision-swin", SWIN, {"x": floats(2, 3, 16, 16)}, unread=("attn.qkv", "attn.proj")),
    Model("torchvision-swin-weights", SWIN, {"x": floats(2, 3, 16, 16)}, ("mlp.*", "qkv.weight", "proj.weight")),
    Model("timm-vit", timm("vit_tiny_patch16_224", **TIMM_VIT), {"x": floats(2, 3, 8, 8)}),
    Model("timm-beit", timm("beit_base_patch16_224", **TIMM_VIT), {"x": floats(2, 3, 8, 8)}, unread=("attn.qkv",)),
    Model("timm-convnext", timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), conv_mlp=False,
                                ls_init_value=1.0), {"x": floats(2, 3, 32, 32)}),
    Model("transformer", lambda: nn.Transformer(16, 2, 2, 2, 24, dropout=0.0, batch_first=True),
          {"src": floats(2, 5, 16), "tgt": floats(2, 4, 16)}, same_kernels=False),
    Model("padded-encoder", PaddedEncoder,
          {"x": floats(2, 5, 16), "padding": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
          same_kernels=False),
]  # fmt: skip
PEFT_OPENS = [model for model in MODELS if model.name in ("llama", "bert", "gpt2")]


@pytest.fixture(params=MODELS, ids=lambda model: model.name)
def real(request: pytest.FixtureRequest) -> Model:
    return request.param


# ---- the laws --------------------------------------------------------------------------------------------------------


def test_injecting_leaves_the_output_as_it_was(real: Model) -> None:
    # frozen, as the base is after injecting: torch's attention adds in another order where a gradient is asked for
    base, model = real.base().requires_grad_(False), real.adapted()
    for mode in MODES:
        wanted, y = real.output(base, mode), real.output(model, mode)
        assert torch.equal(y, wanted) or (not real.same_kernels and distance(y, wanted) < 1e-5), mode


def test_training_reaches_every_adapter_and_nothing_else(real: Model) -> None:
    model = real.adapted()
    before = {name: tensor.clone() for name, tensor in real.base().state_dict().items()}
    target = floats(*real.output(model, "eval without gradients").shape)
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3)
    moved: set[str] = set()
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (real.output(model, "train") - target).square().mean()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in trained(model).items()}
        moved |= {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    still = {name.partition(".lora_")[0] for name in trained(model).keys() - moved}
    assert still == real.inert(adapted_layers(model))
    after = model.state_dict()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == [
        name for name in before if name.endswith(statistics)
    ]


def test_a_loaded_adapter_computes_the_same_bits(real: Model, tmp_path: Path) -> None:
    model = real.live()
    lora_plus.save_adapter(model, tmp_path / "adapter.safetensors")
    # trainable as the saved one: torch multiplies a transposed input in another order where a gradient is asked for
    loaded = lora_plus.load_adapter(real.base(), tmp_path / "adapter.safetensors", trainable=True)
    for mode in MODES:
        assert torch.equal(real.output(loaded, mode), real.output(model, mode)), mode


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merging_keeps_the_output_and_can_be_undone(real: Model, dtype: torch.dtype) -> None:
    model, base = real.live(dtype), real.base(dtype)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unmerged = {mode: real.output(model, mode) for mode in EVAL_MODES}
    for mode, y in unmerged.items():
        assert distance(y, real.output(base, mode)) > 1e-2, "the adapters do nothing"
        with lora_plus.merged(model):
            assert distance(real.output(model, mode), y) < TOLERANCE[dtype], mode
        assert torch.equal(real.output(model, mode), y), mode
    after = model.state_dict()
    assert list(after) == list(bits)
    assert all(torch.equal(after[name], tensor) for name, tensor in bits.items())
    plain = lora_plus.merge_and_unload(model)
    assert types(plain) == types(base)
    assert list(plain.state_dict()) == list(base.state_dict())
    for mode, y in unmerged.items():
        assert distance(real.output(plain, mode), y) < TOLERANCE[dtype], mode


@pytest.mark.parametrize("real", PEFT_OPENS, ids=lambda model: model.name)
def test_peft_opens_the_adapter_of_a_whole_model(real: Model, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = real.live()
    lora_plus.save_adapter(model, tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(real.base(), str(tmp_path))
    assert [str(warning.message) for warning in said if warning.category is not FutureWarning] == []
    for mode in EVAL_MODES:
        assert distance(real.output(theirs, mode), real.output(model, mode)) < 1e-5, mode


def test_the_check_names_just_the_adapters_without_effect(real: Model) -> None:
    model = real.adapted()
    names = adapted_layers(model)
    wanted = real.inert(names)
    if not wanted:
        lora_plus.check_adapters(model, **real.inputs)
        return
    with pytest.raises(ValueError) as error:
        lora_plus.check_adapters(model, **real.inputs)
    said = str(error.value)
    assert {name for name in names if re.search(rf"(?<![\w.]){re.escape(name)}(?!\.?\w)", said)} == wanted
