"""What is true? Each module measures one thing: ``python -m evals.NAME --out FILE.json``; README.md says which.

``common``, ``counting``, ``records``, ``words`` and ``tables`` measure nothing themselves; they serve the others.
"""
