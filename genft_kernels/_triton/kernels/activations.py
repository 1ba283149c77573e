"""The Triton versions of `genft_kernels.activations`: for each name, σ(z) and σ'(z) on fp32 tiles, built from tl only
(libdevice is not available in the interpreter)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...activations import LEAKY_SLOPE

_LEAKY_SLOPE = tl.constexpr(LEAKY_SLOPE)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def none(z):
    return z


@triton.jit
def none_grad(z):
    return z * 0.0 + 1.0


@triton.jit
def relu(z):
    # Not tl.maximum, which turns NaN into 0.
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def relu_grad(z):
    return tl.where(z <= 0.0, 0.0, 1.0)


@triton.jit
def leakyrelu(z):
    return tl.where(z > 0.0, z, z * _LEAKY_SLOPE)


@triton.jit
def leakyrelu_grad(z):
    return tl.where(z > 0.0, 1.0, _LEAKY_SLOPE)


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))


@triton.jit
def gelu_grad(z):
    return 0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * tl.exp(-0.5 * z * z) * _INV_SQRT_2PI


@triton.jit
def tanh(z):
    # (1 - e) / (1 + e) cancels near zero, where three terms of the series are exact in fp32.
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    square = z * z
    near = z * (1.0 + square * (-0.3333333333333333 + square * (0.13333333333333333 - square * 0.05396825396825397)))
    return tl.where(tl.abs(z) < 0.1, near, tl.where(z < 0.0, -far, far))


@triton.jit
def tanh_grad(z):
    y = tanh(z)
    return 1.0 - y * y


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def sigmoid_grad(z):
    y = sigmoid(z)
    return y * (1.0 - y)


TWINS: dict[str, tuple[Any, Any]] = {
    "none": (none, none_grad),
    "relu": (relu, relu_grad),
    "leakyrelu": (leakyrelu, leakyrelu_grad),
    "gelu": (gelu, gelu_grad),
    "tanh": (tanh, tanh_grad),
    "sigmoid": (sigmoid, sigmoid_grad),
}
