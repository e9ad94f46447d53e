"""Filter a Ray Dataset: ``python ray_filter.py [MODEL [ACTORS]]``; by default one actor, the lab's model and drawings.

Each actor holds the model; one that dies is restarted, and its rows are judged again. With GPUs: ``gpus=1``.
"""

import sys

import numpy as np
import ray

from gazeguard.filtering.ray import ray_filter
from gazeguard.lab import Sample, samples


def false_caption(sample: Sample) -> str:
    """A caption in the words of the lab's model that names what is not there."""
    return sample.turns[0].answer.replace(sample.drawing.objects[0].noun, "skull", 1)


def main(model: str = "lab", actors: str | int = 1) -> list[dict]:
    drawn = samples("test", 3, seed=7)
    dataset = ray.data.from_items([{"image": np.asarray(s.image), "caption": false_caption(s)} for s in drawn])
    filtered = ray_filter(dataset, model, actors=int(actors), rows=64, batch_size=8)
    rows = filtered.select_columns(["caption", "gaze_verdict", "gaze_reason"]).take_all()
    for row in rows:
        print(row["gaze_verdict"], row["caption"], row["gaze_reason"], sep="\t")
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
