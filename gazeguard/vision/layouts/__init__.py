"""Layout rules: which image token covers which part of an image, one module per kind of layout."""
