"""Attention of a model: the recorder of gaze heads under any kernel, what it derives, and steering."""
