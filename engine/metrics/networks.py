"""A torchvision network for classifying photographs: what it is (a recipe), and building it with or without weights."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from retinar.engine.errors import InputError
from retinar.engine.metrics.inception import INSTALL
from retinar.engine.torchvision_shim import import_torchvision
from retinar.engine.weights import read_file


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a classifier beside its images and its seed.

    ``weights`` is a torchvision state dict of ``network`` (.pth or .safetensors), None for random ones. ``checks``: how
    often, in the second half of the steps, the validation photographs choose the state to keep.
    """

    network: str
    size: int
    steps: int
    batch_size: int
    lr: float
    bfloat16: bool = False
    weights: Path | None = None
    weight_decay: float = 0.05
    checks: int = 5


@dataclass(frozen=True)
class Plan:
    """What is affordable on a kind of device: what a recipe does not say."""

    network: str
    size: int
    steps: int
    batch_size: int
    lr: float
    bfloat16: bool


PLANS = {
    "cpu": Plan("mobilenet_v3_small", 128, 300, 32, 3e-3, False),
    "cuda": Plan("resnet18", 224, 2000, 64, 1e-3, True),
}
LR_GIVEN = 3e-4
"""Peak learning rate of AdamW for given weights; a plan's is for random ones."""


def plan_recipe(
    device: torch.device,
    *,
    network: str | None = None,
    size: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    bfloat16: bool | None = None,
    weights: Path | str | None = None,
) -> Recipe:
    """What is given, and the device's plan for the rest. Raises InputError for numbers that no training has."""
    plan = PLANS[device.type]
    recipe = Recipe(
        network=network or plan.network,
        size=plan.size if size is None else size,
        steps=plan.steps if steps is None else steps,
        batch_size=plan.batch_size if batch_size is None else batch_size,
        lr=(LR_GIVEN if weights else plan.lr) if lr is None else lr,
        bfloat16=plan.bfloat16 if bfloat16 is None else bfloat16,
        weights=Path(weights) if weights else None,
    )
    if min(recipe.size, recipe.steps) < 1 or recipe.batch_size < 2 or not recipe.lr > 0:
        raise InputError(
            f"Expected at least 1 px, 1 step, batches of 2 and a learning rate above 0, found {recipe.size}, "
            f"{recipe.steps}, {recipe.batch_size} and {recipe.lr}: correct them."
        )
    return recipe


def build_network(recipe: Recipe, classes: int, seed: int = 0) -> nn.Module:
    """The network with a head for ``classes``, channels last, its new weights drawn from ``seed``.

    Raises InputError for a network that torchvision lacks or that does not take images of this size, and for a weight
    file that is missing, damaged or another network's.
    """
    try:
        import_torchvision()
        from torchvision import models
    except ImportError as error:
        raise InputError(
            f"Expected the package torchvision for classifiers, found none ({error}): {INSTALL}."
        ) from error
    if recipe.network not in models.list_models(module=models):
        raise InputError(
            f"Expected a classifier of torchvision.models (resnet18, mobilenet_v3_small, ...), "
            f"found {recipe.network!r}: choose one."
        )

    def build(outputs: int) -> nn.Module:
        return models.get_model(recipe.network, weights=None, num_classes=outputs)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        trial = torch.zeros(2, 3, recipe.size, recipe.size)
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            outputs = network.eval()(trial), network.train()(trial)
        if not all(isinstance(each, Tensor) for each in outputs):
            raise TypeError("it gives several outputs")
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise InputError(
            f"Expected a network for images of {recipe.size} px, found that {recipe.network} does not take them "
            f"({error}): choose another network or size."
        ) from error
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()  # of the trial
    if recipe.weights is not None:
        with torch.device("meta"):
            other = {name: tensor.shape for name, tensor in build(classes + 1).state_dict().items()}
        head = {name for name, tensor in network.state_dict().items() if tensor.shape != other[name]}
        _load(network, recipe, head)
    return network


def _load(network: nn.Module, recipe: Recipe, head: set[str]) -> None:
    """Put the file's weights into the network, all but those of ``head``."""
    path = Path(str(recipe.weights))
    advice = f"give a torchvision state dict of {recipe.network} (.pth or .safetensors), or none"
    if not path.is_file():
        raise InputError(f"Expected the classifier's weights in {path}, found no file: {advice}.")
    try:
        if path.suffix == ".safetensors":
            weights = {name: tensor.clone() for name, tensor in read_file(path)}
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:  # Lookup: of a text
        raise InputError(
            f"Expected the weights of {recipe.network} in {path}, found a damaged or another file: {advice}."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise InputError(f"Expected a state dict in {path}, found something else: {advice}.")
    own = network.state_dict()
    body = {name for name in own if name not in head}
    counters = {name for name in body if name.endswith("num_batches_tracked")}  # left out by some writers, not used
    missing = sorted(body - counters - set(weights))
    foreign = sorted(set(weights) - set(own))
    unlike = sorted(name for name in body & set(weights) if weights[name].shape != own[name].shape)
    for what, names in (("without", missing), ("with the foreign", foreign), ("of another shape in", unlike)):
        if names:
            some = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
            raise InputError(
                f"Expected the weights of {recipe.network} in {path}, found a file {what} {some}: {advice}."
            )
    network.load_state_dict({name: weights[name] for name in body & set(weights)}, strict=False)
