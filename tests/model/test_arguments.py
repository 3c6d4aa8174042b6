"""Arguments that users mix up: the error is the library's own, names what was passed and what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import lora_plus as lp
from lora_plus.errors import _OTHER_WORDS
from lora_plus.surgery import extract_adapter, resize_adapter
from lora_plus.training import check_lr_ratio, reset_lora_parameters, watch_lr_ratio


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.parts = nn.ModuleDict({"one": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 2)


def adapted() -> nn.Module:
    return lp.inject_lora(Net(), ["body.0"], r=2)


def optimizer(made: Any = AdamW, **settings: Any) -> Any:
    return lp.create_loraplus_optimizer(adapted(), made, lr=1e-3, **settings)


MODULE, BY_NAME = "the model must be an nn.Module, got ", "write the others by name, such as "
CLASS = f"{MODULE}the class Net; make one"
PATTERN = "a pattern must be a name, a glob, a compiled regular expression, a module type or a function, got "
AN_OPTIMIZER = "optimizer_cls must be an optimizer's class, such as torch.optim.AdamW, got "
WHO = "unexpected keyword argument of "
MIXED_UP: dict[str, tuple[Callable[[], Any], str]] = {
    "a class": (lambda: lp.inject_lora(Net, ["body.0"]), CLASS),
    "a class to load into": (lambda: lp.load_adapter(Net, "a.safetensors"), CLASS),
    "a class to save": (lambda: lp.save_adapter(Net, "a.safetensors"), CLASS),
    "a class to merge": (lambda: lp.merge_lora(Net), CLASS),
    "a class to report on": (lambda: lp.lora_summary(Net), CLASS),
    "a class to train": (lambda: lp.create_loraplus_optimizer(Net, AdamW, lr=1e-3), CLASS),
    "parameters": (lambda: lp.loraplus_param_groups(Net().parameters(), lr=1e-3),
                   "the model must be an nn.Module, got a generator"),
    "a path to save": (lambda: lp.save_adapter("a.safetensors", adapted()), f"{MODULE}a str; it comes first"),
    "a path to load": (lambda: lp.load_adapter("a.safetensors", Net()), f"{MODULE}a str; it comes first"),
    "an optimizer for a model": (lambda: lp.create_loraplus_optimizer(AdamW, adapted(), lr=1e-3),
                                 f"{MODULE}the class AdamW; make one"),
    "a tensor to check": (lambda: lp.check_adapters(torch.ones(2, 4), adapted()), f"{MODULE}a Tensor"),
    "a model for an optimizer": (lambda: lp.check_optimizer(adapted(), AdamW(Net().parameters())),
                                 "the optimizer comes first, and then the model, got Net"),
    "no optimizer": (lambda: optimizer(nn.Linear), f"{AN_OPTIMIZER}{nn.Linear!r}"),
    "parameters besides": (lambda: optimizer(params=[]), f"{WHO}create_loraplus_optimizer and AdamW: 'params'"),
    "decay": (lambda: optimizer(wd=0.1),
              f"{WHO}create_loraplus_optimizer and AdamW: 'wd' (did you mean weight_decay?)"),
    "a rank without a name": (lambda: lp.inject_lora(Net(), ["head"], 8),
                              f"inject_lora takes model and targets, got 3 arguments; {BY_NAME}r="),
    "a rate without a name": (lambda: lp.loraplus_param_groups(adapted(), AdamW),
                              f"loraplus_param_groups takes model, got 2 arguments; {BY_NAME}lr="),
    "a name of an adapter": (lambda: lp.load_adapter(Net(), "a", adapter_name="b", is_trainable=True),
                             f"{WHO}load_adapter: 'adapter_name' (did you mean adapter?), "
                             "'is_trainable' (did you mean trainable?)"),
    "DoRA": (lambda: lp.inject_lora(Net(), ["head"], dora=True, bias="all"),
             f"{WHO}inject_lora: 'dora' (did you mean variant=\"dora\"?), "
             "'bias' (did you mean train_also=\"*.bias\"?)"),
    "a name for names": (lambda: lp.merge_lora(adapted(), adapters="default"),
                         "adapters must be a list of names, got 'default'; write ['default']"),
    "nothing to choose": (lambda: lp.set_adapter(adapted(), None),
                          "adapters must be a name, several, or a mapping from name to factor, got None"),
    "a factor for all": (lambda: lp.merge_checkpoint("a", "b", "c", weights=0.5),
                         "weights must be a list with a factor for each adapter, got 0.5"),
    "no name of an adapter": (lambda: lp.add_adapter(adapted(), None), "an adapter's name must be a str, got None"),
    "no new name": (lambda: lp.rename_adapter(adapted(), "default", None), "an adapter's name must be a str, got None"),
    "names of parameters": (lambda: optimizer(decayed=["q"]), "decayed must hold the parameters themselves, got 'q'"),
    "a model for a schedule": (lambda: check_lr_ratio(adapted()),
                               "the optimizer must be one of torch.optim's kind, got a Net"),
    "a model to watch": (lambda: watch_lr_ratio(adapted()),
                         "the optimizer must be one of torch.optim's kind, got a Net"),
    "a rank for settings": (lambda: lp.transfer_lr(1e-3, 8, 16),
                            "tuned must be the settings of a run, such as {'r': 8}, got 8"),
    "a rank of a new size": (lambda: resize_adapter(adapted(), rank=4),
                             f"{WHO}resize_adapter: 'rank' (did you mean r?)"),
    "PEFT's name to export": (lambda: lp.export_adapter(adapted(), "a", adapter_name="b"),
                              f"{WHO}export_adapter: 'adapter_name' (did you mean adapter?)"),
    "whether it is trained": (lambda: lp.set_adapter(adapted(), "default", True),
                              f"set_adapter takes model and adapters, got 3 arguments; {BY_NAME}trainable="),
    "an adapter to start anew": (lambda: reset_lora_parameters(adapted(), "default"),
                                 f"reset_lora_parameters takes model, got 2 arguments; {BY_NAME}adapter="),
    "a rank to extract": (lambda: extract_adapter(Net(), Net(), rank=2, targets=["head"]),
                          f"{WHO}extract_adapter: 'rank' (did you mean r?)"),
    "no samples": (lambda: lp.adapter_per_sample(adapted(), None).__enter__(),
                   "expected a list with the name of an adapter, or None, for each sample, got None"),
    "a module as target": (lambda: lp.inject_lora(Net(), [nn.Linear(4, 4)]), f"{PATTERN}a Linear; give its name"),
    "the module alone": (lambda: lp.inject_lora(Net(), nn.Linear(4, 4)), f"{PATTERN}a Linear; give its name"),
    "a list of modules": (lambda: lp.inject_lora(Net(), Net().body), f"{PATTERN}a Sequential; give its name"),
    "a dict of modules": (lambda: lp.inject_lora(Net(), Net().parts), f"{PATTERN}a ModuleDict; give its name"),
    "a module to train": (lambda: lp.inject_lora(Net(), ["body.0"], train_also=[Net().head]),
                          f"{PATTERN}a Linear; give its name"),
    "a name of an optimizer": (lambda: optimizer("adamw"), f"{AN_OPTIMIZER}'adamw'"),
    "an optimizer": (lambda: optimizer(AdamW(Net().parameters())), f"{AN_OPTIMIZER}an instance of AdamW"),
    "ratio": (lambda: optimizer(ratio=4),
              f"{WHO}create_loraplus_optimizer and AdamW: 'ratio' (did you mean lr_ratio?)"),
    "PEFT's ratio": (lambda: optimizer(SGD, loraplus_lr_ratio=4, momentum=0.9),
                     f"{WHO}create_loraplus_optimizer and SGD: 'loraplus_lr_ratio' (did you mean lr_ratio?)"),
    "the optimizer's word": (lambda: optimizer(partial(AdamW, eps=1e-6), beta=0.9),
                             f"{WHO}create_loraplus_optimizer and partial: 'beta' (did you mean 'betas'?)"),
    "ratio of groups": (lambda: lp.loraplus_param_groups(adapted(), lr=1e-3, ratio=4),
                        f"{WHO}loraplus_param_groups: 'ratio' (did you mean lr_ratio?)"),
    "PEFT's words": (lambda: lp.inject_lora(Net(), ["body.0"], lora_alpha=8, rank=2, use_dora=True),
                     f"{WHO}inject_lora: 'lora_alpha' (did you mean alpha?), 'rank' (did you mean r?), "
                     "'use_dora' (did you mean variant=\"dora\"?)"),
    "a slip": (lambda: lp.inject_lora(Net(), ["body.0"], train_all=["head"]),
               f"{WHO}inject_lora: 'train_all' (did you mean 'train_also' or 'train_rows'?)"),
    "no such word": (lambda: lp.inject_lora(Net(), ["body.0"], zzz=1), f"{WHO}inject_lora: 'zzz'"),
    "a word of the optimizer": (lambda: lp.inject_lora(Net(), ["body.0"], loraplus_lr_ratio=4),
                                f"{WHO}inject_lora: 'loraplus_lr_ratio'"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), MIXED_UP.values(), ids=MIXED_UP.keys())
def test_what_was_meant_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


def test_a_refused_call_changes_nothing() -> None:
    model, state = Net(), torch.get_rng_state()
    for settings in ({"targets": [model.head]}, {"targets": ["head"], "rank": 4}):
        with pytest.raises(TypeError):
            lp.inject_lora(model, **settings)
    assert type(model.head) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_every_word_of_others_has_one_here() -> None:
    functions = (lp.inject_lora, lp.loraplus_param_groups, lp.create_loraplus_optimizer, lp.load_adapter)
    known = {name: parameter for each in functions for name, parameter in inspect.signature(each).parameters.items()}
    assert {word.partition("=")[0] for word in _OTHER_WORDS.values()} <= known.keys()
    assert not _OTHER_WORDS.keys() & known.keys()


@pytest.mark.parametrize("change", [lp.set_adapter, lp.delete_adapter])
def test_a_list_is_no_name_of_an_adapter(change: Callable[..., None]) -> None:
    given = [["default"]] if change is lp.set_adapter else ["default"]
    with pytest.raises(KeyError, match=r"the model has no adapter \['default'\]: it has 'default'"):
        change(adapted(), given)


def test_optimizers_that_take_anything_get_it() -> None:
    given: dict[str, Any] = {}

    def make(groups: Any, **settings: Any) -> Any:
        given.update(settings)
        return SGD(groups, settings["lr"])

    optimizer(make, ratio=4)
    assert given == {"lr": 1e-3, "ratio": 4}
    assert isinstance(optimizer(partial(SGD, momentum=0.9), nesterov=True), SGD)


def test_an_optimizer_whose_annotations_name_what_is_not_there_is_made() -> None:
    class Told(type):
        @property
        def __signature__(cls) -> inspect.Signature:  # as Python 3.14 evaluates them when it is asked
            raise NameError("name 'Closure' is not defined")

    class Own(AdamW, metaclass=Told):
        pass

    assert type(optimizer(Own)) is Own
