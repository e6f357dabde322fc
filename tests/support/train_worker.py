"""One rank that trains several recipes one after the other: starting Python once is most of a small run's time.

train_worker.py RECIPE.json...
"""

import json
import os
import sys
import warnings

import torch.distributed as dist

from pairtile.engine.recipe import parse_recipe
from pairtile.engine.train import train

warnings.filterwarnings("ignore")
for path in sys.argv[1:]:
    with open(path) as file:
        train(parse_recipe(json.load(file)))
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo threads may outlive the group
