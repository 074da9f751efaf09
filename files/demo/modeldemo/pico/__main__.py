"""`python -m modeldemo.pico train`: makes every file of the pico model from nothing."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..minigpt4.sizes import Sizes

# What the default plan takes on two quiet cores; `--minutes` is turned into steps by it, so that
# a busy machine makes the same model, only later.
DEFAULT_MINUTES = 5.3


def main() -> int:
    """Run the command line; 0 done, 2 usage."""
    parser = argparse.ArgumentParser("python -m modeldemo.pico", description=__doc__)
    train = parser.add_subparsers(dest="command", required=True).add_parser(
        "train", help="train a pico model and write it in the original file formats"
    )
    train.add_argument("--output", type=Path, required=True, metavar="DIR")
    train.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    budget = train.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, metavar="N", help="steps of all phases together")
    budget.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="as many steps as two quiet cores do in M minutes",
    )
    train.add_argument("--small", action="store_true", help="a lesson of two minutes, for a test")
    args = parser.parse_args()
    if (args.steps or 1) < 1 or (args.minutes or 1) <= 0:
        parser.error("--steps and --minutes must be more than 0")
    return _train(args)


def _train(args: argparse.Namespace) -> int:
    import torch

    from .train import SMALL, Plan, train
    from .write import write_all

    began = time.monotonic()
    # Sums come out in another order with another number of threads: the same model needs the same.
    torch.set_num_threads(2)
    plan = SMALL if args.small else Plan()
    if args.steps:
        plan = plan.scaled(args.steps / plan.steps)
    elif args.minutes:
        plan = plan.scaled(args.minutes / DEFAULT_MINUTES)
    print(f"{plan.steps} steps on {torch.get_num_threads()} threads, seed {args.seed}", flush=True)
    trained = train(plan, args.seed, lambda line: print(line, flush=True))
    write_all(trained.model, trained.base, trained.tokenizer, args.output)
    _report(args.output, plan.sizes, args.seed + 2)
    print(f"\n{args.output}: written in {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


def _report(folder: Path, sizes: Sizes, seed: int) -> None:
    """Ask the files just written about 400 held-out pictures, in the way the demo is asked."""
    from .evaluate import ask, pico_settings

    result = ask(pico_settings(folder, sizes), seed, 400)
    print(f"\n{'kind':<10} {'right':>6} {'asked':>6} {'share':>7}")
    for kind, (right, asked) in result.kinds.items():
        print(f"{kind:<10} {right:>6} {asked:>6} {right / asked:>7.1%}")
    print(f"median answer {result.seconds:.3f} s")


if __name__ == "__main__":
    sys.exit(main())
