"""A local defense in anyone's Flower ClientApp.

Nothing heavy is imported before it is called: the package exports this function, and a worker process must be able to
import the package before it loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch
    from flwr.app import Context
    from torch import Tensor, nn

    from fedbd.training import TrainingPlan
    from fedbd.types import LocalDefense, Notes, Samples

MEMORY = "fedbd.local_defense"
"""Name of the ``ArrayRecord`` in the client's state with what the defense remembers."""

COUNT = "fedbd.local_defense.count"
"""Name of the ``ConfigRecord`` beside it, with the number of participations so far and a hash of the data."""


def local_defense(
    defense: LocalDefense,
    model: nn.Module,
    data: Samples | tuple[Tensor, Tensor],
    context: Context,
    *,
    plan: TrainingPlan | None = None,
    seed: int = 0,
) -> Notes:
    """Train a client's model in place with a local defense in place of plain training, for one participation.

    What the defense remembers lies in ``context.state`` as plain arrays, where Flower keeps it for the client's next
    participation, also from process to process. It is written last: after an error everything is as it was, but for the
    model. In a project of one's own::

        from fedbd.defenses.local.abl import ABL
        from fedbd.flower import local_defense

        @app.train()
        def train(message, context):
            model = Net()
            model.load_state_dict(message.content["arrays"].to_torch_state_dict())
            images, labels = my_partition(context.node_config["partition-id"])
            notes = local_defense(ABL(isolate_after=5), model, (images, labels), context)
            reply = {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": len(labels), "loss": notes["loss"]}),
            }
            return Message(RecordDict(reply), reply_to=message)

    Args:
        defense: What trains.
        model: A classifier of (N, C, H, W) float32 images in [0, 1], filled with the received weights; left in train
            mode. A normalization of the inputs belongs into the model.
        data: The client's samples, the same and in the same order in every participation: ``Samples``, or a pair of
            images, (N, C, H, W), uint8 or float in [0, 1] (rounded to 256 levels, which undoes torchvision's
            ``ToTensor``), and labels, (N,), of an integer type.
        context: Flower's, of this client.
        plan: Epochs, rates and batches; None: ``TrainingPlan()``. A rate that falls with the rounds is the caller's.
        seed: With the client (``partition-id`` of the node's configuration, else the node's id) and the number of the
            participation it decides all randomness.

    Returns:
        The defense's notes.

    Raises:
        UserError: If ``data`` or ``plan`` is not as described, or ``data`` not what it was in the participation before.
        MethodRefused: If the defense cannot act; if the model does not take the images, has fewer classes than there
            are labels, or has diverged.
    """
    from flwr.app import ArrayRecord, ConfigRecord  # noqa: PLC0415 - see the module's description

    from fedbd.data.digest import samples_digest  # noqa: PLC0415
    from fedbd.flower.arrays import pack_all, view_all  # noqa: PLC0415
    from fedbd.training import TrainingPlan  # noqa: PLC0415

    if not isinstance(plan, TrainingPlan | None):
        remedy = "from fedbd.training import TrainingPlan"
        raise _wrong("must be a TrainingPlan", type(plan).__name__, remedy, path="plan")
    samples = _samples(data, model)
    state = context.state
    before = state.config_records.get(COUNT, ConfigRecord())
    participation = cast("int", before.get("participations", 0)) + 1
    held = samples_digest(samples)
    if before.get("data", held) != held:
        raise _wrong(
            "must be the same samples in the same order in every participation: what the defense remembers of a sample "
            "would be of another",
            "others, or another order",
            "give it the images themselves, always in one order",
        )
    remembered = view_all(state.array_records.get(MEMORY, ArrayRecord()))
    memory = {name: array.copy() for name, array in remembered.items()}
    rng = generator(context, participation, seed)
    kept, notes = defense.fit(model, samples, TrainingPlan() if plan is None else plan, memory, rng)
    state[MEMORY] = pack_all(dict(kept))
    state[COUNT] = ConfigRecord({"participations": participation, "data": held})
    return notes


def generator(context: Context, participation: int, seed: int = 0) -> torch.Generator:
    """Return the generator that ``local_defense`` draws from in a client's so-many-th participation (from 1)."""
    from fedbd.seeding import torch_rng  # noqa: PLC0415

    client = int(context.node_config.get("partition-id", context.node_id))
    return torch_rng(seed, "local-defense", client, participation)


def _samples(data: Samples | tuple[Tensor, Tensor], model: nn.Module) -> Samples:
    """Return the data as samples on the model's device, if it is a model for them."""
    import torch  # noqa: PLC0415

    from fedbd.defenses.sound_model import need_known_labels, need_sound  # noqa: PLC0415
    from fedbd.types import Samples  # noqa: PLC0415

    images, labels = _pair(data)
    device = next((entry.device for entry in model.parameters()), torch.device("cpu"))
    samples = Samples(images.contiguous().to(device), labels.to(device, torch.int64))
    need_sound(model, "local_defense")
    need_known_labels(model, "local_defense", samples.batch(torch.arange(min(2, len(samples))))[0], samples.labels)
    return samples


def _pair(data: Samples | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return images, (N, C, H, W) uint8, and labels, (N,) of an integer type."""
    import torch  # noqa: PLC0415
    from torch import Tensor  # noqa: PLC0415

    from fedbd.types import Samples, quantized  # noqa: PLC0415

    pair = (data.images, data.labels) if isinstance(data, Samples) else data
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        got = type(data).__name__
        got += f" of {', '.join(type(part).__name__ for part in data)}" if isinstance(data, tuple | list) else ""
        remedy = (
            "of a data set: images = torch.stack([x for x, _ in data]), labels = torch.tensor([y for _, y in data])"
        )
        raise _wrong("must be Samples or two tensors, images and labels", got, remedy)
    images, labels = pair
    if images.dim() != 4 or labels.shape != images.shape[:1] or len(labels) == 0:
        got = f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
        raise _wrong("must hold images (N, C, H, W) and labels (N,), N at least 1", got)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise _wrong("must have labels of an integer type", str(labels.dtype), "one-hot labels: labels.argmax(1)")
    if images.is_floating_point():
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):  # so written, NaN is refused, too
            remedy = "take the normalization out of the data and make it the model's first layer"
            raise _wrong("must have float images in [0, 1]", f"{low:.3g} to {high:.3g}", remedy)
        images = quantized(images)
    if images.dtype != torch.uint8:
        raise _wrong("must have images of type uint8 or float", str(images.dtype))
    return images, labels


def _wrong(expected: str, got: str, remedy: str = "", *, path: str = "data") -> Exception:
    from fedbd.errors import Problem, UserError  # noqa: PLC0415

    return UserError([Problem(path=path, expected=expected, got=got, remedy=remedy)])
