"""Every method as its released code does it: ΔW [N,K] built in full, autograd for the rest.

These are peers (what a user of the released code pays) and, in float64, the truth that the gate of every timing
compares with. Parameters carry the released names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genft_kernels.activations import ACTIVATIONS


class Naive(nn.Module):
    """y = x (W0 + ΔW)ᵀ + b with W0 [N,K] and b of a frozen `nn.Linear`; `delta` makes ΔW from the parameters."""

    kinked = False  # whether an activation has a kink

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.n, self.k = linear.weight.shape
        self.r = r
        self.reset()

    def reset(self) -> None:
        """Makes the parameters, by `factor`."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.delta(), self.bias)

    def factor(self, *shape: int) -> nn.Parameter:
        """A random factor that keeps the size of what it multiplies."""
        return nn.Parameter(torch.randn(shape, dtype=self.weight.dtype, device=self.weight.device) * shape[-1] ** -0.5)


class NaiveLora(Naive):
    scale = 2.0

    def reset(self) -> None:
        self.lora_A, self.lora_B = self.factor(self.r, self.k), self.factor(self.n, self.r)

    def delta(self) -> Tensor:
        return self.scale * (self.lora_B @ self.lora_A)


class NaiveWegeft(Naive):
    scale = 2.0

    def reset(self) -> None:
        self.phi, self.psi = self.factor(self.r, self.k), self.factor(self.r, self.k)

    def delta(self) -> Tensor:
        return self.scale * ((self.weight @ self.phi.t()) @ self.psi)


class NaiveGift(Naive):
    def reset(self) -> None:
        self.phi, self.psi = self.factor(self.r, self.k), self.factor(self.k, self.r)

    def delta(self) -> Tensor:
        return (self.weight @ self.phi.t()) @ self.psi.t()


class NaivePeanut(Naive):
    """Depth 0, relu."""

    kinked = True

    def reset(self) -> None:
        self.A, self.B = self.factor(self.r, self.n), self.factor(self.n, self.r)

    def delta(self) -> Tensor:
        return (torch.relu(self.weight.t() @ self.A.t()) @ self.B.t()).t()


class NaiveHira(Naive):
    def reset(self) -> None:
        self.hira_A, self.hira_B = self.factor(self.r, self.k), self.factor(self.n, self.r)

    def delta(self) -> Tensor:
        return self.weight * (self.hira_B @ self.hira_A)


class NaiveGrft(Naive):
    """r rows, far apart; the gradient of the whole ΔW is made and most of it thrown away."""

    columns = False

    def reset(self) -> None:
        self.values = self.factor(self.n, self.r) if self.columns else self.factor(self.r, self.k)
        size = self.k if self.columns else self.n
        self.register_buffer("indices", torch.linspace(0, size - 1, self.r, device=self.weight.device).long())

    def delta(self) -> Tensor:
        return torch.zeros_like(self.weight).index_copy(int(self.columns), self.indices, self.values)


class NaiveGrftColumns(NaiveGrft):
    columns = True


class NaiveSas(Naive):
    """r is half shared, half made by the hypernetwork; its sizes are the config's defaults."""

    size, hidden, chunk = 16, 32, 64

    @classmethod
    def split(cls, r: int) -> tuple[int, int]:
        """r_shared and r_specific."""
        return r - r // 2, r // 2

    def reset(self) -> None:
        shared, specific = self.split(self.r)
        self.embedding = self.factor(self.size)
        chunks = math.ceil(self.k / self.chunk) + math.ceil(self.n / self.chunk)
        pair = {"p": (self.k, shared), "q": (self.n, shared), "chunks": (chunks, self.size)}
        head = (self.chunk * specific, self.hidden)
        network = {"weight": (self.hidden, self.size), "bias": (self.hidden,), "head_p": head, "head_q": head}
        for name, shapes in (("pair", pair), ("hypernetwork", network)):
            setattr(self, name, nn.ParameterDict({key: self.factor(*shape) for key, shape in shapes.items()}))

    def delta(self) -> Tensor:
        pair, network = self.pair, self.hypernetwork
        hidden = torch.tanh((pair["chunks"] + self.embedding) @ network["weight"].t() + network["bias"])
        specific = network["head_p"].shape[0] // self.chunk
        first = math.ceil(self.k / self.chunk)
        p = (hidden[:first] @ network["head_p"].t()).reshape(-1, specific)[: self.k] * self.k**-0.5
        q = (hidden[first:] @ network["head_q"].t()).reshape(-1, specific)[: self.n] * self.hidden**-0.5
        return pair["q"] @ pair["p"].t() + q @ p.t()


class NaiveGenft(Naive):
    """Both stages, ΔW = s·D2ᵀ, with generator biases; a rectangular W0 has a specific pair for each side."""

    inner = outer = "gelu"
    ratio = scale = 1.0

    @classmethod
    def split(cls, r: int) -> tuple[int, int]:
        """r_shared and r_specific: halves, as in the released LLaMA setting."""
        return r - r // 2, r // 2

    def reset(self) -> None:
        shared, specific = self.split(self.r)
        self.shared_1_a, self.shared_1_b = self.factor(shared, self.k), self.factor(self.k, shared)
        self.shared_2_a, self.shared_2_b = self.factor(shared, self.n), self.factor(self.n, shared)
        sides = {"": self.k} if self.n == self.k else {"1_": self.k, "2_": self.n}
        for side, size in sides.items():
            setattr(self, f"specific_{side}a", self.factor(specific, size))
            setattr(self, f"specific_{side}b", self.factor(size, specific))
        self.bias_1_a, self.bias_1_b = self.factor(self.r), self.factor(self.k)
        self.bias_2_a, self.bias_2_b = self.factor(self.r), self.factor(self.n)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ã1 [r,K], B̃1 [K,r], Ã2 [r,N], B̃2 [N,r], shared and specific parts side by side."""
        shared = (self.shared_1_a, self.shared_1_b, self.shared_2_a, self.shared_2_b)
        sides = ("", "") if self.n == self.k else ("1_", "2_")
        own = [getattr(self, f"specific_{side}{end}") for side in sides for end in "ab"]
        pairs = zip(shared, own, (0, 1, 0, 1), strict=True)
        return tuple(torch.cat([common, specific], dim=dim) for common, specific, dim in pairs)  # type: ignore

    def delta(self) -> Tensor:
        inner, outer = ACTIVATIONS[self.inner].forward, ACTIVATIONS[self.outer].forward
        a1, b1, a2, b2 = self.factors()
        d1 = outer(F.linear(inner(F.linear(self.ratio * self.weight, a1, self.bias_1_a)), b1, self.bias_1_b))  # [N, K]
        d2 = outer(F.linear(inner(F.linear(d1.t(), a2, self.bias_2_a)), b2, self.bias_2_b))  # [K, N]
        return self.scale * d2.t()


class NaiveGenftLinear(NaiveGenft):
    """The released GLUE setting without its dropout: linear throughout, so low rank."""

    inner = outer = "none"
    ratio, scale = 0.5, 0.05


class NaiveGenftLeaky(NaiveGenft):
    """The activations of the released ViT setting."""

    inner, outer = "none", "leakyrelu"
    ratio = 1.4
    kinked = True

    @classmethod
    def split(cls, r: int) -> tuple[int, int]:
        """32 and 5 of 37, as released, and that proportion of other ranks."""
        specific = max(1, r * 5 // 37)
        return r - specific, specific
