"""The tables of docs/costs.md and docs/peers.md, made anew.

python benchmarks/costs.py             # prints them, in about ten minutes on two cores
python benchmarks/costs.py --write     # and puts them into the pages
python benchmarks/costs.py --large     # only the two largest sizes: twenty minutes, 10 GB of memory; also with --write

Times are those of one core on one thread, as the operating system counts them for the process: what else the machine does counts
less than with a clock.
"""

import sys
import warnings

import exact_pass
import peers
import scale
import torch
from pages import publish

TABLES = {
    "machine": peers.machine,
    "sizes": lambda: scale.sizes_table(scale.SIZES),
    "growth": lambda: scale.growth_table(scale.Case(4000, 1024, 2 * scale.BATCH)),
    "layers": exact_pass.layers_table,
    "memory": exact_pass.memory_table,
    "passes": exact_pass.passes_table,
    "tokens": exact_pass.tokens_table,
    "pairs": scale.pairs_table,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if "--large" in sys.argv:
        publish("costs.md", {"large": lambda: scale.sizes_table(scale.LARGE)})
    else:
        publish("costs.md", TABLES)
        publish("peers.md", peers.TABLES)
