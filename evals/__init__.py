"""What is true? Each module measures one thing: ``python -m evals.NAME --out FILE.json [--quick]``."""
