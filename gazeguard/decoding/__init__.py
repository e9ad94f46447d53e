"""Decoding with gaze evidence: rerank, rewind and self-verification, and the calls of generate that they serve."""
