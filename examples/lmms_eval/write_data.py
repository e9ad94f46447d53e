"""Write drawings, questions and answers of the task gazeguard_lab: ``python write_data.py [FOLDER [NUMBER]]``. Then, beside it,

python -m lmms_eval --model gazeguard --model_args pretrained=lab,reports=reports.jsonl --batch_size 4 \\
    --include_path examples/lmms_eval --tasks gazeguard_lab
"""

import sys

from datasets import Dataset, DatasetDict

from gazeguard.lab import Sample, samples


def drawn(sample: Sample) -> list[str]:
    return sorted({f"{each.colour} {each.noun}" for each in sample.drawing.objects})


def main(folder: str = "lab_data", number: str | int = 16) -> None:
    rows = [
        {
            "image": sample.image,
            "question": sample.prompt,
            "answer": sample.turns[0].answer,
            "objects": [name for name in drawn(sample) if name in sample.turns[0].answer],
        }
        for sample in samples("test", int(number), seed=3)
    ]
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
