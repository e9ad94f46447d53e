"""Images, their tokens in a prompt, and the batches that models read."""
