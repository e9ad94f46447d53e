"""Claims of a caption: what a text asserts about an image, phrase by phrase, and what of it is not judged."""
