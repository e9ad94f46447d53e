"""Watch a call of ``model.generate``: ``python wrap_generate.py [IMAGE [MODEL [ARTIFACTS]]]``; by default the lab's.

The model writes what it writes without GazeGuard (policy "mark"); the report says which phrases the image does not support.
"""

import sys

from PIL import Image

from gazeguard import GazeGuard
from gazeguard.lab import samples


def main(path: str | None = None, name: str = "lab", artifacts: str | None = None) -> None:
    image = samples("test", 2, seed=0)[0].image if path is None else Image.open(path).convert("RGB")
    guard = GazeGuard.from_pretrained(name, artifacts=artifacts)
    model, processor = guard.model, guard.processor

    content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=prompt, return_tensors="pt").to(model.device)
    with guard.watch():  # inside, model.generate is recorded; outside, the model is what it was
        ids = model.generate(**inputs, max_new_tokens=120, do_sample=False)
    print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip())

    (report,) = guard.reports
    print(report)  # the verdict, and each flagged phrase with its risk and reasons


if __name__ == "__main__":
    main(*sys.argv[1:])
