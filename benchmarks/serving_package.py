"""A package of `lopro_fx.package` as an engine."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import lopro_fx
from benchmarks.serving_child import serve


class Package:
    """One sequence on the two programs of the package."""

    def __init__(self, path: str) -> None:
        self._generator = lopro_fx.load_package(path)

    def prefill(self, ids: list[int]) -> Any:
        self._generator.reset()
        return self._generator.prefill(torch.tensor([ids]))[0].numpy()

    def decode(self, token: int) -> Any:
        return self._generator.decode(torch.tensor([[token]]))[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    serve(Package(args.path), version=torch.__version__)


if __name__ == "__main__":
    main()
