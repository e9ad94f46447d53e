"""Integrations: GazeGuard as a model of other tools."""
