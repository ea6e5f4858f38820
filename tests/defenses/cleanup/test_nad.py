from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedbd.config.schema import parse
from fedbd.defenses.cleanup.finetune import FineTune, tune
from fedbd.defenses.cleanup.nad import NAD, distill
from fedbd.errors import MethodRefused
from fedbd.metrics import predict
from fedbd.models.cnn import Cnn
from fedbd.models.mlp import Mlp
from fedbd.models.wrn import Wrn
from fedbd.types import Cleanup, Clues, Samples

FIELDS: dict[str, Any] = {
    "epochs": 2,
    "teacher_epochs": 1,
    "batch_size": 64,
    "lr": 0.02,
    "teacher_lr": 0.02,
    "augment": "none",
}
SMALL = NAD(**FIELDS)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: entry.numpy().tobytes() for name, entry in model.state_dict().items()}


def share_right(model: nn.Module, data: Samples) -> float:
    return float((predict(model, data) == data.labels.numpy()).mean())


def test_is_a_cleanup_with_the_codes_defaults() -> None:
    how = NAD()
    assert isinstance(how, Cleanup) and how.needs_trusted
    assert (how.betas, how.power, how.distance) == ((500.0, 1000.0, 1000.0), 2.0, "mse")
    assert how.student_tuning == FineTune()
    assert how.teacher_tuning == FineTune(epochs=10)
    own = NAD(teacher_lr=0.5, teacher_lr_drop_epoch=None, teacher_lr_gamma=0.3, lr=0.2, augment="none", batch_size=7)
    assert own.teacher_tuning == FineTune(
        epochs=10, lr=0.5, lr_drop_epoch=None, lr_gamma=0.3, augment="none", batch_size=7
    )
    assert own.student_tuning == FineTune(lr=0.2, augment="none", batch_size=7)


def test_fields_from_a_scenario() -> None:
    problems: list[Any] = []
    assert parse(NAD, {"betas": [500, 1000.5], "distance": "l2"}, "", problems) == NAD(
        betas=(500, 1000.5), distance="l2"
    )
    assert problems == []
    for wrong in ({"betas": []}, {"betas": [-1.0]}, {"distance": "L2"}, {"start": "teacher"}, {"momentum": 0.0}):
        problems.clear()
        assert parse(NAD, wrong, "", problems) is None and problems


@pytest.mark.parametrize("augment", ["none", "crop_flip_cutout"])
def test_with_all_betas_zero_the_student_is_that_of_finetune_bit_for_bit(augment: Any, backdoored: Any) -> None:
    how = NAD(**{**FIELDS, "augment": augment}, betas=(0.0, 0.0, 0.0))
    student, _, notes = how.clean(backdoored.model, backdoored.trusted, Clues(), generator())
    plain, _, wanted = how.student_tuning.clean(backdoored.model, backdoored.trusted, Clues(), generator())
    assert state_bytes(student) == state_bytes(plain)
    assert notes["validation_after"] == wanted["validation_after"]
    for mine, its in zip(notes["epochs"], wanted["epochs"], strict=True):
        assert mine["cross_entropy"] == its["cross_entropy"]
        assert all(term > 0 for term in mine["attention"])  # still measured
    pressed = NAD(**{**FIELDS, "augment": augment}).clean(backdoored.model, backdoored.trusted, Clues(), generator())
    assert state_bytes(pressed[0]) != state_bytes(plain)


def test_teacher_does_not_move_the_generator_and_is_not_the_student(backdoored: Any) -> None:
    ends = []
    for teacher_epochs in (1, 2):
        rng = generator()
        how = NAD(**{**FIELDS, "teacher_epochs": teacher_epochs, "epochs": 1})
        notes = how.clean(backdoored.model, backdoored.trusted, Clues(), rng)[2]
        ends.append((torch.rand(1, generator=rng), notes["epochs"][0]["attention"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] != ends[1][1]
    # Same schedule, other order of the samples: the first epochs' losses differ.
    notes = SMALL.clean(backdoored.model, backdoored.trusted, Clues(), generator())[2]
    assert notes["teacher"]["epochs"][0]["cross_entropy"] != notes["epochs"][0]["cross_entropy"]


def maps_of(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The cnn's groups and logits, called by hand."""
    first = model.block1(x)
    second = model.block2(model.pool(first))
    third = model.block3(model.pool(second))
    return [first, second, third], model.fc(third.mean((2, 3)))


def unit(features: Tensor) -> Tensor:
    energy = (features**2).sum(1, keepdim=True)
    return energy / (energy.norm(p=2, dim=(2, 3), keepdim=True) + 1e-6)


@pytest.mark.parametrize("distance", ["mse", "l2"])
def test_first_step_against_one_written_out(distance: Any, backdoored: Any, tiny_net: Any) -> None:
    """One batch of everything, plain SGD: the weights move by the gradient of the whole loss."""
    betas = (5.0, 0.0, 20.0)
    data = backdoored.trusted.fit
    teacher = tiny_net(9)
    train_mode = [module.training for module in teacher.modules()]
    given = state_bytes(teacher)
    plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "augment": "none"}
    how = NAD(betas=betas, distance=distance, epochs=1, batch_size=len(data), lr=0.01, **plain)
    student = copy.deepcopy(backdoored.model)
    tuning = distill(student, teacher, data, how, generator())
    assert state_bytes(teacher) == given and [module.training for module in teacher.modules()] == train_mode
    slow = copy.deepcopy(backdoored.model).train()
    x = data.images.float() / 255
    mine, out = maps_of(slow, x)
    theirs, _ = maps_of(copy.deepcopy(teacher).eval(), x)
    terms = []
    for own, other in zip(mine, theirs, strict=True):
        gap = unit(own) - unit(other.detach())
        terms.append((gap**2).mean() if distance == "mse" else gap.flatten(1).norm(dim=1).mean())
    entropy = F.cross_entropy(out, data.labels)
    (entropy + sum(beta * term for beta, term in zip(betas, terms, strict=True))).backward()
    assert tuning.epochs[0]["cross_entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    assert tuning.epochs[0]["attention"] == pytest.approx([term.item() for term in terms], rel=1e-4)
    for (name, after), start in zip(student.named_parameters(), backdoored.model.parameters(), strict=True):
        gradient = slow.get_parameter(name).grad
        assert gradient is not None
        assert torch.allclose(after, start - 0.01 * gradient, atol=1e-5), name


def test_large_betas_bring_the_attention_closer_than_fine_tuning_does(backdoored: Any, tiny_net: Any) -> None:
    """The gradient of the term is alive: towards a foreign teacher the terms fall, without it they do not."""
    fields = {**FIELDS, "epochs": 4, "lr_drop_epoch": None}
    last = {}
    for betas in ((0.0, 0.0, 0.0), (500.0, 500.0, 500.0)):
        student = copy.deepcopy(backdoored.model)
        tuning = distill(student, tiny_net(9), backdoored.trusted.fit, NAD(**fields, betas=betas), generator())
        last[betas[0]] = tuning.epochs[-1]["attention"]
    assert all(pressed < 0.7 * free for pressed, free in zip(last[500.0], last[0.0], strict=True))


def test_term_is_zero_where_the_teacher_is_the_student(backdoored: Any) -> None:
    """In eval mode all along (no BatchNorm that sees batches), one batch: nothing but cross-entropy moves it."""

    class Plain(nn.Module):
        taps = ("conv",)

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).relu().mean((2, 3)))

    data, model = backdoored.trusted.fit, Plain()
    fields = {**FIELDS, "epochs": 1, "batch_size": len(data)}
    found = []
    for beta in (0.0, 1e6):
        student = copy.deepcopy(model)
        tuning = distill(student, model, data, NAD(**fields, betas=(beta,)), generator())
        assert tuning.epochs[0]["attention"] == [0.0]
        found.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(*found)


def test_teacher_of_another_architecture_with_maps_of_another_size(backdoored: Any) -> None:
    student = copy.deepcopy(backdoored.model)  # 8x8, 4x4, 2x2
    teacher = Wrn(depth=10).build((1, 8, 8), 10, generator())  # 8x8, 4x4, 2x2 of other widths
    wide = Cnn(width=3).build((1, 8, 8), 10, generator())
    wide.taps = ("block1", "block1", "block2")  # 8x8, 8x8, 4x4
    for other in (teacher, wide):
        tuning = distill(student, other, backdoored.trusted.fit, NAD(**{**FIELDS, "epochs": 1}), generator())
        assert tuning.finite and all(term > 0 for term in tuning.epochs[0]["attention"])
    wide.taps = ("block1",)
    with pytest.raises(MethodRefused, match="set betas to 1 number"):
        distill(student, wide, backdoored.trusted.fit, SMALL, generator())


def test_whole_run(backdoored: Any) -> None:
    before = state_bytes(backdoored.model)
    clues = Clues(target=3)
    model, passed, notes = SMALL.clean(backdoored.model, backdoored.trusted, clues, generator())
    assert state_bytes(backdoored.model) == before
    assert not backdoored.model.training and not model.training
    assert not any(module._forward_hooks for net in (model, backdoored.model) for module in net.modules())
    assert passed is clues
    assert notes["acted"] and notes["start"] == "model"
    assert [entry["lr"] for entry in notes["epochs"]] == [0.02, 0.02]
    assert all(len(entry["attention"]) == 3 for entry in notes["epochs"])
    assert len(notes["teacher"]["epochs"]) == 1 and 0 < notes["teacher"]["validation"] <= 1
    validate = backdoored.trusted.validate
    assert notes["validation_before"] == notes["validation_start"] == share_right(backdoored.model, validate)
    assert notes["validation_after"] == share_right(model, validate)
    json.dumps(notes, allow_nan=False)
    again = SMALL.clean(backdoored.model, backdoored.trusted, clues, generator())
    assert state_bytes(again[0]) == state_bytes(model) and again[2] == notes


def test_teacher_and_student_start_from_the_unlearned_model(backdoored: Any, tiny_net: Any) -> None:
    found = tiny_net(5).eval()
    how = NAD(**FIELDS, start="unlearned", betas=(0.0, 0.0, 0.0))
    model, _, notes = how.clean(backdoored.model, backdoored.trusted, Clues(unlearned=found), generator())
    alone = copy.deepcopy(found)
    tune(alone, backdoored.trusted.fit, how.student_tuning, generator())
    assert state_bytes(model) == state_bytes(alone)
    assert notes["validation_start"] == share_right(found, backdoored.trusted.validate)
    from_model = NAD(**FIELDS).clean(backdoored.model, backdoored.trusted, Clues(unlearned=found), generator())[2]
    assert notes["teacher"]["epochs"] != from_model["teacher"]["epochs"]
    with pytest.raises(MethodRefused, match="run rnp before"):
        how.clean(backdoored.model, backdoored.trusted, Clues(recovered=found), generator())


def test_where_a_training_diverges_it_says_so_and_changes_nothing(backdoored: Any) -> None:
    for name, field in (("teacher_lr", "lower teacher_lr"), ("lr", "lower lr")):
        how = NAD(**{**FIELDS, name: 1e30})
        model, _, notes = how.clean(backdoored.model, backdoored.trusted, Clues(), generator())
        assert state_bytes(model) == state_bytes(backdoored.model)
        assert notes["acted"] is False and field in notes["reason"]
        json.dumps(notes, allow_nan=False)


def test_refusals(backdoored: Any) -> None:
    with pytest.raises(MethodRefused, match="hand it TrustedData"):
        SMALL.clean(backdoored.model, None, Clues(), generator())
    assert SMALL.refusal(backdoored.model) is None
    flat = Mlp(hidden=(6, 6, 6)).build((1, 8, 8), 10, generator())
    bare, pooled = copy.deepcopy(backdoored.model), copy.deepcopy(backdoored.model)
    bare.taps = ()
    pooled.taps = ("block1", "block2", "extra")
    pooled.extra = nn.AdaptiveAvgPool2d(1)
    pooled.block3.register_forward_hook(lambda module, args, out: pooled.extra(out) * 0 + out)
    short = NAD(**FIELDS, betas=(500.0, 1000.0))
    for how, model, word in (
        (SMALL, flat, "compares maps"),
        (SMALL, bare, "`taps`"),
        (SMALL, pooled, "one pixel"),
        (short, backdoored.model, "set betas to 3 numbers, for block1, block2, block3"),
    ):
        assert word in (how.refusal(model) or "")
        with pytest.raises(MethodRefused, match=word):
            how.clean(model, backdoored.trusted, Clues(), generator())


def test_maps_that_only_the_images_make_too_small_are_refused_before_any_training(backdoored: Any) -> None:
    deep = Cnn(width=2).build((1, 8, 8), 10, generator())
    deep.block3 = nn.Sequential(nn.MaxPool2d(2), deep.block3)  # 8x8 images leave one pixel, larger ones more
    assert SMALL.refusal(deep) is None
    assert "one pixel" in (SMALL.refusal_on(deep, backdoored.trusted) or "")
    assert SMALL.refusal_on(backdoored.model, backdoored.trusted) is None
    rng = generator()
    with pytest.raises(MethodRefused, match="one pixel"):
        SMALL.clean(deep, backdoored.trusted, Clues(), rng)
    assert torch.equal(rng.get_state(), generator().get_state())


class Strip(nn.Module):
    """One map of the whole width and no height, or the other way round."""

    taps = ("conv",)

    def __init__(self, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, kernel), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
        return out


def test_maps_with_one_pixel_in_common_are_refused(backdoored: Any) -> None:
    how = NAD(**{**FIELDS, "epochs": 1}, betas=(500.0,))
    assert distill(Strip((8, 1)), Strip((8, 1)), backdoored.trusted.fit, how, generator()).finite
    with pytest.raises(MethodRefused, match="one pixel in common"):
        distill(Strip((8, 1)), Strip((1, 8)), backdoored.trusted.fit, how, generator())
