"""The names that a scenario may use, and where each method lives.

Literal tables on purpose: no import side effect can add or lose a method, and a reader sees all of them at once. A
third party writes ``package.module:Class`` in place of a name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fedbd.errors import FedBDError, Problem, ScenarioError

METHODS: dict[str, dict[str, str]] = {
    "data": {
        "digits": "fedbd.data.digits:Digits",
        "npz": "fedbd.data.npz:Npz",
        "image_parquet": "fedbd.data.image_parquet:ImageParquet",
        "image_folder": "fedbd.data.image_folder:ImageFolder",
        "cifar10": "fedbd.data.cifar:Cifar10",
        "cifar100": "fedbd.data.cifar:Cifar100",
        "mnist": "fedbd.data.idx_sets:Mnist",
        "fashion_mnist": "fedbd.data.idx_sets:FashionMnist",
        "emnist": "fedbd.data.idx_sets:Emnist",
        "gtsrb": "fedbd.data.gtsrb:Gtsrb",
        "generated": "fedbd.data.generated:Generated",
    },
    "partition": {
        "iid": "fedbd.data.partition_iid:Iid",
        "dirichlet": "fedbd.data.partition_dirichlet:Dirichlet",
        "shards": "fedbd.data.partition_shards:Shards",
        "pathological": "fedbd.data.partition_pathological:Pathological",
        "quantity": "fedbd.data.partition_quantity:Quantity",
        "natural": "fedbd.data.partition_natural:Natural",
        "flwr_datasets": "fedbd.data.partition_flwr_datasets:FlwrDatasets",
    },
    "model": {
        "cnn": "fedbd.models.cnn:Cnn",
        "mlp": "fedbd.models.mlp:Mlp",
        "mnistnet": "fedbd.models.mnistnet:MnistNet",
        "wrn16-1": "fedbd.models.wrn:Wrn",
        "resnet18": "fedbd.models.resnet:ResNet18",
        "preact_resnet18": "fedbd.models.preact_resnet:PreActResNet18",
        "vit": "fedbd.models.vit:Vit",
        "torchvision": "fedbd.models.torchvision_models:Torchvision",
    },
    "trigger": {
        "grid": "fedbd.attacks.grid_trigger:GridTrigger",
        "square": "fedbd.attacks.square_trigger:SquareTrigger",
        "four_corners": "fedbd.attacks.four_corners_trigger:FourCornersTrigger",
        "single_pixel": "fedbd.attacks.single_pixel_trigger:SinglePixelTrigger",
        "trojan_patch": "fedbd.attacks.trojan_patch_trigger:TrojanPatchTrigger",
        "blend": "fedbd.attacks.blend_trigger:BlendTrigger",
        "sig": "fedbd.attacks.sig_trigger:SigTrigger",
        "low_frequency": "fedbd.attacks.low_frequency_trigger:LowFrequencyTrigger",
        "wanet": "fedbd.attacks.wanet_trigger:WaNetTrigger",
        "object_overlay": "fedbd.attacks.object_overlay_trigger:ObjectOverlayTrigger",
    },
    "attack": {"badnets": "fedbd.attacks.badnets:BadNets"},
    "evasion": {
        "fgsm": "fedbd.attacks.fgsm:FGSM",
        "pgd": "fedbd.attacks.pgd:PGD",
        "cw": "fedbd.attacks.cw:CW",
    },
    "local_defense": {"abl": "fedbd.defenses.local.abl:ABL"},
    "central_defense": {"abl_central": "fedbd.defenses.local.abl_central:ABLCentral"},
    "secure_sum": {"ckks": "fedbd.crypto.ckks:Ckks"},
    "aggregation": {
        "mean": "fedbd.defenses.aggregation.mean:Mean",
        "norm_clip": "fedbd.defenses.aggregation.norm_clip:NormClip",
        "median": "fedbd.defenses.aggregation.median:Median",
        "masa": "fedbd.defenses.aggregation.masa:MASA",
    },
    "cleanup": {
        "rnp": "fedbd.defenses.cleanup.rnp:RNP",
        "rnp_label": "fedbd.defenses.cleanup.rnp_label:RNPLabel",
        "trigger_recovery": "fedbd.defenses.cleanup.trigger_recovery:TriggerRecovery",
        "linf_pruning": "fedbd.defenses.cleanup.linf_pruning:LinfPruning",
        "clp": "fedbd.defenses.cleanup.clp:CLP",
        "finetune": "fedbd.defenses.cleanup.finetune:FineTune",
        "nad": "fedbd.defenses.cleanup.nad:NAD",
        "fine_pruning": "fedbd.defenses.cleanup.fine_pruning:FinePruning",
        "flain": "fedbd.defenses.cleanup.flain:FLAIN",
    },
    "detection": {
        "rnp_unlearned": "fedbd.defenses.detection.rnp_unlearned:RNPUnlearned",
        "abl_isolation": "fedbd.defenses.detection.abl_isolation:ABLIsolation",
        "activation_clustering": "fedbd.defenses.detection.activation_clustering:ActivationClustering",
        "spectral_signatures": "fedbd.defenses.detection.spectral_signatures:SpectralSignatures",
        "strip": "fedbd.defenses.detection.strip:STRIP",
        "frequency": "fedbd.defenses.detection.frequency:Frequency",
        "kernel_density": "fedbd.defenses.detection.kernel_density:KernelDensity",
        "label_switching": "fedbd.defenses.detection.label_switching:LabelSwitching",
        "lid": "fedbd.defenses.detection.lid:LID",
        "model_mutation": "fedbd.defenses.detection.model_mutation:ModelMutation",
    },
    "strategy": {
        "fedavg": "flwr.serverapp.strategy:FedAvg",
        "fedavgm": "flwr.serverapp.strategy:FedAvgM",
        "fedadagrad": "flwr.serverapp.strategy:FedAdagrad",
        "fedadam": "flwr.serverapp.strategy:FedAdam",
        "fedyogi": "flwr.serverapp.strategy:FedYogi",
        "fedprox": "flwr.serverapp.strategy:FedProx",
    },
}
"""kind -> name -> ``module:Class``. The strategies are Flower's; only ``fedbd.flower`` resolves them."""

CLOSED = frozenset({"secure_sum"})
"""Kinds that take no third party's class: key agent and evaluator are built for the registered ones."""

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def near_miss(word: str, known: Sequence[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest known word, or the empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""


def either(words: Sequence[str]) -> str:
    """Return words as a choice: ``a``, ``a or b``, ``a, b or c``."""
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def choice(kind: str) -> str:
    """Return what may stand for a method of a kind: ``mean, median or package.module:Class``."""
    return either([*METHODS[kind], *([] if kind in CLOSED else ["package.module:Class"])])


def location(kind: str, name: str, path: str) -> str:
    """Return the ``module:Class`` of a method.

    Args:
        kind: A key of ``METHODS``.
        name: A registered name, or ``package.module:Class`` itself.
        path: Where the name stands in the scenario, for the message.

    Raises:
        ScenarioError: If the name is neither.
    """
    known = METHODS[kind]
    if name in known:
        return known[name]
    if PATH.fullmatch(name) and kind not in CLOSED:
        return name
    expected = f"must be {choice(kind)}"
    raise ScenarioError([Problem(path=path, expected=expected, got=repr(name), remedy=near_miss(name, list(known)))])


def resolve(kind: str, name: str, path: str) -> Any:
    """Return the class of a method (see ``location``), importing its module.

    Raises:
        ScenarioError: If the name is unknown, or a third party's module or class is not there or breaks.
        FedBDError: If one of fedbd's own cannot be imported: the installation is broken.
    """
    where = location(kind, name, path)
    module, _, attribute = where.partition(":")
    try:
        loaded = importlib.import_module(module)
        if hasattr(loaded, attribute):
            return getattr(loaded, attribute)
    except Exception as error:  # a third party's module may do anything
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        if name in METHODS[kind]:
            raise FedBDError(f"{kind} {name}: {module} cannot be imported: {reason}; see fedbd doctor") from error
        remedy = "check the spelling, and that PYTHONPATH leads there" if isinstance(error, ImportError) else ""
        problem = Problem(path=path, expected=f"must be importable ({reason})", got=repr(name), remedy=remedy)
        raise ScenarioError([problem]) from None
    classes = _classes(loaded)
    remedy = near_miss(attribute, classes) or f"classes there: {', '.join(classes) or 'none'}"
    problem = Problem(path=path, expected=f"must name a class in {module}", got=repr(name), remedy=remedy)
    raise ScenarioError([problem])


def _classes(module: ModuleType) -> list[str]:
    """Return the public classes of a module: those in its ``__all__``, else those that it defines itself."""
    listed = getattr(module, "__all__", None)
    found = inspect.getmembers(module, inspect.isclass)
    if listed is not None:
        return [name for name, _ in found if name in listed]
    return [name for name, cls in found if cls.__module__ == module.__name__ and not name.startswith("_")]


def class_names(kind: str) -> list[str]:
    """Return the names of the classes of a kind's registered methods, sorted."""
    return sorted(where.partition(":")[2] for where in METHODS[kind].values())


def class_named(kind: str, name: str, package: str) -> Any:
    """Return the class of a registered method by the class's own name: what a package's ``__getattr__`` asks for.

    Raises:
        AttributeError: If no registered method of the kind has a class of that name.
    """
    for where in METHODS[kind].values():
        module, _, attribute = where.partition(":")
        if attribute == name:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
