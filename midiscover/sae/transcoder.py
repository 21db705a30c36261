"""Transcoders: SAEs that read one hook and predict another, with or without a linear skip connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from midiscover.errors import ConfigError
from midiscover.sae.base import (
    Losses,
    Normalisation,
    Sae,
    StepContext,
    bias_for_density,
    random_directions,
    squared_error,
)
from midiscover.sae.code import PreActivations, relu_code
from midiscover.saeconfig import SkipTranscoderConfig, TranscoderConfig


class TranscoderSae(Sae):
    """f = relu(x @ W_enc + b_enc), y_hat = f @ W_dec + b_dec; loss = |y_hat - y|^2 + l1 * sum_i f_i * norm(W_dec_i).

    x and y are the same token at two hooks (Dunefsky et al. 2024, arXiv 2406.11944, section 3.1). b_dec belongs to the
    output and is not subtracted from the input. The penalty is weighted by decoder norms, as in `StandardSae`.
    """

    kind = "transcoder"
    saelens_architecture = "transcoder"
    transcodes = True
    config: TranscoderConfig

    @property
    def coefficient(self) -> float:
        return self.config.l1_coefficient

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        """As for SAEs, but for the encoder, whose directions are its own: the decoder's belong to another space."""
        super().initialise_(seed)
        generator = torch.Generator().manual_seed(seed)
        random_directions(self.d_sae, self.d_out, generator)  # those of the decoder; the next ones are the encoder's
        self.W_enc.copy_(self.initial_norm * random_directions(self.d_sae, self.d_in, generator).T)

    @torch.no_grad()
    def initialise_neurons_(self) -> None:
        raise ConfigError(f"A {self.kind} has no neurons as features: what it predicts is another hook's.")

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        if self.config.initial_density is not None:
            self.b_enc.copy_(bias_for_density(self.pre_activations(x), self.config.initial_density))

    def pre_activations(self, x: Tensor) -> Tensor:
        """[tokens, d_sae] before the activation function."""
        return x @ self.W_enc + self.b_enc

    def activate(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    def loss(self, x: Tensor, y: Tensor, context: StepContext) -> Losses:
        code = relu_code(PreActivations(x, self.W_enc, self.b_enc, None))
        y_hat, norms = code.decode_with_norms(self.W_dec)
        mse = squared_error(self.past(x, y_hat + self.b_dec), y)
        penalty = code.total(norms)
        return Losses(mse + context.sparsity * penalty, mse.detach(), penalty.detach(), code)

    def past(self, x: Tensor, decoded: Tensor) -> Tensor:  # noqa: ARG002 - for the skip connection
        """The output from what the features write, both [tokens, d_out]."""
        return decoded

    def output(self, x: Tensor, features: Tensor) -> Tensor:
        return self.past(x, self.decode(features))

    def folded(self, w: Mapping[str, Tensor], inputs: Normalisation, outputs: Normalisation) -> dict[str, Tensor]:
        weights = super().folded(w, inputs, outputs)
        # scale * (x - mean) @ W_enc: without b_dec at the input, the mean goes into the encoder's bias.
        return weights | {"b_enc": weights["b_enc"] - inputs.mean @ weights["W_enc"]}

    def saelens_fields(self) -> dict[str, Any]:
        return {"d_out": self.d_out, "apply_b_dec_to_input": False}

    @classmethod
    def config_of(cls, cfg: Mapping[str, Any]) -> TranscoderConfig:
        return TranscoderConfig(d_sae=cfg["d_sae"])


class SkipTranscoderSae(TranscoderSae):
    """y_hat = f @ W_dec + b_dec + x @ W_skip.T, the rest as for the transcoder (Paulo et al. 2025, arXiv 2501.18823).

    `decode` gives what the features write; `output` and `forward` add what the skip connection W_skip [d_out, d_in]
    carries past them.
    """

    kind = "skip_transcoder"
    saelens_architecture = "skip_transcoder"

    def __init__(self, config: Any, d_in: int, d_sae: int, d_out: int | None = None) -> None:
        super().__init__(config, d_in, d_sae, d_out)
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in))

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        super().initialise_(seed)
        self.W_skip.zero_()

    def past(self, x: Tensor, decoded: Tensor) -> Tensor:
        return decoded + x @ self.W_skip.T

    def folded_rest(self, w: Mapping[str, Tensor], inputs: Normalisation, outputs: Normalisation) -> dict[str, Tensor]:
        skip = w["W_skip"] * (inputs.scale / outputs.scale)
        return {"W_skip": skip, "b_dec": super().folded_rest(w, inputs, outputs)["b_dec"] - skip @ inputs.mean}

    @classmethod
    def config_of(cls, cfg: Mapping[str, Any]) -> SkipTranscoderConfig:
        return SkipTranscoderConfig(d_sae=cfg["d_sae"])
