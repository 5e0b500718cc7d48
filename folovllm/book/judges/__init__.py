"""Judges of an engine and of the parts that readers put into it, by properties: what must hold whatever is asked of it.

The engine is the real one; for most judges its model is pretended (`folovllm.book.judges.pretended`). The engine's own
tests use the same judges (``tests/integration/test_engine.py``, ``tests/book/test_faults.py``).
"""

from folovllm.book.judges.detokenizing import judge_detokenizer
from folovllm.book.judges.grammars import judge_grammars
from folovllm.book.judges.model_parts import judge_attention, judge_reader, judge_runner
from folovllm.book.judges.pretended import SETTINGS, Arrival, check_outputs, drive, make_engine
from folovllm.book.judges.scheduling import Watch, judge_cache, judge_engine, judge_scheduler, run_watched
from folovllm.book.judges.searching import judge_search

__all__ = [
    "SETTINGS",
    "Arrival",
    "Watch",
    "check_outputs",
    "drive",
    "judge_attention",
    "judge_cache",
    "judge_detokenizer",
    "judge_engine",
    "judge_grammars",
    "judge_reader",
    "judge_runner",
    "judge_scheduler",
    "judge_search",
    "make_engine",
    "run_watched",
]
