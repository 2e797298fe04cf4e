"""retinar train: a tokenizer on photographs, a transformer on their codes, or the diffusion model beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from retinar.engine.progress import Progress


@dataclass
class Train:
    """Train a tokenizer or a diffusion model (iddpm) on prepared photographs, or a transformer (gpt) on codes.

    Example: retinar train gpt --recipe fundus-cpu --data codes --tokenizer runs/vq/model --out runs/gpt
    On several GPUs: torchrun --nproc-per-node 8 -m retinar train gpt --set parallel=fsdp ...
    """

    what: Annotated[Literal["tokenizer", "gpt", "iddpm"], tyro.conf.Positional]
    """What to train."""
    recipe: str | None = None
    """The complete config to start from; with --resume by default the run's own."""
    data: Path | None = None
    """tokenizer, iddpm: the folder that `retinar prepare` wrote. gpt: the codes that `retinar encode` wrote (or a
    folder with train/ and valid/ codes).
    """
    out: Path | None = None
    """The run's folder: config, metrics, checkpoints, and the finished model in model/."""
    set: tuple[str, ...] = ()
    """Changes to the recipe, key=value (--set optim.lr=2e-4 batch_size=16); --print-config shows every key."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint."""
    init: Path | None = None
    """A checkpoint to start from: our folder, or an upstream file."""
    tokenizer: Path | None = None
    """gpt: the tokenizer that made the codes, to be put into the exported model so that it can sample by itself."""
    valid: Path | None = None
    """gpt: codes of the validation split."""
    max_minutes: float | None = None
    """Save, export and stop after so many minutes; --resume goes on."""
    print_config: bool = False
    """Print the complete config as JSON and do nothing else."""
    plan: bool = False
    """gpt: print what each parallel mode would need on each GPU, and which settings fit, and do nothing else."""
    gpus: int = 8
    """--plan: GPUs in all."""
    gpu_memory: float = 80.0
    """--plan: memory of a GPU, GiB."""

    def run(self, progress: Progress) -> dict[str, object]:
        from retinar.engine.errors import InputError
        from retinar.train.config import apply_overrides

        if self.max_minutes is not None and not self.max_minutes > 0:
            raise InputError(f"Expected --max-minutes above 0, found {self.max_minutes}: leave it out for no limit.")
        config = apply_overrides(self._start(), self.set)
        if self.print_config:
            return self._config(config)
        if self.plan:
            return self._plan(config, progress)
        if self.data is None or self.out is None:
            missing = "--data" if self.data is None else "--out"
            raise InputError(f"Expected {missing} for training, found none: see `retinar train --help`.")
        train = {"gpt": self._gpt, "tokenizer": self._tokenizer, "iddpm": self._iddpm}[self.what]
        result = train(config, progress)
        return {
            "run": str(self.out),
            "step": result.step,
            "steps": result.steps,
            "ended": result.reason,
            **{name: value for name, value in result.values.items() if name != "step"},
            "model": str(result.model) if result.model else None,
        }

    def _start(self) -> Any:
        """The config before --set: the recipe's, or the run's own."""
        from retinar.engine.errors import InputError
        from retinar.train.config import from_dict
        from retinar.train.state import read_run

        kind, known, recipe = _recipes(self.what)
        if self.recipe is not None:
            return recipe(self.recipe)
        if self.resume and self.out is not None:
            stored = read_run(self.out)
            if stored["task"] != self.what:
                raise InputError(
                    f"Expected a {self.what} run in {self.out}, found a {stored['task']} run: check --out."
                )
            return from_dict(kind, stored["config"])
        raise InputError(f"Expected --recipe, found none: known are {', '.join(known)}.")

    def _config(self, config: Any) -> dict[str, object]:
        """The complete config, as the codes in --data (if given) fit it."""
        from retinar.train.config import to_dict

        return to_dict(self._fitted(config) if self.what == "gpt" and self.data is not None else config)

    def _plan(self, config: Any, progress: Progress) -> dict[str, object]:
        """What the config would need on so many GPUs."""
        from retinar.engine.errors import InputError
        from retinar.train.plan import plan

        if self.what != "gpt":
            raise InputError(f"Expected --plan with `train gpt` only, found it with `train {self.what}`: leave it out.")
        return plan(self._fitted(config), gpus=self.gpus, gpu_memory=self.gpu_memory, progress=progress).to_dict()

    def _fitted(self, config: Any) -> Any:
        """The config of a transformer as the codes in --data fit it; what is said by hand wins."""
        from retinar.train.code_fit import default_codes, fit_to_codes
        from retinar.train.codes import CodeSet
        from retinar.train.config import apply_overrides

        if self.data is None or not config.fit_to_codes:
            return config
        return apply_overrides(fit_to_codes(config, CodeSet(default_codes(self.data)[0])), self.set)

    def render(self, summary: Mapping[str, Any]) -> str:
        """The summary as text; a config as JSON; a plan as a table."""
        from retinar import ui

        if self.plan:
            from retinar.train.plan_table import table

            return table(summary)
        return json.dumps(summary, indent=2) if self.print_config else "\n".join(ui.lines(summary))

    def _gpt(self, config: Any, progress: Progress) -> Any:
        from retinar.train.code_fit import default_codes
        from retinar.train.gpt import train_gpt

        assert self.data is not None and self.out is not None
        data, valid = default_codes(self.data)
        result = train_gpt(
            self._fitted(config),
            data,
            self.out,
            valid=self.valid or valid,
            tokenizer=self.tokenizer,
            init=self.init,
            resume=self.resume,
            max_minutes=self.max_minutes,
            progress=progress,
        )
        if self.tokenizer is None and result.model:
            print("no tokenizer in the model: `retinar generate` will need --tokenizer.", file=sys.stderr, flush=True)
        return result

    def _tokenizer(self, config: Any, progress: Progress) -> Any:
        from retinar.train.tokenizer import train_tokenizer

        return self._on_photographs(train_tokenizer, config, progress)

    def _iddpm(self, config: Any, progress: Progress) -> Any:
        from retinar.bench.baselines.iddpm.training import train_iddpm

        return self._on_photographs(train_iddpm, config, progress)

    def _on_photographs(self, train: Callable[..., Any], config: Any, progress: Progress) -> Any:
        from retinar.engine.errors import InputError

        for flag, value in (("--tokenizer", self.tokenizer), ("--valid", self.valid)):
            if value is not None:
                raise InputError(
                    f"Expected {flag} with `train gpt` only, found it with `train {self.what}`: leave it out."
                )
        return train(
            config,
            self.data,
            self.out,
            init=self.init,
            resume=self.resume,
            max_minutes=self.max_minutes,
            progress=progress,
        )


def _recipes(what: str) -> tuple[type, Mapping[str, Any], Callable[[str], Any]]:
    """Of what is to be trained: the class of its configs, its recipes, and how one is found."""
    from retinar.train import config, recipes

    if what == "gpt":
        return config.GPTTrainConfig, recipes.GPT_RECIPES, recipes.gpt_recipe
    if what == "tokenizer":
        return config.TokenizerTrainConfig, recipes.TOKENIZER_RECIPES, recipes.tokenizer_recipe
    from retinar.bench.baselines.iddpm import recipes as diffusion
    from retinar.bench.baselines.iddpm.train_config import IDDPMTrainConfig

    return IDDPMTrainConfig, diffusion.IDDPM_RECIPES, diffusion.iddpm_recipe
