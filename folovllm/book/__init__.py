"""What the notebooks need and the engine does not: figures, source listings, checks of exercises."""

from folovllm.book.short_errors import shorten_errors

shorten_errors()
