"""iDDPM, the diffusion model that the transformer is compared with (Nichol & Dhariwal 2021).

``config`` defines a model, ``unet`` is the network, ``schedule`` and ``diffusion`` the process and its losses,
``sampling`` and ``guidance`` make images of a class. ``training`` and ``recipes`` train it, ``checkpoint`` keeps it,
``sampler`` and ``generate`` make folders of images: by the same commands, data and files as the transformer.
"""

from retinar.bench.baselines.iddpm.config import IDDPM_SIZES, IDDPMConfig, iddpm_config
from retinar.bench.baselines.iddpm.diffusion import Bound, Diffusion, Losses, Prediction
from retinar.bench.baselines.iddpm.guidance import Denoiser, denoiser, drop_labels
from retinar.bench.baselines.iddpm.sampling import Step, ddim_sample, p_sample, sample, trajectory
from retinar.bench.baselines.iddpm.unet import UNet, load_weights

__all__ = [
    "IDDPM_SIZES",
    "Bound",
    "Denoiser",
    "Diffusion",
    "IDDPMConfig",
    "Losses",
    "Prediction",
    "Step",
    "UNet",
    "ddim_sample",
    "denoiser",
    "drop_labels",
    "iddpm_config",
    "load_weights",
    "p_sample",
    "sample",
    "trajectory",
]
