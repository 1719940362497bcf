"""Models that keep a value in hooks, in closures and in forwards of one instance."""

from __future__ import annotations

import functools
import types
from typing import Any

from stashes import Base, style
from torch import Tensor, nn


class HookObject:
    """As fastai's: its bound method is the hook, the value lies in ``stored``; removes itself at its end."""

    def __init__(self, module: nn.Module) -> None:
        self.stored: Any = None
        self.removed = False
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.stored = output

    def remove(self) -> None:
        if not self.removed:
            self.hook.remove()
            self.removed = True

    def __del__(self) -> None:
        self.remove()


@style
class HookObjectOfFastai(Base):
    def __init__(self) -> None:
        super().__init__()
        self.hooks = [HookObject(self.conv)]

    def take(self) -> Tensor:
        return self.hooks[0].stored  # type: ignore[no-any-return]


@style
class PartialOfBoundMethod(Base):
    """As timm's FeatureHooks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}
        self.conv.register_forward_hook(functools.partial(self.collect, "conv"))

    def collect(self, name: str, *args: Any) -> None:
        self.found[name] = args[-1]

    def take(self) -> Tensor:
        return self.found["conv"]


class Reading(Base):
    """``self.read`` gives the value."""

    read: Any

    def take(self) -> Tensor:
        return self.read()  # type: ignore[no-any-return]


@style
def closure() -> nn.Module:
    model, found = Reading(), {}

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        found["conv"] = output

    model.conv.register_forward_hook(hook, always_call=True)
    model.read = lambda: found["conv"]
    return model


@style
def nonlocal_variable() -> nn.Module:
    model, last = Reading(), None

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        nonlocal last
        last = output

    def read() -> Any:
        return last

    model.conv.register_forward_hook(hook, with_kwargs=True)
    model.read = read
    return model


@style
def default_argument() -> nn.Module:
    model = Reading()

    def hook(module: nn.Module, args: Any, output: Tensor, found: list[Tensor] = []) -> None:  # noqa: B006
        found[:] = [output]

    model.conv.register_forward_hook(hook)
    model.read = lambda found=hook.__defaults__[0]: found[0]  # type: ignore[index,misc]
    return model


def of_the_module(module: nn.Module, args: Any, output: Tensor, *, found: dict[str, Tensor] = {}) -> None:  # noqa: B006
    """A hook at the top of a file, with a default that it writes to."""
    found["conv"] = output


@style
def keyword_default() -> nn.Module:
    model = Reading()
    model.conv.register_forward_hook(of_the_module)
    model.read = lambda *, found=of_the_module.__kwdefaults__["found"]: found["conv"]
    return model


@style
def attribute_of_the_function() -> nn.Module:
    model = Reading()

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        hook.last = output  # type: ignore[attr-defined]

    model.conv.register_forward_hook(hook)
    model.read = lambda: hook.last  # type: ignore[attr-defined]
    return model


@style
def hook_that_knows_the_model() -> nn.Module:
    model = Reading()

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        model.conv.kept = output

    model.conv.register_forward_hook(hook)
    model.read = lambda: model.conv.kept
    return model


class TwoForwards(Base):
    def put(self, value: Tensor) -> None:
        self.skip = value

    def take(self) -> Tensor:
        return self.skip

    def doubled(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return factor * super().forward(x)


@style
def forward_of_the_instance() -> nn.Module:
    model = TwoForwards()
    model.forward = model.doubled  # type: ignore[method-assign]
    return model


@style
def forward_by_partial() -> nn.Module:
    model = TwoForwards()
    model.forward = functools.partial(model.doubled, factor=3.0)  # type: ignore[method-assign]
    return model


@style
def forward_wrapped() -> nn.Module:
    model = TwoForwards()
    old = model.forward
    model.forward = functools.wraps(old)(lambda x: old(x) * 1)  # type: ignore[method-assign]
    outer = model.forward
    model.forward = lambda x: outer(x) * 2  # type: ignore[method-assign]
    return model


@style
def forward_by_method_type() -> nn.Module:
    model, seen = TwoForwards(), []

    def forward(self: TwoForwards, x: Tensor) -> Tensor:
        seen.append(x)
        out = TwoForwards.doubled(self, x)
        return out + seen.pop(0).mean()

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    return model


@style
def forward_of_a_submodule() -> nn.Module:
    """As accelerate and quantization tools do it: the patched module is an argument of a partial."""
    model = Base()

    def new_forward(module: Any, *args: Any) -> Tensor:
        module.skip = module.old_forward(*args)
        return module.skip  # type: ignore[no-any-return]

    model.conv.old_forward = model.conv.forward  # type: ignore[assignment]
    model.conv.forward = functools.update_wrapper(  # type: ignore[method-assign]
        functools.partial(new_forward, model.conv), model.conv.old_forward
    )
    model.take = lambda: model.conv.skip  # type: ignore[method-assign,assignment,return-value]
    return model
