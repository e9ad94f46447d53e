"""Gaze heads: the artifact, the comic strips that find them, their discovery, and figures."""
