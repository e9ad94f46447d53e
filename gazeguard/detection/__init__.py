"""Features of claims and the detector that turns them into calibrated risks."""
