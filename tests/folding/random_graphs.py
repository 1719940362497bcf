"""Random small models from a seed, written as Python that a person can read, run and shorten.

Each statement is run as it is drawn, and kept if PyTorch takes it: so no rules about shapes are needed here, and a
program that is printed is one that runs. ``python tests/folding/random_graphs.py 17`` prints the program of seed 17.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a per-channel map may or may not get through; each where its shapes allow it. {v} is a value, {C} its channels,
# {h} about half of them, {a} and {b} two axes, {s} some other shape of the same size.
CARRIERS = """
{v}.flatten(1) | {v}.flatten(2) | {v}.flatten(0, 1) | {v}.flatten(-2) | {v}.reshape({s}) | {v}.reshape({s})
{v}.transpose({a}, {b}) | {v}.transpose(1, -1) | {v}.permute({p}) | {v}.movedim({a}, {b}) | {v}.unsqueeze({a})
{v}.squeeze() | {v}.unflatten(1, ({h}, -1)) | {v}.unflatten(0, (-1, 2)) | {v}.contiguous() | {v}.clone()
{v}.detach() | {v}.expand_as({v}) | {v}[:, :{h}] | {v}[:, {h}:] | {v}[:, ::2] | {v}[:, -1:] | {v}[..., 1:]
{v}[..., ::2] | {v}[-1:] | {v}[:, 0] | {v}.narrow(1, 0, {h}) | {v}.chunk(2, 1)[1] | {v}.split({h}, 1)[0]
{v}.unbind(1)[-1] | {v}.select(-1, 0) | {v}.flip({a}) | {v}.roll(1, {a}) | {v}.expand(2, *{v}.shape).flatten(0, 1)
{v}.repeat(1, 2, *[1] * ({v}.dim() - 2)) | {v}.repeat_interleave(2, 1) | torch.cat([{v}, {v}], 1)
torch.cat([{v}, {v}], {a}) | torch.stack([{v}, {v}], {a}) | {v}.view({v}.shape) | {v}.reshape_as({v})
F.dropout({v}, 0.3, self.training) | F.dropout({v}, 0.3, self.training) | {v}.mean(({a}, -1))
{v}.mean(-1, keepdim=True) | F.avg_pool2d({v}, 2) | F.avg_pool2d({v}, 2, ceil_mode=True)
F.avg_pool2d({v}, 3, 1, 1) | F.avg_pool1d({v}, 2) | F.avg_pool2d({v}, 3, 1, 1, count_include_pad=False)
F.avg_pool2d({v}, 2, divisor_override=3) | F.avg_pool3d({v}, 2) | F.adaptive_avg_pool2d({v}, 1)
F.adaptive_avg_pool2d({v}, 1).flatten(1) | F.adaptive_avg_pool2d({v}, (2, 3)) | F.adaptive_avg_pool1d({v}, 2)
F.pad({v}, (1, 1)) | F.pad({v}, (1, 0), value=0.5) | F.pad({v}, (1, 1), mode="reflect")
F.pad({v}, (0, 1), mode="replicate") | F.pad({v}, (1, 1), mode="circular") | F.pad({v}, (-1, 0))
F.interpolate({v}, scale_factor=2) | F.pixel_shuffle({v}, 2)
F.interpolate({v}, scale_factor=1.5, mode="bilinear") | F.pixel_unshuffle({v}, 2) | F.channel_shuffle({v}, 2)
{v}[:, torch.arange({C})] | {v}.float() | {v}.double().float() | {v}.swapaxes(1, 2).contiguous()
{v}.unfold(-1, 2, 1) | {v}.t() | {v}.mT
"""

# What it never gets through, or only in part.
BARRIERS = """
F.relu({v}) | F.relu({v}) | {v}.sigmoid() | F.gelu({v}) | F.leaky_relu({v}, 0.2) | F.hardtanh({v})
{v}.softmax({a}) | {v}.abs() | {v} * 2 | {v} + 1 | 1 - {v} | -{v} | {v} / {v}.shape[1] | {v} * {v}
{v} * torch.ones_like({v}) | torch.zeros_like({v}) + 0.5 | F.max_pool2d({v}, 2) | F.max_pool1d({v}, 2)
{v}.amax({a}) | {v}.sum(-1) | {v}.cumsum(1) | F.layer_norm({v}, {v}.shape[-1:]) | F.max_pool2d({v}, 3, 1, 1)
{v}.clamp(-1, 1) | F.normalize({v}, dim=1) | {v} - {v}.mean(1, keepdim=True) | {v}.masked_fill({v} > 9, 0)
F.scaled_dot_product_attention({v}, {v}, {v}) | {v} @ {v}.mT.softmax(-1) | F.group_norm({v}, 1)
"""

PAIRS = """
{v} + {w} | {v} + {w} | {v} + {w} | {v} - {w} | {v} * {w} | {v} + 0.5 * {w} | torch.add({v}, {w}, alpha=2)
torch.maximum({v}, {w}) | torch.cat([{v}, {w}], 1) | torch.cat([{v}, {w}], 1) | torch.cat([{w}, {v}, {w}], 1)
torch.cat([{v}, {w}], {a}) | torch.cat([{v}, {w}], -1) | torch.stack([{v}, {w}], 1) | {v}.reshape({w}.shape)
{v}.expand_as({w}) | {v} @ {w}.mT | {w}.softmax(-1) @ {v} | {v} * {w}.mean()
F.scaled_dot_product_attention({w}, {w}, {v}) | torch.where({w} > 0, {v}, {v}) | {v} * {w}.sigmoid()
"""

# Statements that change a value, or leave one behind.
EFFECTS = """
{v}.relu_() | {v}.add_(1) | {v}.mul_(2) | {v}[:, :{h}].relu_() | {v}[:, {h}:].mul_(0.5)
{v}.transpose(0, 1)[0].add_(1) | {v} += {w} | {v} += 1 | {v}[:, 0] = 0.5 | {v}.chunk(2, 1)[0].mul_(2)
{v}.flatten(1)[:, ::2].neg_() | F.relu({v}, inplace=True) | {v}.copy_({w}) | self.kept{n} = {v}
self.kept{n} = [{v}] | self.kept{n} = {v}[:, :1] | self.kept{n} = {v}.detach() | self.kept{n} = {v}.mean()
self.kept{n} = {v}.flatten(1) | self.kept{n} = {{"v": {v}}}
"""

MODULES = """
nn.Dropout(0.2) | nn.Dropout(0.2) | nn.Identity() | nn.Flatten() | nn.ReLU() | nn.ReLU(inplace=True)
nn.SiLU(inplace=True) | nn.Dropout2d(0.2) | nn.AvgPool2d(2) | nn.AdaptiveAvgPool2d(1) | nn.AvgPool2d(3, 2, 1)
nn.MaxPool2d(2) | nn.Upsample(scale_factor=2) | nn.Softmax(1) | nn.ReflectionPad2d(1) | nn.ZeroPad2d(1)
nn.PReLU() | nn.AlphaDropout(0.2) | nn.Flatten(0, 1) | nn.Unflatten(1, (-1, 2))
"""

NORM_OF_TOKENS = """
self.{n}({y}.flatten(0, 1)).reshape_as({y}) | self.{n}({y}.transpose(1, 2)).transpose(1, 2)
self.{n}({y}.mT).permute(0, 2, 1) | self.{n}({y}.reshape(-1, {w})).view({y}.shape)
"""

HOOKS = ("lambda m, i, o: o * 2", "lambda m, i, o: None", "lambda m, i, o: o.relu()")
LARGEST, MOST = 2048, 100.0
"""Elements of a value, and how far from 0 they may go: beyond that a statement is not kept."""


def _options(table: str) -> list[str]:
    return [option.strip() for line in table.strip().splitlines() for option in line.split(" | ")]


_CARRIERS, _BARRIERS, _PAIRS, _EFFECTS, _MODULES = map(_options, (CARRIERS, BARRIERS, PAIRS, EFFECTS, MODULES))


@dataclass(frozen=True)
class Program:
    """A model as source: lines of ``__init__`` and ``forward``, what it returns, and the shape of its input."""

    seed: int
    shape: tuple[int, ...]
    init: tuple[str, ...]
    body: tuple[str, ...]
    returns: str

    def source(self) -> str:
        """The class, ready to be pasted."""
        lines = [f"# seed {self.seed}, called with torch.randn{self.shape}", "class Net(nn.Module):"]
        lines += ["    def __init__(self):", "        super().__init__()", *(f"        {line}" for line in self.init)]
        lines += ["", "    def forward(self, x):", *(f"        {line}" for line in self.body)]
        return "\n".join([*lines, f"        return {self.returns}", ""])

    def build(self) -> nn.Module:
        """The model in eval mode, every weight and statistic drawn from the seed: twice the same."""
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor}
        exec(compile(self.source(), f"<seed {self.seed}>", "exec"), scope)
        torch.manual_seed(self.seed)
        model: nn.Module = scope["Net"]()
        worn(model, self.seed)
        return model.eval()

    def example(self, number: int = 0, batch: int | None = None) -> Tensor:
        """An input; others for other numbers."""
        generator = torch.Generator().manual_seed(7919 * self.seed + number)
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return torch.randn(shape, generator=generator)

    @property
    def kept(self) -> list[str]:
        """Attributes that the forward writes, for whoever reads them afterwards."""
        return sorted({m for line in self.body for m in re.findall(r"self\.(kept\d+) =", line)})


def worn(model: nn.Module, seed: int) -> None:
    """Statistics and affine weights that mean something: also γ zero and negative, variance zero where eps allows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
                continue
            mean.copy_(draw(mean) * 0.5)
            var.copy_(torch.exp(draw(var) * 0.7))
            if getattr(module, "eps", 0.0) > 1e-2:
                var[draw(var) > 1.5] = 0.0
            if isinstance(getattr(module, "weight", None), Tensor):
                gamma = 1 + draw(mean) * 0.4
                kind = draw(mean)
                module.weight.copy_(torch.where(kind > 1, -gamma, torch.where(kind < -1.6, gamma * 0, gamma)))  # type: ignore[operator]
                module.bias.copy_(draw(mean) * 0.5)  # type: ignore[operator]


@dataclass
class _Writer:
    """Draws statements and keeps those that run."""

    seed: int
    rng: random.Random
    live: nn.Module = field(default_factory=nn.Module)
    scope: dict[str, Any] = field(default_factory=dict)
    values: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    count: int = 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def of(self, value: str) -> Tensor:
        found: Tensor = self.scope[value]
        return found

    def pick(self) -> str:
        """A value, mostly a late one."""
        return self.values[-1] if self.rng.random() < 0.65 else self.rng.choice(self.values)

    def keep(self, line: str, *init: str) -> bool:
        """Run a statement, and take it into the program if it runs and leaves values that are fit to go on with."""
        state = torch.get_rng_state()
        before = {v: self.of(v).clone() for v in self.values}
        try:
            for one in init:
                exec(one, self.scope)
            self.live.eval()
            worn(self.live, self.count)
            with torch.no_grad():
                exec(line, self.scope)
            good = all(self._fit(v) for v in (*self.values, *self._made(line)))
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):  # not for these shapes
            good = False
        torch.set_rng_state(state)
        if not good:
            for value, was in before.items():
                if not torch.equal(self.of(value), was):
                    self.scope[value] = was
            return False
        self.init += init
        self.body.append(line)
        self.values += self._made(line)
        return True

    def _made(self, line: str) -> list[str]:
        found = re.match(r"((?:v\d+(?:, )?)+) = ", line)
        return found[1].split(", ") if found else []

    def _fit(self, name: str) -> bool:
        value = self.of(name)
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or not 2 <= value.dim() <= 5:
            return False
        return 0 < value.numel() <= LARGEST and bool(value.isfinite().all()) and value.abs().max().item() < MOST

    def take(self, expression: str, *init: str) -> str | None:
        """``expression`` as a new value."""
        made = self.name("v")
        return made if self.keep(f"{made} = {expression}", *init) else None

    # ---------------------------------------------------------------------------------- one by one

    def fill(self, template: str, v: str, w: str) -> str:
        t, rng = self.of(v), self.rng
        channels = t.shape[1]
        axes = rng.sample(range(t.dim()), 2)
        order = (
            [0, *rng.sample(range(1, t.dim()), t.dim() - 1)]
            if rng.random() < 0.8
            else rng.sample(range(t.dim()), t.dim())
        )
        return template.format(
            v=v, w=w, C=channels, h=max(1, channels // 2), a=axes[0], b=axes[1], p=", ".join(map(str, order)),
            s=self._reshaped(t), n=self.count,
        )  # fmt: skip

    def _reshaped(self, t: Tensor) -> str:
        """Neighbouring axes joined or split at random; mostly the batch stays."""
        rng, sizes = self.rng, list(t.shape)
        at = rng.randrange(0 if rng.random() < 0.25 else 1, len(sizes))
        divisors = [d for d in range(2, sizes[at]) if sizes[at] % d == 0]
        if divisors and rng.random() < 0.6:
            d = rng.choice(divisors)
            sizes[at : at + 1] = [d, sizes[at] // d]
        elif at + 1 < len(sizes):
            sizes[at : at + 2] = [sizes[at] * sizes[at + 1]]
        if rng.random() < 0.5:
            sizes[rng.randrange(len(sizes))] = -1
        return ", ".join(map(str, sizes))

    def step(self, table: list[str], v: str | None = None) -> str | None:
        """One expression of a table; a few tries."""
        for _ in range(4):
            one = v or self.pick()
            made = self.take(self.fill(self.rng.choice(table), one, self.rng.choice(self.values)))
            if made:
                return made
        return None

    def module(self, v: str) -> str | None:
        name, cls = self.name("part"), self.rng.choice(_MODULES)
        init = [f"self.{name} = {cls}"]
        if self.rng.random() < 0.06:
            init.append(f"self.{name}.register_forward_hook({self.rng.choice(HOOKS)})")
        return self.take(f"self.{name}({v})", *init)

    def layer(self, v: str, outputs: int | None = None, *, same: bool = False) -> str | None:
        """A layer with weights on ``v``: convolution, transposed convolution, linear, functional, shared or tied."""
        rng, t = self.rng, self.of(v)
        if self.layers and rng.random() < 0.08:
            return self.take(f"self.{rng.choice(self.layers)}({v})")
        rank, inputs = t.dim() - 2, t.shape[1]
        bias = rng.random() < 0.6
        if rank == 0 or rng.random() < 0.2:
            return self._linear(v, outputs, bias)
        groups = rng.choice([g for g in (1, 1, 1, 2, inputs) if inputs % g == 0])
        out = outputs or groups * rng.choice([1, 2, 3])
        kernel = 1 if rng.random() < 0.35 else 3 if same else rng.choice([1, 2, 3])
        options = {"groups": groups, "bias": bias}
        if same or rng.random() < 0.5:
            options["padding"] = kernel // 2
        name = self.name("conv")
        if not same and rng.random() < 0.15:
            stride = rng.choice([1, 2])
            options |= {"stride": stride, "output_padding": rng.choice([0, stride - 1])}
            cls = f"ConvTranspose{rank}d"
        else:
            cls = f"Conv{rank}d"
            if rng.random() < 0.4:
                options["padding_mode"] = rng.choice(["reflect", "replicate", "circular"])  # type: ignore[assignment]
            if not same and rng.random() < 0.2:
                options[rng.choice(["stride", "dilation"])] = 2
            if rng.random() < 0.08:
                options["padding"] = "same"  # type: ignore[assignment]
        if cls == "Conv2d" and rng.random() < 0.1:
            return self._functional(v, out, inputs, kernel, bias)
        made = [
            f"self.{name} = nn.{cls}({inputs}, {out}, {kernel}, {', '.join(f'{k}={x!r}' for k, x in options.items())})"
        ]
        if self.layers and rng.random() < 0.07:
            made.append(f"self.{name}.weight = self.{rng.choice(self.layers)}.weight")
        elif rng.random() < 0.03:
            made.append(f"self.{name}.register_forward_hook({rng.choice(HOOKS)})")
        elif rng.random() < 0.03:
            made.append(f"nn.utils.parametrizations.weight_norm(self.{name})")
        result = self.take(f"self.{name}({v})", *made)
        if result:
            self.layers.append(name)
        return result

    def _linear(self, v: str, outputs: int | None, bias: bool) -> str | None:
        name, inputs = self.name("lin"), self.of(v).shape[-1]
        made = self.take(
            f"self.{name}({v})",
            f"self.{name} = nn.Linear({inputs}, {outputs or self.rng.choice([2, 3, 4, 6])}, bias={bias})",
        )
        if made:
            self.layers.append(name)
        return made

    def _functional(self, v: str, out: int, inputs: int, kernel: int, bias: bool) -> str | None:
        w, b = self.name("w"), self.name("b")
        init = [f"self.{w} = nn.Parameter(torch.randn({out}, {inputs}, {kernel}, {kernel}) * 0.3)"]
        init.append(f"self.{b} = nn.Parameter(torch.randn({out}))" if bias else f"self.{b} = None")
        return self.take(f"F.conv2d({v}, self.{w}, self.{b}, padding={kernel // 2})", *init)

    def norm(self, v: str) -> str | None:
        """A norm on axis 1, now and then one that was there before, or a functional one."""
        rng, t = self.rng, self.of(v)
        if self.norms and rng.random() < 0.1:
            return self.take(f"self.{rng.choice(self.norms)}({v})")
        channels = t.shape[1]
        if rng.random() < 0.04:
            mean, var = self.name("mean"), self.name("var")
            init = [f'self.register_buffer("{mean}", torch.randn({channels}) * 0.5)']
            init.append(f'self.register_buffer("{var}", torch.rand({channels}) + 0.5)')
            return self.take(f"F.batch_norm({v}, self.{mean}, self.{var})", *init)
        options = ""
        if rng.random() < 0.3:
            options = rng.choice(
                [
                    ", affine=False",
                    ", eps=0.1",
                    ", eps=0.1",
                    ", eps=1e-3",
                    ", eps=1e-3",
                    ", affine=False",
                    ", track_running_stats=False",
                ]
            )
        kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[t.dim()]
        if rng.random() < 0.04 and t.dim() > 2:
            kind, options = kind.replace("Batch", "Instance"), ", affine=True, track_running_stats=True"
        name = self.name("bn")
        init = [f"self.{name} = nn.{kind}({channels}{options})"]
        if rng.random() < 0.03:
            init.append(f"self.{name}.register_forward_hook({rng.choice(HOOKS)})")
        made = self.take(f"self.{name}({v})", *init)
        if made:
            self.norms.append(name)
        return made

    def carried(self, v: str | None, most: int = 2) -> str | None:
        """``v`` through a few operations."""
        for _ in range(self.rng.choice([0, 0, 1, 1, most])):
            if v is None:
                return None
            v = (self.module(v) if self.rng.random() < 0.25 else self.step(_CARRIERS, v)) or v
        return v

    # ------------------------------------------------------------------------------- several at once

    def backward(self) -> None:
        """Layer, something between, norm."""
        v = self.carried(self.layer(self.pick()))
        v = v and self.norm(v)
        if v and self.rng.random() < 0.5:
            self.step(_BARRIERS, v)

    def forward(self) -> None:
        """Something no norm gets through, norm, something between, layer."""
        v = self.step(_BARRIERS) if self.rng.random() < 0.7 else self.pick()
        v = self.carried(v and self.norm(v))
        if v:
            self.layer(v)

    def branches(self) -> None:
        """Two layers on one value, or a layer and the value itself, joined and normalised."""
        v, rng = self.pick(), self.rng
        channels = self.of(v).shape[1]
        one = self.layer(v, channels, same=True)
        two = self.layer(v, channels, same=True) if rng.random() < 0.7 else v
        if not one or not two:
            return
        if rng.random() < 0.3:
            one = self.norm(one) or one
        joined = self.take(self.fill(rng.choice(_PAIRS[:11]), one, two))
        joined = self.carried(joined, 1)
        if joined and rng.random() < 0.8:
            self.norm(joined)

    def parts(self) -> None:
        """A layer's output in two parts: one or both normalised, and joined again."""
        rng, v = self.rng, self.layer(self.pick(), rng_even(self.rng))
        if not v or self.of(v).shape[1] < 2:
            return
        a, b = self.name("v"), self.name("v")
        size = max(1, self.of(v).shape[1] // 2)
        how = rng.choice([f"{v}.chunk(2, 1)", f"torch.split({v}, {size}, 1)", f"({v}[:, :{size}], {v}[:, {size}:])"])
        if not self.keep(f"{a}, {b} = {how}"):
            return
        left, right = self.norm(a) or a, (self.norm(b) if rng.random() < 0.5 else None) or b
        if rng.random() < 0.3:
            left = self.step(_BARRIERS, left) or left
        joined = self.take(
            rng.choice([f"torch.cat([{left}, {right}], 1)", f"{left} + {right}", f"torch.cat([{right}, {left}], 1)"])
        )
        if joined and rng.random() < 0.4:
            self.norm(joined)

    def tokens(self) -> None:
        """Linear on (N, L, C), normalised over C by way of flatten or transpose, perhaps attention over L."""
        rng, v = self.rng, self.pick()
        if self.of(v).dim() != 3:
            made = self.take(f"{v}.flatten(2)" + rng.choice(["", ".transpose(1, 2)"]))
            if not made:
                return
            v = made
        width = rng.choice([4, 4, 6])
        y = self._linear(v, width, rng.random() < 0.5)
        if not y:
            return
        name = self.name("bn")
        way = rng.choice(_options(NORM_OF_TOKENS))
        z = self.take(way.format(n=name, y=y, w=width), f"self.{name} = nn.BatchNorm1d({width})")
        if not z:
            return
        self.norms.append(name)
        if rng.random() < 0.6:
            q = self._linear(v, width, True)
            heads = f"{z}.unflatten(-1, (2, -1)).transpose(1, 2)"
            way = rng.choice(["({q} @ {q}.mT).softmax(-1) @ {z}", "F.scaled_dot_product_attention({q}, {q}, {z})",
                              "(({q} @ {q}.mT).softmax(-1)[:, None] @ {h}).transpose(1, 2).flatten(2)"])  # fmt: skip
            z = q and self.take(way.format(q=q, z=z, h=heads))
            if z:
                self._linear(z, rng.choice([2, 4]), True)

    def again(self) -> None:
        """A layer and a norm that were there before, in a row, on another value."""
        if self.layers and self.norms:
            self.take(f"self.{self.rng.choice(self.norms)}(self.{self.rng.choice(self.layers)}({self.pick()}))")

    def effect(self) -> None:
        """Change a value in place, or keep it."""
        v = self.pick()
        self.keep(self.fill(self.rng.choice(_EFFECTS), v, self.rng.choice(self.values)))
        self.count += 1

    def written(self, steps: int) -> Program:
        rng = self.rng
        shape = rng.choice(
            [
                (2, 3, 5, 5),
                (2, 4, 4, 4),
                (2, 4, 6, 6),
                (2, 4, 6),
                (2, 6, 6),
                (2, 4, 4),
                (3, 4),
                (2, 6),
                (1, 2, 3, 4, 3),
                (2, 4, 5, 4),
            ]
        )
        self.scope |= {"torch": torch, "nn": nn, "F": F, "self": self.live, "v0": torch.randn(shape)}
        self.values, self.body = ["v0"], ["v0 = x"]
        moves: dict[Callable[[], object], int] = {
            self.backward: 6,
            self.forward: 5,
            self.branches: 3,
            self.parts: 2,
            self.tokens: 1,
            self.again: 1,
            self.effect: 2,
            lambda: self.step(_BARRIERS): 1,
            lambda: self.step(_PAIRS): 1,
            lambda: self.module(self.pick()): 1,
        }
        for _ in range(40):
            if len(self.body) > steps and self.norms:
                break
            rng.choices(list(moves), list(moves.values()))[0]()
        return Program(self.seed, shape, tuple(self.init), tuple(self.body), self._returned())

    def _returned(self) -> str:
        """What nobody reads is an output, mostly; now and then something else as well."""
        rng = self.rng
        free = [
            v for v in self.values if not any(re.search(rf"\b{v}\b", line) for line in self.body[self._at(v) + 1 :])
        ]
        chosen = [v for v in free if rng.random() < 0.9] or [self.values[-1]]
        if rng.random() < 0.15:
            chosen.append(rng.choice(self.values))
        chosen = list(dict.fromkeys(chosen))
        form = rng.random()
        if len(chosen) == 1 and form < 0.7:
            return chosen[0]
        if form < 0.3:
            return "{" + ", ".join(f'"{v}": {v}' for v in chosen) + "}"
        return f"[{', '.join(chosen)}]" if form < 0.4 else f"({', '.join(chosen)},)"

    def _at(self, value: str) -> int:
        return next(i for i, line in enumerate(self.body) if value in self._made(line))


def rng_even(rng: random.Random) -> int:
    """A number of channels that can be halved."""
    return rng.choice([2, 4, 6])


def program(seed: int) -> Program:
    """The program of a seed, always the same; those below 1,000 are small."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _Writer(seed, rng).written(rng.randint(3, 8) if seed < 1000 else rng.randint(4, 18))


def shortened(found: Program, fails: Callable[[Program], bool]) -> Program:
    """The same failure with as few statements as leaving out one at a time can reach."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _shorter(found):
            if fails(candidate):
                found, smaller = candidate, True
                break
    return found


def _shorter(found: Program) -> Iterator[Program]:
    returned = re.findall(r"\bv\d+\b", found.returns)
    outputs = list(dict.fromkeys(returned))
    if len(outputs) > 1 or found.returns != outputs[0]:
        for one in outputs:
            yield replace(found, returns=one)
        for one in outputs:
            yield replace(found, returns=", ".join(o for o in outputs if o != one) + ",") if len(outputs) > 1 else found
    for i in range(len(found.body) - 1, 0, -1):
        line = found.body[i]
        made = re.match(r"((?:v\d+(?:, )?)+) = ", line)
        rest = line[made.end() :] if made else ""
        news = made[1].split(", ") if made else []
        for source in list(dict.fromkeys(re.findall(r"\bv\d+\b", rest))) or [""]:
            after = [*found.body[:i], *(_renamed(b, news, source) for b in found.body[i + 1 :])]
            yield replace(found, body=tuple(after), returns=_renamed(found.returns, news, source))
    for i in range(len(found.init)):
        yield replace(found, init=(*found.init[:i], *found.init[i + 1 :]))


def _renamed(line: str, names: list[str], to: str) -> str:
    for name in names:
        line = re.sub(rf"\b{name}\b", to, line)
    return line


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(program(int(argument)).source())
