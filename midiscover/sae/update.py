"""From an SAE's gradients to its next weights: clip, the constraints, Adam."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from midiscover.sae.base import Sae
from midiscover.sae.pattern import kernels_of

MATRICES = ("W_enc", "W_dec")


Moments = dict[Tensor, dict[str, Tensor]]
"""What Adam knows of each parameter that has taken a step, by PyTorch's names: step, exp_avg, exp_avg_sq."""


class Update:
    """Adam on an SAE's parameters, by PyTorch's function: its class loads torch._dynamo, which takes seconds.

    Both matrices lie in memory by feature, so that what belongs to one feature is one row: a sparse code's gradients
    come so, and to turn one round takes as long as a third of the step's products.
    """

    def __init__(self, sae: Sae, *, lr: float, betas: tuple[float, float]) -> None:
        sae.W_enc.data = by_feature(sae.W_enc.data)
        self.sae, self.lr, self.betas = sae, lr, betas
        self.learned = [parameter for parameter in sae.parameters() if parameter.requires_grad]
        self.moments: Moments = {}

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While a loss is computed; gradients of the step before are gone."""
        for parameter in self.learned:
            parameter.grad = None
        yield

    def gradients(self) -> list[Tensor]:
        """Of what the loss depends on."""
        return [p.grad for p in self.sae.parameters() if p.grad is not None]

    def prepare(self, lr: float) -> None:
        """Before the loss of the next step is computed: its learning rate."""
        self.lr = lr

    @torch.no_grad()
    def step(self, clip: float) -> None:
        """Take the step, gradients clipped to the norm `clip` before it; 0: as they are."""
        over = self._over(clip) if clip else None
        self.sae.before_step()
        self._adam(over)
        self.sae.after_step()

    def take_up(self, parameter: Tensor, held: Mapping[str, Tensor]) -> None:
        """Adam's moments of a parameter from a checkpoint."""
        state = self.moments.setdefault(parameter, _none_yet(parameter))
        for name, value in held.items():
            state[name].copy_(value)

    def changed(self) -> None:
        """To be told where weights or moments were changed from outside."""

    def _adam(self, over: Tensor | None) -> None:
        moved = [(parameter, parameter.grad) for parameter in self.learned if parameter.grad is not None]
        for parameter, _ in moved:
            if parameter not in self.moments:
                self.moments[parameter] = _none_yet(parameter)
        held = [self.moments[parameter] for parameter, _ in moved]
        parameters, gradients = ([pair[i] for pair in moved] for i in range(2))
        adam_(parameters, gradients, held, lr=self.lr, betas=self.betas, over=over)

    def _over(self, most: float) -> Tensor | None:
        """What gradients are to be divided by, where they are longer than `most`: Adam reads them anyway."""
        norm = gradient_norm(self.gradients())
        # On a CPU nothing waits for the comparison, and a factor of 1 would be a pass over all of them.
        if norm.device.type == "cpu" and float(norm) <= most:
            return None
        return ((norm + 1e-6) / most).clamp(min=1.0)  # as PyTorch's clipping


class HalvedUpdate(Update):
    """On a GPU: losses see bfloat16 copies of both matrices, and one kernel takes each parameter through its step.

    A step that casts the weights, clips, projects, runs Adam and divides the rows by operators of their own passes
    over them ten times; here gradient, weight and moments are read once and weight, moments and copy written once.
    The weights themselves and the moments stay float32. What changes from step to step lies in tensors, so that a CUDA
    graph can hold the step.
    """

    def __init__(self, sae: Sae, *, lr: float, betas: tuple[float, float]) -> None:
        kernels = kernels_of(sae.W_enc.device)
        assert kernels is not None, "`make_update` asks first"
        super().__init__(sae, lr=lr, betas=betas)
        self.kernels = kernels
        self.masters = {name: sae.get_parameter(name) for name in MATRICES}
        self.halves = {
            name: nn.Parameter(master.detach().bfloat16(), requires_grad=master.requires_grad)
            for name, master in self.masters.items()
        }
        self.taken = 0
        self.knobs = torch.zeros(2, device=sae.W_enc.device)
        # Nobody but a checkpoint asks for the count: on the CPU, where to write it down launches nothing.
        self.moments = {parameter: _none_yet(parameter) | {"step": torch.zeros(())} for parameter in self.learned}

    @contextmanager
    def computing(self) -> Iterator[None]:
        for half in self.halves.values():
            half.grad = None
        with super().computing():
            self.sae._parameters.update(self.halves)
            try:
                yield
            finally:
                self.sae._parameters.update(self.masters)

    def gradients(self) -> list[Tensor]:
        return [*super().gradients(), *(half.grad for half in self.halves.values() if half.grad is not None)]

    def prepare(self, lr: float) -> None:
        super().prepare(lr)
        self.taken += 1
        for parameter in self.learned:
            self.moments[parameter]["step"].fill_(self.taken)
        beta1, beta2 = self.betas
        self.knobs[0].fill_(lr / (1 - beta1**self.taken))
        self.knobs[1].fill_((1 - beta2**self.taken) ** -0.5)

    @torch.no_grad()
    def step(self, clip: float) -> None:
        scale = torch.ones((), device=self.knobs.device)
        if clip:  # as PyTorch's
            scale = (clip / (gradient_norm(self.gradients()) + 1e-6)).clamp(max=1.0)
        for name, parameter in self.sae.named_parameters():
            half, state = self.halves.get(name), self.moments.get(parameter)
            grad = parameter.grad if half is None else half.grad
            if grad is None or not state:
                continue
            tensors = [rows_of(tensor) for tensor in (parameter.data, grad, state["exp_avg"], state["exp_avg_sq"])]
            half = None if half is None else rows_of(half)
            assert all(tensor.is_contiguous() for tensor in tensors), f"{name} lies in memory by feature"
            unit = name == "W_dec" and self.sae.unit_decoder
            self.kernels.adam_(*tensors, half=half, scale=scale, knobs=self.knobs, betas=self.betas, unit=unit)
        self.sae.constrain_()
        for parameter in (*self.learned, *self.halves.values()):
            parameter.grad = None  # a graph's next step may lie in the same memory

    @torch.no_grad()
    def changed(self) -> None:
        self.taken = int(self.moments[self.learned[0]]["step"])
        for name, half in self.halves.items():
            half.copy_(self.masters[name])


def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[dict[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    over: Tensor | None = None,
) -> None:
    """A step of PyTorch's fused Adam on each parameter, whose moments are those of `Moments`.

    over: a scalar that the gradients are divided by before.
    """
    adam(
        [rows_of(parameter) for parameter in parameters],
        [rows_of(gradient) for gradient in gradients],
        [rows_of(state["exp_avg"]) for state in moments],
        [rows_of(state["exp_avg_sq"]) for state in moments],
        [],
        [state["step"] for state in moments],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=0,
        eps=1e-8,
        maximize=False,
        grad_scale=over,
    )


def by_feature(encoder: Tensor) -> Tensor:
    """W_enc [d_in, d_sae] with the d_in numbers of a feature side by side in memory."""
    return encoder.T.contiguous().T


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor, or what it is the transpose of in memory."""
    return tensor if tensor.is_contiguous() else tensor.T


def _none_yet(parameter: Tensor) -> dict[str, Tensor]:
    # PyTorch's fused Adam wants the count of steps where the parameter is.
    none = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device)} | none


def make_update(sae: Sae, *, lr: float, betas: tuple[float, float], halved: bool) -> Update:
    """How an SAE takes its steps; `halved`: where its losses may be computed from bfloat16 copies of its matrices."""
    kind = HalvedUpdate if halved and kernels_of(sae.W_enc.device) is not None else Update
    return kind(sae, lr=lr, betas=betas)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of all of them together, a scalar summed up in float32."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
