"""Default prompt of captions, whoever writes or checks them."""

DEFAULT_PROMPT = "Describe the picture."
