"""Fine-tune an encoder on a labelled set, beside the same architecture from scratch.

python launch/finetune.py encoder.checkpoint=runs/demo dataset.path=DIR output.dir=runs/finetune
torchrun --nproc-per-node 2 launch/finetune.py --config FILE.yaml --resume auto

Results are in output.dir/scores.json, each run's curve and best weights in output.dir/runs. All keys: docs/downstream.md.
"""

import sys

from mpmae.eval.finetune import FinetuneConfig, finetune
from mpmae.eval.launcher import launch


def run(config: FinetuneConfig, resume: bool) -> None:
    """One evaluation."""
    finetune(config, resume=resume)


if __name__ == "__main__":
    sys.exit(launch(__doc__, FinetuneConfig, run))
