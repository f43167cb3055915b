"""Print prompts in words that training does not show, spread evenly over a data set: none is picked.

python -m model.data emoji --size 128
python examples/unseen_prompts.py data/emoji128.npz 40 > prompts.txt
python -m model.sample model/zoo/emoji --prompts prompts.txt --columns 10 -o prompts.png
"""

import sys

import numpy as np

from ditserve.model.data.texts import wordings_of


def unseen_prompts(captions: np.ndarray, count: int) -> list[str]:
    """Return the first wording that is kept from training, of `count` of the captions that have one."""
    kept = [unseen[0] for _, unseen in map(wordings_of, captions.tolist()) if unseen]
    return [kept[k * len(kept) // count] for k in range(min(count, len(kept)))]


if __name__ == "__main__":
    print(*unseen_prompts(np.load(sys.argv[1])["captions"], int(sys.argv[2])), sep="\n")
