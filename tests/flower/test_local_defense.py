"""A local defense in a ClientApp of somebody's own, with a real Flower context."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from sklearn.datasets import load_digits

import fedbd.flower
from fedbd.data.digest import samples_digest
from fedbd.defenses.local.abl import ABL
from fedbd.errors import MethodRefused, UserError
from fedbd.flower import local_defense
from fedbd.flower.arrays import view_all
from fedbd.flower.compat import acting_as
from fedbd.flower.local_defense import COUNT, MEMORY, generator
from fedbd.models.cnn import Cnn
from fedbd.params import flatten
from fedbd.training import TrainingPlan
from fedbd.types import Samples

PLAN = TrainingPlan(epochs=1, batch_size=32, lr=0.05)
DEFENSE = ABL(isolate_after=2, ratio=0.05, confidence=None)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data():
    raw = load_digits(n_class=4)
    images = torch.from_numpy(np.rint(raw.images[:120] * 255 / 16).astype(np.uint8))[:, None]
    return Samples(images.contiguous(), torch.from_numpy(raw.target[:120].astype(np.int64)))


def net():
    return Cnn(width=4).build((1, 8, 8), 4, torch.Generator().manual_seed(0))


def context(**node_config):
    return Context(run_id=1, node_id=77, node_config=node_config, state=RecordDict(), run_config={})


def bits(arrays):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def test_three_participations_equal_direct_use(data):
    flower, direct, memory = net(), net(), {}
    ctx = context(**{"partition-id": 5})
    for participation in (1, 2, 3):
        notes = local_defense(DEFENSE, flower, data, ctx, plan=PLAN, seed=9)
        memory, expected = DEFENSE.fit(direct, data, PLAN, memory, generator(ctx, participation, 9))
        assert notes == expected
        assert flatten(flower).tobytes() == flatten(direct).tobytes()
        assert bits(view_all(ctx.state[MEMORY])) == bits(memory)
        assert dict(ctx.state[COUNT]) == {"participations": participation, "data": samples_digest(data)}
        assert isinstance(ctx.state[MEMORY], ArrayRecord)
        assert isinstance(ctx.state[COUNT], ConfigRecord)
    assert notes["stage"] == "unlearn"
    assert {array.dtype.str for array in memory.values()} == {"<i8", "<f8", "|b1"}


def test_arrays_need_no_pickle(data):
    ctx = context()
    local_defense(DEFENSE, net(), data, ctx, plan=PLAN)
    for name, array in ctx.state[MEMORY].items():
        assert array.stype == "numpy.ndarray"
        assert array.numpy().tobytes() == view_all(ctx.state[MEMORY])[name].tobytes()  # Flower reads what we wrote


def test_pairs_of_tensors_are_the_same_samples(data):
    weights = []
    for given in (
        data,
        (data.images, data.labels),
        (data.images.float() / 255, data.labels.to(torch.int32)),
        (data.images.double() / 255, data.labels.to(torch.uint8)),
    ):
        model = net()
        local_defense(DEFENSE, model, given, context(), plan=PLAN)
        weights.append(flatten(model).tobytes())
    assert len(set(weights)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_become_the_levels_that_they_came_from(dtype):
    class Looking:
        def fit(self, model, data, plan, memory, rng):
            seen.append(data.images.flatten().tolist())
            return {}, {}

    seen, levels = [], torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    off = torch.full(levels.shape, 1e-4, dtype=dtype)
    images = (levels.to(dtype) / 255 - off).clamp(min=0)
    local_defense(Looking(), net(), (images, torch.zeros(4, dtype=torch.int64)), context())
    assert seen == [list(range(256))]


def test_seed_client_and_participation_decide_the_draws():
    def draws(ctx, participation, seed):
        return tuple(torch.randint(1 << 30, (4,), generator=generator(ctx, participation, seed)).tolist())

    one, other, without = context(**{"partition-id": 1}), context(**{"partition-id": 2}), context()
    found = [draws(one, 1, 0), draws(one, 2, 0), draws(one, 1, 1), draws(other, 1, 0), draws(without, 1, 0)]
    assert len(set(found)) == 5
    assert draws(context(**{"partition-id": 1}), 1, 0) == found[0]


def test_a_defense_may_forget(data):
    class Forgetful:
        def fit(self, model, data, plan, memory, rng):
            seen.append({name: array.tolist() for name, array in memory.items()})
            assert all(array.flags.writeable for array in memory.values())
            return ({"a": np.arange(3)} if len(seen) == 1 else {}), {}

    seen, ctx = [], context()
    for _ in range(3):
        local_defense(Forgetful(), net(), data, ctx)
    assert seen == [{}, {"a": [0, 1, 2]}, {}]


class Refusing:
    def fit(self, model, data, plan, memory, rng):
        raise MethodRefused("no")


@pytest.mark.parametrize(
    ("defense", "rows", "error"),
    [
        (DEFENSE, torch.arange(119), UserError),
        (DEFENSE, torch.arange(119, -1, -1), UserError),
        (Refusing(), torch.arange(120), MethodRefused),
    ],
    ids=["fewer samples", "another order", "the defense's own"],
)
def test_after_an_error_the_state_is_what_it_was(defense, rows, error, data):
    ctx, model = context(), net()
    ctx.state["mine"] = ConfigRecord({"kept": 1})
    local_defense(DEFENSE, model, data, ctx, plan=PLAN)
    before = bits(view_all(ctx.state[MEMORY])), dict(ctx.state[COUNT])
    with pytest.raises(error, match=r"no|the same samples in the same order"):
        local_defense(defense, model, data.subset(rows), ctx, plan=PLAN)
    assert (bits(view_all(ctx.state[MEMORY])), dict(ctx.state[COUNT])) == before
    assert dict(ctx.state["mine"]) == {"kept": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, y: (x[:, 0], y), "images .N, C, H, W."),
        (lambda x, y: (x, y[:5]), "images .N, C, H, W."),
        (lambda x, y: (x[:0], y[:0]), "N at least 1"),
        (lambda x, y: (x.float(), y), "first layer"),
        (lambda x, y: (x / 255 - 0.5, y), "first layer"),
        (lambda x, y: (x / 255 * float("nan"), y), "float images"),
        (lambda x, y: (x.int(), y), "uint8 or float"),
        (lambda x, y: (x, y.float()), "integer type"),
        (lambda x, y: (x.numpy(), y.numpy()), "two tensors, images and labels, got tuple of ndarray, ndarray"),
        (
            lambda x, y: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y)),
            "got DataLoader; of a data set",
        ),
    ],
)
def test_refuses_data_that_it_would_misread(change, says, data):
    ctx = context()
    with pytest.raises(UserError, match=says):
        local_defense(DEFENSE, net(), change(data.images, data.labels), ctx)
    assert len(ctx.state) == 0


@pytest.mark.parametrize(
    ("model", "labels", "says"),
    [
        (lambda: net().double(), None, r"hand it model\.float\(\)"),
        (lambda: Cnn(width=4).build((3, 8, 8), 4, torch.Generator()), None, "does not take images"),
        (net, 10, "the labels are 10 to 13, and the model's classes 0 to 3"),
        (net, -1, "the labels are -1 to 2"),
    ],
)
def test_refuses_a_model_of_other_data(model, labels, says, data):
    ctx = context()
    with pytest.raises(MethodRefused, match=says):
        local_defense(DEFENSE, model(), (data.images, data.labels + (labels or 0)), ctx)
    assert len(ctx.state) == 0


def test_refuses_a_plan_that_is_none(data):
    with pytest.raises(UserError, match="plan: must be a TrainingPlan, got dict"):
        local_defense(DEFENSE, net(), data, context(), plan={"epochs": 1})


def test_in_a_train_function_as_documented(data):
    def train(message, context):
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        notes = local_defense(DEFENSE, model, (data.images, data.labels), context)
        reply = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(data), "loss": notes["loss"]}),
        }
        return Message(RecordDict(reply), reply_to=message)

    ctx = context(**{"partition-id": 0})
    with acting_as(1, 77):
        message = Message(RecordDict({"arrays": ArrayRecord(net().state_dict())}), dst_node_id=77, message_type="train")
        reply = train(message, ctx)
    direct = net()
    DEFENSE.fit(direct, data, TrainingPlan(), {}, generator(ctx, 1))
    trained = reply.content["arrays"].to_torch_state_dict()
    assert all(torch.equal(entry, trained[name]) for name, entry in direct.state_dict().items())


def test_the_package_exports_the_function_and_loads_nothing_heavy():
    assert callable(fedbd.flower.local_defense)
    code = "import sys, fedbd.flower.worker_main\nprint([n for n in ('torch', 'numpy', 'flwr') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    code = "import fedbd.flower.local_defense\nimport fedbd.flower\nprint(callable(fedbd.flower.local_defense))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "True"
