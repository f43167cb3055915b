"""`python -m model.prune MODEL --data FILE --heads 0.33 --mlp 0.5 -o BUNDLE`: remove heads and MLP channels.

The least important ones are removed. Every block loses as many, so an ordinary, smaller network remains: it
is described, exported and served like any other. Importance is measured on training pictures
(`model.prune.importance`). With `--tokens`, every block computes a share of the tokens together with others
that are like them (`model.nets.token_merging`). Beside the bundle of weights stands recover.json, the
configuration of the training that makes up for the loss, with the whole model as its teacher; edit it as you
like:

    python -m model.train --config BUNDLE/recover.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ditserve.commands import command_line
from ditserve.model.prune.pruned_bundle import PruneOptions, write_pruned_bundle
from ditserve.model.spec.command_line import count, guarded, named_path, positive, share


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return 0, or 2 after a mistake, which is reported in one sentence."""
    parser = argparse.ArgumentParser(
        prog=command_line("model.prune"),
        description="Take away the heads and MLP channels that matter least.",
    )
    parser.add_argument("model", type=named_path, help="a bundle of a DiT, or a training run")
    parser.add_argument("-o", "--out", type=named_path, required=True, help="folder of the smaller bundle")
    parser.add_argument("--data", type=named_path, required=True, help="the data it was trained on")
    parser.add_argument(
        "--heads", type=share, default=0.0, help="share of every block's heads to take away (0)"
    )
    parser.add_argument(
        "--mlp", type=share, default=0.0, help="share of every block's MLP channels to take away (0)"
    )
    parser.add_argument(
        "--tokens", type=share, default=0.0, help="share of the tokens to merge into others (0)"
    )
    parser.add_argument("--pictures", type=positive, default=256, help="to measure importance on (256)")
    parser.add_argument("--seed", type=count, default=0, help="of the pictures' choice and noise (0)")
    options = parser.parse_args(arguments)
    pruning = PruneOptions(options.heads, options.mlp, options.tokens, options.pictures, options.seed)
    return guarded(
        "model.prune",
        lambda: print(write_pruned_bundle(options.model, options.data, options.out, pruning)),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
