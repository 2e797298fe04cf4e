"""LlamaGen's ``autoregressive/train/train_c2i.py``: class-conditional training, data-parallel.

torchrun --nproc_per_node=8 -m retinar.train.upstream.train_c2i --cloud-save-path CLOUD --code-path CODES
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retinar.train.upstream.checkpoints import PtStore, ddp_folders
from retinar.train.upstream.flags import exit_code
from retinar.train.upstream.gpt_flags import gpt_parser
from retinar.train.upstream.training import train


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code."""

    def work() -> int:
        args = gpt_parser("train_c2i", (__doc__ or "").splitlines()[0], fsdp=False).parse_args(argv)
        return train(args, ddp_folders, PtStore, args.gpt_ckpt)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
