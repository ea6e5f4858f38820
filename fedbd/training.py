"""Plain local training: the loop that honest clients, attackers and the bare-loop benchmark share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.seeding import layers_draw_from
from fedbd.types import Notes, Samples

Batch = tuple[Tensor, Tensor]
OnBatch = Callable[[Tensor, Tensor, torch.Generator], Batch]
Objective = Callable[[Tensor, Tensor], Tensor]
Pull = Callable[[], None]
"""Changes a model's gradients between the backward pass and the step."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class TrainingPlan:
    """How one client trains in one round (the field's standard: 2 epochs, batch 64, SGD 0.1, momentum 0.9, wd 5e-4).

    Attributes:
        epochs: Passes over the client's data.
        batch_size: Images per step; the last batch of an epoch may be smaller.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD, 0 for none.
        nesterov: Nesterov's form of momentum.
        weight_decay: L2 penalty.
        lr_step: Multiply ``lr`` by ``lr_gamma`` every so many epochs; None for a constant rate.
        lr_gamma: See ``lr_step``.
        lr_decay: Multiply ``lr`` by this once a round: rate of round t is ``lr * lr_decay ** (t - 1)``.
        augment: ``crop_flip``: crop with 4 pixels of zero padding and mirror, per image; ``none`` (default).
    """

    epochs: Annotated[int, Ge(1)] = 2
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 64
    lr: Annotated[float, Gt(0)] = 0.1
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    lr_step: Annotated[int, Ge(1)] | None = None
    lr_gamma: Annotated[float, Gt(0), Le(1)] = 0.1
    lr_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    augment: Literal["none", "crop_flip"] = "none"

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        return momentum_problems(self.nesterov, self.momentum)

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch (0-based)."""
        return self.lr * self.lr_gamma ** (epoch // self.lr_step) if self.lr_step else self.lr


def momentum_problems(nesterov: bool, momentum: float) -> list[tuple[str, str]]:
    """Return what is wrong between the two fields that every SGD here has."""
    return [("nesterov", "needs a momentum above 0")] if nesterov and momentum == 0 else []


def need_gradients(what: str) -> None:
    """Refuse to go on where no gradient can be computed.

    Args:
        what: What cannot be done then, for the message.

    Raises:
        MethodRefused: Under ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        remedy = "call it outside (torch.no_grad() is no matter)"
        raise MethodRefused(f"{what} under torch.inference_mode(); {remedy}")


@contextlib.contextmanager
def learning(rng: torch.Generator) -> Iterator[None]:
    """Within the block a model can be trained: gradients are computed, whatever the caller's mode, and ``rng`` decides.

    Args:
        rng: Decides what layers like Dropout draw; nothing is drawn from it (``seeding.layers_draw_from``).

    Raises:
        MethodRefused: Under ``torch.inference_mode()``, whose tensors no gradient can pass, or where a BatchNorm gets
            one value per channel, as a BatchNorm1d does from a batch of one image.
    """
    need_gradients("nothing can be trained")
    try:
        with torch.enable_grad(), layers_draw_from(rng):
            yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        remedy = "choose a batch_size that leaves no batch of one image, or larger images"
        raise MethodRefused(f"BatchNorm cannot train on a single value per channel; {remedy}") from error


def sgd(model: nn.Module, plan: TrainingPlan) -> torch.optim.SGD:
    """Return the plan's optimizer over the model's trainable parameters.

    Raises:
        MethodRefused: If there is none.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise MethodRefused("the model has no weight to train: all are frozen; call model.requires_grad_(True)")
    return torch.optim.SGD(
        trainable,
        lr=plan.lr,
        momentum=plan.momentum,
        nesterov=plan.nesterov,
        weight_decay=plan.weight_decay,
        fused=True,
    )


def crop_flip(images: Tensor, rng: torch.Generator, padding: int = 4) -> Tensor:
    """Return each image shifted by up to ``padding`` pixels (zeros move in) and mirrored with probability 1/2.

    Args:
        images: (N, C, H, W) float.
        rng: Draws shifts and mirrors, on the CPU.
        padding: Largest shift in pixels.
    """
    n, _, height, width = images.shape
    shift = torch.randint(0, 2 * padding + 1, (2, n), generator=rng).to(images.device)
    mirror = (torch.rand(n, generator=rng) < 0.5).to(images.device)
    padded = F.pad(images, (padding,) * 4)
    rows = shift[0][:, None] + torch.arange(height, device=images.device)
    cols = torch.arange(width, device=images.device).expand(n, width)
    cols = shift[1][:, None] + torch.where(mirror[:, None], width - 1 - cols, cols)
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def memory_format_of(model: nn.Module) -> torch.memory_format:
    """Return the memory format that a model was put in (its first convolution weight that is not both tells)."""
    for entry in model.parameters():
        last = entry.dim() == 4 and entry.is_contiguous(memory_format=torch.channels_last)
        if entry.dim() == 4 and last != entry.is_contiguous():
            return torch.channels_last if last else torch.contiguous_format
    return torch.contiguous_format


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def train(
    model: nn.Module,
    data: Samples,
    plan: TrainingPlan,
    rng: torch.Generator,
    *,
    on_batch: OnBatch | None = None,
    objective: Objective = F.cross_entropy,
    proximal_mu: float = 0.0,
) -> Notes:
    """Train a model in place with SGD.

    Args:
        model: Left in train mode.
        data: The client's samples.
        plan: Epochs, batches and rates.
        rng: Draws the order of the samples, then whatever ``on_batch`` and the augmentation draw; decides Dropout.
        on_batch: Rewrites a batch of raw images in [0, 1] and labels (an attacker stamps here), before augmentation.
        objective: Mean loss of (logits, labels).
        proximal_mu: Weight of FedProx's proximal term; 0 for none. See ``proximal_pull``.

    Returns:
        ``loss`` (mean of the last epoch's batch losses, without the proximal term) and ``images`` (how many were
        trained on).
    """
    optimizer = sgd(model, plan)
    pull = proximal_pull(model, proximal_mu) if proximal_mu else None
    losses = torch.zeros(1)
    for epoch in range(plan.epochs):
        losses = train_epoch(
            model, optimizer, data, plan, epoch, rng, on_batch=on_batch, objective=objective, pull=pull
        )
    return {"loss": float(losses.mean()), "images": plan.epochs * len(data)}


def proximal_pull(model: nn.Module, mu: float) -> Pull:
    """Return what adds the gradient of FedProx's proximal term to a model's gradients.

    The term is ``mu / 2 * ||w - w_start||^2`` over the trainable parameters (BatchNorm's running statistics are not
    trained), with ``w_start`` the model as it is now; its gradient is ``mu * (w - w_start)``.

    T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith, "Federated Optimization in Heterogeneous
    Networks", MLSys 2020, https://arxiv.org/abs/1812.06127, section 3.2, equation 2. Differs from the paper: clients
    solve it by the plan's epochs of SGD (the paper's own experiments do), never by less for a slow client.
    """
    trained = [entry for entry in model.parameters() if entry.requires_grad]
    start = [entry.detach().clone() for entry in trained]

    def pull() -> None:
        for entry, before in zip(trained, start, strict=True):
            if entry.grad is not None:
                entry.grad.add_(entry.detach() - before, alpha=mu)

    return pull


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Samples,
    plan: TrainingPlan,
    epoch: int,
    rng: torch.Generator,
    *,
    on_batch: OnBatch | None = None,
    objective: Objective = F.cross_entropy,
    pull: Pull | None = None,
) -> Tensor:
    """Train one epoch in place; arguments as in ``train``, ``epoch`` (0-based) decides the learning rate.

    ``pull`` is called before each step: see ``proximal_pull``.

    Returns:
        (steps,) float32: the batches' losses.
    """
    model.train()
    layout = memory_format_of(model)
    for group in optimizer.param_groups:
        group["lr"] = plan.rate(epoch)
    losses: list[Tensor] = []
    with learning(rng):
        for index in torch.split(torch.randperm(len(data), generator=rng), plan.batch_size):
            x, y = data.batch(index)
            if on_batch is not None:
                x, y = on_batch(x, y, rng)
            if plan.augment == "crop_flip":
                x = crop_flip(x, rng)
            optimizer.zero_grad(set_to_none=True)
            loss = objective(model(x.contiguous(memory_format=layout)), y)
            loss.backward()  # type: ignore[no-untyped-call]
            if pull is not None:
                pull()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses)
