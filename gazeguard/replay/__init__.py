"""Replay page: reports word by word in a browser."""
