"""Filter a Ray Dataset: ``python ray_filter.py [MODEL [ACTORS]]``; by default one actor, the lab's model and drawings.

Each actor holds the model; one that dies is restarted, and its rows are judged again. With GPUs: ``gpus=1``.
"""

import sys

import numpy as np
import ray

from gazeguard.filtering.ray import ray_filter
from gazeguard.lab import samples

CAPTION = "There is a red star and a green skull."


def main(model: str = "lab", actors: str | int = 1) -> list[dict]:
    dataset = ray.data.from_items([{"image": np.asarray(s.image), "caption": CAPTION} for s in samples("test", 3, seed=7)])
    filtered = ray_filter(dataset, model, actors=int(actors), rows=64, batch_size=8)
    rows = filtered.select_columns(["caption", "gaze_verdict", "gaze_reason"]).take_all()
    for row in rows:
        print(row["gaze_verdict"], row["caption"], row["gaze_reason"], sep="\t")
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
