"""Filter a Hugging Face dataset: ``python datasets_map.py [MODEL [ARTIFACTS]]``; by default the lab's model and drawings.

A `CaptionFilter` is a function of batches, as ``datasets.map`` wants it. The result columns come behind the dataset's own.
"""

import sys

from datasets import Dataset

from gazeguard import CaptionFilter
from gazeguard.lab import Sample, samples


def false_caption(sample: Sample) -> str:
    """A caption in the words of the lab's model that names what is not there."""
    return sample.turns[0].answer.replace(sample.drawing.objects[0].noun, "skull", 1)


def main(model: str = "lab", artifacts: str | None = None) -> Dataset:
    drawn = samples("test", 3, seed=7)
    dataset = Dataset.from_dict(
        {"image": [sample.image for sample in drawn], "caption": [false_caption(sample) for sample in drawn]}
    )
    caption_filter = CaptionFilter(model=model, artifacts=artifacts, batch_size=8)
    filtered = dataset.map(caption_filter, batched=True, batch_size=64)
    for row in filtered:
        print(row["gaze_verdict"], row["caption"], row["gaze_reason"], sep="\t")
    return filtered.filter(lambda verdict: verdict == "pass", input_columns="gaze_verdict")


if __name__ == "__main__":
    main(*sys.argv[1:])
