"""Do the lab's gaze heads look at what is described? Mass on the described panel, the other heads, and chance.

Measured on fresh strips that discovery has not seen; discovery itself is repeated for the split-half agreement. Mass is
over the rows of all words that describe a panel, articles and commas too; ``gaze_head_mass_nouns`` is over the rows of
each panel's first noun alone, where the look is what is said.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import typer

from evals.common import Out, Quick, figure, write
from gazeguard import lab
from gazeguard.comics import Strip, draw_strips
from gazeguard.guard import HEADS_FILE
from gazeguard.heads import GazeHeads, find_heads
from gazeguard.phrases import chunk

SEED = 100


def first_nouns(strip: Strip) -> Strip:
    """The same strip, where only the first noun of each panel counts as its words."""
    heads = [chunk(strip.narration[start:end])[0].head for start, end in strip.spans]
    spans = ((start + head.start, start + head.end) for (start, _), head in zip(strip.spans, heads, strict=True))
    return replace(strip, spans=tuple(spans))


def main(out: Out, quick: Quick = False) -> None:
    """Measure the gaze heads."""
    model, processor = lab.load()
    kept = GazeHeads.load(lab.checkpoint_path() / HEADS_FILE)
    kept.check_model(model)
    strips = draw_strips(12 if quick else 96, SEED)
    fresh, nouns = find_heads(model, processor, strips), find_heads(model, processor, [first_nouns(s) for s in strips])
    figures = {}
    for score in ("narration", "query"):
        mass, others = fresh.mass(kept.heads, score), fresh.mass(kept.others(), score)
        figures |= {
            f"gaze_head_mass{'' if score == 'narration' else '_query'}": figure(mass.mean()),
            f"least_gaze_head_mass{'' if score == 'narration' else '_query'}": figure(mass.min()),
            f"best_other_mass{'' if score == 'narration' else '_query'}": figure(others.max()),
        }
    where = [fresh.all_heads.index(head) for head in kept.heads]
    same = len(set(fresh.heads) & set(kept.heads)) / len(set(fresh.heads) | set(kept.heads))
    figures |= {
        "gaze_head_mass_nouns": figure(nouns.mass(kept.heads).mean()),
        "best_other_mass_nouns": figure(nouns.mass(kept.others()).max()),
        "gaze_head_selectivity": figure(np.mean([fresh.narration.selectivity[i] for i in where])),
        "null_mass": figure(np.mean([fresh.narration.null_mass[i] for i in where])),
        "chance": figure(1 / fresh.panels),
        "split_half": figure(fresh.split_half),
        "same_heads_as_shipped": figure(same),
        "gaze_heads": figure(len(kept.heads)),
        "all_heads": figure(len(kept.all_heads)),
    }
    write(out, figures, quick, seed=SEED, heads=[list(head) for head in kept.heads], strips=fresh.strips)


if __name__ == "__main__":
    typer.run(main)
