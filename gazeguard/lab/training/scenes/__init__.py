"""Training of the scenes VLM in three stages: encoder, connector, and all together."""
