"""Pictures that move: what a real run did, step by step, and what a sampler makes of real logits.

Each player is the output of a cell, and whole in itself: its data, one plain script and a still picture with a
description for readers without scripts. It asks nobody for anything, so it works in JupyterLab, on the site and from a
file alike. Chapters 0, 2, 8 to 13, 16 and 18 use them.
"""

from folovllm.book.players.player import Player
from folovllm.book.players.sampling import exact_logits, play_sampling
from folovllm.book.players.trace import Trace, record
from folovllm.book.players.trace_player import play_trace

__all__ = ["Player", "Trace", "exact_logits", "play_sampling", "play_trace", "record"]
