"""What every architecture shares: weights, initialisation, folding into the raw activation space.

An SAE trains on x' = scale * (x - mean), whose mean norm is sqrt(d_in). `fold` turns its weights into ones that take
raw activations and have unit decoder rows, the form in which SAEs are saved, compared and served.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

DECODER_INIT_NORM = 0.1
"""Norm of decoder rows at initialisation of SAEs with free decoder norms (SAELens' default)."""


class Losses(NamedTuple):
    """Losses of one batch; each a scalar tensor, in normalised units."""

    total: Tensor
    """What is minimised."""
    mse: Tensor
    """Squared error summed over d_in, mean over tokens."""
    sparsity: Tensor
    """The unweighted penalty: sum_i f_i * norm(W_dec_i) for L1; the AuxK loss for TopK. Mean over tokens."""
    features: Tensor
    """[tokens, d_sae] the code, detached, for counts of what fired."""


class StepContext(NamedTuple):
    """What a loss needs besides the batch."""

    l1_scale: float
    """Position in the L1 warm-up, 0 to 1."""
    dead: Tensor | None
    """[d_sae] bool, features that count as dead; None where nothing asks for them or none is."""


class Sae(nn.Module, ABC):
    """f = activate((x - b_dec) @ W_enc + b_enc);  x_hat = f @ W_dec + b_dec.

    Shapes: x [tokens, d_in], f [tokens, d_sae], W_enc [d_in, d_sae], W_dec [d_sae, d_in].
    A new architecture is one subclass and one line in `registry.py`.
    """

    kind: ClassVar[str]
    """Name in the YAML and in records."""
    saelens_architecture: ClassVar[str]
    """`architecture` in a SAELens cfg.json."""
    uses_dead: ClassVar[bool] = False
    """Whether the loss wants to know which features are dead."""

    def __init__(self, config: Any, d_in: int, d_sae: int) -> None:
        super().__init__()
        self.config = config
        self.d_in, self.d_sae = d_in, d_sae
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        """Random decoder directions, the encoder their transpose, zero biases; the same on every machine."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(self.d_sae, self.d_in, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec.copy_(rows * self.init_norm)
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.zero_()

    @property
    def init_norm(self) -> float:
        """Norm of the decoder rows at initialisation."""
        return DECODER_INIT_NORM

    def pre_activations(self, x: Tensor) -> Tensor:
        """[tokens, d_sae] before the activation function."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    @abstractmethod
    def activate(self, pre: Tensor) -> Tensor:
        """The code of given pre-activations, both [tokens, d_sae]."""

    def encode(self, x: Tensor) -> Tensor:
        """Features [tokens, d_sae] of activations [tokens, d_in]."""
        return self.activate(self.pre_activations(x))

    def decode(self, features: Tensor) -> Tensor:
        """Reconstruction [tokens, d_in] of features [tokens, d_sae]."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of activations, both [tokens, d_in]."""
        return self.decode(self.encode(x))

    @abstractmethod
    def loss(self, x: Tensor, context: StepContext) -> Losses:
        """Losses of a normalised batch [tokens, d_in]."""

    def before_step(self) -> None:
        """Change gradients between the backward pass and the optimiser's step; nothing by default."""

    def after_step(self) -> None:
        """Restore constraints on the weights after the optimiser's step; nothing by default."""

    def saelens_fields(self) -> dict[str, Any]:
        """Fields of cfg.json that only this architecture has."""
        return {}

    @torch.no_grad()
    def fold(self, mean: Tensor, scale: float) -> dict[str, Tensor]:
        """Weights for raw activations with unit decoder rows; `encode` and `decode` then match the trained SAE.

        mean: [d_in], scale: the factor of x' = scale * (x - mean). Features come out in raw units: multiplied by
        the norm of their decoder row and divided by `scale`. Returns float32 copies on the CPU.
        """
        weights = {name: value.detach().to("cpu", torch.float64) for name, value in self.named_parameters()}
        norms = (weights["W_dec"].norm(dim=1) / scale).clamp(min=1e-8)
        folded = {
            "W_enc": weights["W_enc"] * scale * norms,
            "b_enc": weights["b_enc"] * norms,
            "W_dec": weights["W_dec"] / scale / norms[:, None],
            "b_dec": mean.detach().to("cpu", torch.float64) + weights["b_dec"] / scale,
        }
        return {name: value.to(torch.float32).contiguous() for name, value in folded.items()}


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Squared error summed over d_in, mean over tokens; both [tokens, d_in]."""
    return (x_hat - x).pow(2).sum(-1).mean()


def l1_conventions(coefficient: float, *, scale: float, d_in: int, d_sae: int) -> dict[str, float]:
    """The same L1 penalty in the conventions people compare.

    coefficient: on inputs of mean norm sqrt(d_in), squared error summed over d_in (SAELens).
    unit_norm: on inputs of unit mean squared norm (dictionary_learning's recipe).
    raw_scale: on raw activations with unit decoder rows.
    seed: raw activations, squared error averaged over d_in and L1 over d_sae.
    """
    raw = coefficient / scale
    return {
        "coefficient": coefficient,
        "unit_norm": coefficient / math.sqrt(d_in),
        "raw_scale": raw,
        "seed": raw * d_sae / d_in,
    }
