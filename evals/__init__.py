"""Evaluations: each module measures one thing, ``python -m evals.NAME --out FILE.json``; README.md lists them.

``common``, ``counting``, ``records``, ``words``, ``timing``, ``guards``, ``caption_counts``, ``caption_jobs``,
``decoding_methods`` and ``tables`` measure nothing themselves; they serve the others. No baseline imports an evaluation.
"""
