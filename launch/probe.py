"""Probe an encoder: kNN and linear classifiers on its features, beside baselines that learned nothing.

python launch/probe.py --config configs/eval/eurosat_probe.yaml dataset.path=DIR encoder.checkpoint=RUN
python launch/probe.py dataset.path=DIR encoder.checkpoint=RUN dataset.label_fractions=[0.01,0.1,1] output.dir=runs/probe
python launch/probe.py --resume auto --config configs/eval/eurosat_probe.yaml dataset.path=DIR encoder.checkpoint=RUN

output.dir gets results.md, results.png and scores.json. Without encoder.checkpoint the baselines are probed alone.

Exit status: 0 done, 2 an error that the message explains, 130 interrupted (--resume auto continues).
"""

import sys

from mpmae.eval.launcher import launch
from mpmae.eval.probe import probe
from mpmae.eval.probe_config import ProbeConfig

if __name__ == "__main__":
    sys.exit(launch(__doc__, ProbeConfig, lambda config, resume: probe(config, resume=resume)))
