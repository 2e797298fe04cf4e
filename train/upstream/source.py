"""A checkpoint to go on from or to start from: ours or LlamaGen's own, of its DDP or its FSDP training.

With an optimizer's state in it the training goes on at its step; without, it starts at step 0 from the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinar.engine.config import GPTConfig
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.upstream import Weights, read_upstream, unpickle
from retinar.train.gpt import GPTTask
from retinar.train.upstream.adamw import MOMENTS, Moments, by_name, packed, upstream_shapes
from retinar.train.upstream.fsdp_files import Shards

EMA, OURS, STEP = "ema.pth", "retinar.json", "resume_step.txt"
"""In a folder of FSDP training: the averages and what restarts exactly (both ours), and the step."""
EXTRA = "retinar"
"""The key in a ``.pt`` under which ours holds what OURS holds in a folder."""
_CLASSES = "cls_embedding.embedding_table.weight"


class Source:
    """What ``--gpt-ckpt`` and ``--gpt-resume`` name: a ``.pt``, or a folder with a ``consolidated.pth``.

    ``steps`` are done; ``resumes``: there is an optimizer to go on with. ``extra``: what ours keeps for an exact
    restart, {} in LlamaGen's own. Tensors stay in their files until :meth:`into` takes them. InputError for a file that
    cannot be read or is of another model than ``config``.
    """

    def __init__(self, path: Path, config: GPTConfig) -> None:
        self.path = path
        with torch.device("meta"):
            self._ours = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
        self._shapes = upstream_shapes(self._ours)
        self.fresh_classes = False
        self._weights = self._checked(read_upstream(path).weights)
        if path.is_dir():
            average = read_upstream(path / EMA).weights if (path / EMA).is_file() else None
            self._optimizer: Shards | dict[str, Moments] = Shards(path, self._shapes)
            steps, self.extra = _folder_notes(path)
        else:
            content = unpickle(path)
            average = read_upstream(path, ema=True).weights if isinstance(content.get("ema"), Mapping) else None
            stored = content.get("optimizer")
            self._optimizer = {} if stored is None else by_name(stored, self._shapes, str(path))
            steps = content.get("steps")
            extra = content.get(EXTRA)
            self.extra = dict(extra) if isinstance(extra, Mapping) else {}
        self._averages = None if average is None else self._checked(average)
        self.resumes = bool(self._optimizer)
        if self.resumes and self.fresh_classes:
            raise self._other(_CLASSES, self._weights)
        self.steps = self._steps(steps) if self.resumes else 0

    def _steps(self, stated: object) -> int:
        """As stated, else as the file's name has it (upstream does the same), else as AdamW counted."""
        if isinstance(stated, int) and stated >= 0:
            return stated
        if self.path.stem.isdigit():
            return int(self.path.stem)
        return int(self._optimizer["output.weight"]["step"])

    def _checked(self, weights: Weights) -> Weights:
        """All of them are there, in their shapes; but a fresh start may bring other classes, whose table stays as it is
        then."""
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        wrong = [name for name in {**self._shapes, **found} if found.get(name) != self._shapes.get(name)]
        table = found.get(_CLASSES, ())
        if wrong == [_CLASSES] and table[1:] == self._shapes[_CLASSES][1:]:
            self.fresh_classes = True
        elif wrong:
            raise self._other(wrong[0], weights)
        return weights

    def _other(self, name: str, weights: Weights) -> InputError:
        found = _shape(tuple(weights[name].shape) if name in weights else None)
        return InputError(
            f"Expected {name} {_shape(self._shapes.get(name))} for the model asked for, found it {found} in "
            f"{self.path}: set --gpt-model, --vocab-size and --num-classes as that training had them."
        )

    @property
    def has_averages(self) -> bool:
        """Whether there are averaged weights (``--ema``)."""
        return self._averages is not None

    def into(self, task: GPTTask) -> None:
        """Spread weights, averages (the weights where there are none) and moments over the task's processes, one
        parameter after another. All processes call it."""
        for part in self._parts():
            task.load_full_state(part)

    def _parts(self) -> Iterator[dict[str, Any]]:
        averages = self._weights if self._averages is None else self._averages
        for name in self._ours:
            if name == _CLASSES and self.fresh_classes:
                continue
            part: dict[str, Any] = {
                "model": {name: packed(name, self._weights.__getitem__)},
                "ema": {name: packed(name, averages.__getitem__)},
            }
            if self.resumes:
                part["optimizer"] = {name: self._moments(name)}
            yield part

    def _moments(self, name: str) -> Moments:
        found: dict[str, Moments] = {}

        def fetch(own: str, key: str) -> Tensor:
            try:
                if own not in found:
                    found[own] = self._optimizer[own]
                tensor = found[own][key]
            except KeyError:
                raise InputError(
                    f"Expected the optimizer's state for {own} in {self.path}, found none: give another checkpoint."
                ) from None
            if tensor.shape != self._shapes[own]:
                raise InputError(
                    f"Expected {key} of {own} {_shape(self._shapes[own])} in {self.path}, found it "
                    f"{_shape(tuple(tensor.shape))}: give another checkpoint."
                )
            return tensor

        whole = {key: packed(name, lambda own, key=key: fetch(own, key)) for key in MOMENTS}  # type: ignore[misc]
        return {"step": next(iter(found.values()))["step"].float(), **whole}


def _folder_notes(path: Path) -> tuple[int | None, dict[str, Any]]:
    """The step and what ours keeps, as far as they are there. InputError for damage."""
    steps, extra = None, {}
    try:
        if (path / STEP).is_file():
            steps = int((path / STEP).read_text(encoding="utf-8").strip())
        if (path / OURS).is_file():
            extra = json.loads((path / OURS).read_text(encoding="utf-8"))
        if not isinstance(extra, dict):
            raise ValueError(f"{OURS} holds something else")
    except ValueError as error:
        raise InputError(
            f"Expected a whole number in {STEP} and ours in {OURS} of {path}, found {error}: copy the folder again."
        ) from None
    return steps, extra


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"
